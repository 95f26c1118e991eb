"""Results files in COCO's format, also huge ones, read piece by piece."""

import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from operator import attrgetter
from typing import IO, Annotated, Any, NamedTuple, Protocol, TypedDict, TypeVar

import msgspec
import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as mask_utils
from tqdm import tqdm

from oln_d2.boxes import BoxFormat, to_xyxy
from oln_d2.checks import InputError
from oln_d2.data.rle import is_text_of_bytes, to_rle, wrong_rle
from oln_d2.evaluation.ground_truth import GroundTruth
from oln_d2.files import StrPath, open_json, read_json, write_whole
from oln_d2.results import Proposals, coco_entries
from oln_d2.scores import SCORES

# Bytes that are decoded at once: bounds the memory that is used beyond the arrays.
PIECE = 2**23
# At how many places a cut of a piece is tried, should entries contain lists of objects.
CUTS = 100
BETWEEN_ENTRIES = re.compile(rb"\}\s*,\s*(?=\{)")


class _Mask(TypedDict):
    size: tuple[int, int]
    counts: str


_Id = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]
_FIELDS = [("image_id", _Id), ("bbox", tuple[float, float, float, float]), ("score", float)]
_QUALITIES = [(score.field, float | None, None) for score in SCORES]
_Entry = msgspec.defstruct("_Entry", [*_FIELDS, *_QUALITIES], gc=False)
_MaskEntry = msgspec.defstruct(
    "_MaskEntry", [*_FIELDS, ("segmentation", _Mask), *_QUALITIES], gc=False
)
# What other tools write as well: slower to read.
_AnyEntry = msgspec.defstruct(
    "_AnyEntry",
    [
        ("image_id", _Id | float | str),
        ("score", float),
        ("bbox", tuple[float, ...] | None, None),
        ("segmentation", Any, None),
        *_QUALITIES,
    ],
    gc=False,
)


Floats = NDArray[np.float64]
# An image's id, boxes, scores, masks, further fields.
ImageDetections = tuple[int, Floats, NDArray[Any], Sequence[Any] | None, Mapping[str, NDArray[Any]]]


class ScatteredError(Exception):
    """The detections of an image are not side by side in their file."""


class Detections(NamedTuple):
    """D detections, in the order in which they were given."""

    image_ids: NDArray[np.int64]  # (D,)
    boxes: Floats  # (D, 4), XYWH, absolute pixels
    scores: Floats  # (D,)
    masks: list[Any] | None  # D masks as COCO RLE
    qualities: dict[str, Floats]  # (D,) each, by field: those of SCORES that all have
    source: str  # the file they come from; named in errors
    first: int = 0  # the number that the first of them has there

    def select(self, index: NDArray[np.int64] | slice) -> "Detections":
        """Those at these indices."""
        numbers = np.arange(len(self.scores))[index]
        return self._replace(
            image_ids=self.image_ids[index],
            boxes=self.boxes[index],
            scores=self.scores[index],
            masks=[self.masks[i] for i in numbers] if self.masks is not None else None,
            qualities={field: values[index] for field, values in self.qualities.items()},
        )

    def add_to(self, recall: Any) -> None:
        """Give them to an `OpenWorldRecall`. Raises InputError where it cannot take them."""
        try:
            recall.update(*self[:3], masks=self.masks, box_format="xywh", first=self.first)
        except InputError as error:
            raise InputError(f"{self.source}: {error}") from None

    def to_proposals(self, size: tuple[int, int], name: str) -> Proposals:
        """For one image, whose they all are, of this height and width and name."""
        attributes = {score.field: score.attribute for score in SCORES}
        more: dict[str, Any] = {attributes[field]: v for field, v in self.qualities.items()}
        boxes = to_xyxy(self.boxes)
        return Proposals(boxes, self.scores, size=size, name=name, masks=self.masks, **more)


