"""Writing files."""

import contextlib
import fcntl
import os

from oln_d2.errors import InputError


def check_output(path, inputs):
    """
    Args:
        path (str): a file that is to be written later.
        inputs (Iterable[str]): the files that are to be read.

    Raises:
        InputError: it cannot be written, or is one of `inputs`.
    """
    if not os.path.isdir(os.path.dirname(os.path.abspath(path))) or os.path.isdir(path):
        raise InputError(f"{path}: is a folder, or its folder does not exist; give a file")
    if os.path.realpath(path) in map(os.path.realpath, inputs):
        raise InputError(f"{path}: is one of the files to be read; write to another")


@contextlib.contextmanager
def write_whole(path):
    """
    Write all of a file or nothing: the body writes to a temporary name beside `path`, with the same
    ending, which then takes the place of `path`.

        with write_whole("out.json") as temporary: ...

    Args:
        path (str): where the file goes.

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


def lock(file):
    """
    Args:
        file: open; locked until it is closed, by this process and by those that inherit it.

    Returns:
        bool: False if another process has locked it. True also where the file system has no locks.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True
