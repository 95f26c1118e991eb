"""Proposals for many images, written to files; a run that was stopped goes on."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image
from tqdm import tqdm

from oln_d2.checks import POSITIVE_INT, InputError, check_limits, one_of
from oln_d2.data.coco import load_coco
from oln_d2.drawing import contact_sheet as make_contact_sheet
from oln_d2.drawing import picture_path, save_picture
from oln_d2.files import StrPath, make_folder, write_whole
from oln_d2.propose.inputs import find_sources, read_frames
from oln_d2.propose.journal import Journal, Stamp
from oln_d2.propose.proposer import Photo, Proposer, check_selection
from oln_d2.propose.writers import WRITERS, label_name

NAMED = 3  # of the images that a message is about
WAITING = 4  # batches of images that wait for others of their size
ON_A_SHEET = 60


class Proposed(NamedTuple):
    """What :func:`propose_files` did."""

    names: list[str]  # of the images and frames that are in the files, relative to `root`
    new: int  # how many of them were not done before
    root: str  # the folder that all inputs are in
    failures: list[str]  # why an input could not be read, a sentence each
    unknown: list[str]  # paths of images that the ground truth does not have, so left out


def propose_files(
    proposer: Proposer,
    inputs: Iterable[str],
    output: StrPath,
    *,
    format: str = "coco",
    gt: StrPath | None = None,
    top_k: int = 100,
    score: float = 0.0,
    nms: float | None = None,
    batch_size: int = 4,
    every: int = 1,
    draw: bool = False,
    draw_top: int = 20,
    contact_sheet: bool = False,
) -> Proposed:
    """
    Propose on images and write the results to files. The same call again skips what is done, goes
    on where it was stopped, and does new and changed images.

    Args:
        proposer: see :func:`oln_d2.load`.
        inputs: images, folders, globs and videos, see :func:`oln_d2.propose.inputs.find_sources`.
        output: a folder.
        format: "coco", "csv" or "yolo", see :mod:`oln_d2.propose.writers`.
        gt: a COCO file whose image ids are taken, by `file_name`; only for "coco".
        top_k, score, nms, batch_size, every: see :meth:`Proposer.__call__`.
        draw: also write pictures of the best, to `pictures/`.
        draw_top: how many are drawn.
        contact_sheet: pictures, and sheets of 60 of them each.

    Raises:
        InputError: arguments or files that cannot be used, before any work is lost. Images that
            cannot be read stop nothing: see `failures`.
    """
    check_selection(top_k, score, nms, batch_size, every)
    check_limits(draw_top=(draw_top, POSITIVE_INT), format=(format, one_of(*WRITERS)))
    if gt is not None and format != "coco":
        raise InputError(f"gt: only results of the format coco have image ids, not {format}")
    output = os.fspath(output)
    root, sources = find_sources(inputs, output)
    if format == "yolo":
        _check_labels(sources)
    ids, unknown = {}, []
    if gt is not None:
        ids, unknown = _image_ids(gt, sources)
        sources = [source for source in sources if source.name in ids]
    settings: dict[str, Any] = {"model": proposer.identity, "root": root}
    settings |= {"top_k": top_k, "score": score, "nms": nms, "every": every}
    make_folder(output)
    journal = Journal(os.path.join(output, "journal.jsonl"), settings)
    run = _Run(proposer, journal, output, (top_k, score, nms), batch_size, every)
    run.go_through(sources)
    names = [name for own in run.done.values() for name in own]
    if gt is None:
        ids = {name: i for i, name in enumerate(names, 1)}
    WRITERS[format](output, (journal.read_proposals(name) for name in names), ids)
    if names and (draw or contact_sheet):
        _draw(run.done, journal, output, every, draw_top, contact_sheet)
    with write_whole(os.path.join(output, "unreadable.txt")) as temporary:
        text = "".join(f"{failure}\n" for failure in run.failures)
        Path(temporary).write_text(text, encoding="utf-8")
    return Proposed(names, run.new, root, run.failures, unknown)


def _check_labels(sources):
    """YOLO's text files have the images' names without their endings: these have to differ."""
    first = {}
    for source in sources:
        other = first.setdefault(label_name(source.name), source)
        if other is not source:
            raise InputError(
                f"format yolo: {other.path} and {source.path} would have the same text file; "
                "rename one, or use the format csv"
            )


def _image_ids(gt, sources):
    """
    Image ids of a COCO file by the sources' names: its file_name is the end of a path. And the
    paths of the sources that it does not have.
    """
    ids = {image.get("file_name"): image["id"] for image in load_coco(gt)["images"]}
    ret, first, unknown = {}, {}, []
    for source in sources:
        parts = source.path.split(os.sep)
        ends = ("/".join(parts[i:]) for i in range(len(parts)))  # the longest first
        known = next((end for end in ends if end in ids), None)
        if known is None:
            unknown.append(source.path)
            continue
        if first.setdefault(known, source) is not source:
            raise InputError(
                f"{first[known].path} and {source.path} would both be the image {known} of {gt}; "
                "leave one out"
            )
        ret[source.name] = ids[known]
    if not ret:
        raise InputError(
            f"{gt}: has no image of these file names: {some(unknown)}; give the file of these "
            "images"
        )
    return ret, unknown


def some(paths: list[str]) -> str:
    """The first of them, and how many there are more."""
    more = f" and {len(paths) - NAMED} more" if len(paths) > NAMED else ""
    return ", ".join(paths[:NAMED]) + more


class _Run:
    """
    Proposes on what is not in the journal.

    Attributes:
        done (dict[Source, list[str]]): the names of the frames of each; none where it cannot be
            read.
        new (int): how many were not in the journal.
        failures (list[str]): what went wrong.
    """

    def __init__(self, proposer, journal, output, selection, batch_size, every):
        self.proposer, self.journal, self.output = proposer, journal, output
        self.selection, self.batch_size, self.every = selection, batch_size, every
        self.done, self.new, self.failures = {}, 0, []
        self.waiting = {}  # photos and their files' stamps, by the size that the model sees

    def go_through(self, sources):
        with tqdm(desc="proposing", unit="image", disable=None) as self.progress:
            if not any(source.is_video for source in sources):
                self.progress.total = len(sources)
            for source in sources:
                self._propose(source)
            self._finish_all()

    def _propose(self, source):
        stamp = _stamp(source.path)
        if self.journal.has(source.name, stamp):  # of a video: the names of its frames
            own = self.journal.read(source.name)["frames"] if source.is_video else [source.name]
            self.done[source] = own
            self.progress.update(len(own))
            return
        own, broken = self.done.setdefault(source, []), False
        for name, image in read_frames(source, self.every):
            if isinstance(image, InputError):
                self.failures.append(str(image))
                broken = True
                self.progress.update()
                continue
            own.append(name)
            if self.journal.has(name, stamp):
                self.progress.update()
                continue
            shape = self.proposer.input_shape(image)
            self.waiting.setdefault(shape, []).append((Photo(image, name), stamp))
            if len(self.waiting[shape]) == self.batch_size:
                self._finish(shape)
            elif sum(map(len, self.waiting.values())) >= WAITING * self.batch_size:
                self._finish(max(self.waiting, key=lambda shape: len(self.waiting[shape])))
        if source.is_video and not broken:
            self._finish_all()
            self.journal.add(source.name, stamp, {"frames": own})

    def _finish_all(self):
        for shape in list(self.waiting):
            self._finish(shape)

    def _finish(self, shape):
        photos, stamps = zip(*self.waiting.pop(shape), strict=True)
        for found, stamp in zip(
            self.proposer.propose(list(photos), *self.selection), stamps, strict=True
        ):
            # Of the image as it was before.
            Path(_picture(self.output, found.name)).unlink(missing_ok=True)
            self.journal.add_proposals(stamp, found)
        self.progress.update(len(photos))
        self.new += len(photos)


def _stamp(path: str) -> Stamp:
    try:
        stat = os.stat(path)
    except OSError:
        return None
    return [stat.st_size, stat.st_mtime_ns]


def _picture(output, name):
    return picture_path(os.path.join(output, "pictures"), name)


def _draw(done, journal, output, every, top, sheets):
    """Pictures of all images that have none yet, and sheets of all."""
    paths = {name: _picture(output, name) for own in done.values() for name in own}
    drawn = os.path.join(output, "pictures", "boxes.txt")  # how many boxes pictures have
    if not os.path.exists(drawn) or Path(drawn).read_text() != str(top):
        for path in paths.values():
            Path(path).unlink(missing_ok=True)
        make_folder(os.path.dirname(drawn))
        with write_whole(drawn) as temporary:
            Path(temporary).write_text(str(top))
    for source, own in tqdm(done.items(), desc="drawing", unit="file", disable=None):
        missing = {name for name in own if not os.path.exists(paths[name])}
        for name, image in read_frames(source, every) if missing else ():
            if name not in missing:
                continue
            if isinstance(image, InputError):
                raise image  # it could be read when the run began
            save_picture(journal.read_proposals(name).on(image).draw(top), paths[name])
    if sheets:
        named = list(paths.items())
        for number, begin in enumerate(range(0, len(named), ON_A_SHEET), 1):
            names, files = zip(*named[begin : begin + ON_A_SHEET], strict=True)
            path = os.path.join(output, f"contact_sheet_{number:03d}.jpg")
            save_picture(make_contact_sheet(map(Image.open, files), names), path)