def join_detections(parts: Iterable[Detections]) -> Detections:
    """Those of several parts or files, one at least, as if they were one."""
    image_ids, boxes, scores, masks, qualities, sources, first = map(list, zip(*parts, strict=True))
    fields = [field for field in qualities[0] if all(field in part for part in qualities)]
    named = {field: [part[field] for part in qualities] for field in fields}
    qualities.clear()
    arrays: list[Any] = []
    for column in (image_ids, boxes, scores, *named.values()):
        arrays.append(np.concatenate(column))
        column.clear()  # not twice in memory
    rles = None if None in masks else list(chain.from_iterable(masks))
    ids, sides, values, *others = arrays
    return Detections(ids, sides, values, rles, dict(zip(named, others)), sources[0], first[0])


def read_results(path: StrPath, ground_truth: GroundTruth, masks: bool = False) -> Detections:
    """
    Args:
        path: JSON, perhaps gzip, a list of {"image_id", "bbox": [x, y, width, height], "score"},
            perhaps with the fields of :data:`oln_d2.scores.SCORES`; others, `category_id` too, are
            ignored. In place of its id an image may have its `file_name`, see
            :meth:`GroundTruth.find_image`; a "segmentation" gives the box where there is no "bbox".
        ground_truth: that of the data set.
        masks: also read each entry's "segmentation".

    Raises:
        InputError: a file that is missing or not complete, an entry that is not of this kind or of
            an unknown image, or boxes that are plainly not XYWH in pixels.
    """
    return join_detections(_read(path, ground_truth, masks))


def read_in_parts(
    path: StrPath, ground_truth: GroundTruth, masks: bool = False
) -> Iterator[Detections]:
    """
    As :func:`read_results`, for files that need not fit into memory.

    Yields:
        the detections in the order of the file, some images with all of theirs at a time.

    Raises:
        ScatteredError: what an image has is not side by side, so that this cannot be done.
        InputError: as of `read_results`.
    """
    done = np.zeros(len(ground_truth.image_ids), bool)
    held: Detections | None = None
    for piece in _read(path, ground_truth, masks):
        if held is not None:
            # What follows may have more of the last image.
            begins = np.flatnonzero(held.image_ids[1:] != held.image_ids[:-1]) + 1
            cut = int(begins[-1]) if len(begins) else 0
            rest = held.select(slice(cut, None))._replace(first=held.first + cut)
            yield _whole_images(held.select(slice(0, cut)), ground_truth, done)
            piece = join_detections([rest, piece])
        held = piece
    assert held is not None  # a file without detections has an empty piece
    yield _whole_images(held, ground_truth, done)


def _whole_images(
    part: Detections, ground_truth: GroundTruth, done: NDArray[np.bool_]
) -> Detections:
    """The part, whose images are noted as done."""
    images = np.unique(ground_truth.index_images(part.image_ids))
    if done[images].any():
        raise ScatteredError
    done[images] = True
    return part


Taker = TypeVar("Taker", bound="TakesDetections")


class TakesDetections(Protocol):
    """What :func:`give_detections` feeds."""

    def update(self, detections: Detections) -> None:
        """Take all detections of some images."""


def give_detections(
    results: StrPath | Detections,
    ground_truth: GroundTruth,
    begin: Callable[[], Taker],
    masks: bool = False,
) -> Taker:
    """
    Args:
        results: a file, of which a part at a time is in memory if it has what belongs to an image
            side by side; or detections.
        ground_truth, masks: see :func:`read_results`.
        begin: makes what takes the detections; called again where a file has to be read anew.

    Returns:
        what `begin` made, with all detections.

    Raises:
        InputError: as of `read_results`, or of `begin`.
    """
    taker = begin()
    if isinstance(results, Detections):
        taker.update(results)
        return taker
    try:
        for part in read_in_parts(results, ground_truth, masks):
            taker.update(part)
    except ScatteredError:
        taker = begin()
        taker.update(read_results(results, ground_truth, masks))
    return taker


