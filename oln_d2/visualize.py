"""
Pictures of proposals: coloured by score, beside the objects of the ground truth and which of the
novel ones were found. The command `python -m oln_d2 visualize`.

Shapes: D boxes drawn, G objects of the image. Boxes are XYXY in absolute pixels.
"""

import base64
import html
import io
import os
from functools import lru_cache

import matplotlib
import msgspec
import numpy as np
import torch
from PIL import Image, ImageColor, ImageDraw, ImageFont, ImageOps
from pycocotools import mask as mask_utils
from torchvision.ops import box_convert, box_iou
from torchvision.transforms.functional import pil_to_tensor, to_pil_image
from torchvision.utils import draw_segmentation_masks
from tqdm import tqdm

from oln_d2.data.coco import load_coco
from oln_d2.data.images import open_image
from oln_d2.errors import InputError
from oln_d2.evaluation.coco_results import read_results
from oln_d2.evaluation.ground_truth import GroundTruth
from oln_d2.files import write_whole

FOUND_IOU = 0.5
# Longer side of the pictures in pixels: labels have one size, whatever the size of the image.
SIDES = 960, 1600
# Width of the lines and size of the text, in pixels of a picture with a longer side of 1000.
LINE, TEXT = 2.5, 15
TOLD = 10  # of the images that cannot be drawn
LABELS = 10  # of the best boxes; more would hide the image
# Fields of a results file beside the score, and what labels and legend call them.
QUALITY_NAMES = {
    "objectness": ("c", "centerness"),
    "box_score": ("b", "IoU of the box"),
    "mask_score": ("m", "IoU of the mask"),
}
# Apart from each other and from the colours of scores also for the colour-blind, and by their
# dashes.
KNOWN, FOUND, MISSED = "#33c3ff", "#3dff3d", "#ffffff"
SCORES = matplotlib.colormaps["plasma"]  # dark purple: low; yellow: high


