"""What an open-world evaluation found, by name."""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import InitVar, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tabulate import tabulate

from oln_d2.checks import FRACTION, POSITIVE_INT, SEED, InputError, check_limits
from oln_d2.data.lookup import plural
from oln_d2.evaluation.ground_truth import GroundTruth
from oln_d2.evaluation.plot import plot_results
from oln_d2.files import StrPath, write_file

GROUPS = ("unseen", "seen", "all")
AREA_SUFFIXES = {"all": "", "small": "s", "medium": "m", "large": "l"}
# AUC as published: AR over ln k at these budgets, with AR@1 taken as 0.
AUC_KS = (1, 10, 30, 50, 100, 300, 500, 1000)
PROTOCOL_TEXT = {
    "xclass": "detections of seen objects cost no budget where unseen ones are searched",
    "filtered": "only the objects searched for exist, every detection costs budget",
}
# Below this share, images that run out of detections are not worth a warning.
FEW_IMAGES = 0.05
# Above this share of equal scores within an image they must have been rounded.
MANY_TIES = 0.05
DRAWS_AT_ONCE = 128


@dataclass(kw_only=True, eq=False, repr=False)
class OpenWorldResult:
    """
    Recall of one set of detections under one protocol. `print` shows the main metrics in percent.

    `result["unseen"]`, `result["seen"]` and `result["all"]` are dicts of metrics in [0, 1], NaN
    where there is nothing to be found: AR@k (all sizes), ARs@k, ARm@k, ARl@k (small, medium,
    large), AUC, and AP, AP50, AP75, APs, APm, APl with at most 100 detections an image, as COCO
    has it. AP is class-agnostic and only a hint: finding an object that nobody annotated lowers it.
    """

    ground_truth: GroundTruth
    # The settings, see `OpenWorldRecall`.
    protocol: str
    iou_type: str
    max_dets: int
    ks: tuple[int, ...]
    iou_thresholds: NDArray[np.float64]  # (T,)
    counts: NDArray[np.bool_]  # (3, 4, G): which gts are to be found, by group and area range
    # (3, 4, T, G): rank of the detection that found a gt; at least `max_dets` if none
    found: NDArray[np.integer[Any]]
    precision: InitVar[NDArray[np.float64]]  # (3, 4, T): average precision
    given: NDArray[np.int32]  # (I,): detections that each image had, before the cut at `max_dets`
    freed: NDArray[np.int32]  # (I,): how many cost no budget where unseen objects are searched
    tied: float  # share of the detections with the score of another one of their image
    # What to know before these numbers are compared with others.
    warnings: list[str] = field(init=False)

    def __post_init__(self, precision: NDArray[np.float64]) -> None:
        self._metrics = {g: self._group_metrics(g, precision[v]) for v, g in enumerate(GROUPS)}
        self.warnings = self._warnings()

    def __getitem__(self, group: str) -> dict[str, float]:
        return self._metrics[group]

    def recall(self, k: int, group: str = "unseen", area: str = "all") -> NDArray[np.float64]:
        """
        Args:
            k: budget; beyond `max_dets` recall stays what it is there, in AUC as well.
            group: "unseen", "seen" or "all".
            area: "all", "small", "medium" or "large".

        Returns:
            (T,): share of the gts that the first k detections of each image found at each IoU
            threshold.

        Raises:
            InputError: another group or area.
        """
        v, a = _index(group, area)
        num_gts = self.counts[v, a].sum()
        if not num_gts:
            return np.full(len(self.iou_thresholds), np.nan)
        return np.count_nonzero(self.found[v, a] < min(k, self.max_dets), axis=1) / num_gts

    def ar(self, k: int, group: str = "unseen", area: str = "all") -> float:
        """Average recall: the mean of :meth:`recall`, which see, over the IoU thresholds."""
        return float(self.recall(k, group, area).mean())

    def per_category(self, group: str = "unseen") -> dict[str, dict[str, float]]:
        """
        Returns:
            category name -> {"gts": number to be found, "AR@k": recall of them}, in the order of
            the names; categories without a gt are left out.
        """
        gt, v = self.ground_truth, GROUPS.index(group)
        table: dict[str, dict[str, float]] = {}
        for category, name in sorted(gt.category_names.items(), key=lambda item: item[1]):
            chosen = self.counts[v, 0] & (gt.category_ids == category)
            if chosen.any():
                found = self.found[v, 0][:, chosen]
                table[name] = {"gts": int(chosen.sum())}
                table[name].update({f"AR@{k}": float((found < k).mean()) for k in self.ks})
        return table

    def bootstrap(
        self, samples: int = 1000, seed: int = 0, level: float = 0.95
    ) -> dict[str, dict[str, tuple[float, float]]]:
        """
        Confidence intervals for the case that other images of the same kind had been drawn.

        Args:
            samples: how often the images are drawn anew, with replacement.
            seed: starts the random draws.
            level: share of the draws that lie in the interval.

        Returns:
            group -> metric (AR@k, ..., AUC) -> (low, high), in [0, 1].

        Raises:
            InputError: an argument out of its range.
        """
        check_limits(samples=(samples, POSITIVE_INT), seed=(seed, SEED), level=(level, FRACTION))
        draws = draw_images(len(self.given), samples, seed)
        intervals = {}
        for group in GROUPS:
            values = {}
            for area, suffix in AREA_SUFFIXES.items():
                ars = self.ar_of_draws(draws, self.ks, group, area)
                values.update({f"AR{suffix}@{k}": ar for k, ar in zip(self.ks, ars.T)})
                if area == "all":
                    at_auc = self.ar_of_draws(draws, AUC_KS, group)
                    values["AUC"] = np.array([auc(row) for row in at_auc])
            intervals[group] = {name: interval(value, level) for name, value in values.items()}
        return intervals

    def ar_of_draws(
        self, draws: NDArray[np.float32], ks: Sequence[int], group: str, area: str = "all"
    ) -> NDArray[np.float64]:
        """(S, K): :meth:`ar` at the K budgets in each of S draws, see :func:`draw_images`."""
        v, a = _index(group, area)
        counts, num_images = self.counts[v, a], len(self.given)
        found, image = self.found[v, a][:, counts], self.ground_truth.images[counts]
        within = [min(k, self.max_dets) for k in ks]
        sums = [np.bincount(image, (found < k).mean(0), num_images) for k in within]
        sums.append(np.bincount(image, minlength=num_images).astype(float))
        # In parts, as each becomes float64.
        parts = [draws[i : i + DRAWS_AT_ONCE] for i in range(0, len(draws), DRAWS_AT_ONCE)]
        *sums, num_gts = [np.concatenate([part @ s for part in parts]) for s in sums]
        with np.errstate(invalid="ignore"):  # a draw may have nothing to be found
            return np.stack(sums, 1) / num_gts[:, None]

    def to_dict(self) -> dict[str, Any]:
        """All of the result in plain Python values; metrics in [0, 1], NaN where undefined."""
        numbers = self.counts.sum(-1).tolist()
        gt = self.ground_truth
        return {
            "protocol": self.protocol,
            "iou_type": self.iou_type,
            **{group: dict(self[group]) for group in GROUPS},
            "num_images": len(gt.image_ids),
            "num_detections": int(self.given.sum()),
            "num_gts": {g: dict(zip(AREA_SUFFIXES, n)) for g, n in zip(GROUPS, numbers)},
            "detections_per_image": self._detections_per_image(),
            "settings": {
                "ground_truth": gt.source,
                "seen": list(gt.seen_names),
                "max_dets": self.max_dets,
                "ks": list(self.ks),
                "iou_thresholds": self.iou_thresholds.tolist(),
            },
            "warnings": self.warnings,
        }

    def to_json(self, path: StrPath) -> None:
        """Write :meth:`to_dict` as the one entry of a report, undefined values as null."""
        write_report(path, [self.to_dict()])

    def plot(self, path: StrPath, label: str = "unseen") -> None:
        """Write a picture, AR against the budget k, see :func:`plot_results`."""
        plot_results(path, {label: self})

    def __str__(self) -> str:
        rows = []
        for v, group in enumerate(GROUPS):
            for a, (area, suffix) in enumerate(AREA_SUFFIXES.items()):
                metrics = self[group]
                row: dict[str, Any] = {"objects": f"{group}, {area}" if a else group}
                row["number"] = int(self.counts[v, a].sum())
                row.update({f"AR@{k}": metrics[f"AR{suffix}@{k}"] for k in self.ks})
                row["AUC"] = metrics["AUC"] if a == 0 else None
                row["AP"] = metrics[f"AP{suffix}"]
                rows.append({k: percent(x) if isinstance(x, float) else x for k, x in row.items()})
        return f"{text_table(list(rows[0]), [row.values() for row in rows])}\n{self.summary()}"

    def summary(self) -> str:
        """What the numbers are based on, and warnings: text to be shown with every table."""
        per_image = self._detections_per_image()
        crowds = np.count_nonzero(self.ground_truth.crowd)
        bare = int(np.count_nonzero(self.given == 0))
        freed = f", {self.freed.mean():.1f} of them cost no budget" if self.freed.any() else ""
        lines = [
            f"Percent. Protocol {self.protocol}: {PROTOCOL_TEXT[self.protocol]}. "
            f"{self.iou_type.capitalize()} IoU, the {self.max_dets} best detections of an image.",
            f"{plural(len(self.given), 'image')}, {plural(int(self.given.sum()), 'detection')}: "
            f"{per_image['min']} to {per_image['max']} an image, {per_image['mean']:.1f} on "
            f"average{freed}; {plural(bare, 'image')} without any.",
            *([f"Crowds, which are no objects to be found: {crowds}."] if crowds else []),
            *(f"Warning: {text}" for text in self.warnings),
        ]
        return "\n".join(lines)

    def _detections_per_image(self):
        return {
            "min": int(self.given.min()),
            "mean": float(self.given.mean()),
            "max": int(self.given.max()),
        }

    def _group_metrics(self, group: str, precision: NDArray[np.float64]) -> dict[str, float]:
        metrics = {
            f"AR{suffix}@{k}": self.ar(k, group, area)
            for area, suffix in AREA_SUFFIXES.items()
            for k in self.ks
        }
        metrics["AUC"] = auc([self.ar(k, group) for k in AUC_KS])
        metrics["AP"] = float(precision[0].mean())
        for iou in (50, 75):
            for at in np.flatnonzero(np.isclose(self.iou_thresholds, iou / 100)):
                metrics[f"AP{iou}"] = float(precision[0, at])
        for a, suffix in enumerate(AREA_SUFFIXES.values()):
            metrics[f"AP{suffix}"] = float(precision[a].mean())
        return metrics

    def _warnings(self) -> list[str]:
        warnings = list(self.ground_truth.notes)
        if self.ground_truth.crowd.all():
            return [*warnings, f"{self.ground_truth.source} holds no object to be found."]
        bare = np.count_nonzero(self.given == 0)
        if bare:
            warnings.append(
                f"{bare} of {len(self.given)} images have no detection, so all their objects count "
                "as missed: was the detector run on all of them?"
            )
        # A list that was cut off has the same number of detections for many images. Where the
        # protocol itself cuts at `max_dets`, to keep more of them would change nothing.
        cut = self.given.max()
        full = self.given == cut
        left = cut - self.freed[full]
        short = [k for k in self.ks if np.mean(left < k) > FEW_IMAGES]
        if 1 < cut < self.max_dets and short and full.sum() > 1 and full.mean() > FEW_IMAGES:
            names = ", ".join(f"AR@{k}" for k in short)
            warnings.append(
                f"{full.sum()} of {len(full)} images have {cut} detections, where the list seems "
                f"to be cut off, and {np.median(left):.0f} of them (median) are in the budget: "
                f"with more detections {names} may be higher. Keep more of them, or compare "
                "smaller k only."
            )
        if self.tied > MANY_TIES:
            warnings.append(
                f"{100 * self.tied:.0f} % of the detections have the score of another one of their "
                "image: rounded scores? Their order in the file decides then. Write scores in full."
            )
        return warnings


