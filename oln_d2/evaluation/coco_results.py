"""Results files in COCO's format, also huge ones, read piece by piece."""

import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from operator import attrgetter
from typing import IO, Annotated, Any, NamedTuple, TypedDict

import msgspec
import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as mask_utils
from tqdm import tqdm

from oln_d2.boxes import to_xyxy
from oln_d2.checks import InputError
from oln_d2.data.rle import is_text_of_bytes, to_rle, wrong_rle
from oln_d2.evaluation.ground_truth import GroundTruth
from oln_d2.files import StrPath, open_json, write_whole
from oln_d2.results import Proposals, coco_entries
from oln_d2.scores import SCORES

# Bytes that are decoded at once: bounds the memory that is used beyond the arrays.
PIECE = 2**23
# At how many places a cut of a piece is tried, should entries contain lists of objects.
CUTS = 100
BETWEEN_ENTRIES = re.compile(rb"\}\s*,\s*(?=\{)")
# XYXY boxes read as XYWH reach beyond their image; this share of them does not by accident.
SHARE_BEYOND = 0.2


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


class Detections(NamedTuple):
    """D detections, in the order in which they were given."""

    image_ids: NDArray[np.int64]  # (D,)
    boxes: Floats  # (D, 4), XYWH, absolute pixels
    scores: Floats  # (D,)
    masks: list[Any] | None  # D masks as COCO RLE
    qualities: dict[str, Floats]  # (D,) each, by field: those of SCORES that all have
    source: str  # the file they come from; named in errors

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

    def to_proposals(self, size: tuple[int, int], name: str) -> Proposals:
        """For one image, whose they all are, of this height and width and name."""
        attributes = {score.field: score.attribute for score in SCORES}
        more: dict[str, Any] = {attributes[field]: v for field, v in self.qualities.items()}
        boxes = to_xyxy(self.boxes)
        return Proposals(boxes, self.scores, size=size, name=name, masks=self.masks, **more)


def join_detections(parts: Sequence[Detections]) -> Detections:
    """Those of several files of boxes, one at least, as if they were one; without masks."""
    fields = set.intersection(*(set(part.qualities) for part in parts))
    return Detections(
        np.concatenate([part.image_ids for part in parts]),
        np.concatenate([part.boxes for part in parts]),
        np.concatenate([part.scores for part in parts]),
        None,
        {field: np.concatenate([part.qualities[field] for part in parts]) for field in fields},
        parts[0].source,
    )


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
    try:
        with open_json(path) as f:
            pieces = _read_pieces(path, f, _Decoder(ground_truth, masks, str(path)))
            detections = _collect(pieces, masks, str(path))
    except OSError as error:
        reason = error.strerror or error
        raise InputError(f"{path}: cannot be read ({reason})") from None
    except (UnicodeError, EOFError, RecursionError, zlib.error) as error:
        raise InputError(
            f"{path}: not complete, valid JSON in UTF-8 ({error}); write or fetch it again"
        ) from None
    _check_together(ground_truth, detections)
    return detections


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
    detections = _collect([checked], masks, source)
    _check_together(ground_truth, detections)
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


def _collect(pieces: Iterable[list[Any]], masks: bool, source: str) -> Detections:
    columns: list[list[Any]] = [[], [], []]
    rles: list[Any] = []
    qualities: dict[str, list[Any]] = {score.field: [] for score in SCORES}
    for entries in pieces:
        n = len(entries)
        sides = chain.from_iterable([entry.bbox for entry in entries])
        columns[0].append(np.fromiter([entry.image_id for entry in entries], np.int64, n))
        columns[1].append(np.fromiter(sides, float, 4 * n).reshape(n, 4))
        columns[2].append(np.fromiter([entry.score for entry in entries], float, n))
        if masks:
            rles.extend(entry.segmentation for entry in entries)
        for field in list(qualities):
            values = np.fromiter(map(attrgetter(field), entries), float, n)
            if np.isnan(values).any():  # None: an entry does without
                del qualities[field]
            else:
                qualities[field].append(values)
    arrays = []
    for column in (*columns, *qualities.values()):
        arrays.append(np.concatenate(column))
        column.clear()  # not twice in memory
    image_ids, boxes, scores, *others = arrays
    named = dict(zip(qualities, others))
    return Detections(image_ids, boxes, scores, rles if masks else None, named, source)


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
                "format (of a data set whose annotations have scores, that is the list "
                "'annotations' alone)"
            )
        rest = rest[1:]
        while more := f.read(PIECE):
            progress.update(len(more))
            cuts = [match.end() for match in BETWEEN_ENTRIES.finditer(rest)][: -CUTS - 1 : -1]
            failures = []
            for cut in cuts:
                try:
                    entries = decode(b"[" + rest[:cut].rstrip()[:-1] + b"]", done)
                except msgspec.ValidationError as error:
                    raise _describe(path, rest, done, error) from None
                except msgspec.DecodeError as error:
                    failures.append(error)  # an entry that has a list of objects was cut
                    continue
                yield entries
                done += len(entries)
                rest = rest[cut:]
                break
            if failures and len(failures) == len(cuts):
                raise _describe(path, rest, done, failures[0]) from None
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


def _check_together(ground_truth: GroundTruth, detections: Detections) -> None:
    """
    Raises InputError where an image is unknown, a mask has another size than its image, or the
    boxes cannot be XYWH in pixels.
    """
    try:
        image = ground_truth.index_images(detections.image_ids)
    except InputError as error:
        raise InputError(f"{detections.source}: {error}") from None
    if detections.masks:
        sizes = np.array([mask["size"] for mask in detections.masks], float)
        known = ground_truth.image_sizes[image]
        other = np.flatnonzero(((sizes != known) & np.isfinite(known)).any(axis=1))
        if len(other):
            raise InputError(
                f"{detections.source}: entry {other[0]}: mask of size "
                f"{list(detections.masks[other[0]]['size'])} on an image of size "
                f"{known[other[0]].astype(int).tolist()} (height, width) in {ground_truth.source}; "
                "write masks of the image's size"
            )
    some = slice(None, None, 1 + len(image) // 100_000)  # enough to recognise the format
    x, y, w, h = detections.boxes[some].T
    height, width = ground_truth.image_sizes[image[some]].T
    if len(x) < 10:
        return
    beyond = (x + w > 1.05 * width + 2) | (y + h > 1.05 * height + 2)
    fits_as_corners = (w >= x) & (h >= y) & (w <= width + 2) & (h <= height + 2)
    if beyond.mean() > SHARE_BEYOND and fits_as_corners.mean() > 0.999:
        entry = np.flatnonzero(beyond)[0] * some.step
        raise InputError(
            f"{detections.source}: entry {entry}: bbox {detections.boxes[entry].tolist()} reaches "
            f"beyond its image, as {100 * beyond.mean():.0f} % of the boxes do, and all fit if "
            "read as corners: they seem to be [x1, y1, x2, y2], write [x, y, width, height]"
        )
    if max(x.max(), y.max(), w.max(), h.max()) <= 1 and np.nanmin([height, width]) > 1:
        raise InputError(
            f"{detections.source}: entry 0: bbox {detections.boxes[0].tolist()}, as all others, is "
            "below one pixel: they seem to be fractions of the image size, write pixels"
        )


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