def draw_proposals(image, boxes, scores, qualities=None, masks=None, objects=None):
    """
    Args:
        image (PIL.Image.Image): RGB.
        boxes (ndarray): shape (D, 4), all are drawn.
        scores (ndarray): shape (D,).
        qualities (dict[str, ndarray], optional): shape (D,), those of `QUALITY_NAMES` that there
            are; told in the labels of the best.
        masks (list[dict], optional): D masks as COCO RLE.
        objects (Objects, optional): the ground truth of the image.

    Returns:
        PIL.Image.Image: the image, enlarged or made smaller to `SIDES`, with the legend below.
    """
    width, height = image.size
    longer = max(image.size)
    scale = min(max(longer, SIDES[0]), SIDES[1]) / longer
    size = max(round(width * scale), 1), max(round(height * scale), 1)
    picture = image.resize(size, Image.Resampling.LANCZOS)
    unit = max(size) / 1000
    line, font = max(round(LINE * unit), 1), _font(max(round(TEXT * unit), 11))
    low, high = scores.min(initial=1), scores.max(initial=0)
    digits = 2 if high - low > 0.1 else 3
    colors = _colors(scores, low, high)
    order = np.argsort(-scores, kind="stable")
    if masks:
        picture = _tint(picture, masks, colors, order[:LABELS])
    draw = ImageDraw.Draw(picture)
    is_found = objects.found_by(boxes) if objects else None
    if objects:
        for box in objects.boxes[objects.seen]:
            _rectangle(draw, scale * box, KNOWN, round(1.5 * line))
    for i in order[::-1]:  # the best on top
        _rectangle(draw, scale * boxes[i], colors[i], line)
    used = []  # by labels
    if objects:
        novel = [(i, FOUND if is_found[i] else MISSED) for i in np.flatnonzero(~objects.seen)]
        for i, color in novel:
            _rectangle(draw, scale * objects.boxes[i], color, 2 * line, dashed=color == MISSED)
        for i, color in novel:
            _label(draw, scale * objects.boxes[i], objects.names[i], color, font, used, size, True)
    qualities = qualities or {}
    for i in order[:LABELS]:
        numbers = [f"{scores[i]:.{digits}f}"]
        numbers += [f"{QUALITY_NAMES[name][0]} {value[i]:.2f}" for name, value in qualities.items()]
        _label(draw, scale * boxes[i], "  ".join(numbers), colors[i], font, used, size)
    entries = (
        [("bar", f"{len(boxes)} proposals, score")] if len(boxes) else [(None, "no proposals")]
    )
    if len(boxes) > LABELS:
        entries[0] = "bar", f"{len(boxes)} proposals, the {LABELS} best with numbers; score"
    if qualities and len(boxes):
        entries.append((None, ", ".join(": ".join(QUALITY_NAMES[name]) for name in qualities)))
    if objects:
        entries += _entries_of(objects, is_found)
    legend = _legend(max(size[0], 480), entries, f"{low:.{digits}f}", f"{high:.{digits}f}")
    whole = Image.new("RGB", (legend.width, size[1] + legend.height), "white")
    whole.paste(picture, ((legend.width - size[0]) // 2, 0))
    whole.paste(legend, (0, size[1]))
    return whole


class Objects:
    """
    The ground truth of an image.

    Args:
        boxes (ndarray): shape (G, 4).
        seen (ndarray): shape (G,), bool: whether its category was seen in training.
        names (list[str]): of their categories.
    """

    def __init__(self, boxes, seen, names):
        self.boxes = boxes
        self.seen = seen
        self.names = names

    @classmethod
    def of(cls, ground_truth, index):
        """
        Args:
            ground_truth (GroundTruth)
            index (int): of the image. Crowds are left out.
        """
        gts = np.arange(*ground_truth.starts[index : index + 2])
        gts = gts[~ground_truth.crowd[gts]]
        names = [ground_truth.category_names[i] for i in ground_truth.category_ids[gts].tolist()]
        return cls(to_xyxy(ground_truth.boxes[gts]), ground_truth.seen[gts], names)

    def found_by(self, boxes):
        """(G,) bool: whether one of the boxes, shape (D, 4), overlaps with IoU 0.5 or more."""
        iou = box_iou(torch.from_numpy(self.boxes), torch.from_numpy(boxes)).numpy()
        return iou.max(axis=1, initial=0) >= FOUND_IOU


def to_xyxy(boxes):
    """Of boxes (D, 4) as XYWH."""
    return box_convert(torch.from_numpy(boxes), "xywh", "xyxy").numpy()


def contact_sheet(pictures, titles, columns=None):
    """
    Args:
        pictures (iterable[PIL.Image.Image]): one at least.
        titles (list[str]): told above them.
        columns (int, optional): as many as make the sheet about square, if not given.

    Returns:
        PIL.Image.Image: all of them in rows.
    """
    columns = columns or min(max(round(len(titles) ** 0.5), 1), 6)
    font, gap, title, width = _font(15), 8, 24, 480
    small = [ImageOps.contain(picture, (width, width)) for picture in pictures]
    rows = [small[i : i + columns] for i in range(0, len(small), columns)]
    heights = [max(picture.height for picture in row) + title + gap for row in rows]
    sheet = Image.new("RGB", (columns * (width + gap) + gap, sum(heights) + gap), "white")
    draw = ImageDraw.Draw(sheet)
    top = gap
    titles = iter(titles)
    for row, height in zip(rows, heights):
        for column, picture in enumerate(row):
            left, text = gap + column * (width + gap), next(titles)
            while draw.textlength(text, font=font) > width and len(text) > 4:
                text = "..." + text[4:]  # the end of a path tells more
            draw.text((left, top), text, fill="black", font=font)
            sheet.paste(picture, (left + (width - picture.width) // 2, top + title))
        top += height
    return sheet


@lru_cache
def _font(size):
    folder = os.path.join(matplotlib.get_data_path(), "fonts", "ttf")
    return ImageFont.truetype(os.path.join(folder, "DejaVuSans.ttf"), size)


def _colors(scores, low, high):
    place = (scores - low) / max(high - low, 1e-6)
    rgb = SCORES(0.15 + 0.8 * place.clip(0, 1))[..., :3]  # the ends are near black and near white
    return [tuple(color) for color in (255 * rgb).astype(int).reshape(-1, 3).tolist()]


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


def _tint(picture, rles, colors, order):
    """Colour the masks of the best boxes, each without what a better one covers."""
    masks = []
    for i in order:
        mask = np.asarray(Image.fromarray(mask_utils.decode(rles[i])).resize(picture.size)) > 0
        masks.append(mask & ~np.any(masks, axis=0))
    masks, colors = torch.from_numpy(np.stack(masks)), [colors[i] for i in order]
    # Where masks overlap it draws black.
    return to_pil_image(draw_segmentation_masks(pil_to_tensor(picture), masks, 0.4, colors))


def _entries_of(objects, is_found):
    """Of the legend: colour and text."""
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
            ramp = _colors(np.linspace(0, 1, 90), 0, 1)
            for step, color in enumerate(ramp):
                draw.line((x + step, y + 1, x + step, y + 15), fill=color)
            draw.text((x + 96, y), high, fill="black", font=font)
    return legend


def visualize(args):
    """
    The command `python -m oln_d2 visualize`.

    Args:
        args: the command's arguments, see `oln_d2.cli`.

    Returns:
        int: 0, or 1 if no image could be drawn.

    Raises:
        InputError: files or arguments that cannot be used; nothing is drawn then.
    """
    for option in ("top_k", "num_images"):
        value = getattr(args, option)
        if value is not None and value < 1:
            raise InputError(f"--{option.replace('_', '-')} {value}: expected 1 or more")
    if not os.path.isdir(args.images):
        raise InputError(f"--images {args.images}: no such folder; give the one of the images")
    content = load_coco(args.gt)
    has_objects = len(content["annotations"]) > 0
    if has_objects and not (args.split or args.seen):
        raise InputError(f"{args.gt}: holds objects; tell which are known by --split or --seen")
    ground_truth = GroundTruth(content, (args.split or args.seen) if has_objects else [], args.gt)
    file_names = {image["id"]: image.get("file_name", "") for image in content["images"]}
    detections = read_results(args.results, ground_truth, masks=args.masks)
    qualities = _read_qualities(args.results)
    index = ground_truth.index_images(detections.image_ids)
    chosen = np.unique(index)[: args.num_images]
    if len(chosen) == 0:
        raise InputError(f"{args.results}: holds no detection, so there is nothing to draw")
    os.makedirs(args.output, exist_ok=True)
    cards, failures = [], []
    for i in tqdm(chosen, desc="drawing", unit="image", disable=None):
        name = file_names[int(ground_truth.image_ids[i])]
        try:
            image = open_image(os.path.join(args.images, name))
        except InputError as error:
            failures.append(str(error))
            continue
        own = np.flatnonzero(index == i)
        own = own[np.argsort(-detections.scores[own], kind="stable")[: args.top_k]]
        found = {
            "boxes": to_xyxy(detections.boxes[own]),
            "scores": detections.scores[own],
            "qualities": {name: values[own] for name, values in qualities.items()},
        }
        objects = Objects.of(ground_truth, i) if has_objects else None
        masks = [detections.masks[j] for j in own] if args.masks else None
        save_picture(
            draw_proposals(image, **found, masks=masks, objects=objects),
            picture_path(args.output, name),
        )
        if args.html:
            cards.append(_card(name, image, found, objects))
    if args.html and cards:
        path = os.path.join(args.output, "index.html")
        with write_whole(path) as temporary, open(temporary, "w", encoding="utf-8") as f:
            f.write(PAGE + (PAGE_OF_OBJECTS if has_objects else "") + "".join(cards))
        print(f"Hover over the boxes in {path}")
    print(f"{len(chosen) - len(failures)} pictures are in {args.output}")
    if failures:
        more = [f"and {len(failures) - TOLD} more"] if len(failures) > TOLD else []
        print(f"{len(failures)} images could not be drawn:", *failures[:TOLD], *more, sep="\n  ")
    return int(len(failures) == len(chosen))


_Qualities = msgspec.defstruct(
    "_Qualities", [(name, float | None, None) for name in QUALITY_NAMES], gc=False
)


def _read_qualities(path):
    """dict[str, (D,)]: those of `QUALITY_NAMES` that all entries of a results file have."""
    with open(path, "rb") as f:
        entries = msgspec.json.decode(f.read(), type=list[_Qualities])
    columns = {name: [getattr(entry, name) for entry in entries] for name in QUALITY_NAMES}
    return {name: np.array(column) for name, column in columns.items() if None not in column}


def picture_path(folder, name):
    """Where the picture of the image `name` goes: under the same name, as JPEG."""
    is_jpeg = name.lower().endswith((".jpg", ".jpeg"))
    return os.path.join(
        folder, os.path.normpath(os.path.join("/", name))[1:] + ("" if is_jpeg else ".jpg")
    )


def save_picture(picture, path):
    with write_whole(path) as temporary:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        picture.save(temporary, quality=90)


PAGE = """<!doctype html><meta charset="utf-8"><title>Proposals</title>
<style>
body { font: 15px sans-serif; margin: 1em } figure { display: inline-block; margin: .5em }
svg { display: block; max-width: 100%; height: auto }
rect { fill: transparent; stroke-width: 2; vector-effect: non-scaling-stroke }
rect:hover { fill: #ffffff55; stroke-width: 5 }
</style>
<p>Hover over a box: its score, c (centerness), b (predicted IoU) and m (that of the mask) where
known. Proposals: purple (low score) to yellow.</p>
"""
PAGE_OF_OBJECTS = """\
<p>Objects: known ones blue, novel ones green if found at IoU 0.5, white and dashed if missed.</p>
"""


def _card(name, image, found, objects):
    """The image with boxes that tell their scores on hover, as HTML that needs no other file."""
    picture = image.copy()
    picture.thumbnail((SIDES[0], SIDES[0]))
    data = io.BytesIO()
    picture.save(data, "JPEG", quality=85)
    scores = found["scores"]
    colors = _colors(scores, scores.min(initial=1), scores.max(initial=0))
    rects = []  # the best last: on top
    for i in range(len(scores))[::-1]:
        text = f"{i + 1}: score {scores[i]:.3f}"
        for quality, values in found["qualities"].items():
            text += f", {QUALITY_NAMES[quality][0]} {values[i]:.3f}"
        rects.append(_rect(found["boxes"][i], "rgb({},{},{})".format(*colors[i]), text))
    if objects:
        for box, seen, hit, category in zip(
            objects.boxes, objects.seen, objects.found_by(found["boxes"]), objects.names
        ):
            kind = "known" if seen else "novel, found" if hit else "novel, missed"
            color = KNOWN if seen else FOUND if hit else MISSED
            dash = "" if seen or hit else ' stroke-dasharray="6"'
            rects.append(_rect(box, color, f"{category} ({kind})", dash + ' style="fill: none"'))
    return (
        f'<figure><figcaption>{html.escape(name)}</figcaption><svg width="{picture.width}" '
        f'viewBox="0 0 {image.width} {image.height}"><image width="{image.width}" '
        f'height="{image.height}" href="data:image/jpeg;base64,'
        f'{base64.b64encode(data.getvalue()).decode()}"/>{"".join(rects)}</svg></figure>\n'
    )


def _rect(box, color, text, more=""):
    x, y, w, h = (f"{v:.1f}" for v in (*box[:2], *(box[2:] - box[:2])))
    return (
        f'<rect x="{x}" y="{y}" width="{w}" height="{h}" stroke="{color}"{more}>'
        f"<title>{html.escape(text)}</title></rect>"
    )
