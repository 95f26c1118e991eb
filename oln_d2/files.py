"""Reading JSON, and writing files whole or not at all."""

import contextlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from oln_d2.checks import InputError

StrPath = str | os.PathLike[str]


def read_json(path: StrPath) -> Any:
    """
    Args:
        path: a JSON file.

    Returns:
        what the file holds.

    Raises:
        InputError: the file is missing, not readable or not complete JSON.
    """
    try:
        return json.loads(Path(path).expanduser().read_bytes())
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        message = f"{path}: not complete, valid JSON ({error}); fetch or write it again"
        raise InputError(message) from None


def check_output(path: StrPath, inputs: Iterable[StrPath]) -> None:
    """
    Args:
        path: a file that is to be written later.
        inputs: the files that are to be read.

    Raises:
        InputError: it cannot be written, or is one of `inputs`.
    """
    if not os.path.isdir(os.path.dirname(os.path.abspath(path))) or os.path.isdir(path):
        raise InputError(f"{path}: is a folder, or its folder does not exist; give a file")
    if os.path.realpath(path) in map(os.path.realpath, inputs):
        raise InputError(f"{path}: is one of the files to be read; write to another")


def make_folder(path: StrPath) -> None:
    """
    Args:
        path: a folder that is to be written to; made with those above it, or there already.

    Raises:
        InputError: it is a file or cannot be made.
    """
    if os.path.exists(path) and not os.path.isdir(path):
        raise InputError(f"{path}: is a file; give a folder")
    try:
        os.makedirs(path, exist_ok=True)
    except OSError as error:
        raise InputError(f"{path}: cannot be made ({error.strerror}); choose another") from None


@contextlib.contextmanager
def write_whole(path: StrPath) -> Iterator[str]:
    """
    Write all of a file or nothing: the body writes to a temporary name beside `path`, with the same
    ending, which then takes the place of `path`.

        with write_whole("out.json") as temporary: ...

    Args:
        path: where the file goes.

    Raises:
        InputError: it cannot be written there.
    """
    name, ending = os.path.splitext(path)
    temporary = f"{name}.tmp{ending}"
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror or error})") from None
    finally:
        with contextlib.suppress(OSError):
            os.remove(temporary)


def lock(file: IO[Any]) -> bool:
    """
    Args:
        file: open; locked until it is closed, by this process and by those that inherit it.

    Returns:
        False if another process has locked it. True also where the system, as Windows, or the file
        system has no such locks.
    """
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except (ImportError, OSError):
        pass
    return True
