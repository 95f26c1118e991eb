"""Proposals for many images, written to files; a run that was stopped goes on."""

import hashlib
import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image
from tqdm import tqdm

from oln_d2.checks import POSITIVE_INT, InputError, check_limits, one_of
from oln_d2.data.coco import load_coco
from oln_d2.data.lookup import image_name, image_size, match_images, some
from oln_d2.drawing import TOP, list_shortened, picture_path, save_picture
from oln_d2.drawing import contact_sheet as make_contact_sheet
from oln_d2.files import (
    InUseError,
    StrPath,
    check_folder,
    check_output,
    lock_folder,
    make_folder,
    write_file,
)
from oln_d2.pages import Item, write_page
from oln_d2.propose.ahead import ahead
from oln_d2.propose.inputs import Frame, find_sources, import_av, read_frames
from oln_d2.propose.journal import Journal, Stamp
from oln_d2.propose.proposer import WAITING, Batches, Proposer, check_selection
from oln_d2.propose.shards import Shard
from oln_d2.propose.writers import FILES, WRITERS, Target, label_name

logger = logging.getLogger(__name__)

ON_A_SHEET = 60


class Proposed(NamedTuple):
    """What :func:`propose_files` did."""

    names: list[str]  # images and frames that are done, relative to `root`
    new: int  # how many of them were not done before
    root: str  # the folder that all inputs are in
    failures: list[str]  # why an input could not be read, a sentence each
    unknown: list[str]  # paths of images that the ground truth does not have, so left out
    absent: list[str]  # names of images of the ground truth that are not among the inputs
    as_stored: list[str]  # names of images that EXIF turns, but their annotations do not
    # Whether this process wrote the files, of all images. If not, all above is of its shard.
    written: bool
    waiting: list[int]  # numbers of the shards that have to be done before
    boxes: int = 0  # how many it wrote


class UnreadableError(InputError):
    """No input can be read; `failures` are the reasons, a sentence each."""

    def __init__(self, failures: list[str]):
        more = f" (and {len(failures) - 1} more)" if len(failures) > 1 else ""
        super().__init__(f"{failures[0]}{more}; none of the images can be read")
        self.failures = failures


