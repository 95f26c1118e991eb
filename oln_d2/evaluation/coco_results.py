"""Results files in COCO's format, also huge ones, read piece by piece."""

import os
import re
from itertools import chain
from typing import NamedTuple, TypedDict

import msgspec
import numpy as np
from tqdm import tqdm

from oln_d2.errors import InputError
from oln_d2.files import write_whole

# Bytes that are decoded at once: bounds the memory that is used beyond the arrays.
PIECE = 2**23
# How many places are tried to cut a piece, should entries hold lists of objects.
CUTS = 100
BETWEEN_ENTRIES = re.compile(rb"\}\s*,\s*(?=\{)")
# What OLN's score is made of: fields of detections, and of a results file's entries.
QUALITY_FIELDS = {
    "objectness": "objectness",
    "box_scores": "box_score",
    "mask_scores": "mask_score",
}
# XYXY boxes read as XYWH reach beyond their image; this share of them does not by accident.
SHARE_BEYOND = 0.2


class _Entry(msgspec.Struct, gc=False):
    image_id: int
    bbox: tuple[float, float, float, float]
    score: float


class _Mask(TypedDict):
    size: tuple[int, int]
    counts: str


class _MaskEntry(_Entry, gc=False):
    segmentation: _Mask


class Detections(NamedTuple):
    """The content of a results file, D detections in its order."""

    image_ids: np.ndarray  # (D,)
    boxes: np.ndarray  # (D, 4), XYWH, absolute pixels
    scores: np.ndarray  # (D,)
    masks: list | None  # D masks as COCO RLE


def read_results(path, ground_truth, masks=False):
    """
    Args:
        path (str): JSON, a list of {"image_id", "bbox": [x, y, width, height], "score"}; other
            fields, `category_id` too, are not looked at.
        ground_truth (GroundTruth): of the data set that was detected on.
        masks (bool): also read each entry's "segmentation".

    Returns:
        Detections

    Raises:
        InputError: a file that is missing or not complete, an entry that is not of this kind or of
            an unknown image, or boxes that are plainly not XYWH in pixels.
    """
    columns = [], [], [], []
    try:
        with open(path, "rb") as f:
            for entries in _read_pieces(path, f, _MaskEntry if masks else _Entry):
                n = len(entries)
                boxes = chain.from_iterable([entry.bbox for entry in entries])
                columns[0].append(np.fromiter([entry.image_id for entry in entries], np.int64, n))
                columns[1].append(np.fromiter(boxes, float, 4 * n).reshape(n, 4))
                columns[2].append(np.fromiter([entry.score for entry in entries], float, n))
                if masks:
                    columns[3].extend(entry.segmentation for entry in entries)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    arrays = []
    for column in columns[:3]:
        arrays.append(np.concatenate(column))
        column.clear()  # not twice in memory
    detections = Detections(*arrays, columns[3] if masks else None)
    try:
        _check_box_format(ground_truth, detections)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    return detections


def _read_pieces(path, f, entry_type):
    """Decode one piece of the file after the other, each cut where an entry ends."""
    decoder = msgspec.json.Decoder(list[entry_type])
    done = 0
    size = os.fstat(f.fileno()).st_size
    name = os.path.basename(path)
    with tqdm(total=size, unit="B", unit_scale=True, desc=name, disable=None) as progress:
        rest = f.read(PIECE).lstrip()
        if rest[:1] != b"[":
            what = "does not hold a list" if rest else "is empty"
            raise InputError(
                f"{path}: {what}; expected a list of detections in COCO's results format"
            )
        rest = rest[1:]
        while more := f.read(PIECE):
            progress.update(len(more))
            cuts = [match.end() for match in BETWEEN_ENTRIES.finditer(rest)][: -CUTS - 1 : -1]
            failures = []
            for cut in cuts:
                try:
                    entries = decoder.decode(b"[" + rest[:cut].rstrip()[:-1] + b"]")
                except msgspec.ValidationError as error:
                    raise _describe(path, rest, done, error) from None
                except msgspec.DecodeError as error:
                    failures.append(error)  # an entry that holds a list of objects was cut
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
            yield decoder.decode(b"[" + rest)
        except msgspec.DecodeError as error:
            raise _describe(path, rest, done, error) from None


def _describe(path, text, done, error):
    """
    Args:
        text (bytes): from the entry number `done` on.
        error (msgspec.DecodeError): of b"[" + text.

    Returns:
        InputError: that names file and entry.
    """
    reason = str(error)
    if isinstance(error, msgspec.ValidationError):
        place = re.search(r" - at `\$\[(\d+)\]\.?(.*)`$", reason)
        if place is None:
            return InputError(f"{path}: {reason}; expected COCO's results format")
        field = f"{place[2]}: " if place[2] else ""
        reason = reason[: place.start()].replace("`", "'")
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


def _check_box_format(ground_truth, detections):
    """Raises InputError where the boxes cannot be XYWH in pixels."""
    image = ground_truth.index_images(detections.image_ids)
    some = slice(None, None, 1 + len(image) // 100_000)  # to look at all of them tells no more
    x, y, w, h = detections.boxes[some].T
    height, width = ground_truth.image_sizes[image[some]].T
    if len(x) < 10:
        return
    beyond = (x + w > 1.05 * width + 2) | (y + h > 1.05 * height + 2)
    fits_as_corners = (w >= x) & (h >= y) & (w <= width + 2) & (h <= height + 2)
    if beyond.mean() > SHARE_BEYOND and fits_as_corners.mean() > 0.999:
        entry = np.flatnonzero(beyond)[0] * some.step
        raise InputError(
            f"entry {entry}: bbox {detections.boxes[entry].tolist()} reaches beyond its image, as "
            f"{100 * beyond.mean():.0f} % of the boxes do, and all fit if read as corners: "
            "they seem to be [x1, y1, x2, y2], write [x, y, width, height]"
        )
    if max(x.max(), y.max(), w.max(), h.max()) <= 1 and np.nanmin([height, width]) > 1:
        raise InputError(
            f"entry 0: bbox {detections.boxes[0].tolist()}, as all others, is below one pixel: "
            "they seem to be fractions of the image size, write pixels"
        )


def write_results(path, detections):
    """
    Write a COCO results file in which every detection is of category 1; all of it or nothing.

    Args:
        path (str)
        detections (iterable): for each image: image id, boxes (d, 4) as XYWH, scores (d,), its
            masks (list of d RLE) or None, and further fields by name (dict), each (d,). Numbers are
            written in full, so that reading gives the same again.
    """
    encoder = msgspec.json.Encoder()
    with write_whole(path) as temporary, open(temporary, "wb") as f:
        separator = b"[\n"
        for image, boxes, scores, masks, more in detections:
            entries = [
                {"image_id": image, "category_id": 1, "bbox": box, "score": score}
                for box, score in zip(boxes.tolist(), scores.tolist())
            ]
            for entry, mask in zip(entries, masks or ()):
                counts = mask["counts"]
                counts = counts.decode() if isinstance(counts, bytes) else counts
                entry["segmentation"] = {"size": mask["size"], "counts": counts}
            for name, values in more.items():
                for entry, value in zip(entries, values.tolist()):
                    entry[name] = value
            for entry in entries:
                f.write(separator)
                f.write(encoder.encode(entry))
                separator = b",\n"
        f.write(b"\n]\n" if separator == b",\n" else b"[]\n")
