"""What was proposed so far, one line an image: a run that was stopped goes on from it."""

import functools
import json
import os
import re
from typing import IO, Any, NamedTuple

import msgspec
import numpy as np

from oln_d2.checks import InputError
from oln_d2.data.rle import wrong_rle
from oln_d2.files import lock_folder
from oln_d2.propose.shards import Shard
from oln_d2.propose.writers import FILES
from oln_d2.results import Proposals
from oln_d2.scores import SCORES

Stamp = list[int] | None  # differs where a file may differ; None where there is no file
NAME = re.compile(r"journal(-\d+-of-\d+)?\.jsonl")
OPEN_FILES = 200  # of other processes, that are kept open


class Place(NamedTuple):
    """What is kept in memory of an entry."""

    stamp: Stamp
    path: str  # the file that it is in
    offset: int
    size: tuple[int, int]  # height and width of an image
    as_stored: bool  # not turned as EXIF says
    frames: list[str] | None  # names of those of a video or of another file of several


class _Entry(msgspec.Struct):
    """What is looked at of a line when a run begins."""

    name: str | None = None
    stamp: Stamp = None
    height: int = 0
    width: int = 0
    as_stored: bool = False
    frames: list[str] | None = None
    finished: str | None = None


def _broken(path: str, offset: int) -> InputError:
    return InputError(
        f"{path}: the line at byte {offset} is broken; remove the file to start again"
    )


def _open(path: str) -> IO[bytes]:
    return open(path, "rb")