def convert_entries(
    entries: Sequence[Mapping[str, Any]], ground_truth: GroundTruth, masks: bool = False
) -> Detections:
    """
    Detections of a list of entries as a results file has them; its numbers may be numpy's.

    Raises:
        InputError: as of :func:`read_results`.
    """
    source = "results"
    try:
        # Masks stay as they are: RLE may have bytes, which JSON does not know.
        numbers = [{k: v for k, v in e.items() if k != "segmentation"} for e in entries]
        plain = msgspec.to_builtins(numbers, enc_hook=lambda value: value.tolist())
        checked: list[Any] = msgspec.convert(plain, list[_AnyEntry])  # type: ignore[valid-type]
    except msgspec.ValidationError as error:
        raise _describe(source, b"", 0, error) from None
    except (AttributeError, OverflowError, RecursionError, TypeError, ValueError) as error:
        raise InputError(f"{source}: not a list of COCO's result entries ({error})") from None
    for entry, given in zip(checked, entries):
        entry.segmentation = given.get("segmentation")
    _Decoder(ground_truth, masks, source).correct(checked, 0)
    detections = _convert(checked, masks, [score.field for score in SCORES], source, 0)
    _Format(ground_truth, source).check(detections)
    return detections


class _Decoder:
    """
    Decodes a part of a results file: quickly as long as it is plain, else with all that
    :func:`read_results` takes.
    """

    def __init__(self, ground_truth: GroundTruth, masks: bool, source: str):
        self.ground_truth, self.masks, self.source = ground_truth, masks, source
        entry_type = _MaskEntry if masks else _Entry
        self._decode = msgspec.json.Decoder(list[entry_type]).decode  # type: ignore[valid-type]
        self._decode_any: Callable[[bytes], Any] = msgspec.json.Decoder(list[_AnyEntry]).decode  # type: ignore[valid-type]
        self._plain = True
        self._ids: dict[Any, int] = {}

    def __call__(self, text: bytes, done: int) -> list[Any]:
        """
        Args:
            text: a JSON list of entries.
            done: how many came before.

        Raises:
            DecodeError, ValidationError (msgspec), InputError: not such a list.
        """
        if self._plain:
            try:
                entries: list[Any] = self._decode(text)
                masks = [entry.segmentation for entry in entries] if self.masks else []
                of_bytes = any(is_text_of_bytes(mask["counts"]) for mask in masks)
                if not of_bytes and wrong_rle(masks) is None:
                    return entries
            except msgspec.ValidationError:
                pass
        self.correct(entries := self._decode_any(text), done)
        self._plain = False
        return entries

    def correct(self, entries: list[Any], done: int) -> None:
        """Make the entries plain, in place; `done` is the number of the first."""
        ids, needs_mask = self._ids, self.masks
        for number, entry in enumerate(entries, done):
            try:
                image_id = ids.get(entry.image_id)
                if image_id is None:
                    image_id = ids[entry.image_id] = self.ground_truth.find_image(entry.image_id)
                entry.image_id = image_id
                if needs_mask or not entry.bbox:
                    entry.segmentation = self._mask(entry.segmentation, image_id)
                    entry.bbox = entry.bbox or mask_utils.toBbox(entry.segmentation).tolist()
                if len(entry.bbox) != 4:
                    raise InputError(
                        f"bbox {list(entry.bbox)} is not four numbers x, y, width, height"
                    )
            except InputError as error:
                raise InputError(f"{self.source}: entry {number}: {error}") from None

    def _mask(self, mask: Any, image_id: int) -> dict[str, Any]:
        if not mask and self.masks:
            raise InputError(
                "has no 'segmentation', so these results have no masks: leave out --iou mask or "
                "--masks, or give results with masks"
            )
        if not mask:
            raise InputError("has neither 'bbox' nor 'segmentation'; write [x, y, width, height]")
        size = (np.nan, np.nan)
        if isinstance(mask, list):
            (index,) = self.ground_truth.index_images([image_id])
            size = self.ground_truth.image_sizes[index]
        try:
            return to_rle(mask, *size)
        except Exception as error:  # pycocotools raises no narrower one
            reason = " ".join(str(error).split())
            raise InputError(
                f"'segmentation' is neither RLE nor polygons [[x1, y1, x2, y2, x3, y3, ...], ...] "
                f"({reason}); write RLE with 'size' and 'counts'"
            ) from None


