"""A results file as pictures, and as a page."""

import os
from collections.abc import Iterator
from itertools import chain
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from oln_d2.checks import POSITIVE_INT, InputError, check_limits
from oln_d2.data.coco import load_coco
from oln_d2.data.images import open_annotated
from oln_d2.data.lookup import find_images, image_name, image_size
from oln_d2.drawing import Objects, list_shortened, picture_path, save_picture
from oln_d2.evaluation.coco_results import read_results
from oln_d2.evaluation.ground_truth import GroundTruth
from oln_d2.files import StrPath, check_folder, lock_folder, make_folder
from oln_d2.pages.page import Item, write_page


class Pictures(NamedTuple):
    """What :func:`visualize` wrote."""

    paths: list[str]  # one picture an image
    page: str | None  # the HTML page
    failures: list[str]  # why an image could not be drawn, a sentence each


def visualize(
    gt: StrPath,
    results: StrPath,
    images: StrPath,
    output: StrPath,
    *,
    seen: str | list[str] | None = None,
    top_k: int = 10,
    num_images: int | None = None,
    masks: bool = False,
    html: bool = False,
) -> Pictures:
    """
    Draw the best proposals of each image of a results file, without near copies, and the objects of
    the ground truth: known ones, novel ones that one of these proposals finds with an IoU of 0.5,
    novel ones missed. Images without a detection are left out.

    Args:
        gt: ground truth in COCO format, or `images.json` of `propose`, which has no objects.
        results: detections in COCO's results format.
        images: the folder of the images.
        output: a folder; pictures have the images' names, the page is `index.html`.
        seen: the known categories, see :func:`oln_d2.data.splits.seen_names`; needed where `gt` has
            objects.
        top_k: how many proposals of an image are drawn; what the page shows at first.
        num_images: only the first so many images.
        masks: also tint the masks of the 10 best.
        html: also write the page.

    Raises:
        InputError: files or arguments that cannot be used; nothing is drawn then.
    """
    check_limits(top_k=(top_k, POSITIVE_INT), num_images=(num_images, POSITIVE_INT))
    content = load_coco(gt)
    has_objects = len(content["annotations"]) > 0
    if has_objects and not seen:
        raise InputError(f"{gt}: holds objects; name the known categories (--split or --seen)")
    ground_truth = GroundTruth(content, (seen or []) if has_objects else [], gt)
    detections = read_results(results, ground_truth, masks=masks)
    index = ground_truth.index_images(detections.image_ids)
    chosen = np.unique(index)[:num_images]
    if len(chosen) == 0:
        raise InputError(f"{results}: holds no detection, so there is nothing to draw")
    entries = {image["id"]: image for image in content["images"]}
    wanted = [entries[i] for i in ground_truth.image_ids[chosen].tolist()]
    where = find_images(images, wanted, gt, all_of_them=False)
    if not where:
        raise InputError(
            f"{images}: holds none of the images to be drawn, such as {image_name(wanted[0])}; "
            f"give the folder of the images of {gt}"
        )
    names = {i: os.path.relpath(path, images) for i, path in where.items()}
    originals = set(map(os.path.realpath, where.values()))
    replaced = originals & {os.path.realpath(picture_path(output, n)) for n in names.values()}
    if replaced:
        raise InputError(
            f"{output}: the pictures would replace {len(replaced)} of the images themselves, such "
            f"as {min(replaced)}; choose another --output"
        )
    pictures = Pictures([], None, [])

    def draw() -> Iterator[Item]:
        progress = tqdm(wanted, desc="drawing", unit="image", disable=None)
        for i, entry in zip(chosen, progress, strict=True):
            name = names.get(entry["id"]) or image_name(entry)
            try:
                if entry["id"] not in where:
                    raise InputError(f"{name}: is not among the images in {images}")
                path = where[entry["id"]]
                image, as_stored = open_annotated(path, image_size(entry), gt)
            except InputError as error:
                pictures.failures.append(str(error))
                continue
            own = detections.select(np.flatnonzero(index == i))
            found = own.to_proposals((image.height, image.width), name)
            objects = Objects.of(ground_truth, i) if has_objects else None
            pictures.paths.append(picture_path(output, name))
            save_picture(found.on(image).draw(top_k, objects), pictures.paths[-1])
            # The page refers to the file, unless it would be turned there.
            yield Item(name, image if as_stored else path, [found], objects)

    if html:
        check_folder(output, "visualize")
    make_folder(output)
    with lock_folder(output):
        items = draw()
        first = next(items, None)
        if html and first is not None:  # a page of nothing would hide why
            write_page(output, chain([first], items), number=top_k)
            pictures = pictures._replace(page=os.path.join(output, "index.html"))
        else:
            for _ in items:
                pass
        list_shortened(output, names.values())
    return pictures
