"""What was proposed so far, one line an image: a run that was stopped goes on from it."""

import json
import os
import re
from typing import Any, NamedTuple

import numpy as np

from oln_d2.checks import InputError
from oln_d2.data.rle import wrong_rle
from oln_d2.files import lock_folder
from oln_d2.propose.writers import FILES
from oln_d2.results import Proposals
from oln_d2.scores import SCORES

FRAME = re.compile(r"/\d+\.jpg")  # the end of a name
Stamp = list[int] | None  # differs where a file may differ; None where there is no file


class Place(NamedTuple):
    """What is kept in memory of an entry."""

    stamp: Stamp
    offset: int
    size: tuple[int, int]  # height and width of an image
    as_stored: bool  # not turned as EXIF says
    frames: list[str] | None  # names of those of a video or of another file of several


class Journal:
    """
    A file to which entries are appended as they come.

    Args:
        path: begun if it is not there; its folder is locked.
        settings: what the proposals depend on; those in the file have to be the same.

    Raises:
        InputError: the file is of other settings or cannot be used, another process has its
            folder, or that holds results of something else.
    """

    def __init__(self, path: str, settings: dict[str, Any]):
        self.path = path
        self.places: dict[str, Place] = {}  # by name, whose last entry counts
        folder = os.path.dirname(path)
        files = {os.path.join(folder, name) for names in FILES.values() for name in names}
        for file in sorted(files):
            if os.path.exists(file) and not os.path.exists(path):
                raise InputError(
                    f"{file}: is there, but no {os.path.basename(path)} of the run that wrote it; "
                    "choose another --output, or remove it"
                )
        self.lock = lock_folder(folder)  # lasts as long as the journal
        try:
            self.file = open(path, "a+b")  # noqa: SIM115  to be added to
        except OSError as error:
            raise InputError(f"{path}: cannot be written ({error.strerror})") from None
        end = self._scan(settings)
        self.file.truncate(end)  # the part of a line that a killed run left
        if end == 0:
            self._write(settings)

    def _scan(self, settings):
        """Returns where the last whole line ends."""
        offset = 0
        self.file.seek(0)
        for line in self.file:
            if not line.endswith(b"\n"):
                break
            try:
                entry = json.loads(line)
                if not isinstance(entry, dict):
                    raise ValueError("no object")
                if offset:
                    self._keep(entry, offset)
            except (AttributeError, KeyError, RecursionError, TypeError, ValueError):
                raise self._broken(offset) from None
            if offset == 0:
                self._compare(entry, settings)
            offset += len(line)
        return offset

    def _broken(self, offset):
        return InputError(
            f"{self.path}: the line at byte {offset} is broken; remove the file to start again"
        )

    def _keep(self, entry, offset):
        name, stamp, frames = entry["name"], entry["stamp"], entry.get("frames")
        size = entry.get("height", 0), entry.get("width", 0)
        fits = isinstance(name, str) and all(type(n) is int for n in (*(stamp or ()), *size))
        # Files are written by the names of frames, so these are not to lead elsewhere.
        if not fits or not all(FRAME.fullmatch(frame.removeprefix(name)) for frame in frames or ()):
            raise ValueError("no entry of a journal")
        self.places[name] = Place(stamp, offset, size, bool(entry.get("as_stored")), frames)

    def _compare(self, known, settings):
        for name, value in settings.items():
            if known.get(name) != value:
                what = {
                    "model": "of another model",
                    "root": f"for images in {known.get(name)}, not in {value},",
                }.get(name, f"with {name} {known.get(name)}")
                raise InputError(
                    f"{self.path}: proposals {what} are in this folder; choose another --output, "
                    "or remove it"
                )

    def _write(self, entry):
        try:
            self.file.write(json.dumps(entry).encode() + b"\n")
            self.file.flush()
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

    def add(self, name: str, stamp: Stamp, content: dict[str, Any]) -> None:
        """Append an entry of plain values. Raises InputError if it cannot be written."""
        offset = os.fstat(self.file.fileno()).st_size
        entry = {"name": name, "stamp": stamp, **content}
        self._write(entry)
        self._keep(entry, offset)

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
        self.file.seek(place.offset)
        entry = json.loads(self.file.readline())
        try:
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
        except (AttributeError, LookupError, TypeError, ValueError):
            raise self._broken(place.offset) from None
        return found
