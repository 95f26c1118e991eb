"""Which types of half precision are taken."""

import builtins
import io

import pytest
import torch

from oln_d2.checks import InputError
from oln_d2.precision import computes_bfloat16, usable_dtype


@pytest.mark.parametrize(
    "flags, expected",
    [
        ("fpu avx512_bf16 vaes", True),
        ("fpu amx_bf16", True),
        ("fpu avx512f my_avx512_bf16x", False),
    ],
)
def test_processors(flags, expected, monkeypatch):
    """Where the processor has to emulate it, bfloat16 would make training slower without a word."""
    real = builtins.open
    content = f"processor\t: 0\nflags\t\t: {flags}\n"
    # The only way to have another processor.
    monkeypatch.setattr(
        builtins,
        "open",
        lambda path, *args, **kwargs: (
            io.StringIO(content) if path == "/proc/cpuinfo" else real(path, *args, **kwargs)
        ),
    )
    assert computes_bfloat16("cpu") is expected
    if expected:
        assert usable_dtype("bfloat16", "cpu") is torch.bfloat16
    else:
        with pytest.raises(InputError, match="KEY is bfloat16, .* avx512_bf16 .*; use float32"):
            usable_dtype("bfloat16", "cpu", "KEY")


def test_names():
    """A type that cannot be had must be named with what can."""
    assert usable_dtype("", "cpu") is None
    assert usable_dtype("float16", "cuda") is torch.float16
    with pytest.raises(InputError, match="KEY is float16, which needs a GPU; use bfloat16"):
        usable_dtype("float16", "cpu", "KEY")
    with pytest.raises(InputError, match="KEY is 'half'; use bfloat16, float16 or float32"):
        usable_dtype("half", "cpu", "KEY")
