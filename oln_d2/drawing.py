"""
Pictures of proposals: coloured by score, beside the objects of the ground truth and which of the
novel ones were found.

Shapes: D boxes drawn, G objects of the image. Boxes are XYXY in absolute pixels.
"""

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageColor, ImageDraw, ImageFont, ImageOps
from pycocotools import mask as mask_utils

from oln_d2.boxes import nms, to_xywh, to_xyxy
from oln_d2.files import StrPath, write_file, write_whole
from oln_d2.scores import SCORES

FOUND_IOU = 0.5
FOLD_IOU = 0.5  # a box that overlaps a better one by more is a copy of it
TOP = 20  # boxes drawn
MAX_NAME = 255  # bytes of the name of a file
# Longer side of the pictures in pixels: labels have one size, whatever the size of the image.
SIDES = 960, 1600
# Width of the lines of the best and size of the text, in pixels of a picture with a longer side of
# 1000; the weakest line has `WEAK` of that width.
LINE, TEXT = 4, 13
WEAK = 0.4
TINT = 0.4  # how much of the colour of a mask is seen
LABELS = 10  # the best boxes have one; more would hide the image
# Apart from each other and from the colours of scores also for the colour-blind, and by their
# dashes.
KNOWN, FOUND, MISSED = "#33c3ff", "#3dff3d", "#ffffff"
# The bright part of plasma, red (low) to yellow (high): with a dark rim it is seen on any ground.
COLORMAP, DIMMEST, BRIGHTEST = "plasma", 0.6, 0.95
_SCORE_OF = {score.field: score for score in SCORES}


