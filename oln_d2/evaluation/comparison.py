"""
Whether detectors differ: their recalls under the same draws of images.

Shapes: I images, G gts, K = len(KS) budgets, S draws of images.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from oln_d2.checks import InputError
from oln_d2.evaluation.coco_results import Detections, give_detections, join_detections
from oln_d2.evaluation.ground_truth import GroundTruth
from oln_d2.evaluation.open_world import DEFAULT_MAX_DETS, OpenWorldRecall
from oln_d2.evaluation.result import AREA_SUFFIXES, GROUPS, interval
from oln_d2.files import StrPath

KS = (10, 30, 100, 300, 1000)
# Budgets that whether detectors differ is judged at: the largest for which all lists are long
# enough.
MAIN_KS = (10, 30, 100)
LEVEL = 0.95
# With fewer images that hold objects, draws of them say nothing about other images.
MIN_IMAGES = 10
CURVE_POINTS = 60

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A metric in [0, 1] and its 95 % interval over images; NaN where there is no object."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, value: float, draws: Floats) -> "Estimate":
        """From the value on all images and those on draws of images, (S,)."""
        return cls(value, *interval(draws, LEVEL))


@dataclass(frozen=True)
class Difference:
    """How much more of some objects one detector finds than another does."""

    first: str
    second: str
    group: str  # "unseen", "seen" or "all"
    area: str  # "all", "small", "medium" or "large"
    k: int
    ar: Estimate  # AR@k of the first less that of the second, in the same draws of images
    num_images: int  # that hold such objects

    @property
    def differs(self) -> bool:
        """Whether the interval leaves out zero."""
        return self.num_images >= MIN_IMAGES and (self.ar.low > 0 or self.ar.high < 0)

    @property
    def objects(self) -> str:
        """In words."""
        kinds = [kind for kind in (self.area, self.group) if kind != "all"]
        return " ".join([*kinds, "objects"])

    @property
    def numbers(self) -> str:
        """The difference in percent, with its interval."""
        value, low, high = (100 * x for x in (self.ar.value, self.ar.low, self.ar.high))
        digits = 1 if min(abs(low), abs(high)) >= 0.05 else 2  # "0.0" would hide on which side of 0
        return f"{value:+.{digits}f} AR@{self.k} ({low:.{digits}f} to {high:.{digits}f})"

    def turned(self) -> "Difference":
        """The same with the detector that finds more first."""
        if not self.ar.value < 0:
            return self
        ar = Estimate(-self.ar.value, -self.ar.high, -self.ar.low)
        return replace(self, first=self.second, second=self.first, ar=ar)

    def __str__(self) -> str:
        if self.num_images < MIN_IMAGES:
            return (
                f"{self.first} and {self.second}: too few images hold {self.objects} "
                f"({self.num_images}) to say whether they differ."
            )
        if self.differs:
            more = self.turned()
            return (
                f"{more.first} finds more of the {more.objects} than {more.second}: {more.numbers}."
            )
        return (
            f"{self.first} and {self.second}: no difference can be seen on {self.objects}, "
            f"{self.numbers}."
        )


class Detector(NamedTuple):
    """What is kept of a results file: enough to compare it with others, small beside it."""

    name: str
    source: str
    longest: int  # most detections of an image
    num_detections: int
    num_gts: NDArray[np.int64]  # (3, 4): objects to be found, the same for all detectors
    num_images: NDArray[np.int64]  # (3, 4): images that hold such objects
    values: Floats  # (3 groups, 4 area ranges, K): AR@k
    draws: Floats  # (3, 4, K, S): the same in each draw of images
    found: NDArray[np.bool_]  # (3, K, G): whether the first k detections find it at IoU 0.5
    per_category: dict[str, dict[str, float]]  # the objects compared, see OpenWorldResult
    curve_ks: NDArray[np.int64]  # (C,)
    curves: Floats  # (3, C): AR at `curve_ks`
    found_scores: Floats  # of the objects compared, see `OpenWorldRecall.found_scores`
    warnings: list[str]

    def estimate(self, group: str, k: int, area: str = "all") -> Estimate:
        """AR@k of a group's objects."""
        at = GROUPS.index(group), list(AREA_SUFFIXES).index(area), KS.index(k)
        return Estimate.of(float(self.values[at]), self.draws[at])

    def minus(self, other: "Detector", group: str, k: int, area: str = "all") -> Difference:
        """The paired comparison: both have the same draws of images."""
        at = GROUPS.index(group), list(AREA_SUFFIXES).index(area), KS.index(k)
        ar = Estimate.of(
            float(self.values[at] - other.values[at]), self.draws[at] - other.draws[at]
        )
        num_images = int(self.num_images[at[:2]])
        return Difference(self.name, other.name, group, area, k, ar, num_images)


