"""
What somebody decided about candidates: read, merged into annotations, and learnt from.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from oln_d2.auditing.candidates import Candidates
from oln_d2.checks import InputError
from oln_d2.data.coco import PSEUDO
from oln_d2.evaluation.open_world import LARGE
from oln_d2.files import StrPath, read_json

SOURCE = "oln-d2 audit"  # marks the annotations that it added, under "source"
OBJECT = "object"  # the category of what was accepted without one
LEAST = 10  # decisions of each kind that a rank can be learnt from
_KINDS = ("accept", "reject", "skip")


class Decision(NamedTuple):
    """About one candidate."""

    id: str  # the candidate's
    image_id: int
    what: str  # "accept", "reject" or "skip"
    bbox: tuple[float, ...]  # XYWH in pixels, as adjusted
    proposed: tuple[float, ...]  # as proposed
    category_id: int | None


def read_decisions(paths: Sequence[StrPath], content: Mapping[str, Any]) -> list[Decision]:
    """
    Args:
        paths: files that the page saved; of a candidate that several decide on, the last counts.
        content: the COCO file that they are about.

    Raises:
        InputError: not such a file, or of other images or categories.
    """
    images = {image["id"]: image for image in content["images"]}
    categories = {category["id"] for category in content["categories"]}
    found: dict[str, Decision] = {}
    for path in paths:
        entries = read_json(path)
        entries = entries.get("decisions") if isinstance(entries, dict) else None
        if not isinstance(entries, list):
            raise InputError(
                f"{path}: has no list 'decisions'; give the file that the page of an audit saved"
            )
        for number, entry in enumerate(entries):
            where = f"{path}: decisions[{number}]"
            decision = _decision(where, entry)
            if decision.image_id not in images:
                raise InputError(
                    f"{where}: the image {decision.image_id} is not in the annotations; give the "
                    "file that was audited"
                )
            if decision.category_id is not None and decision.category_id not in categories:
                raise InputError(
                    f"{where}: there is no category {decision.category_id} in the annotations; "
                    "give the file that was audited"
                )
            found[decision.id] = decision
    return list(found.values())


def _decision(where, entry):
    try:
        bbox, proposed = (tuple(map(float, entry[field])) for field in ("bbox", "proposed"))
        key, image, category = str(entry["id"]), int(entry["image_id"]), entry.get("category_id")
        if category is not None:
            category = int(category)
        ret = Decision(key, image, entry["what"], bbox, proposed, category)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
        raise InputError(
            f"{where}: lacks one of id, image_id, what, bbox and proposed, or has something else "
            "there; save it again from the page"
        ) from None
    if ret.what not in _KINDS:
        raise InputError(f"{where}: what is {ret.what!r}; it can be {', '.join(_KINDS)}")
    for box in (ret.bbox, ret.proposed):
        if len(box) != 4 or not np.less(np.abs(box), LARGE).all() or min(box[2:]) <= 0:
            raise InputError(f"{where}: {list(box)} is no box x, y, width, height with an area")
    return ret


def add_accepted(content: Mapping[str, Any], decisions: Sequence[Decision]) -> dict[str, Any]:
    """
    Args:
        content: a COCO file; not changed.
        decisions: about its images.

    Returns:
        the same with the accepted boxes as annotations that have `SOURCE` under "source", where
        that or a box very near is not there already. What was there keeps its id. Boxes without a
        category get the category `OBJECT`, which is added if needed.
    """
    rows = [
        (d.image_id, d.bbox, d.category_id, {"source": SOURCE})
        for d in decisions
        if d.what == "accept"
    ]
    return _add(content, rows)


def add_candidates(content: Mapping[str, Any], candidates: Candidates) -> dict[str, Any]:
    """
    Args:
        content: a COCO file; not changed.
        candidates: of its images.

    Returns:
        the same with the candidates as annotations of the category `OBJECT`, which have `PSEUDO`
        under "source", and their "score".
    """
    rows = [
        (image, tuple(box), None, {"source": PSEUDO, "score": round(score, 5)})
        for image, box, score in zip(
            candidates.image_ids.tolist(), candidates.boxes.tolist(), candidates.scores.tolist()
        )
    ]
    return _add(content, rows)


def _add(content, rows):
    """Annotations of rows (image id, box, category id or None, more fields), but of those there."""
    annotations = list(content["annotations"])
    categories = list(content["categories"])
    there = {(a["image_id"], *np.round(a["bbox"]).tolist()) for a in annotations}
    ids = [a["id"] for a in annotations if isinstance(a.get("id"), int)]
    next_id = max(ids, default=0) + 1
    for image, box, category, more in rows:
        key = (image, *np.round(box).tolist())
        if key in there:
            continue
        there.add(key)
        if category is None:
            category = next((c["id"] for c in categories if c["name"] == OBJECT), None)
            if category is None:
                category = max(c["id"] for c in categories) + 1
                categories.append({"id": category, "name": OBJECT})
        x, y, width, height = (round(value, 2) for value in box)
        annotations.append(
            {
                "id": next_id,
                "image_id": image,
                "category_id": category,
                "bbox": [x, y, width, height],
                "area": round(width * height, 2),
                "iscrowd": 0,
                **more,
            }
        )
        next_id += 1
    return {**content, "annotations": annotations, "categories": categories}


def learn_ranks(
    candidates: Candidates, judged: Candidates, accepted: NDArray[np.bool_]
) -> NDArray[np.float64] | None:
    """
    How likely each candidate is to be accepted, by a logistic regression on its score, its size and
    how it lies to the annotations.

    Args:
        candidates: C of them.
        judged: others, J of them, that somebody has decided on.
        accepted: shape (J,), how.

    Returns:
        shape (C,), in [0, 1]; None where fewer than `LEAST` were accepted or rejected.
    """
    if min(accepted.sum(), (~accepted).sum()) < LEAST:
        return None
    known, wanted = _features(judged), _features(candidates)
    mean, std = known.mean(axis=0), known.std(axis=0) + 1e-6
    known, wanted = (np.hstack([(x - mean) / std, np.ones((len(x), 1))]) for x in (known, wanted))
    weights = np.zeros(known.shape[1])
    decay = np.append(np.ones(len(weights) - 1), 1e-6)  # keeps few decisions from extremes
    for _ in range(50):  # Newton's method
        p = 1 / (1 + np.exp(-known @ weights))
        gradient = known.T @ (p - accepted) + decay * weights
        hessian = (known * (p * (1 - p))[:, None]).T @ known + np.diag(decay)
        step = np.linalg.solve(hessian, gradient)
        weights -= step
        if np.abs(step).max() < 1e-8:
            break
    return 1 / (1 + np.exp(-wanted @ weights))


def _features(candidates):
    size = np.log(candidates.boxes[:, 2:].prod(axis=1).clip(1))
    score = candidates.scores.clip(1e-6, 1 - 1e-6)
    return np.stack(
        [np.log(score / (1 - score)), size, candidates.inside, candidates.around], axis=1
    )
