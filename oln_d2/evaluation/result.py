"""What an open-world evaluation found, by name. Needs no Detectron2."""

import json
import math

import numpy as np

GROUPS = ("unseen", "seen", "all")
AREA_SUFFIXES = {"all": "", "small": "s", "medium": "m", "large": "l"}
# AUC as published: AR over ln k, with AR@1 taken as 0.
AUC_KS = (1, 10, 30, 50, 100, 300, 500, 1000)


class OpenWorldResult:
    """
    Recall of one set of detections under one protocol.

    `unseen`, `seen` and `all` are dicts of metrics in [0, 1], NaN where there is nothing to be found:
    AR@k (all sizes), ARs@k, ARm@k, ARl@k (small, medium, large), AUC, AP, AP50, AP75, APs, APm, APl.
    AP is class-agnostic and for orientation only: an object that nobody annotated counts as a mistake.

    Attributes:
        protocol, iou_type, max_dets, ks, iou_thresholds: the settings, see `OpenWorldRecall`.
        ground_truth (GroundTruth)
        counts (3, 4, G): bool; which gts are to be found, for each group and area range.
        found (3, 4, T, G): rank of the detection that found a gt, huge where none did.
        precision (3, 4, T): average precision.
        given (I,): detections that each image had, before the cut at `max_dets`.
        freed (I,): detections of each image that cost no budget where unseen objects are searched.
        tied: share of the detections that have the score of another one of their image.
    """

    def __init__(
        self, *, ground_truth, protocol, iou_type, max_dets, ks, iou_thresholds, counts, found,
        precision, given, freed, tied,
    ):  # fmt: skip
        self.ground_truth = ground_truth
        self.protocol = protocol
        self.iou_type = iou_type
        self.max_dets = max_dets
        self.ks = ks
        self.iou_thresholds = iou_thresholds
        self.counts = counts
        self.found = found
        self.precision = precision
        self.given = given
        self.freed = freed
        self.tied = tied
        self.unseen, self.seen, self.all = map(self._metrics, GROUPS)

    def recall(self, k, group="unseen", area="all"):
        """
        Args:
            k (int): budget, at most `max_dets`.
            group (str): "unseen", "seen" or "all".
            area (str): "all", "small", "medium" or "large".

        Returns:
            (T,): share of the gts that the first k detections of each image found at each IoU threshold.
        """
        v, a = GROUPS.index(group), list(AREA_SUFFIXES).index(area)
        counts = self.counts[v, a]
        if not counts.any():
            return np.full(len(self.iou_thresholds), np.nan)
        return (self.found[v, a] < k).sum(1) / counts.sum()

    def ar(self, k, group="unseen", area="all"):
        """Average recall: the mean of :meth:`recall` over the IoU thresholds."""
        return float(self.recall(k, group, area).mean())

    def _metrics(self, group):
        metrics = {
            f"AR{suffix}@{k}": self.ar(k, group, area)
            for area, suffix in AREA_SUFFIXES.items()
            for k in self.ks
        }
        recalls = [0] + [self.ar(k, group) for k in AUC_KS[1:]]
        metrics["AUC"] = auc(recalls) if self.counts[GROUPS.index(group), 0].any() else math.nan
        precision = self.precision[GROUPS.index(group)]
        metrics["AP"] = float(precision[0].mean())
        for iou in (0.5, 0.75):
            at = np.flatnonzero(np.isclose(self.iou_thresholds, iou))
            if len(at):
                metrics[f"AP{iou * 100:.0f}"] = float(precision[0, at[0]])
        for a, suffix in enumerate(AREA_SUFFIXES.values()):
            metrics[f"AP{suffix}"] = float(precision[a].mean())
        return metrics


def auc(recalls):
    """Trapezoid of average recalls at the budgets `AUC_KS`, over ln k / ln 1000."""
    return float(np.trapezoid(recalls, np.log(AUC_KS) / math.log(AUC_KS[-1])))