def propose_files(
    proposer: Proposer,
    inputs: Sequence[str],
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
    draw_top: int = TOP,
    contact_sheet: bool = False,
    html: bool = False,
    shard: tuple[int, int] | None = None,
) -> Proposed:
    """
    Propose on images and write the results to files. The same call again skips what is done, goes
    on where it was stopped, and does new and changed images. Several processes, also of several
    machines, can share the images; the last of them writes the results.

    Args:
        proposer: see :func:`oln_d2.load`.
        inputs: images, folders, globs, videos and lists of these, see
            :func:`oln_d2.propose.inputs.find_sources`.
        output: a folder.
        format: see :mod:`oln_d2.propose.writers`.
        gt: a COCO file whose image ids are taken, see :func:`oln_d2.data.lookup.match_images`;
            not for "csv" and "yolo". Boxes are then in the frame of its annotations, see
            :meth:`oln_d2.data.images.Page.of_size`.
        top_k, score, nms, batch_size, every: see :meth:`Proposer.__call__`.
        draw: also write pictures of the best, to `pictures/`.
        draw_top: how many are drawn.
        contact_sheet: pictures, and sheets of 60 of them each.
        html: also write a page to look through, `index.html`.
        shard: do the first of these numbers, from 1, of so many shares of the images, (2, 8). Give
            all processes the same other arguments, and the same files at the same paths. None: do
            all, or what shares left that were given up.

    Raises:
        InputError: arguments or files that cannot be used, before any work is lost. Images that
            cannot be read stop nothing: see `failures`.
        UnreadableError: none of the images can be read; nothing is written.
    """
    own = Shard(*shard).check() if shard is not None else None
    check_selection(top_k, score, nms, batch_size, every)
    check_limits(draw_top=(draw_top, POSITIVE_INT), format=(format, one_of(*WRITERS)))
    if gt is not None and format in ("csv", "yolo"):
        raise InputError(f"gt: the format {format} has no image ids; use another, such as coco")
    output = os.fspath(output)
    root, sources = find_sources(inputs, output)
    if format == "yolo":
        _check_labels(sources)
    known = None
    if gt is not None:
        known = _Known(gt, sources)
        sources = known.sources
    _tell_of_videos(sources)
    _check_readable(sources, known)
    settings: dict[str, Any] = {"model": proposer.identity, "root": root}
    settings |= {"top_k": top_k, "score": score, "nms": nms, "every": every}
    settings |= proposer.overrides
    if html:
        check_folder(output, "propose")
    make_folder(output)
    if gt is not None:
        for file in FILES[format]:
            check_output(os.path.join(output, file), [gt])
    journal = Journal(output, settings, own)
    run = _Run(proposer, journal, output, (top_k, score, nms), batch_size, every, known)
    draws = draw or contact_sheet
    lock = None
    if own is not None:
        waiting = _do_share(run, own, sources, draw_top if draws else None)
        lock = None if waiting else _lock_results(output)
        if lock is None:
            return _summary(run, root, written=False, waiting=waiting)
    run.go_through(sources)
    names = run.names()
    ids = {name: known.ids[name] if known else i for i, name in enumerate(names, 1)}
    boxes = 0

    def read():
        nonlocal boxes
        for name in names:
            proposals = journal.read_proposals(name)
            boxes += len(proposals)
            yield proposals

    WRITERS[format](Target(output, ids, gt, root, proposer.identity), read())
    if names and draws:
        paths = _draw(run, draw_top)
        if contact_sheet:
            _write_sheets(output, paths)
    if names and html:
        write_page(output, _items(run), number=draw_top, score=proposer.likely_score)
    unreadable = Path(output, "unreadable.txt")
    if run.failures:
        write_file(unreadable, "".join(f"{failure}\n" for failure in run.failures))
    else:
        unreadable.unlink(missing_ok=True)  # of a run before
    return _summary(run, root)._replace(boxes=boxes)


def _tell_of_videos(sources):
    """That what reads them is missing is told now, not only at the end of a long run."""
    for video in [source.path for source in sources if source.is_video][:1]:
        try:
            import_av(video)
        except ImportError as error:
            logger.warning("%s, and run the same command again; videos are left out", error)


def _check_readable(sources, known):
    sizes, gt = (known.sizes, known.gt) if known else ({}, "")
    failures = []
    for source in sources:
        for frame in read_frames(source, sizes=sizes, gt=gt):
            if not isinstance(frame.image, InputError):
                return
            failures.append(str(frame.image))
    if failures:
        raise UnreadableError(failures)


def _summary(run, root, written=True, waiting=()):
    names, known = run.names(), run.known
    as_stored = [name for name in names if run.journal.places[name].as_stored]
    unknown, absent = (known.unknown, known.absent) if known else ([], [])
    return Proposed(
        names, run.new, root, run.failures, unknown, absent, as_stored, written, list(waiting)
    )


def _do_share(run, own, sources, draw_top):
    """
    Does what is this process's, with pictures unless `draw_top` is None. Returns the numbers of the
    shards that are not done yet.
    """
    run.go_through(own.of(sources), f"proposing {own}")
    if draw_top is not None:
        _draw(run, draw_top)
    run.journal.finish(_digest(own.of(sources)))
    run.journal.refresh()  # only now: of two that finish at once, one at least sees both
    shards = [Shard(number, own.total) for number in range(1, own.total + 1)]
    # Most processes need not look at the files of others.
    waiting = [shard for shard in shards if run.journal.finished(shard) is None] or [
        shard for shard in shards if run.journal.finished(shard) != _digest(shard.of(sources))
    ]
    return [shard.number for shard in waiting]


def _digest(sources):
    """Differs where the sources, or what is in their files, may."""
    stamps = [(source.name, _stamp(source.path)) for source in sources]
    return hashlib.sha256(json.dumps(stamps).encode()).hexdigest()


