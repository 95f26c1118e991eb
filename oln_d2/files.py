"""Writing files."""

import contextlib
import os

from oln_d2.errors import InputError


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
        raise InputError(f"{path}: cannot be written ({error.strerror})") from None
    finally:
        with contextlib.suppress(OSError):
            os.remove(temporary)