class Journal:
    """
    The entries of all runs in a folder: `journal.jsonl` and, of processes that share the images,
    `journal-2-of-8.jsonl` and so on. Each process appends to its own file as entries come.

    Args:
        folder: what has no journal yet gets one; locked, for a shard together with others.
        settings: what the proposals depend on; those in all files have to be the same.
        shard: this process's; None: it is the only one.

    Raises:
        InputError: a file is of other settings or cannot be used, another process has the folder or
            the shard, or the folder holds results of something else.
    """

    def __init__(self, folder: str, settings: dict[str, Any], shard: Shard | None = None):
        self.folder, self.settings = folder, settings
        self.path = self._path(shard)
        self.places: dict[str, Place] = {}  # by name, whose last entry counts
        self._finished: dict[str, str] = {}  # by path
        self._ends: dict[str, int] = {}  # by path: where the last whole line read ends
        self.locks = self._lock(shard)  # last as long as the journal
        files = {os.path.join(folder, name) for names in FILES.values() for name in names}
        for file in sorted(filter(os.path.exists, files)) if not self._paths() else ():
            raise InputError(
                f"{file}: is there, but no {os.path.basename(self.path)} of the run that wrote it; "
                "choose another --output, or remove it"
            )
        try:
            self.file = open(self.path, "a+b")  # noqa: SIM115  to be added to
        except OSError as error:
            raise InputError(f"{self.path}: cannot be written ({error.strerror})") from None
        self.refresh()
        end = self._ends[self.path]
        if end < os.fstat(self.file.fileno()).st_size:
            self.file.truncate(end)  # the part of a line that a killed run left
        if end == 0:
            self._write(settings)
        self._read = functools.lru_cache(OPEN_FILES)(_open)

    def _path(self, shard):
        of = f"-{shard.number}-of-{shard.total}" if shard else ""
        return os.path.join(self.folder, f"journal{of}.jsonl")

    def _paths(self):
        """The files that there are, the one that was last written to last."""
        paths = [os.path.join(self.folder, name) for name in os.listdir(self.folder)]
        paths = [path for path in paths if NAME.fullmatch(os.path.basename(path))]
        return sorted(paths, key=lambda path: (os.stat(path).st_mtime_ns, path))

    def _lock(self, shard):
        """Shards exclude who has all of the folder, and are excluded by it."""
        if shard is None:
            others = [name for name in os.listdir(self.folder) if name.startswith(".lock-")]
            return [lock_folder(self.folder, name) for name in (".lock", *sorted(others))]
        own = lock_folder(self.folder, f".lock-{shard.number}-of-{shard.total}")
        lock_folder(self.folder, shared=True).close()
        return [own]

    def refresh(self) -> None:
        """Read what was added to the files since. Raises InputError as the constructor."""
        for path in self._paths():
            with open(path, "rb") as f:
                self._ends[path] = self._scan(f, path, self._ends.get(path, 0))

    def _scan(self, file: IO[bytes], path: str, offset: int) -> int:
        """Returns where the last whole line ends."""
        decode = msgspec.json.Decoder(_Entry).decode
        file.seek(offset)
        for line in file:
            if not line.endswith(b"\n"):
                break  # cut off, or still being written
            try:
                if offset == 0:
                    self._compare(json.loads(line), path)
                else:
                    self._keep(decode(line), path, offset)
            except (AttributeError, RecursionError, ValueError) as error:
                if isinstance(error, InputError):
                    raise
                raise _broken(path, offset) from None
            offset += len(line)
        return offset

    def _keep(self, entry: _Entry, path: str, offset: int) -> None:
        if entry.finished is not None:
            self._finished[path] = entry.finished
        if entry.name is not None:
            # Files are written by the names of frames, so these are not to lead elsewhere.
            of_frame = re.compile(re.escape(entry.name) + r"/\d+\.jpg")
            if not all(map(of_frame.fullmatch, entry.frames or ())):
                raise ValueError("no names of frames")
            size = entry.height, entry.width
            self.places[entry.name] = Place(
                entry.stamp, path, offset, size, entry.as_stored, entry.frames
            )

    def _compare(self, known, path):
        for name, value in self.settings.items():
            if known.get(name) != value:
                what = {
                    "model": "of another model",
                    "root": f"for images in {known.get(name)}, not in {value},",
                }.get(name, f"with {name} {known.get(name)}")
                raise InputError(
                    f"{path}: proposals {what} are in this folder; choose another --output, or "
                    "remove it"
                )

    def _write(self, entry, sync=False):
        try:
            self.file.write(json.dumps(entry).encode() + b"\n")
            self.file.flush()
            if sync:
                os.fsync(self.file.fileno())
        except OSError as error:
            raise InputError(
                f"{self.path}: cannot be written ({error.strerror}); what is done stays, run the "
                "same command again"
            ) from None

    def has(self, name: str, stamp: Stamp, size: tuple[int, int] | None = None) -> bool:
        """
        Whether there are proposals for the image of this name with this stamp; of `size`, height
        and width, or else for the upright image.
        """
        place = self.places.get(name)
        if place is None or place.stamp != stamp or place.frames is not None:
            return False
        return not place.as_stored if size is None else place.size == size

    def frames(self, name: str, stamp: Stamp) -> list[str] | None:
        """The names of the frames of a file with this stamp, where all of them were looked at."""
        place = self.places.get(name)
        return place.frames if place is not None and place.stamp == stamp else None

    def finish(self, what: str) -> None:
        """
        Note that this process has done its share, of which `what` is the digest, where that other
        machines see it. Raises InputError if it cannot be written.
        """
        if self._finished.get(self.path) != what:
            self._add({"finished": what}, sync=True)

    def finished(self, shard: Shard) -> str | None:
        """The digest of the last share that this shard's process has done."""
        return self._finished.get(self._path(shard))

    def add(self, name: str, stamp: Stamp, content: dict[str, Any]) -> None:
        """Append an entry of plain values. Raises InputError if it cannot be written."""
        self._add({"name": name, "stamp": stamp, **content})

    def _add(self, entry, sync=False):
        offset = os.fstat(self.file.fileno()).st_size
        self._write(entry, sync)
        self._keep(msgspec.convert(entry, _Entry), self.path, offset)
        self._ends[self.path] = os.fstat(self.file.fileno()).st_size

    def add_proposals(self, stamp: Stamp, found: Proposals, as_stored: bool) -> None:
        """Append an image's. Raises InputError if it cannot be written."""
        height, width = found.size
        content: dict[str, Any] = {"height": height, "width": width}
        content |= {"as_stored": True} if as_stored else {}
        content["boxes"] = found.boxes.tolist()
        content["scores"] = found.scores.tolist()
        content |= {field: values.tolist() for field, values in found.qualities().items()}
        if found.masks is not None:
            content["masks"] = [
                {"size": list(rle["size"]), "counts": rle["counts"].decode()}
                for rle in found.masks.rles
            ]
        self.add(found.name, stamp, content)

    def read_proposals(self, name: str) -> Proposals:
        """The last of the image of this name, without the image."""
        place = self.places[name]
        file = self._read(place.path)
        file.seek(place.offset)
        try:
            entry = json.loads(file.readline())
            found = Proposals(
                entry["boxes"],
                entry["scores"],
                size=place.size,
                name=name,
                masks=entry.get("masks"),
                **{score.attribute: entry.get(score.field) for score in SCORES},
            )
            if not (np.isfinite(found.boxes).all() and np.isfinite(found.scores).all()):
                raise ValueError("not finite")
            if found.masks is not None and wrong_rle(found.masks.rles) is not None:
                raise ValueError("no mask")
        except (AttributeError, LookupError, OverflowError, TypeError, ValueError):
            raise _broken(place.path, place.offset) from None
        return found
