"""What was proposed so far, one line an image: a run that was stopped goes on from it."""

import json
import os
from typing import Any

from oln_d2.checks import InputError
from oln_d2.files import lock
from oln_d2.results import Proposals
from oln_d2.scores import SCORES

Stamp = list[int] | None  # of a file; differs where the file may, None of one that is not there


class Journal:
    """
    A file to which entries are appended as they come.

    Args:
        path: begun if it is not there.
        settings: of the proposals; those in the file have to be the same.

    Raises:
        InputError: the file is of other settings, cannot be used, or another process writes it.
    """

    def __init__(self, path: str, settings: dict[str, Any]):
        self.path = path
        # name: (stamp, offset); the last entry of a name counts
        self.places: dict[str, tuple[Stamp, int]] = {}
        try:
            self.file = open(path, "a+b")  # noqa: SIM115  its lock lasts as long as the journal
        except OSError as error:
            raise InputError(f"{path}: cannot be written ({error.strerror})") from None
        if not lock(self.file):
            raise InputError(f"{path}: another process is writing it; wait for it")
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
            except ValueError:
                raise InputError(
                    f"{self.path}: the line at byte {offset} is broken; remove the file to start "
                    "again"
                ) from None
            if offset == 0:
                self._compare(entry, settings)
            else:
                self.places[entry["name"]] = entry["stamp"], offset
            offset += len(line)
        return offset

    def _compare(self, known, settings):
        for name, value in settings.items():
            if known.get(name) != value:
                what = "of another model" if name == "model" else f"with {name} {known.get(name)}"
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

    def has(self, name: str, stamp: Stamp) -> bool:
        """Whether there is an entry of this name with this stamp."""
        return name in self.places and self.places[name][0] == stamp

    def add(self, name: str, stamp: Stamp, content: dict[str, Any]) -> None:
        """Append an entry of plain values. Raises InputError if it cannot be written."""
        offset = os.fstat(self.file.fileno()).st_size
        self._write({"name": name, "stamp": stamp, **content})
        self.places[name] = stamp, offset

    def read(self, name: str) -> dict[str, Any]:
        """The last entry of this name."""
        self.file.seek(self.places[name][1])
        return json.loads(self.file.readline())

    def add_proposals(self, stamp: Stamp, found: Proposals) -> None:
        """Append an image's. Raises InputError if it cannot be written."""
        height, width = found.size
        content = {"height": height, "width": width, "boxes": found.boxes.tolist()}
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
        entry = self.read(name)
        return Proposals(
            entry["boxes"],
            entry["scores"],
            size=(entry["height"], entry["width"]),
            name=name,
            masks=entry.get("masks"),
            **{score.attribute: entry.get(score.field) for score in SCORES},
        )