def _read(path: StrPath, ground_truth: GroundTruth, masks: bool) -> Iterator[Detections]:
    """The detections in the order of the file, one piece, perhaps empty, at least."""
    source = str(path)
    fields = [score.field for score in SCORES]
    box_format = _Format(ground_truth, source)
    _check_ids(source, ground_truth)
    done = 0
    try:
        with open_json(path) as f:
            for entries in _read_pieces(path, f, _Decoder(ground_truth, masks, source)):
                detections = _convert(entries, masks, fields, source, done)
                box_format.check(detections)
                yield detections
                done += len(entries)
    except FileNotFoundError:
        raise InputError(
            f"{path}: no such file; give detections in COCO's results format"
        ) from None
    except OSError as error:
        reason = error.strerror or error
        raise InputError(f"{path}: cannot be read ({reason})") from None
    except (UnicodeError, EOFError, RecursionError, zlib.error) as error:
        raise InputError(
            f"{path}: not complete, valid JSON in UTF-8 ({error}); write or fetch it again"
        ) from None


def _convert(
    entries: list[Any], masks: bool, fields: list[str], source: str, first: int
) -> Detections:
    """`fields`: the further ones to read; those that an entry does without are removed."""
    n = len(entries)
    sides = chain.from_iterable([entry.bbox for entry in entries])
    qualities = {}
    for field in list(fields):
        values = np.fromiter(map(attrgetter(field), entries), float, n)
        if np.isnan(values).any():  # None: an entry does without
            fields.remove(field)
        else:
            qualities[field] = values
    return Detections(
        np.fromiter([entry.image_id for entry in entries], np.int64, n),
        np.fromiter(sides, float, 4 * n).reshape(n, 4),
        np.fromiter([entry.score for entry in entries], float, n),
        [entry.segmentation for entry in entries] if masks else None,
        qualities,
        source,
        first,
    )


def _check_ids(source, ground_truth):
    """That the ids of what `propose` wrote are the ground truth's, by the names beside them."""
    folder, name = os.path.split(os.path.expanduser(source))
    if name != "results.json":
        return
    try:
        images = read_json(os.path.join(folder, "images.json"))["images"]
        ids = {str(image["file_name"]): image["id"] for image in images}
    except (InputError, LookupError, TypeError):  # none there, or another tool's
        return
    for name, written in ids.items():
        try:
            meant = ground_truth.find_image(name)
        except InputError:
            continue
        if written != meant:
            raise InputError(
                f"{source}: calls {name} the image {written} (images.json beside it), which is "
                f"{meant} in {ground_truth.source}; propose again with --gt {ground_truth.source}"
            )


def _read_pieces(path: StrPath, f: IO[bytes], decode: _Decoder) -> Iterator[list[Any]]:
    """Decode one piece of the file after the other, each cut where an entry ends."""
    done = 0
    size, name = os.path.getsize(os.path.expanduser(path)), os.path.basename(path)
    with tqdm(total=size, unit="B", unit_scale=True, desc=name, disable=None) as progress:
        rest = f.read(PIECE).lstrip()
        if not rest:
            raise InputError(f"{path}: is empty; write or fetch the results again")
        if rest[:1] != b"[":
            raise InputError(
                f"{path}: does not hold a list; expected a list of detections in COCO's results "
                "format, as `propose` writes it with --format coco (of a data set whose "
                "annotations have scores, that is the list 'annotations' alone)"
            )
        rest = rest[1:]
        # More at a time where there is no cut: an entry of many pieces is not to be decoded often.
        while more := f.read(max(PIECE, len(rest))):
            progress.update(len(more))
            cuts = [match.end() for match in BETWEEN_ENTRIES.finditer(rest)][: -CUTS - 1 : -1]
            for cut in cuts:
                try:
                    entries = decode(b"[" + rest[:cut].rstrip()[:-1] + b"]", done)
                except msgspec.ValidationError as error:
                    raise _describe(path, rest, done, error) from None
                except msgspec.DecodeError as error:
                    if "truncated" in str(error):  # an entry that has a list of objects was cut
                        continue
                    raise _describe(path, rest, done, error) from None
                yield entries
                done += len(entries)
                rest = rest[cut:]
                break
            rest += more
        progress.update(len(rest))
        try:
            yield decode(b"[" + rest, done)
        except msgspec.DecodeError as error:
            raise _describe(path, rest, done, error) from None


