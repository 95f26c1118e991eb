"""
Pickles of plain values and numpy's arrays, read without executing what else they may hold; and what
is no checkpoint.
"""

import pickle
import re
from collections import OrderedDict
from typing import Any, BinaryIO

import numpy as np

from oln_d2.checks import InputError
from oln_d2.files import StrPath

# How files begin that were taken for checkpoints, and what they are; the first that fits.
_OTHER_FILES = {
    rb"version https://git-lfs": "a Git LFS pointer, which stands for the file; run `git lfs pull` "
    "in its repository, or download the file itself",
    rb"(\xef\xbb\xbf)?\s*<": "a web page (HTML or XML), such as a quota or login page, saved under "
    "this name; open its address in a browser and fetch the file again",
    rb"\x1f\x8b|BZh|\xfd7zXZ|7z\xbc\xaf|Rar!|.{257}ustar": "an archive; unpack it and give the "
    "checkpoint in it",
    rb"\xff\xd8\xff|\x89PNG|GIF8|RIFF.{4}WEBP": "an image, not a checkpoint; images stand before "
    "the options, e.g. `propose photos/ --weights model.pth`",
    rb"\x89HDF": "HDF5, as Keras writes it; give a checkpoint of PyTorch",
    rb"\x08.\x12": "ONNX, not a checkpoint; only `propose` and oln_d2.load take it, under a name "
    "that ends in .onnx",
    # Python 2 wrote pickles as text.
    rb"(?!\(d|c\w+\n)[\t\r\n -~]+\Z": "text, not a checkpoint; give one, e.g. "
    "output/model_final.pth",
}


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


def _read_bytearray(unpickler: Any) -> None:
    unpickler.load_binbytes8()
    unpickler.stack[-1] = bytearray(unpickler.stack[-1])


class _Unpickler(pickle._Unpickler):
    """
    That in Python: the one in C fills memory up to any number that a few bytes name as a place in
    its memo, which is a dict here. A `bytearray` is made once its bytes have been read.
    """

    dispatch = {
        **pickle._Unpickler.dispatch,
        pickle.BYTEARRAY8[0]: _read_bytearray,
    }

    def find_class(self, module: str, name: str) -> Any:
        # An array is made by other functions; the class itself makes one of any size.
        if found := {**NUMPY, "numpy.ndarray": object, **_PYTHON}.get(f"{module}.{name}"):
            return found
        raise pickle.UnpicklingError(f"GLOBAL {module}.{name}")


def read_head(file: StrPath, path: StrPath) -> bytes:
    """
    Args:
        file: is to be read as a checkpoint.
        path: what errors call it.

    Returns:
        its first bytes.

    Raises:
        InputError: no such file, or plainly no checkpoint; said without PyTorch.
    """
    try:
        with open(file, "rb") as f:
            head = f.read(1024)
    except (FileNotFoundError, ValueError):  # the latter of a name that no file can have
        raise InputError(
            f"{path}: no such file; give a checkpoint, e.g. output/model_final.pth"
        ) from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    if not head.strip(b"\0"):
        what = "holds nothing but zeros" if head else "is empty"
        raise InputError(f"{path}: {what}; fetch or write it again")
    for pattern, what in _OTHER_FILES.items():
        if re.match(pattern, head, re.DOTALL | re.IGNORECASE):
            raise InputError(f"{path}: is {what}")
    return head


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
