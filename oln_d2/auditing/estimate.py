"""
How much an audit finds, measured on annotations that it is not shown.

Shapes: C candidates; H hidden objects; N images. Boxes are XYWH in absolute pixels.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as mask_utils

from oln_d2.auditing.candidates import Candidates, find_candidates
from oln_d2.auditing.decisions import SOURCE
from oln_d2.data.coco import PSEUDO
from oln_d2.drawing import FOUND_IOU
from oln_d2.evaluation.coco_results import Detections
from oln_d2.evaluation.open_world import AREA_RANGES
from oln_d2.evaluation.result import draw_images

SHARE = 0.3  # of all objects that is hidden at random
DEPTHS = 100, 200, 500, 1000, 2000, 5000, 10000  # candidates that somebody reads
READ = 500, 2000  # those that the summary is about
DRAWS = 1000  # of images, for the 95 % intervals


class Found(NamedTuple):
    """How much of what was hidden the first candidates contain; all in [0, 1]."""

    hidden: int  # objects
    depths: list[int]  # the number of candidates that are read
    recall: list[float]  # of the hidden objects, at each depth
    low: list[float]  # of its 95 % interval over images
    high: list[float]
    precision: list[float]  # hidden objects among the candidates read: a lower limit
    by_size: dict[str, list[float]]  # the recall, by the size of the hidden objects
    by_category: dict[str, list[float]]  # and by their category


def estimate(
    detections: Detections,
    content: Mapping[str, Any],
    options: Mapping[str, float],
    seed: int = 0,
) -> dict[str, Found]:
    """
    Hide annotations and count how many of them the candidates contain that are then listed: those
    of half of the categories, then those of the other half ("categories": objects of a kind that
    nobody annotated); and a share of all ("at random": objects that were forgotten).

    Args:
        detections: of all images.
        content: the COCO file.
        options: of :func:`find_candidates`.
        seed: of the halves, the share, and the draws of images.

    Returns:
        for both ways of hiding, as far as there are categories or objects to hide. Precision and
        recall are those of one list, on average over the halves.
    """
    rng = np.random.default_rng(seed)
    # What an audit added would be found again by its own boxes.
    objects = [
        a
        for a in content["annotations"]
        if not a.get("iscrowd") and a.get("source") not in (SOURCE, PSEUDO)
    ]
    crowds = [a for a in content["annotations"] if a.get("iscrowd")]
    objects.sort(key=lambda a: (a["image_id"], a["category_id"], a["bbox"]))  # not by the file's
    used = sorted({a["category_id"] for a in objects})
    names = {c["id"]: c["name"] for c in content["categories"]}
    ret = {}
    if len(used) > 1:
        half = set(rng.permutation(used)[: len(used) // 2].tolist())
        is_first = np.array([a["category_id"] in half for a in objects])
        ret["categories"] = _measure(
            detections, objects, crowds, [is_first, ~is_first], names, options, seed
        )
    hidden = rng.random(len(objects)) < SHARE
    if hidden.any():
        ret["at random"] = _measure(detections, objects, crowds, [hidden], names, options, seed)
    return ret


def _measure(detections, objects, crowds, groups, names, options, seed):
    """:class:`Found` of lists made without each of some groups, (objects,) bools, in turn."""
    hidden, parts, lists = [], [], []
    for group in groups:
        kept: dict[int, list[Any]] = {}
        for annotation in [*crowds, *(a for a, h in zip(objects, group) if not h)]:
            kept.setdefault(annotation["image_id"], []).append(annotation)
        own = [a for a, h in zip(objects, group) if h]
        candidates = find_candidates(detections, kept, **options)
        lists.append(len(candidates.scores))
        parts.append(places(candidates, own))
        hidden += own
    place = np.concatenate(parts)
    depths = [n for n in DEPTHS if n <= min(lists)] or [max(min(lists), 1)]
    found = place[:, None] < np.array(depths)  # (H, depths)
    images, of_image = np.unique([a["image_id"] for a in hidden], return_inverse=True)
    draws = draw_images(len(images), DRAWS, seed)
    hits = np.stack([np.bincount(of_image, f, len(images)) for f in found.T], axis=1)
    totals = draws @ np.bincount(of_image, minlength=len(images)).astype(np.float32)
    low, high = np.quantile(
        draws @ hits.astype(np.float32) / totals[:, None], [0.025, 0.975], axis=0
    )
    areas = np.array([a["bbox"][2] * a["bbox"][3] for a in hidden])
    kinds = np.array([a["category_id"] for a in hidden])
    sizes = {
        name: (areas >= least) & (areas <= most) for name, (least, most) in AREA_RANGES.items()
    }

    def recall(chosen):
        return found[chosen].mean(axis=0).round(4).tolist()

    return Found(
        hidden=len(hidden),
        depths=depths,
        recall=recall(slice(None)),
        low=low.round(4).tolist(),
        high=high.round(4).tolist(),
        precision=(found.sum(axis=0) / len(groups) / np.array(depths)).round(4).tolist(),
        by_size={name: recall(chosen) for name, chosen in sizes.items() if chosen.any()},
        by_category={names[k]: recall(kinds == k) for k in np.unique(kinds).tolist()},
    )


def places(candidates: Candidates, objects: Sequence[Mapping[str, Any]]) -> NDArray[np.float64]:
    """
    Args:
        candidates: C of them, in order.
        objects: H annotations.

    Returns:
        shape (H,), at which place, from 0, a candidate shows each object by an IoU of
        `FOUND_IOU`, each candidate one object; infinite for those that none shows.
    """
    ret = np.full(len(objects), np.inf)
    of_image: dict[int, list[int]] = {}
    for j, annotation in enumerate(objects):
        of_image.setdefault(annotation["image_id"], []).append(j)
    order = np.argsort(candidates.image_ids, kind="stable")  # places ascend within an image
    ids, begins = np.unique(candidates.image_ids[order], return_index=True)
    for image, index in zip(ids.tolist(), np.split(order, begins[1:])):
        own = of_image.get(image)
        if own is None:
            continue
        boxes = np.array([objects[j]["bbox"] for j in own], float)
        overlap = mask_utils.iou(candidates.boxes[index], boxes, [0] * len(own))
        for place, row in zip(index, overlap):
            row = np.where(np.isinf(ret[own]), row, 0)
            if row.max() >= FOUND_IOU:
                ret[own[int(row.argmax())]] = place
    return ret


def sentences(found: Mapping[str, Found], note: str = "") -> str:
    """
    What the numbers mean for who reads the list.

    Args:
        found: of :func:`estimate`.
        note: said at the end, where the numbers are better than they will be.
    """
    kinds = {
        "categories": "objects of categories that nobody annotated",
        "at random": "objects that were forgotten",
    }
    ret = []
    for name, one in found.items():
        some, more = (max(int(np.searchsorted(one.depths, n, "right")) - 1, 0) for n in READ)
        text = (
            f"Among the first {one.depths[some]} candidates we expect "
            f"{100 * one.recall[some]:.0f} % of the {kinds[name]} (95 % interval "
            f"{100 * one.low[some]:.0f} to {100 * one.high[some]:.0f})"
        )
        if more > some:
            text += f"; reading on to {one.depths[more]} finds {100 * one.recall[more]:.0f} %"
        ret.append(f"{text}.")
    return " ".join([*ret, note]).strip()