def _lock_results(output):
    """None where another process, which has found all shards done as well, writes the results."""
    try:
        return lock_folder(output, ".lock-results")
    except InUseError:
        return None


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


class _Known:
    """
    The images of a COCO file among the sources.

    Attributes:
        sources (list[Source]): those that are, or have, images of the file.
        ids (dict[str, int]): image ids, by the names of images and frames.
        sizes (dict[str, tuple[int, int] | None]): height and width, where the file has both.
        unknown (list[str]): paths of what the file does not have.
        absent (list[str]): names of the file's images that are not among the sources.
    """

    def __init__(self, gt, sources):
        self.gt = gt
        images = load_coco(gt)["images"]
        of_file = {}
        for source in sources:
            of_file.setdefault(os.path.basename(source.path), []).append(source)
        ways = {source.path: (source, source.name) for source in sources}
        for image in images:  # pages and frames that it names: "scan.tif/000002.jpg"
            folder, _, frame = str(image.get("file_name")).replace("\\", "/").rpartition("/")
            for source in of_file.get(os.path.basename(folder), ()):
                ways[f"{source.path}/{frame}"] = source, f"{source.name}/{frame}"
        found = match_images(ways, images, gt)
        self.ids, self.sizes, kept = {}, {}, set()
        self.absent = []
        for image in images:
            if image["id"] not in found:
                self.absent.append(image_name(image))
                continue
            source, name = ways[found[image["id"]]]
            kept.add(source)
            # The name of a file of several pages means its first.
            for own in (name, f"{name}/000000.jpg") if name == source.name else (name,):
                self.ids[own], self.sizes[own] = image["id"], image_size(image)
        self.sources = [source for source in sources if source in kept]
        self.unknown = [source.path for source in sources if source not in kept]
        if not kept:
            raise InputError(
                f"none of the {len(self.unknown)} inputs ({some(self.unknown)}) is an image of "
                f"{gt} ({some(self.absent)}); give the folder of its images, or the annotations of "
                "these"
            )


class _Run:
    """
    Proposes on what is not in the journal.

    Attributes:
        done (dict[Source, list[str]]): the names of the frames of each of those last gone through;
            none where it cannot be read.
        new (int): how many were not in the journal.
        failures (list[str]): what went wrong with those.
    """

    def __init__(self, proposer, journal, output, selection, batch_size, every, known):
        self.proposer, self.journal, self.output = proposer, journal, output
        self.selection, self.every = selection, every
        self.known = known  # a _Known; None without ground truth
        self.new = 0
        self.broken = False  # the source that is read, in part or as a whole
        self.batch_size = batch_size
        # Photos, their files' stamps, whether they are as stored.
        self.batches = Batches(batch_size)

    def go_through(self, sources, what="proposing"):
        self.done, self.failures = {}, []
        with tqdm(desc=what, unit="image", disable=None) as self.progress:
            if not any(source.is_video for source in sources):
                self.progress.total = len(sources)
            # While the model runs, the next images are read and resized.
            with ahead(self._read(sources), WAITING * self.batch_size) as read:
                for source, stamp, frame in read:
                    self._take(source, stamp, frame)
            self._finish(self.batches.rest())

    def names(self):
        """Of all that is done, in the order of the sources."""
        return [name for own in self.done.values() for name in own]

    def frames(self, source):
        """See :func:`read_frames`; only those that the ground truth has, if there is one."""
        if self.known is None:
            return read_frames(source, self.every)
        frames = read_frames(source, self.every, self.known.sizes, self.known.gt)
        return (f for f in frames if f.name in self.known.ids or isinstance(f.image, InputError))

    def _has(self, name, stamp):
        return self.journal.has(name, stamp, self.known and self.known.sizes.get(name))

    def _read(self, sources):
        """
        Of each source its stamp and its frames, one by one: a :class:`Photo` in place of the image,
        or None where the journal has it. A frame that is None ends the source.
        """
        for source in sources:
            stamp = _stamp(source.path)
            own = self.journal.frames(source.name, stamp) or [source.name]
            own = [name for name in own if self.known is None or name in self.known.ids]
            if own and all(self._has(name, stamp) for name in own):
                frames = (Frame(name, None) for name in own)
            else:
                frames = (self._prepared(frame, stamp) for frame in self.frames(source))
            for frame in frames:
                yield source, stamp, frame
            yield source, stamp, None

    def _prepared(self, frame, stamp):
        name, image, _ = frame
        if isinstance(image, InputError):
            return frame
        photo = None if self._has(name, stamp) else self.proposer.prepare(image, name)
        return frame._replace(image=photo)

    def _take(self, source, stamp, frame):
        """What :meth:`_read` gives."""
        own = self.done.setdefault(source, [])
        if frame is None:
            frames = self.journal.frames(source.name, stamp)
            if self.known is None and own not in ([source.name], frames) and not self.broken:
                self._finish(self.batches.rest())
                self.journal.add(source.name, stamp, {"frames": own})
            self.broken = False
            return
        name, photo, as_stored = frame
        if isinstance(photo, InputError):
            self.failures.append(str(photo))
            self.broken = True
            self.progress.update()
            return
        own.append(name)
        if photo is None:
            self.progress.update()
            return
        self._finish(self.batches.add(photo, stamp, as_stored))

    def _finish(self, batches):
        for batch in batches:
            photos, *more = zip(*batch, strict=True)
            for found, stamp, as_stored in zip(
                self.proposer.propose(list(photos), *self.selection), *more, strict=True
            ):
                # It would show the image as it was before.
                Path(_picture(self.output, found.name)).unlink(missing_ok=True)
                self.journal.add_proposals(stamp, found, as_stored)
            self.progress.update(len(photos))
            self.new += len(photos)


