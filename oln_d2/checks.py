"""User-facing errors: bad input, limits of arguments, and layers that are not installed."""

import contextlib
import errno
import math
import re
from collections.abc import Callable, Iterator, Mapping
from numbers import Integral
from typing import Any, NamedTuple

LONGEST = 400  # characters of a message


class InputError(ValueError):
    """
    A file, setting or argument that cannot be used. Its message is one sentence that names the
    file, the field or entry and the remedy, fit to be shown without a traceback: what it quotes of
    a file is cut short, and characters that do not print are escaped.
    """

    def __init__(self, message: str):
        # Of a long one, the beginning names the file and the end the remedy.
        if len(message) > LONGEST:
            message = f"{message[:220]} ... {message[-150:]}"
        super().__init__("".join(c if c.isprintable() else ascii(c)[1:-1] for c in message))


class Limit(NamedTuple):
    """The values that an argument may have."""

    fits: Callable[[Any], bool]
    allowed: str  # the same in words


POSITIVE_INT = Limit(lambda value: isinstance(value, Integral) and int(value) >= 1, "1 or more")
NOT_NEGATIVE = Limit(lambda value: 0 <= value < math.inf, "0 or more")
POSITIVE = Limit(lambda value: 0 < value < math.inf, "a number above 0")
FRACTION = Limit(lambda value: 0 <= value <= 1, "a number from 0 to 1")
SEED = Limit(lambda value: 0 <= value < 2**32, "0 or more, below 2**32")


def one_of(*values: object) -> Limit:
    """The limit of an argument that has to be one of `values`."""
    return Limit(lambda value: value in values, f"one of {', '.join(map(str, values))}")


def check_limits(**arguments: tuple[Any, Limit]) -> None:
    """
    Args:
        arguments: value and limit of each argument, by name. None, an argument not given, fits.

    Raises:
        InputError: names the first that does not fit.
    """
    for name, (value, limit) in arguments.items():
        try:
            fits = value is None or limit.fits(value)
        except TypeError:  # text for a number
            fits = False
        if not fits:
            raise InputError(f"{name} is {value}; it has to be {limit.allowed}")


_INSTALL = {
    "detectron2": "Detectron2 is not on PyPI, install it with: python -m pip install "
    "'git+https://github.com/facebookresearch/detectron2.git'",
    **{
        extra: f"install the extra `{extra}`: python -m pip install -c constraints.txt -e "
        f"'.[{extra}]'"
        for extra in ("torch", "train", "timm", "video", "export", "supervision", "classic")
    },
}


@contextlib.contextmanager
def needs(what: str, layer: str) -> Iterator[None]:
    """
    Imports of what may not be installed belong in its body.

        with needs("a video", "video"):
            import av

    Args:
        what: the part of this package that is about to be used.
        layer: "detectron2", or an extra of this package.

    Raises:
        ImportError: something could not be imported; the message says how to install it.
    """
    try:
        yield
    except ImportError as error:
        if (error.name or "").partition(".")[0] in ("oln_d2", ""):
            raise  # a mistake in this package, or an error that has its sentence already
        if layer == "detectron2" and error.name in ("torch", "torchvision"):
            layer = "torch"  # which Detectron2 itself needs first
        raise ImportError(
            f"{what} needs {error.name}, which cannot be imported ({error}); {_INSTALL[layer]}"
        ) from None


def interrupted(error: BaseException | None) -> bool:
    """
    Whether an error is Ctrl-C, or came of it: what was under way, such as the writing of a
    checkpoint, may have ended in an error of its own.
    """
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__context__
    return error is not None


def reason(error: BaseException, processes: str, memory: str, diverged: str = "") -> str | None:
    """
    Args:
        processes, memory, diverged: what to do where a process has been killed, where memory is
            short, and where training has diverged, if the error does not say so itself.

    Returns:
        what a user has to know of an error, without a traceback; None for a mistake in this
        package.
    """
    text = str(error)
    first = text.strip().split("\n")[0][:200]
    if isinstance(error, (InputError, ImportError)):
        return text
    if isinstance(error, FloatingPointError):
        return text if diverged in text else f"{first.rstrip('.!')}: {diverged}"
    if "DataLoader worker" in text or "shared memory" in text or "with signal" in text:
        return f"a process has ended ({first}); most often (shared) memory is short: {processes}"
    # Of gloo, where a connection breaks, and of NCCL and PyTorch.
    if "gloo" in text or re.fullmatch("Dist[A-Z][a-z]+Error", type(error).__name__):
        return (
            f"another process has ended or cannot be reached ({first}); its own message says why, "
            "and checkpoints are good to go on from: --resume"
        )
    # PyTorch's own for a GPU, and what it says of a CPU.
    short = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    if short or "DefaultCPUAllocator" in text:
        return f"memory is short ({first}); {memory}"
    if isinstance(error, OSError):
        if error.filename:
            return f"{error.filename}: {error.strerror}"
        return f"{first}; make room where the output goes" if is_full(error) else first
    return None


def list_losses(losses: Mapping[str, Any]) -> str:
    """The names and values of losses, numbers or tensors of one, as errors tell them."""
    return ", ".join(f"{name} {float(value):.4g}" for name, value in losses.items())


def is_full(error: OSError) -> bool:
    """Whether something could not be written for want of room."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def require_detectron2(what: str) -> None:
    """
    Args:
        what: the part of this package that is about to be used.

    Raises:
        ImportError: Detectron2 cannot be imported; the message says how to install it.
    """
    with needs(what, "detectron2"):
        import detectron2.config  # needs what Detectron2 itself depends on

        del detectron2
