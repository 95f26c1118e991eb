"""Reading and checking ground truth in COCO's JSON format."""

import logging
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import numpy as np

from oln_d2.boxes import BoxFormat
from oln_d2.checks import InputError
from oln_d2.data.lookup import find_images
from oln_d2.data.rle import check_polygons, to_rle
from oln_d2.data.splits import seen_names, split_category_ids
from oln_d2.files import StrPath, read_json

logger = logging.getLogger(__name__)

# A side of an image in pixels; larger ones are mistakes, and make everything slow.
MAX_IMAGE_SIDE = 10**6
# Images with a shorter side than this are left out of training, as in the authors' code.
MIN_IMAGE_SIDE = 32
# The "source" of annotations that an audit added and nobody has looked at.
PSEUDO = "oln-d2 audit, not reviewed"


class Content(dict[str, Any]):
    """What :func:`load_coco` returns."""


_held: WeakValueDictionary[tuple[object, ...], Content] = WeakValueDictionary()


def load_coco(path: StrPath) -> Content:
    """
    Read a COCO ground truth file and check all that training or evaluation will rely on, so that
    bad data stops the run before work is lost.

    Args:
        path: JSON, perhaps gzip, with the lists `images` (`id`, `width`, `height`), `annotations`
            (`image_id`, `category_id`, `bbox` as XYWH in absolute pixels; `area` and `iscrowd`
            optional) and `categories` (`id`, `name`).

    Returns:
        the content of the file, where ids, sizes and `iscrowd` are ints whatever they are in the
        file (see :func:`to_int`). Do not change it: as long as it is held anywhere, whoever loads
        the unchanged file gets the same object, without reading the file again.

    Raises:
        InputError: names the file, the entry and the field that is missing, repeated, of the wrong
            type, NaN, infinite or negative; or boxes that are plainly corners or fractions.
    """
    real = os.path.realpath(Path(path).expanduser())
    try:
        stat = os.stat(real)
    except OSError:  # reading it says why
        return check_coco(path, read_json(path))
    key = real, stat.st_ino, stat.st_mtime_ns, stat.st_size
    content = _held.get(key)
    if content is None:
        content = _held[key] = check_coco(path, read_json(path))
    return content


def check_coco(source: StrPath, content: Any) -> Content:
    """
    Args:
        source: named in errors.
        content: what a COCO ground truth file holds; not changed.

    Returns, raises:
        as :func:`load_coco`.
    """
    if isinstance(content, Content):
        return content
    if not isinstance(content, dict):
        raise InputError(
            f"{source}: holds a JSON {type(content).__name__}, not an object with 'images', "
            "'annotations' and 'categories'; a list is a results file, not ground truth"
        )
    for field in ("images", "annotations", "categories"):
        if not isinstance(content.get(field), list):
            raise InputError(
                f"{source}: field '{field}' is missing or not a list; not COCO ground truth: "
                "convert other formats, such as labelme's or YOLO's, to COCO's first"
            )
    for field in ("images", "categories"):
        if not content[field]:
            raise InputError(f"{source}: field '{field}' is empty; there is nothing to work on")
    images = _with_ids(source, "images", content["images"])
    for index, image in enumerate(images):
        for side in ("height", "width"):
            value = image.get(side)
            if value is not None and not (type(value) is int and value >= 0):
                image[side] = to_int(value)
                if image[side] is None or image[side] < 0:
                    raise InputError(
                        f"{source}: images[{index}]: {side} {value!r} is not a number of pixels; "
                        "write the image's size"
                    )
            if (image.get(side) or 0) > MAX_IMAGE_SIDE:
                raise InputError(
                    f"{source}: images[{index}]: {side} {image[side]} is more than "
                    f"{MAX_IMAGE_SIDE} pixels; write the image's size"
                )
    categories = _with_ids(source, "categories", content["categories"])
    for index, category in enumerate(categories):
        if not isinstance(category.get("name"), str):
            raise InputError(
                f"{source}: categories[{index}], with id {category['id']}, has no 'name' that is "
                "a text; write one"
            )
        if not is_unicode(category["name"]):
            raise InputError(
                f"{source}: categories[{index}]: name {category['name']!r} holds half a character; "
                "write it again as UTF-8"
            )
    image_ids = {image["id"] for image in images}
    category_ids = {category["id"] for category in categories}
    annotations = list(content["annotations"])
    for index, annotation in enumerate(annotations):
        if not _is_clean(annotation, image_ids, category_ids):
            where = f"{source}: annotations[{index}]"
            annotations[index] = _cleaned(where, annotation, image_ids, category_ids)
    sizes = {i["id"]: (i.get("height") or np.nan, i.get("width") or np.nan) for i in images}
    boxes = np.array([a["bbox"] for a in annotations], float).reshape(-1, 4)
    of_boxes = np.array([sizes[a["image_id"]] for a in annotations], float).reshape(-1, 2)
    BoxFormat(source, "annotations[{}]").check(boxes, of_boxes)
    lists = {"images": images, "annotations": annotations, "categories": categories}
    return Content({**content, **lists})


