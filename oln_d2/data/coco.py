"""Reading and checking ground truth in COCO's JSON format."""

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

from pycocotools import mask as mask_utils

from oln_d2.checks import InputError
from oln_d2.data.splits import seen_names, split_category_ids
from oln_d2.files import StrPath, read_json

# Images with a shorter side than this are left out of training, as in the authors' code.
MIN_IMAGE_SIDE = 32


class _Content(dict[str, Any]):
    """A dict that can be referred to weakly."""


_held: WeakValueDictionary[tuple[object, ...], _Content] = WeakValueDictionary()


def load_coco(path: StrPath) -> dict[str, Any]:
    """
    Read a COCO ground truth file and check all that training or evaluation will rely on, so that
    bad data stops the run before work is lost.

    Args:
        path: JSON with the lists `images` (`id`, `width`, `height`), `annotations` (`image_id`,
            `category_id`, `bbox` as XYWH in absolute pixels; `area` and `iscrowd` optional here)
            and `categories` (`id`, `name`).

    Returns:
        the content of the file. Do not change it: as long as it is held anywhere, whoever loads the
        unchanged file gets the same object, without reading the file again.

    Raises:
        InputError: names the file, the entry and the field that is missing, repeated, of the wrong
            type, NaN, infinite or negative.
    """
    real = os.path.realpath(Path(path).expanduser())
    try:
        stat = os.stat(real)
    except OSError:  # reading it says why
        return _Content(_check(path, read_json(path)))
    key = real, stat.st_ino, stat.st_mtime_ns, stat.st_size
    content = _held.get(key)
    if content is None:
        content = _held[key] = _Content(_check(path, read_json(path)))
    return content


def _check(path: StrPath, content: Any) -> dict[str, Any]:
    if not isinstance(content, dict):
        raise InputError(
            f"{path}: holds a JSON {type(content).__name__}, not an object with 'images', "
            "'annotations' and 'categories'; a list is a results file, not ground truth"
        )
    for field in ("images", "annotations", "categories"):
        if not isinstance(content.get(field), list):
            raise InputError(
                f"{path}: field '{field}' is missing or not a list; not COCO ground truth"
            )
    for field in ("images", "categories"):
        if not content[field]:
            raise InputError(f"{path}: field '{field}' is empty; there is nothing to work on")
    image_ids = _unique_ids(path, "images", content["images"])
    category_ids = _unique_ids(path, "categories", content["categories"])
    for category in content["categories"]:
        if not isinstance(category.get("name"), str):
            raise InputError(f"{path}: categories entry with id {category['id']} has no 'name'")
    for index, annotation in enumerate(content["annotations"]):
        _check_annotation(path, index, annotation, image_ids, category_ids)
    return content


def _unique_ids(path: StrPath, field: str, entries: list[Any]) -> set[int]:
    ids = set()
    for index, entry in enumerate(entries):
        if not isinstance(entry, dict) or not isinstance(entry.get("id"), int):
            raise InputError(f"{path}: {field}[{index}] has no integer 'id'")
        if abs(entry["id"]) >= 2**63:
            raise InputError(f"{path}: {field}[{index}]: id {entry['id']} has more than 64 bits")
        if entry["id"] in ids:
            raise InputError(f"{path}: {field}[{index}]: id {entry['id']} occurs twice")
        ids.add(entry["id"])
    return ids


def _check_annotation(
    path: StrPath, index: int, annotation: Any, image_ids: set[int], category_ids: set[int]
) -> None:
    where = f"{path}: annotations[{index}]"
    if not isinstance(annotation, dict):
        raise InputError(f"{where} is not an object")
    for field, ids, home in (
        ("image_id", image_ids, "images"),
        ("category_id", category_ids, "categories"),
    ):
        value = annotation.get(field)
        if not isinstance(value, int) or value not in ids:
            raise InputError(f"{where}: {field} {value!r} is not in '{home}'")
    box: Any = annotation.get("bbox")
    try:
        fits = len(box) == 4 and all(map(math.isfinite, box)) and box[2] >= 0 and box[3] >= 0
    except TypeError:
        fits = False
    if not fits:
        raise InputError(
            f"{where}: bbox {box!r} is not four finite numbers x, y, width >= 0, height >= 0"
        )


