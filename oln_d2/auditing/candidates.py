"""
Which proposals no annotation explains, in the order in which somebody should look at them.

Shapes: C candidates of a data set; of one image D proposals and G annotations. Boxes are XYWH in
absolute pixels.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as mask_utils

from oln_d2.boxes import nms, to_xyxy
from oln_d2.drawing import FOLD_IOU
from oln_d2.evaluation.coco_results import Detections

Floats = NDArray[np.float64]

IOU = 0.5  # with an annotation that explains a proposal
COPIES = FOLD_IOU  # IoU with a better candidate, of which it is then a copy
INSIDE = 0.15  # how much a candidate that lies wholly in an annotation loses of its score


class Candidates(NamedTuple):
    """Proposals that may show an object without annotation, the most promising first."""

    image_ids: NDArray[np.int64]  # (C,)
    boxes: Floats  # (C, 4)
    scores: Floats  # (C,), the model's
    ranks: Floats  # (C,), what they are ranked by, descending
    inside: Floats  # (C,), in [0, 1]: the part of a box that lies in one annotation, at most
    around: Floats  # (C,), in [0, 1]: the part of one annotation that lies in the box, at most

    def select(self, index: Any) -> "Candidates":
        """Those at these indices, in this order."""
        return Candidates(*(values[index] for values in self))


def find_candidates(
    detections: Detections,
    annotations: Mapping[int, Sequence[Mapping[str, Any]]],
    *,
    iou: float = IOU,
    copies: float = COPIES,
    inside: float = INSIDE,
) -> Candidates:
    """
    A proposal is explained by an annotation that it overlaps by `iou` or more, and by a crowd that
    holds as much of it. To lie in an annotation explains nothing: what people hold and wear lies in
    theirs; but parts of objects do so as well, so it lowers the rank.

    Args:
        detections: of all images, in any order.
        annotations: COCO's, by image id.
        iou, copies: see `IOU` and `COPIES`, in [0, 1].
        inside: see `INSIDE`, in [0, 1].

    Returns:
        the candidates, the same in whatever order the detections and annotations are.
    """
    order = np.argsort(detections.image_ids, kind="stable")
    ids, begins = np.unique(detections.image_ids[order], return_index=True)
    parts = []
    for image, index in zip(ids.tolist(), np.split(order, begins[1:])):
        found = detections.select(index)
        parts.append(_of_image(found, annotations.get(image, ()), iou, copies, inside))
    if not parts:
        return Candidates(np.zeros(0, np.int64), np.zeros((0, 4)), *(np.zeros(0) for _ in range(4)))
    ret = Candidates(*(np.concatenate(values) for values in zip(*parts, strict=True)))
    keys = (*ret.boxes.T[::-1], ret.image_ids, -ret.ranks)  # the last counts first
    return ret.select(np.lexsort(keys))


def _of_image(found, annotations, iou, copies, inside):
    boxes, scores = found.boxes, found.scores
    objects = np.array([a["bbox"] for a in annotations], float).reshape(-1, 4)
    crowd = [int(a.get("iscrowd", 0)) for a in annotations]
    overlap, own, theirs = (np.zeros((len(boxes), 0)) for _ in range(3))
    if len(objects) and len(boxes):
        overlap = mask_utils.iou(boxes, objects, crowd)
        # With "crowds", pycocotools divides by the area of the first box alone.
        own = mask_utils.iou(boxes, objects, [1] * len(objects))
        theirs = mask_utils.iou(objects, boxes, [1] * len(boxes)).T
    part, around = (values.max(axis=1, initial=0) for values in (own, theirs))
    ranks = scores * (1 - inside * part)
    # Equal scores are told apart by their boxes, not by their places in the file.
    order = np.lexsort((*boxes.T[::-1], -ranks))
    order = order[overlap.max(axis=1, initial=0)[order] < iou]
    order = order[nms(to_xyxy(boxes[order]), copies)]
    image = found.image_ids[order]
    return Candidates(image, boxes[order], scores[order], ranks[order], part[order], around[order])