def is_unicode(text: str) -> bool:
    """Whether a text of a JSON file can be written: its escapes may be halves of characters."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def to_int(value: Any) -> int | None:
    """
    Returns:
        the integer that a number of a JSON file stands for, which tools also write as 96.0 or "96";
        None if it is something else.
    """
    if isinstance(value, float):
        return int(value) if value.is_integer() else None
    if isinstance(value, str):
        digits = re.fullmatch(r"\s*(-?[0-9]{1,19})(\.0*)?\s*", value)
        return int(digits[1]) if digits else None
    return value if type(value) is int else None


def _with_ids(source: StrPath, field: str, entries: list[Any]) -> list[dict[str, Any]]:
    """Copies of the entries, each with an `id` that is an int of its own."""
    ret, ids = [], set()
    for index, entry in enumerate(entries):
        where = f"{source}: {field}[{index}]"
        if not isinstance(entry, dict):
            raise InputError(f"{where} is not an object")
        number = to_int(entry.get("id"))
        if number is None:
            raise InputError(
                f"{where}: id {entry.get('id')!r} is not an integer; number the {field}"
            )
        if abs(number) >= 2**63:
            raise InputError(f"{where}: id {number} has more than 64 bits")
        if number in ids:
            raise InputError(f"{where}: id {number} occurs twice; number the {field} anew")
        ids.add(number)
        ret.append({**entry, "id": number})
    return ret


def _is_clean(annotation: Any, image_ids: set[int], category_ids: set[int]) -> bool:
    """Whether nothing is to be corrected; quick, for this is the rule."""
    try:
        image_id, category_id, box = (
            annotation["image_id"],
            annotation["category_id"],
            annotation["bbox"],
        )
        crowd = annotation.get("iscrowd", 0)
        x, y, width, height = box
        return (
            type(image_id) is type(category_id) is type(crowd) is int
            and image_id in image_ids
            and category_id in category_ids
            and (crowd == 0 or crowd == 1)
            and width >= 0
            and height >= 0
            and math.isfinite(x * x + y * y + width * width + height * height)
        )
    except (TypeError, LookupError, ValueError, AttributeError, OverflowError):
        return False


def _cleaned(
    where: str, annotation: Any, image_ids: set[int], category_ids: set[int]
) -> dict[str, Any]:
    if not isinstance(annotation, dict):
        raise InputError(f"{where} is not an object")
    clean = dict(annotation)
    for field, ids, home in (
        ("image_id", image_ids, "images"),
        ("category_id", category_ids, "categories"),
    ):
        clean[field] = to_int(annotation.get(field))
        if clean[field] not in ids:
            raise InputError(f"{where}: {field} {annotation.get(field)!r} is not in '{home}'")
    crowd = annotation.get("iscrowd")
    clean["iscrowd"] = int(crowd or 0) if crowd is None or crowd in (False, True) else to_int(crowd)
    if clean["iscrowd"] not in (0, 1):
        raise InputError(f"{where}: iscrowd {crowd!r} is neither 0 nor 1; write 1 for a crowd")
    box: Any = annotation.get("bbox")
    try:
        # The squares: areas are finite, too.
        finite = all(math.isfinite(side * side) for side in box)
        fits = len(box) == 4 and finite and box[2] >= 0 and box[3] >= 0
    except (TypeError, LookupError, OverflowError):
        fits = False
    if not fits:
        raise InputError(
            f"{where}: bbox {box!r} is not four finite numbers x, y, width >= 0, height >= 0"
        )
    return clean


def load_images(
    json_file: StrPath, image_root: StrPath, seen: StrPath | Sequence[str], training: bool
) -> list[dict[str, Any]]:
    """
    The images of a data set with their annotations, all checked before work starts.

    Args:
        json_file: annotations in COCO format.
        image_root: the folder of the images, see :func:`oln_d2.data.lookup.find_images`.
        seen: the seen categories, see :func:`oln_d2.data.splits.seen_names`.
        training: True selects what a model may see in training: annotations of seen categories
            that are no crowds, and only images of at least `MIN_IMAGE_SIDE` pixels a side that have
            such an annotation; what an audit added without a review (`PSEUDO`) is such an
            annotation, whatever its category. False, for testing, keeps every image with every
            annotation.

    Returns:
        the entries of `images`, ascending by `id`, each with its `annotations`, and with the path
        of the image from `image_root` on as `file_name`. Do not change the annotations, see
        :func:`load_coco`.

    Raises:
        InputError: a file that is missing or broken, an unknown category name, a missing image, or
            nothing left to train on.
    """
    content = load_coco(json_file)
    seen_ids, _ = split_category_ids(content["categories"], seen, json_file)
    entries = [{**image, "annotations": []} for image in content["images"]]
    for index, image in enumerate(entries):
        for side in ("height", "width"):
            if not (pixels := image.get(side)):
                where = f"{json_file}: images[{index}]"
                raise InputError(f"{where}: {side} is {pixels}; write the image's size")
    paths = find_images(image_root, entries, json_file)
    for image in entries:
        image["file_name"] = os.path.relpath(paths[image["id"]], image_root)
    images = sorted(entries, key=lambda image: image["id"])
    by_id = {image["id"]: image for image in images}
    for annotation in content["annotations"]:
        by_id[annotation["image_id"]]["annotations"].append(annotation)
    if training:
        images = _select_for_training(images, set(seen_ids), json_file)
        if not images:
            raise InputError(
                f"{json_file}: no image of {MIN_IMAGE_SIDE} px or more a side has an annotation "
                f"(crowds do not count) of the seen categories ({', '.join(seen_names(seen))}); "
                "there is nothing to train on. Choose other seen categories or another file"
            )
    return images


def _select_for_training(
    images: list[dict[str, Any]], seen_ids: set[int], source: StrPath
) -> list[dict[str, Any]]:
    selected = []
    unseen = crowds = small = in_small = 0
    for image in images:
        seen = [
            a
            for a in image["annotations"]
            if a["category_id"] in seen_ids or a.get("source") == PSEUDO
        ]
        annotations = [a for a in seen if not a.get("iscrowd")]
        unseen += len(image["annotations"]) - len(seen)
        crowds += len(seen) - len(annotations)
        if min(image["height"], image["width"]) < MIN_IMAGE_SIDE:
            small += 1
            in_small += len(annotations)
        elif annotations:
            selected.append({**image, "annotations": annotations})
    reasons = {
        f"images below {MIN_IMAGE_SIDE} px a side": small,
        "images without an object to train on": len(images) - len(selected) - small,
        "objects of categories that are not seen": unseen,
        "crowds": crowds,
        "objects in images that are too small": in_small,
    }
    left_out = [f"{number} {reason}" for reason, number in reasons.items() if number]
    logger.info(
        f"{source}: {len(selected)} of {len(images)} images and "
        f"{sum(len(image['annotations']) for image in selected)} of "
        f"{sum(len(image['annotations']) for image in images)} objects are trained on; left out: "
        f"{', '.join(left_out) or 'none'}"
    )
    return selected


def read_mask(
    annotation: dict[str, Any], image: dict[str, Any], source: StrPath
) -> list[list[float]] | dict[str, Any] | None:
    """
    Args:
        annotation: an entry of `annotations`.
        image: the entry of its image, with `file_name`, `height` and `width`.
        source: the file they come from; named in errors.

    Returns:
        the annotation's `segmentation` as polygons [x1, y1, x2, y2, ...] in absolute pixels,
        without those of fewer than 3 points (which may leave none); or as compressed RLE; None if
        it has none.

    Raises:
        InputError: a `segmentation` that is neither.
    """
    mask = annotation.get("segmentation")
    if mask is None:
        return None
    size = [image["height"], image["width"]]
    try:
        if isinstance(mask, list):
            check_polygons(mask, *size)
            return [polygon for polygon in mask if len(polygon) >= 6 and len(polygon) % 2 == 0]
        if list(mask["size"]) != size:
            raise ValueError(f"size {mask['size']} is not the image's {size}")
        return to_rle(mask, *size)
    except Exception as error:  # pycocotools raises no narrower one
        raise InputError(
            f"{source}: the annotation with id {annotation.get('id')} of {image['file_name']} has "
            "a 'segmentation' that is neither polygons [[x1, y1, x2, y2, x3, y3, ...], ...] nor "
            f"RLE ({' '.join(str(error).split())}); correct it, or remove the field to train boxes"
        ) from None
