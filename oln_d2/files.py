"""Reading JSON, and writing files whole or not at all."""

import codecs
import contextlib
import gzip
import hashlib
import io
import json
import os
import platform
import re
import secrets
import sys
import tempfile
import textwrap
import time
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from oln_d2.checks import InputError, is_full

StrPath = str | os.PathLike[str]

# What tells whose page a folder has.
MARKS = {"journal.jsonl": "propose", "candidates.json": "audit", "comparison.json": "compare"}
_TEMPORARY = ".oln-d2_"  # begins the names of files while they are written, see `write_whole`


class InUseError(InputError):
    """Another process has a folder."""


@contextlib.contextmanager
def open_json(path: StrPath) -> Iterator[IO[bytes]]:
    """
    Yields the text of a JSON file as UTF-8 without a byte order mark, also where the file is gzip,
    or UTF-16 as PowerShell writes it.
    """
    with open(Path(path).expanduser(), "rb") as file:
        zipped = file.peek(2)[:2] == b"\x1f\x8b"
        f: Any = gzip.GzipFile(fileobj=file) if zipped else file
        encoding = json.detect_encoding(f.peek(4)[:4])
        if encoding == "utf-8-sig":
            f.read(len(codecs.BOM_UTF8))
        yield f if encoding.startswith("utf-8") else codecs.EncodedFile(f, "utf-8", encoding)


def read_json(path: StrPath, kind: type = object) -> Any:
    """
    Args:
        path: a JSON file, see :func:`open_json`.
        kind: what it has to hold, such as `dict`.

    Returns:
        what the file holds.

    Raises:
        InputError: the file is missing, not readable, not complete JSON or holds something else.
    """
    try:
        with open_json(path) as f:
            content = json.loads(f.read())
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from None
    except (ValueError, EOFError, zlib.error, RecursionError) as error:
        message = f"{path}: not complete, valid JSON ({error}); fetch or write it again"
        raise InputError(message) from None
    if not isinstance(content, kind):
        raise InputError(
            f"{path}: holds a JSON {type(content).__name__}, not what is expected of this file, a "
            f"{kind.__name__}; fetch or write it again"
        )
    return content


def file_digest(path: StrPath) -> str:
    """SHA-256 of a file; of an address, which stays what it is, itself."""
    if "://" in str(path):
        return str(path)
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def check_output(path: StrPath, inputs: Iterable[StrPath]) -> None:
    """
    Args:
        path: a file that is to be written later.
        inputs: the files that are to be read.

    Raises:
        InputError: it cannot be written, or is one of `inputs`.
    """
    folder = os.path.dirname(os.path.abspath(path))
    if not os.path.isdir(folder) or os.path.isdir(path):
        raise InputError(f"{path}: is a folder, or its folder does not exist; give a file")
    if os.path.realpath(path) in map(os.path.realpath, inputs):
        raise InputError(f"{path}: is one of the files to be read; write to another")
    try:
        with contextlib.suppress(FileNotFoundError):
            os.stat(path)  # fails where the name is too long
        if os.path.isfile(path) or not os.path.exists(path):  # no device
            tempfile.TemporaryFile(dir=folder).close()
            _remove_left(folder)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror}); give another") from None


def check_folder(path: StrPath, command: str) -> None:
    """
    Args:
        path: a folder that a command is about to write its page to; it may not be there yet.
        command: which.

    Raises:
        InputError: it holds what another command wrote, whose page would be lost.
    """
    for mark, other in MARKS.items():
        if other != command and os.path.isfile(os.path.join(path, mark)):
            raise InputError(
                f"{path}: holds what `oln-d2 {other}` wrote ({mark}); choose another folder"
            )