def load_images(
    json_file: StrPath, image_root: StrPath, seen: StrPath | Sequence[str], training: bool
) -> list[dict[str, Any]]:
    """
    The images of a data set with their annotations, all checked before work starts.

    Args:
        json_file: annotations in COCO format.
        image_root: the folder that each `file_name` is relative to. An image without one, as in
            LVIS, gets the last two parts of its `coco_url`, e.g. "val2017/000000000139.jpg".
        seen: the seen categories, see :func:`oln_d2.data.splits.seen_names`.
        training: True selects what a model may see in training: annotations of seen categories
            that are no crowds, and only images of at least `MIN_IMAGE_SIDE` pixels a side that have
            such an annotation. False, for testing, keeps every image with every annotation.

    Returns:
        the entries of `images`, ascending by `id`, each with its `annotations`. Do not change the
        annotations, see :func:`load_coco`.

    Raises:
        InputError: a file that is missing or broken, an unknown category name, a missing image, or
            nothing left to train on.
    """
    content = load_coco(json_file)
    seen_ids, _ = split_category_ids(content["categories"], seen, json_file)
    entries = [{**image, "annotations": []} for image in content["images"]]
    for image in entries:
        if "file_name" not in image and isinstance(image.get("coco_url"), str):
            image["file_name"] = "/".join(image["coco_url"].split("/")[-2:])
    _check_images(json_file, image_root, entries)
    images = sorted(entries, key=lambda image: image["id"])
    by_id = {image["id"]: image for image in images}
    for annotation in content["annotations"]:
        by_id[annotation["image_id"]]["annotations"].append(annotation)
    if training:
        images = _select_for_training(images, set(seen_ids))
        if not images:
            raise InputError(
                f"{json_file}: no image of {MIN_IMAGE_SIDE} px or more a side has an annotation "
                f"(crowds do not count) of the seen categories ({', '.join(seen_names(seen))}); "
                "there is nothing to train on. Choose other seen categories or another file"
            )
    return images


def _check_images(json_file: StrPath, image_root: StrPath, images: list[dict[str, Any]]) -> None:
    """One listing per folder instead of a look-up per image: quick on network file systems too."""
    if not os.path.isdir(image_root):
        raise InputError(
            f"{image_root}: no such folder; the images of {json_file} are expected there"
        )
    listings = {}
    for index, image in enumerate(images):
        for field, kind in (("file_name", str), ("height", int), ("width", int)):
            if not isinstance(image.get(field), kind):
                raise InputError(f"{json_file}: images[{index}] has no '{field}'")
        folder, name = os.path.split(os.path.join(image_root, image["file_name"]))
        if folder not in listings:
            listings[folder] = set(os.listdir(folder)) if os.path.isdir(folder) else set()
        if name not in listings[folder]:
            raise InputError(
                f"{os.path.join(folder, name)}: no such image, though {json_file} lists it as "
                f"images[{index}]; fetch it or remove the entry"
            )


def _select_for_training(images: list[dict[str, Any]], seen_ids: set[int]) -> list[dict[str, Any]]:
    selected = []
    for image in images:
        annotations = [
            annotation
            for annotation in image["annotations"]
            if annotation["category_id"] in seen_ids and not annotation.get("iscrowd", 0)
        ]
        if annotations and min(image["height"], image["width"]) >= MIN_IMAGE_SIDE:
            selected.append({**image, "annotations": annotations})
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
            # A sum is finite if all its terms are, and much quicker than a check of each.
            if not all(math.isfinite(sum(polygon)) for polygon in mask):
                raise ValueError("a coordinate is not finite")
            return [polygon for polygon in mask if len(polygon) >= 6 and len(polygon) % 2 == 0]
        if list(mask["size"]) != size:
            raise ValueError(f"size {mask['size']} is not the image's {size}")
        if isinstance(mask["counts"], list):
            if sum(mask["counts"]) != size[0] * size[1]:
                raise ValueError("the counts do not make up the image")
            mask = mask_utils.frPyObjects(mask, *size)
        mask_utils.area(mask)
        return mask
    except Exception as error:  # pycocotools raises no narrower one
        raise InputError(
            f"{source}: the annotation with id {annotation.get('id')} of {image['file_name']} has "
            "a 'segmentation' that is neither polygons [[x1, y1, x2, y2, x3, y3, ...], ...] nor "
            f"RLE ({' '.join(str(error).split())}); correct it, or remove the field to train boxes"
        ) from None