def _describe(
    path: StrPath, text: bytes, done: int, error: msgspec.DecodeError | msgspec.ValidationError
) -> InputError:
    """
    Args:
        text: from the entry number `done` on.
        error: what decoding b"[" + text raised.

    Returns:
        an error that names file and entry.
    """
    reason = str(error)
    if isinstance(error, msgspec.ValidationError):
        place = re.search(r" - at `\$\[(\d+)\]\.?(.*)`$", reason)
        if place is None:
            return InputError(f"{path}: {reason}; expected COCO's results format")
        field = f"{place[2]}: " if place[2] else ""
        reason = reason[: place.start()].replace("`", "'")
        reason += "; each entry needs image_id, bbox ([x, y, width, height]) and score, a number"
        return InputError(f"{path}: entry {done + int(place[1])}: {field}{reason}")
    place = re.search(r"byte (\d+)", reason)
    at = int(place[1]) - 1 if place else len(text)
    entry = done + len(BETWEEN_ENTRIES.findall(text, 0, at))
    word = re.match(rb"-?(NaN|Infinity)", text[at : at + 9])
    if word:
        return InputError(f"{path}: entry {entry}: {word[0].decode()} is not a finite number")
    return InputError(
        f"{path}: entry {entry}: not complete, valid JSON ({reason}); write the file again"
    )


class _Format:
    """
    Whether the boxes of a file can be XYWH in pixels, judged by all that came so far, and its masks
    are those of its images.
    """

    def __init__(self, ground_truth: GroundTruth, source: str):
        self._ground_truth, self._source = ground_truth, source
        self._boxes = BoxFormat(source, "entry {}")

    def check(self, detections: Detections) -> None:
        """
        Raises InputError where an image is unknown, a mask has another size than its image, or the
        boxes are plainly something else.
        """
        source, first = self._source, detections.first
        try:
            image = self._ground_truth.index_images(detections.image_ids, first)
        except InputError as error:
            raise InputError(f"{source}: {error}") from None
        sizes = self._ground_truth.image_sizes[image]
        if detections.masks:
            own = np.array([mask["size"] for mask in detections.masks], float)
            other = np.flatnonzero(((own != sizes) & np.isfinite(sizes)).any(axis=1))
            if len(other):
                mask, size = detections.masks[other[0]], sizes[other[0]].astype(int).tolist()
                raise InputError(
                    f"{source}: entry {first + other[0]}: mask of size {list(mask['size'])} on an "
                    f"image of size {size} (height, width) in {self._ground_truth.source}; write "
                    "masks of the image's size"
                )
        self._boxes.check(detections.boxes, sizes, first)


def write_results(path: StrPath, detections: Iterable[ImageDetections]) -> None:
    """
    Write a COCO results file in which every detection is of category 1; all of it or nothing.

    Args:
        path: where it goes.
        detections: for each image: image id, boxes (d, 4) as XYWH, scores (d,), its masks (d RLE)
            or None, and further fields by name, each (d,). Numbers are written in full, so that
            reading gives the same again.

    Raises:
        InputError: the file cannot be written.
    """
    encoder = msgspec.json.Encoder()
    with write_whole(path) as temporary, open(temporary, "wb") as f:
        separator = b"[\n"
        for image in detections:
            for entry in coco_entries(*image):
                f.write(separator)
                f.write(encoder.encode(entry))
                separator = b",\n"
        f.write(b"\n]\n" if separator == b",\n" else b"[]\n")
