"""
How much an audit finds: measured on annotations that it is not shown, and on what was decided.

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
LEAST_JUDGED = 20  # decisions of which half say something
DRAWS = 1000  # of images, for the 95 % intervals
SCORES = 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8  # least scores whose candidates are counted


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
    by_score: dict[str, list[float]]  # least score: how many candidates; their precision


class Hidden(NamedTuple):
    """A data set without some of its annotations, and these."""

    kept: list[dict[str, Any]]  # annotations, crowds included
    objects: list[dict[str, Any]]


def _split(content):
    """
    The objects and the crowds of a data set, sorted, for what is drawn not to depend on the file.
    What an audit added would be found again by its own boxes, so it is kept with the crowds.
    """

    def is_object(a):
        return not a.get("iscrowd") and a.get("source") not in (SOURCE, PSEUDO)

    objects = [a for a in content["annotations"] if is_object(a)]
    objects.sort(key=lambda a: (a["image_id"], a["category_id"], a["bbox"]))
    return objects, [a for a in content["annotations"] if not is_object(a)]


def _half(objects, rng):
    """Half of the categories that are used, a set of ids."""
    used = sorted({a["category_id"] for a in objects})
    return set(rng.permutation(used)[: len(used) // 2].tolist())


def estimate(
    detections: Detections,
    content: Mapping[str, Any],
    options: Mapping[str, float],
    seed: int = 0,
) -> dict[str, Found]:
    """
    Hide annotations from the list and count how many of them the candidates contain: those of half
    of the categories, then those of the other half ("categories": objects of a kind that nobody
    annotated); and a share of all ("at random": objects that were forgotten).

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
    objects, others = _split(content)

    def hide(which):
        pairs = list(zip(objects, which))
        return Hidden([*others, *(a for a, h in pairs if not h)], [a for a, h in pairs if h])

    half = _half(objects, rng)
    ret = {}
    if half:
        is_first = np.array([a["category_id"] in half for a in objects])
        hidden = [hide(is_first), hide(~is_first)]
        ret["categories"] = _measure(detections, hidden, content, options, seed)
    at_random = rng.random(len(objects)) < SHARE
    if at_random.any():
        ret["at random"] = _measure(detections, [hide(at_random)], content, options, seed)
    return ret


def hide_from_training(content: Mapping[str, Any], seed: int = 0) -> dict[str, Hidden]:
    """
    What :func:`estimate_trained` needs: half of the categories ("categories") and a share of the
    other objects ("at random") are hidden together, so that one training serves both. Arguments as
    there; {} where there is nothing to hide.
    """
    rng = np.random.default_rng(seed)
    objects, others = _split(content)
    half = _half(objects, rng)
    rest = [a for a in objects if a["category_id"] not in half]
    at_random = rng.random(len(rest)) < SHARE
    kept = [*others, *(a for a, h in zip(rest, at_random) if not h)]
    parts = {
        "categories": [a for a in objects if a["category_id"] in half],
        "at random": [a for a, h in zip(rest, at_random) if h],
    }
    return {name: Hidden(kept, part) for name, part in parts.items() if part}


def estimate_trained(
    detections: Detections,
    content: Mapping[str, Any],
    options: Mapping[str, float],
    seed: int = 0,
) -> dict[str, Found]:
    """
    As :func:`estimate`, of models that :func:`hide_from_training` hid the same from.
    """
    return {
        name: _measure(detections, [hidden], content, options, seed)
        for name, hidden in hide_from_training(content, seed).items()
    }


def _measure(detections, parts, content, options, seed):
    """:class:`Found` of lists, one for each of some :class:`Hidden`."""
    hidden, places_of, lists = [], [], []
    for part in parts:
        kept: dict[int, list[Any]] = {}
        for annotation in part.kept:
            kept.setdefault(annotation["image_id"], []).append(annotation)
        candidates = find_candidates(detections, kept, **options)
        lists.append(candidates.scores)
        places_of.append(places(candidates, part.objects))
        hidden += part.objects
    place = np.concatenate(places_of)
    names = {c["id"]: c["name"] for c in content["categories"]}
    least = min(map(len, lists))
    depths = [n for n in DEPTHS if n <= least] or [max(least, 1)]
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

    by_score = {}
    for score in SCORES:
        above = sum(int((scores >= score).sum()) for scores in lists)
        shown = sum(
            int((scores[own[np.isfinite(own)].astype(int)] >= score).sum())
            for scores, own in zip(lists, places_of)
        )
        if above:
            by_score[str(score)] = [above // len(parts), round(shown / above, 4)]

    def recall(chosen):
        return found[chosen].mean(axis=0).round(4).tolist()

    return Found(
        hidden=len(hidden),
        depths=depths,
        recall=recall(slice(None)),
        low=low.round(4).tolist(),
        high=high.round(4).tolist(),
        precision=(found.sum(axis=0) / len(parts) / np.array(depths)).round(4).tolist(),
        by_size={name: recall(chosen) for name, chosen in sizes.items() if chosen.any()},
        by_category={names[k]: recall(kinds == k) for k in np.unique(kinds).tolist()},
        by_score=by_score,
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
        ret.append(f"{text}. At least {100 * one.precision[some]:.0f} % of those first are such.")
    return " ".join([*ret, note]).strip()


def judged_sentence(accepted: NDArray[np.bool_]) -> str:
    """
    What decisions say about the rest of the list. How much further down fewer are accepted is not
    in them: what they are said to promise is no more than the lower half of them held.

    Args:
        accepted: shape (J,), what was decided on J candidates, 1 or more, in the order of the list.
    """

    def share(some):
        low, high = (100 * x for x in wilson(int(some.sum()), len(some)))
        return f"{100 * some.mean():.0f} %", f"{low:.0f} to {high:.0f}"

    text = "Of {} candidates judged {} were accepted (95 % interval {})"
    text = text.format(len(accepted), *share(accepted))
    if len(accepted) >= LEAST_JUDGED:
        lower = accepted[len(accepted) // 2 :]
        text += ", of the {} that ranked last {} ({}): expect no more of the next".format(
            len(lower), *share(lower)
        )
    return f"{text}."


def wilson(hits: int, number: int) -> tuple[float, float]:
    """The 95 % interval of a share, in [0, 1], of which `hits` of `number` were seen."""
    z = 1.96
    share = hits / number
    middle = share + z * z / (2 * number)
    half = z * np.sqrt(share * (1 - share) / number + z * z / (4 * number**2))
    scale = 1 + z * z / number
    return float((middle - half) / scale), float((middle + half) / scale)