def measure_detector(
    name: str,
    gt: GroundTruth,
    results: StrPath | Detections,
    draws: NDArray[np.float32],
    group: str,
    protocol: str,
    iou_type: str,
    best: int,
) -> tuple[Detector, Detections]:
    """
    Args:
        name: the detector's.
        gt: the objects.
        results: all detections of the detector, or their file.
        draws (S, I): see :func:`draw_images`.
        group: whose objects are compared by category and by score.
        protocol, iou_type: see :func:`oln_d2.evaluate`.
        best: how many detections of an image are returned.

    Returns:
        the detector, and the best detections of each image, ascending by its id.

    Raises:
        InputError: there is no detection, or one that cannot be used.
    """

    def begin():
        recall = OpenWorldRecall(gt, protocol, iou_type=iou_type, ks=KS, with_ap=False)
        return _Measured(recall, best)

    measured = give_detections(results, gt, begin, iou_type == "mask")
    recall, longest = measured.recall, measured.longest
    kept = _best(gt, join_detections(measured.best), best)
    if not longest:
        raise InputError(f"{kept.source}: holds no detection; was the detector run?")
    recall.ks = tuple(k for k in KS if k <= max(longest, KS[0]))  # that warnings may name
    result = recall.result()
    end = min(longest, DEFAULT_MAX_DETS)
    curve_ks = np.unique(np.geomspace(1, end, CURVE_POINTS).round().astype(int))
    at_half = result.found[:, 0, 0]
    detector = Detector(
        name,
        kept.source,
        longest,
        int(result.given.sum()),
        num_gts=result.counts.sum(-1),
        num_images=np.array([[len(np.unique(gt.images[c])) for c in v] for v in result.counts]),
        values=np.array(
            [[[result.ar(k, g, a) for k in KS] for a in AREA_SUFFIXES] for g in GROUPS]
        ),
        draws=np.array(
            [[result.ar_of_draws(draws, KS, g, a).T for a in AREA_SUFFIXES] for g in GROUPS]
        ),
        found=np.stack([at_half < k for k in KS], 1) & result.counts[:, :1],
        per_category=result.per_category(group),
        curve_ks=curve_ks,
        curves=np.array([[result.ar(k, g) for k in curve_ks] for g in GROUPS]),
        found_scores=recall.found_scores()[result.counts[GROUPS.index(group), 0]],
        warnings=result.warnings,
    )
    return detector, kept


def average(runs: Sequence[Detector]) -> Detector:
    """
    One of several runs of one recipe, 1 or more: its recalls are their means, and so are those of
    each draw of images; which objects it finds is that of the first.
    """
    first = min(runs, key=lambda run: run.longest)
    if len(runs) == 1:
        return first
    curves = [
        [np.interp(first.curve_ks, run.curve_ks, curve) for curve in run.curves] for run in runs
    ]
    per_category = {
        name: {
            key: float(np.mean([run.per_category[name][key] for run in runs])) for key in numbers
        }
        for name, numbers in first.per_category.items()
    }
    return runs[0]._replace(
        source=", ".join(run.source for run in runs),
        longest=first.longest,
        num_detections=round(np.mean([run.num_detections for run in runs])),
        values=np.mean([run.values for run in runs], axis=0),
        draws=np.mean([run.draws for run in runs], axis=0),
        per_category=per_category,
        curve_ks=first.curve_ks,
        curves=np.mean(curves, axis=0),
        warnings=list(dict.fromkeys(warning for run in runs for warning in run.warnings)),
    )


class _Measured:
    def __init__(self, recall: OpenWorldRecall, number: int):
        self.recall, self.number = recall, number
        self.best: list[Detections] = []
        self.longest = 0  # most detections of an image

    def update(self, detections: Detections) -> None:
        detections.add_to(self.recall)
        counts = np.unique(detections.image_ids, return_counts=True)[1]
        self.longest = int(counts.max(initial=self.longest))
        self.best.append(_best(self.recall.ground_truth, detections, self.number))


def _best(gt: GroundTruth, detections: Detections, number: int) -> Detections:
    """So many of each image, ascending by its id."""
    image = gt.index_images(detections.image_ids)
    order = np.lexsort((-detections.scores, image))
    starts = np.searchsorted(image[order], np.arange(len(gt.image_ids)))
    return detections.select(order[np.arange(len(order)) - starts[image[order]] < number])


def main_budget(detectors: Sequence[Detector]) -> int:
    """The budget to compare detectors at: the largest for which all lists are long enough."""
    shortest = min(detector.longest for detector in detectors)
    return max(k for k in MAIN_KS if k <= max(shortest, MAIN_KS[0]))
