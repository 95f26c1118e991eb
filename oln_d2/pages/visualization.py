"""A results file as pictures, and as a page that shows the scores of each box."""

import base64
import io
import os
from typing import NamedTuple

import jinja2
import numpy as np
from tqdm import tqdm

from oln_d2.boxes import to_xyxy
from oln_d2.checks import POSITIVE_INT, InputError, check_limits
from oln_d2.data.coco import load_coco
from oln_d2.data.images import open_image
from oln_d2.drawing import (
    FOUND,
    KNOWN,
    MISSED,
    SIDES,
    Objects,
    draw_proposals,
    picture_path,
    save_picture,
    score_colors,
)
from oln_d2.evaluation.coco_results import read_results
from oln_d2.evaluation.ground_truth import GroundTruth
from oln_d2.files import StrPath, make_folder, write_whole
from oln_d2.scores import SCORES


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
    Draw the best proposals of each image of a results file, and the objects of the ground truth:
    known ones, novel ones that one of these proposals finds with an IoU of 0.5, novel ones missed.
    Images without a detection are left out.

    Args:
        gt: ground truth in COCO format, or `images.json` of `propose`, which has no objects.
        results: detections in COCO's results format.
        images: the folder of the images.
        output: a folder; pictures have the images' names, the page is `index.html`.
        seen: the known categories, see :func:`oln_d2.data.splits.seen_names`; needed where `gt` has
            objects.
        top_k: how many proposals of an image are drawn.
        num_images: only the first so many images.
        masks: also tint the masks of the 10 best.
        html: also write the page.

    Raises:
        InputError: files or arguments that cannot be used; nothing is drawn then.
    """
    check_limits(top_k=(top_k, POSITIVE_INT), num_images=(num_images, POSITIVE_INT))
    if not os.path.isdir(images):
        raise InputError(f"{images}: no such folder; give the one of the images")
    content = load_coco(gt)
    has_objects = len(content["annotations"]) > 0
    if has_objects and not seen:
        raise InputError(f"{gt}: holds objects; name the known categories (--split or --seen)")
    ground_truth = GroundTruth(content, (seen or []) if has_objects else [], gt)
    file_names = {image["id"]: image.get("file_name", "") for image in content["images"]}
    detections = read_results(results, ground_truth, masks=masks)
    index = ground_truth.index_images(detections.image_ids)
    chosen = np.unique(index)[:num_images]
    if len(chosen) == 0:
        raise InputError(f"{results}: holds no detection, so there is nothing to draw")
    make_folder(output)
    paths, failures, cards = [], [], []
    for i in tqdm(chosen, desc="drawing", unit="image", disable=None):
        name = file_names[int(ground_truth.image_ids[i])]
        try:
            image = open_image(os.path.join(images, name))
        except InputError as error:
            failures.append(str(error))
            continue
        own = np.flatnonzero(index == i)
        own = own[np.argsort(-detections.scores[own], kind="stable")[:top_k]]
        boxes, scores = to_xyxy(detections.boxes[own]), detections.scores[own]
        qualities = {field: values[own] for field, values in detections.qualities.items()}
        objects = Objects.of(ground_truth, i) if has_objects else None
        rles = [detections.masks[j] for j in own] if detections.masks is not None else None
        paths.append(picture_path(output, name))
        picture = draw_proposals(image, boxes, scores, qualities, masks=rles, objects=objects)
        save_picture(picture, paths[-1])
        if html:
            cards.append(_card(name, image, boxes, scores, qualities, objects))
    page = os.path.join(output, "index.html") if cards else None
    if page:
        environment = jinja2.Environment(
            loader=jinja2.PackageLoader("oln_d2.pages", "."), autoescape=True
        )
        text = environment.get_template("page.html").render(
            cards=cards, scores=SCORES, has_objects=has_objects
        )
        with write_whole(page) as temporary, open(temporary, "w", encoding="utf-8") as f:
            f.write(text)
    return Pictures(paths, page, failures)


def _card(name, image, boxes, scores, qualities, objects):
    """What the template shows of an image."""
    preview = image.copy()
    preview.thumbnail((SIDES[0], SIDES[0]))
    data = io.BytesIO()
    preview.save(data, "JPEG", quality=85)
    colors = score_colors(scores, scores.min(initial=1), scores.max(initial=0))
    rects = []  # the best last: on top
    for i in range(len(scores))[::-1]:
        numbers = [f"score {scores[i]:.3f}"]
        for score in SCORES:
            if score.field in qualities:
                numbers.append(f"{score.letter} {qualities[score.field][i]:.3f}")
        text = f"{i + 1}: {', '.join(numbers)}"
        rects.append({"box": boxes[i], "color": "rgb({},{},{})".format(*colors[i]), "text": text})
    if objects:
        found = objects.found_by(boxes)
        for box, seen, hit, category in zip(
            objects.boxes, objects.seen, found, objects.names, strict=True
        ):
            kind = "known" if seen else "novel, found" if hit else "novel, missed"
            color = KNOWN if seen else FOUND if hit else MISSED
            text = f"{category} ({kind})"
            rects.append({"box": box, "color": color, "text": text, "kind": kind.split()[-1]})
    return {
        "name": name,
        "image": image,
        "width": preview.width,
        "data": base64.b64encode(data.getvalue()).decode(),
        "rects": rects,
    }