def _index(group: str, area: str) -> tuple[int, int]:
    if group not in GROUPS or area not in AREA_SUFFIXES:
        raise InputError(
            f"group {group!r}, area {area!r}: use one of {', '.join(GROUPS)} and one of "
            f"{', '.join(AREA_SUFFIXES)}"
        )
    return GROUPS.index(group), list(AREA_SUFFIXES).index(area)


def draw_images(num_images: int, samples: int, seed: int) -> NDArray[np.float32]:
    """(samples, num_images): how often each image is in each draw, with replacement."""
    rng = np.random.default_rng(seed)
    draws = np.empty((samples, num_images), np.float32)  # exact for counts, half the memory
    for draw in draws:
        draw[:] = rng.multinomial(num_images, np.full(num_images, 1 / num_images))
    return draws


def interval(values: NDArray[np.float64], level: float) -> tuple[float, float]:
    """Between what quantiles this share of the values lies, as much below as above; NaN of none."""
    if np.isnan(values).all():
        return math.nan, math.nan
    tail = (1 - level) / 2
    low, high = np.nanquantile(values, (tail, 1 - tail))
    return float(low), float(high)


def auc(recalls: Sequence[float]) -> float:
    """Area under average recalls at `AUC_KS` over ln k / ln 1000; the first is taken as 0."""
    x = np.log(AUC_KS) / math.log(AUC_KS[-1])
    y = np.append(0 * recalls[-1], recalls[1:])  # NaN where there is nothing to be found
    return float(np.sum(np.diff(x) * (y[1:] + y[:-1])) / 2)


def percent(value: float) -> str:
    """Text of a metric in [0, 1]; n/a where there is nothing to be found."""
    return "n/a" if math.isnan(value) else f"{100 * value:.2f}"


def text_table(headers: Sequence[str], rows: Sequence[Iterable[Any]]) -> str:
    """Names on the left, numbers on the right."""
    align = ["left"] + ["right"] * (len(headers) - 1)
    return tabulate(rows, headers, disable_numparse=True, colalign=align)


def write_report(path: StrPath, results: list[dict[str, Any]]) -> None:
    """
    Args:
        path: where the JSON goes, `{"results": [...]}`; there is either all of it or nothing.
        results: from :meth:`OpenWorldResult.to_dict`, perhaps with more keys.

    Raises:
        InputError: the file cannot be written.
    """
    text = json.dumps({"results": _null_for_nan(results)}, indent=2, allow_nan=False)
    write_file(path, text + "\n")


def _null_for_nan(value):
    if isinstance(value, dict):
        return {key: _null_for_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_null_for_nan(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value
