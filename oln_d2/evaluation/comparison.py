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
from oln_d2.evaluation import Detections, GroundTruth, evaluate
from oln_d2.evaluation.open_world import DEFAULT_MAX_DETS
from oln_d2.evaluation.result import AREA_SUFFIXES, GROUPS, interval

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
    # The score of the detection that finds each object compared at IoU 0.5 when all objects are
    # searched, -inf if none does.
    found_scores: Floats
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
    detections: Detections,
    draws: NDArray[np.float32],
    group: str,
    protocol: str,
    iou_type: str,
) -> Detector:
    """
    Args:
        name: the detector's.
        gt: the objects.
        detections: all of the detector's.
        draws (S, I): see :func:`draw_images`.
        group: whose objects are compared by category and by score.
        protocol, iou_type: see :func:`evaluate`.

    Raises:
        InputError: there is no detection, or one that cannot be used.
    """
    if not len(detections.scores):
        raise InputError(f"{detections.source}: holds no detection; was the detector run?")
    longest = int(np.unique(detections.image_ids, return_counts=True)[1].max())
    ks = [k for k in KS if k <= max(longest, KS[0])]  # that warnings may name
    result = evaluate(gt, detections, protocol=protocol, iou_type=iou_type, ks=ks)
    end = min(longest, DEFAULT_MAX_DETS)
    curve_ks = np.unique(np.geomspace(1, end, CURVE_POINTS).round().astype(int))
    at_half = result.found[:, 0, 0]
    return Detector(
        name,
        detections.source,
        longest,
        len(detections.scores),
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
        found_scores=_found_scores(result, detections)[result.counts[GROUPS.index(group), 0]],
        warnings=result.warnings,
    )


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


def _found_scores(result, detections):
    """(G,): score of the detection that finds each gt at IoU 0.5, -inf if none does."""
    # Where all objects are searched no detection leaves the ranking: a rank is a place by score.
    rank = result.found[GROUPS.index("all"), 0, 0]
    image = result.ground_truth.index_images(detections.image_ids)
    scores = detections.scores[np.lexsort((-detections.scores, image))]
    starts = np.searchsorted(np.sort(image), np.arange(len(result.given)))
    hit = rank < result.max_dets
    ret = np.full(len(rank), -np.inf)
    ret[hit] = scores[starts[result.ground_truth.images[hit]] + rank[hit]]
    return ret


def main_budget(detectors: Sequence[Detector]) -> int:
    """The budget to compare detectors at: the largest for which all lists are long enough."""
    shortest = min(detector.longest for detector in detectors)
    return max(k for k in MAIN_KS if k <= max(shortest, MAIN_KS[0]))