def make_folder(path: StrPath, remedy: str = "choose another") -> None:
    """
    Args:
        path: a folder that is to be written to; made with those above it, or there already.
        remedy: what to do where that cannot be.

    Raises:
        InputError: it is a file, or cannot be made or written to.
    """
    if os.path.exists(path) and not os.path.isdir(path):
        raise InputError(f"{path}: is a file; give a folder")
    try:
        os.makedirs(path, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
        _remove_left(path)
    except OSError as error:
        what = "written to" if os.path.isdir(path) else "made"
        raise InputError(f"{path}: cannot be {what} ({error.strerror}); {remedy}") from None


@contextlib.contextmanager
def write_whole(path: StrPath) -> Iterator[str]:
    """
    Write all of a file or nothing: the body writes to a name beside `path` that no file has, with
    the same ending; the file then takes the place of `path`, or of what `path` links to. What is
    left of it where the process is killed, :func:`make_folder` and :func:`check_output` remove.

        with write_whole("out.json") as temporary: ...

    Args:
        path: where the file goes. A device or a pipe is written to directly.

    Raises:
        InputError: it cannot be written there.
    """
    target = temporary = os.path.realpath(path)
    is_device = os.path.dirname(os.path.abspath(path)) == "/dev"  # /dev/stdout may be a file
    if is_device or (os.path.exists(path) and not os.path.isfile(path)):
        target = temporary = os.fspath(path)
    else:
        # Hidden, and not longer than the name of a file may be.
        name = f"{_TEMPORARY}{secrets.token_hex(8)}{os.path.splitext(path)[1]}"
        temporary = os.path.join(os.path.dirname(target), name)
    try:
        if temporary == target:
            yield temporary
        else:
            with _held(temporary):
                yield temporary
            os.replace(temporary, target)
    except OSError as error:
        remedy = "; make room there" if is_full(error) else ""
        reason = error.strerror or error
        raise InputError(f"{path}: cannot be written ({reason}){remedy}") from None
    finally:
        if temporary != target:
            with contextlib.suppress(OSError):
                os.remove(temporary)


@contextlib.contextmanager
def _held(path: str) -> Iterator[None]:
    """Keeps :func:`_remove_left` from a file that is being written."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):  # who writes it meets that, too
            _lock(stack.enter_context(open(path, "xb")))
        yield


def _remove_left(folder: StrPath) -> None:
    """Remove what processes that were killed have left of files that they wrote to a folder."""
    for name in os.listdir(folder):
        path = os.path.join(folder, name)
        # Only where a lock can tell that nobody writes it any more.
        if name.startswith(_TEMPORARY):
            with contextlib.suppress(ImportError, OSError), open(path, "r+b") as file:
                import fcntl

                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.remove(path)


def write_file(path: StrPath, content: str | bytes) -> None:
    """Write a file, text as UTF-8, whole or not at all, see :func:`write_whole`."""
    with write_whole(path) as temporary, open(temporary, "wb") as f:
        f.write(content.encode() if isinstance(content, str) else content)


def check_links(path: StrPath) -> None:
    """
    Args:
        path: a folder that is about to be written to; may itself be a link.

    Raises:
        InputError: a link in it, or below it, leads out of it: what is written by that name would
            take the place of a file elsewhere. Hidden files and folders are not looked at, but for
            `.lock`: nothing is written there.
    """
    root = os.path.realpath(path)
    folders = [root]
    for folder in folders:  # grows
        try:
            entries = list(os.scandir(folder))
        except OSError:  # whoever writes there says why
            continue
        for entry in entries:
            if entry.name.startswith(".") and entry.name != ".lock":
                continue
            if entry.is_dir(follow_symlinks=False):
                folders.append(entry.path)
            elif entry.is_symlink():
                target = os.path.realpath(entry.path)
                if not os.path.join(target, "").startswith(os.path.join(root, "")):
                    raise InputError(
                        f"{os.path.join(path, os.path.relpath(entry.path, root))}: is a link that "
                        f"leads out of the folder, to {target}, which could be written to; remove "
                        "the link, or choose another folder"
                    )


def lock_folder(path: StrPath, name: str = ".lock", shared: bool = False) -> IO[str]:
    """
    Keep a folder for this process and for those that inherit the lock.

        with lock_folder("output/"): ...

    Args:
        path: a folder that is there and is about to be written to.
        name: of the lock, where processes share a folder but not all that is in it.
        shared: have it together with others that want it so.

    Returns:
        a file of this name in the folder, which says who has it unless it is shared; the folder is
        free when the file is closed, or when the processes that have it have ended. Where the
        system, as Windows, or the file system has no such locks, the folder is not locked.

    Raises:
        InUseError: another process has the folder, other than the one that has started this
            process.
        InputError: it cannot be written to; or see :func:`check_links`.
    """
    check_links(path)
    command = [os.path.basename(word) for word in sys.argv[:1]] + sys.argv[1:]
    what = textwrap.shorten(" ".join(command).replace("__main__.py", "oln-d2"), 60)
    since = time.strftime("%Y-%m-%d %H:%M")
    own = f"{what} (process {os.getpid()} on {platform.node()}, since {since})"
    try:
        file = _Lock(open(os.path.join(path, name), "a+b"), encoding="utf-8")  # noqa: SIM115
        # Of a process that was killed, those that read images for it end some seconds later.
        deadline = time.monotonic() + 10
        while not _lock(file, shared):
            file.seek(0)
            holder = file.read()
            if f"(process {os.getppid()} on {platform.node()}," in holder:
                break
            if not _is_gone(holder) or time.monotonic() > deadline:
                file.close()
                raise InUseError(
                    f"{path}: is in use by {holder or 'another process'}; wait for it or choose "
                    "another folder"
                )
            time.sleep(0.1)
        if not shared:
            file.truncate(0)
            file.write(own)
            file.flush()
    except OSError as error:
        reason = error.strerror or error
        raise InputError(f"{path}: cannot be written to ({reason}); choose another") from None
    return file


def _is_gone(holder: str) -> bool:
    """Whether what :func:`lock_folder` writes is of a process of this machine that has ended."""
    found = re.search(r"\(process (\d+) on (.*), since", holder)
    if found is None or found[2] != platform.node():
        return False
    try:
        os.kill(int(found[1]), 0)
    except ProcessLookupError:
        return True
    except OSError:
        pass
    return False


class _Lock(io.TextIOWrapper):
    """Is free once closed here, also where workers that inherited it have not ended yet."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.process = os.getpid()

    def close(self) -> None:
        if not self.closed and os.getpid() == self.process:
            with contextlib.suppress(ImportError, OSError):
                import fcntl

                fcntl.flock(self, fcntl.LOCK_UN)
        super().close()


def _lock(file: IO[Any], shared: bool = False) -> bool:
    """False if another process has locked an open file; True also where there are no locks."""
    try:
        import fcntl

        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except (ImportError, OSError):
        pass
    return True