def draw_proposals(
    image: Image.Image,
    boxes: NDArray[np.float64],
    scores: NDArray[np.float64],
    qualities: Mapping[str, NDArray[np.float64]] | None = None,
    masks: Sequence[Mapping[str, Any]] | None = None,
    objects: "Objects | None" = None,
    top: int = TOP,
    least: float = 0.0,
) -> Image.Image:
    """
    Args:
        image: RGB.
        boxes (D, 4): those of :func:`choose` are drawn.
        scores (D,)
        qualities: by field of `SCORES`, (D,) each; in the labels of the best where there is room.
        masks: D COCO RLE.
        objects: the ground truth of the image.
        top: how many boxes are drawn at most.
        least: see :func:`choose`.

    Returns:
        the image, enlarged or reduced to `SIDES`, with the legend below.
    """
    order = choose(boxes, scores, top, least)
    boxes, scores = boxes[order], scores[order]
    qualities = {name: values[order] for name, values in (qualities or {}).items()}
    width, height = image.size
    longer = max(image.size)
    scale = min(max(longer, SIDES[0]), SIDES[1]) / longer
    size = max(round(width * scale), 1), max(round(height * scale), 1)
    picture = image.resize(size, Image.Resampling.LANCZOS)
    unit = max(size) / 1000
    line, font = max(round(LINE * unit), 1), _font(max(round(TEXT * unit), 11))
    low, high = scores.min(initial=1), scores.max(initial=0)
    digits = 2 if high - low > 0.1 else 3
    colors = score_colors(scores, low, high)
    lines = LINE * unit * (WEAK + (1 - WEAK) * _place(scores, low, high))
    if masks:
        picture = _tint(picture, [masks[i] for i in order[:LABELS]], colors)
    draw = ImageDraw.Draw(picture)
    if objects:
        is_found = objects.found_by(boxes)
        for box in objects.boxes[objects.seen]:
            _rectangle(draw, scale * box, KNOWN, max(line // 2, 1))
    for i in range(len(boxes))[::-1]:  # the best on top
        _rectangle(draw, scale * boxes[i], colors[i], max(round(lines[i]), 1))
    used = []  # by labels
    if objects:
        novel = [(i, FOUND if is_found[i] else MISSED) for i in np.flatnonzero(~objects.seen)]
        for j, color in novel:
            _rectangle(draw, scale * objects.boxes[j], color, line + 1, dashed=color == MISSED)
        for j, color in novel:
            _label(draw, scale * objects.boxes[j], objects.names[j], color, font, used, size, True)
    for i in range(len(boxes))[:LABELS]:
        text = f"{scores[i]:.{digits}f}"
        more = [text, *(f"{_SCORE_OF[name].letter} {v[i]:.2f}" for name, v in qualities.items())]
        if font.getlength("  ".join(more)) < scale * (boxes[i, 2] - boxes[i, 0]):
            text = "  ".join(more)  # on small boxes it would hide others
        _label(draw, scale * boxes[i], text, colors[i], font, used, size)
    # The legend's: a colour, "bar" or "", and a text.
    best = f", the {LABELS} best with numbers; score" if len(boxes) > LABELS else ", score"
    entries = [("bar", f"{len(boxes)} proposals{best}")] if len(boxes) else [("", "no proposals")]
    if qualities and len(boxes):
        named = (_SCORE_OF[name] for name in qualities)
        entries.append(("", ", ".join(f"{score.letter}: {score.meaning}" for score in named)))
    if objects:
        entries += _entries_of(objects, is_found)
    legend = _legend(max(size[0], 480), entries, f"{low:.{digits}f}", f"{high:.{digits}f}")
    whole = Image.new("RGB", (legend.width, size[1] + legend.height), "white")
    whole.paste(picture, ((legend.width - size[0]) // 2, 0))
    whole.paste(legend, (0, size[1]))
    return whole


def choose(
    boxes: NDArray[np.float64], scores: NDArray[np.float64], top: int = TOP, least: float = 0.0
) -> NDArray[np.int64]:
    """
    Args:
        boxes (D, 4)
        scores (D,)
        top: how many at most.
        least: the least score, but of the best one.

    Returns:
        indices of the best, best first, without copies: boxes that overlap a better one by an IoU
        above `FOLD_IOU`.
    """
    order = np.argsort(-scores, kind="stable")
    order = order[: max((scores >= least).sum(), 1)]
    return order[nms(boxes[order], FOLD_IOU)[:top]]


@dataclass(eq=False)
class Objects:
    """The ground truth of an image."""

    boxes: NDArray[np.float64]  # (G, 4)
    seen: NDArray[np.bool_]  # (G,), whether the category of each was seen in training
    names: list[str]  # G names, their categories'

    @classmethod
    def of(cls, ground_truth: Any, index: int) -> "Objects":
        """Those of the image at `index` of a `GroundTruth`; crowds are left out."""
        gts = np.arange(*ground_truth.starts[index : index + 2])
        gts = gts[~ground_truth.crowd[gts]]
        names = [ground_truth.category_names[i] for i in ground_truth.category_ids[gts].tolist()]
        return cls(to_xyxy(ground_truth.boxes[gts]), ground_truth.seen[gts], names)

    def found_by(self, boxes: NDArray[np.float64]) -> NDArray[np.bool_]:
        """(G,): whether one of the boxes (D, 4) overlaps with an IoU of `FOUND_IOU` or more."""
        if not (len(self.boxes) and len(boxes)):
            return np.zeros(len(self.boxes), bool)
        iou = mask_utils.iou(to_xywh(boxes), to_xywh(self.boxes), [0] * len(self.boxes))
        return iou.max(axis=0) >= FOUND_IOU


def contact_sheet(
    pictures: Iterable[Image.Image], titles: Sequence[str], columns: int | None = None
) -> Image.Image:
    """
    Args:
        pictures: one at least.
        titles: shown above them.
        columns: if not given, as many as make the sheet about square.

    Returns:
        all of them in rows.
    """
    columns = columns or min(max(round(len(titles) ** 0.5), 1), 6)
    font, gap, title, width = _font(15), 8, 24, 480
    small = [ImageOps.contain(picture, (width, width)) for picture in pictures]
    rows = [small[i : i + columns] for i in range(0, len(small), columns)]
    heights = [max(picture.height for picture in row) + title + gap for row in rows]
    sheet = Image.new("RGB", (columns * (width + gap) + gap, sum(heights) + gap), "white")
    draw = ImageDraw.Draw(sheet)
    top = gap
    texts = iter(titles)
    for row, height in zip(rows, heights, strict=True):
        for column, picture in enumerate(row):
            left, text = gap + column * (width + gap), next(texts)
            while draw.textlength(text, font=font) > width and len(text) > 4:
                text = "..." + text[4:]  # the end of a path matters most
            draw.text((left, top), text, fill="black", font=font)
            sheet.paste(picture, (left + (width - picture.width) // 2, top + title))
        top += height
    return sheet


@lru_cache
def _font(size):
    import matplotlib

    folder = os.path.join(matplotlib.get_data_path(), "fonts", "ttf")
    return ImageFont.truetype(os.path.join(folder, "DejaVuSans.ttf"), size)


def score_colors(scores, low, high):
    """D colours (red, green, blue), 0 to 255, of scores (D,) between `low` and `high`."""
    from matplotlib import colormaps

    rgb = colormaps[COLORMAP](DIMMEST + (BRIGHTEST - DIMMEST) * _place(scores, low, high))[..., :3]
    return [tuple(color) for color in (255 * rgb).astype(int).reshape(-1, 3).tolist()]


def _place(scores, low, high):
    """(D,): where scores (D,) lie between `low`, 0, and `high`, 1."""
    return ((scores - low) / max(high - low, 1e-6)).clip(0, 1)


def _rectangle(draw, box, color, width, dashed=False):
    """With a dark rim, to be seen on bright ground."""
    x1, y1, x2, y2 = (int(v) for v in box.round())
    x2, y2 = max(x1, x2 - 1), max(y1, y2 - 1)
    draw.rectangle((x1 - 1, y1 - 1, x2 + 1, y2 + 1), outline="black", width=width + 2)
    if not dashed:
        draw.rectangle((x1, y1, x2, y2), outline=color, width=width)
        return
    dash = 5 * width
    for x in range(x1, x2, 2 * dash):
        for y in (y1, y2 - width + 1):
            draw.rectangle((x, y, min(x + dash, x2), max(y + width - 1, y)), fill=color)
    for y in range(y1, y2, 2 * dash):
        for x in (x1, x2 - width + 1):
            draw.rectangle((x, y, max(x + width - 1, x), min(y + dash, y2)), fill=color)


def _label(draw, box, text, color, font, used, size, below=False):
    """At a corner of the box, where it hides no other label; nowhere, if there is no such place."""
    _, _, right, bottom = draw.textbbox((0, 0), text, font=font)
    w, h = right + 6, bottom + 4
    x1, y1, x2, y2 = box
    places = [(x1, y1 - h), (x1, y1), (x2 - w, y1), (x1, y2 - h), (x2 - w, y2 - h), (x1, y2)]
    for x, y in places[3:] + places[:3] if below else places:
        x, y = (
            int(np.clip(v, 0, max(limit, 0))) for v, limit in ((x, size[0] - w), (y, size[1] - h))
        )
        if all(x >= c or x + w <= a or y >= d or y + h <= b for a, b, c, d in used):
            used.append((x, y, x + w, y + h))
            draw.rectangle((x, y, x + w, y + h), fill=color)
            red, green, blue = ImageColor.getrgb(color) if isinstance(color, str) else color
            bright = 0.3 * red + 0.6 * green + 0.1 * blue > 110
            draw.text((x + 3, y + 1), text, fill="black" if bright else "white", font=font)
            return


def _tint(picture, rles, colors):
    """Colour masks, best first, each without what a better one covers."""
    pixels = np.array(picture, float)
    covered = np.zeros(pixels.shape[:2], bool)
    for rle, color in zip(rles, colors):
        mask = np.asarray(Image.fromarray(mask_utils.decode(rle)).resize(picture.size)) > 0
        own = mask & ~covered
        pixels[own] += TINT * (np.array(color) - pixels[own])
        covered |= mask
    return Image.fromarray(pixels.round().astype(np.uint8))


def _entries_of(objects, is_found):
    """Colour and text of the legend."""
    novel = ~objects.seen
    return [
        (KNOWN, f"known object ({objects.seen.sum()})"),
        (FOUND, f"novel, found at IoU {FOUND_IOU} ({is_found[novel].sum()} of {novel.sum()})"),
        (MISSED, "novel, missed"),
    ]


def _legend(width, entries, low, high):
    """Colours of scores and of objects, below the picture, in as many lines as they need."""
    font = _font(14)
    places, x, y = [], 6, 6
    for kind, text in entries:
        length = font.getlength(text) + 14 + (206 if kind == "bar" else 26 if kind else 0)
        if x > 6 and x + length > width:
            x, y = 6, y + 24
        places.append((x, y, kind, text))
        x += length
    legend = Image.new("RGB", (width, y + 26), "white")
    draw = ImageDraw.Draw(legend)
    for x, y, kind, text in places:
        if kind and kind != "bar":
            draw.rectangle((x, y + 1, x + 20, y + 15), outline="black", width=5)
            inner = (x + 1, y + 2, x + 19, y + 14)
            if kind == MISSED:
                for left in (x + 1, x + 13):
                    draw.rectangle((left, y + 2, left + 6, y + 14), outline=kind, width=3)
            else:
                draw.rectangle(inner, outline=kind, width=3)
            x += 26
        draw.text((x, y), text, fill="black", font=font)
        if kind == "bar":
            x += font.getlength(text) + 8
            draw.text((x, y), low, fill="black", font=font)
            x += 44
            ramp = score_colors(np.linspace(0, 1, 90), 0, 1)
            for step, color in enumerate(ramp):
                draw.line((x + step, y + 1, x + step, y + 15), fill=color)
            draw.text((x + 96, y), high, fill="black", font=font)
    return legend


def picture_path(folder: StrPath, name: str) -> str:
    """
    Where the picture of the image `name` goes: under the same name, as JPEG. One that is longer
    than file systems take is shortened, see :func:`list_shortened`.
    """
    parts = _picture_name(name).split(os.sep)
    for i, part in enumerate(parts):
        if len(part.encode()) > MAX_NAME:
            digest = hashlib.sha256(part.encode()).hexdigest()[:12]
            begin = part.encode()[: MAX_NAME - 20].decode(errors="ignore")
            parts[i] = f"{begin}-{digest}{os.path.splitext(part)[1][:5]}"
    return os.path.join(folder, *parts)


def _picture_name(name):
    is_jpeg = name.lower().endswith((".jpg", ".jpeg"))
    return os.path.normpath(os.path.join("/", name))[1:] + ("" if is_jpeg else ".jpg")


def list_shortened(folder: StrPath, names: Iterable[str]) -> None:
    """Write the names that :func:`picture_path` shortens to `shortened.txt`, if there are any."""
    short = {name: picture_path("", name) for name in names}
    lines = [f"{path}\t{name}\n" for name, path in short.items() if path != _picture_name(name)]
    if lines:
        write_file(os.path.join(folder, "shortened.txt"), "".join(lines))


def save_picture(picture: Image.Image, path: StrPath) -> None:
    """Write it, making its folder. Raises InputError where that fails; then nothing is written."""
    with write_whole(path) as temporary:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        picture.save(temporary, quality=90)