def _items(run):
    """The items of a page, which refers to the files of whole images."""
    for source, own in run.done.items():
        whole = own == [source.name] and not run.journal.places[source.name].as_stored
        frames = [(source.name, source.path, False)] if whole else run.frames(source)
        for name, image, _ in frames:
            if name in own and not isinstance(image, InputError):
                yield Item(name, image, [run.journal.read_proposals(name)])


def _stamp(path: str) -> Stamp:
    try:
        stat = os.stat(path)
    except OSError:
        return None
    return [stat.st_size, stat.st_mtime_ns]


def _picture(output, name):
    return picture_path(os.path.join(output, "pictures"), name)


def _draw(run, top):
    """Pictures of all images of the run that have none yet; returns their paths by name."""
    output = run.output
    paths = {name: _picture(output, name) for own in run.done.values() for name in own}
    drawn = os.path.join(output, "pictures", "boxes.txt")  # how many boxes pictures have
    chosen = f"{top} {run.proposer.likely_score}"
    if not os.path.exists(drawn) or Path(drawn).read_text() != chosen:
        make_folder(os.path.dirname(drawn))
        write_file(drawn, chosen)  # all older pictures have others
    since = os.stat(drawn).st_mtime_ns
    for source, own in tqdm(run.done.items(), desc="drawing", unit="file", disable=None):
        missing = {name for name in own if not _is_since(paths[name], since)}
        for name, image, _ in run.frames(source) if missing else ():
            if name not in missing:
                continue
            if isinstance(image, InputError):
                raise image  # it could be read when the run began
            found = run.journal.read_proposals(name).on(image)
            found.likely_score = run.proposer.likely_score
            save_picture(found.draw(top), paths[name])
    list_shortened(os.path.join(output, "pictures"), paths)
    return paths


def _is_since(path, time):
    try:
        return os.stat(path).st_mtime_ns >= time
    except OSError:
        return False


def _write_sheets(output, paths):
    """Sheets of the pictures at these paths, which have their names."""
    named = list(paths.items())
    for number, begin in enumerate(range(0, len(named), ON_A_SHEET), 1):
        names, files = zip(*named[begin : begin + ON_A_SHEET], strict=True)
        path = os.path.join(output, f"contact_sheet_{number:03d}.jpg")
        save_picture(make_contact_sheet(map(Image.open, files), names), path)
