"""
The "xclass" rule on top of pycocotools: slow, but short and close to the official code. Tests and
benchmark compare `OpenWorldRecall` with it.
"""

import contextlib
import copy
import io
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval


class BudgetRuleCOCOeval(COCOeval):
    """Class-agnostic COCOeval that ignores seen gts, whose detections leave the ranking."""

    def __init__(
        self,
        coco_gt: COCO,
        coco_dt: COCO,
        iou_type: str,
        seen_ids: list[int],
        free_seen: bool = True,
    ):
        """
        Args:
            seen_ids: ids of the categories whose gts are ignored.
            free_seen: whether detections matched to them at IoU .50 leave the ranking.
        """
        super().__init__(coco_gt, coco_dt, iou_type)
        self.seen_ids = set(seen_ids)
        self.free_seen = free_seen
        self.params.useCats = 0

    def _prepare(self):
        super()._prepare()
        for gts in self._gts.values():
            for gt in gts:
                gt["ignore"] = gt["ignore"] or gt["category_id"] in self.seen_ids

    def evaluateImg(self, image_id, category_id, area_range, max_det):
        result = super().evaluateImg(image_id, category_id, area_range, max_det)
        if result is None or not self.free_seen:
            return result
        seen_gts = {gt["id"] for i in self.seen_ids for gt in self._gts[image_id, i]}
        (free_iou,) = np.flatnonzero(np.isclose(self.params.iouThrs, 0.5))
        stays = np.array([gt not in seen_gts for gt in result["dtMatches"][free_iou]], bool)
        for key in ("dtMatches", "dtIgnore"):
            result[key] = result[key][:, stays]
        for key in ("dtScores", "dtIds"):
            result[key] = [value for value, stay in zip(result[key], stays) if stay]
        return result


def evaluate(
    content: dict[str, Any],
    results: list[dict[str, Any]],
    iou_type: str = "bbox",
    ks: tuple[int, ...] = (10, 100, 1500),
    max_dets: int = 1500,
    **rule: Any,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """
    Args:
        content: COCO ground truth, annotation ids > 0 and unique; not changed.
        results: entries of a COCO results file, not empty; not changed.
        ks: ascending.
        max_dets: how many detections of an image take part.
        rule: arguments of `BudgetRuleCOCOeval`; none: plain, class-agnostic pycocotools.

    Returns:
        recall (T, A, K) and precision (T, A, K): -1 where no gt counts. Precision is averaged over
        recall.
    """
    with contextlib.redirect_stdout(io.StringIO()):
        coco_gt = COCO()
        coco_gt.dataset = copy.deepcopy(content)
        coco_gt.createIndex()
        # Class-agnostic: which category a detection names must not change the order of ties.
        first = min(category["id"] for category in content["categories"])
        coco_dt = coco_gt.loadRes([{**copy.copy(entry), "category_id": first} for entry in results])
        if rule:
            evaluator = BudgetRuleCOCOeval(coco_gt, coco_dt, iou_type, **rule)
        else:
            evaluator = COCOeval(coco_gt, coco_dt, iou_type)
            evaluator.params.useCats = 0
        evaluator.params.maxDets = [*(k for k in ks if k < max_dets), max_dets]
        evaluator.evaluate()
        evaluator.accumulate()
    num_ks = len(ks)
    recall = evaluator.eval["recall"][:, 0, :, :num_ks]
    precision = evaluator.eval["precision"][:, :, 0, :, :num_ks].mean(1)
    return recall, precision
