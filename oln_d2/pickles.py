"""Pickles of plain values and numpy's arrays, read without executing what else they may hold."""

import pickle
import re
from collections import OrderedDict
from typing import Any, BinaryIO

import numpy as np

from oln_d2.checks import InputError
from oln_d2.files import StrPath


class _Dtype:
    """
    What a pickle makes in place of a dtype. numpy's own takes from a file whether its bytes are
    pointers, which it then follows.
    """

    def __init__(self, code: str, *_: bool):
        self.dtype = np.dtype(code)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        if any(part is not None for part in state[2:5]):
            raise pickle.UnpicklingError("GLOBAL numpy.dtype with fields")
        if state[1] in ("<", ">"):
            self.dtype = self.dtype.newbyteorder(state[1])


class _Array(np.ndarray[Any, Any]):
    def __setstate__(self, state: Any) -> None:
        version, shape, kind, in_columns, data = state
        super().__setstate__((version, shape, kind.dtype, in_columns, data))


def _reconstruct(*_: Any) -> _Array:
    return np.zeros(0).view(_Array)


def _scalar(kind: _Dtype, data: bytes | str) -> Any:
    data = data.encode("latin1") if isinstance(data, str) else data  # as Python 2 wrote it
    return np.frombuffer(data, kind.dtype, 1)[0]


def _frombuffer(data: bytes, kind: _Dtype, shape: tuple[int, ...], order: Any) -> Any:
    return np.frombuffer(data, kind.dtype).reshape(shape, order=order)


# By their names in any version of numpy.
NUMPY = {
    "numpy.ndarray": np.ndarray,
    "numpy.dtype": _Dtype,
    **{
        f"numpy.{core}.{name}": function
        for core in ("core", "_core")
        for name, function in (
            ("multiarray.scalar", _scalar),
            ("multiarray._reconstruct", _reconstruct),
            ("numeric._frombuffer", _frombuffer),
        )
    },
}


# What old protocols of pickle call by name for plain values: bytes as text, b"" and sets.
_PYTHON = {
    "collections.OrderedDict": OrderedDict,
    "_codecs.encode": lambda text, _: text.encode("latin1"),
    **{
        f"{module}.{name}": made
        for module in ("builtins", "__builtin__")
        for name, made in (("bytes", lambda: b""), ("set", set), ("frozenset", frozenset))
    },
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if found := {**NUMPY, **_PYTHON}.get(f"{module}.{name}"):
            return found
        raise pickle.UnpicklingError(f"GLOBAL {module}.{name}")


def load_plain(file: BinaryIO) -> Any:
    """
    Args:
        file: a pickle, of Python 2 too.

    Returns:
        what it holds: plain values and arrays.

    Raises:
        Exception: it holds more, or is damaged; see :func:`not_plain`.
    """
    return _Unpickler(file, encoding="latin1").load()


def not_plain(path: StrPath, error: Exception, remedy: str) -> InputError:
    """
    Args:
        path: a file of pickled values that could not be read.
        error: of :func:`load_plain` or `torch.load`.
        remedy: what to do where the file holds more than plain values.
    """
    held = re.search(r"(?:GLOBAL|class) ([\w.]*\w)", str(error))  # after much else
    if held is None:
        return InputError(f"{path}: is damaged or not complete; fetch or write it again")
    return InputError(f"{path}: holds {held[1]}; pickled code is not executed. {remedy}")
