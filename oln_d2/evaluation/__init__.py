"""Open-world recall of any detector, from results files or arrays."""

import os
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from oln_d2.checks import InputError
from oln_d2.evaluation.coco_results import (
    Detections,
    convert_entries,
    give_detections,
    read_results,
    write_results,
)
from oln_d2.evaluation.ground_truth import GroundTruth
from oln_d2.evaluation.open_world import DEFAULT_KS, DEFAULT_MAX_DETS, OpenWorldRecall
from oln_d2.evaluation.plot import plot_results
from oln_d2.evaluation.result import OpenWorldResult
from oln_d2.files import StrPath

__all__ = [
    "Detections",
    "GroundTruth",
    "OpenWorldRecall",
    "OpenWorldResult",
    "evaluate",
    "plot_results",
    "read_results",
    "write_results",
]


def __getattr__(name: str) -> NoReturn:
    if name == "OpenWorldEvaluator":
        raise ImportError(
            "`from oln_d2 import OpenWorldEvaluator` has taken the place of "
            "`from oln_d2.evaluation import OpenWorldEvaluator`"
        )
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def evaluate(
    gt: StrPath | GroundTruth,
    results: StrPath | Detections | Sequence[Mapping[str, Any]],
    *,
    seen: StrPath | Sequence[str] | None = None,
    protocol: str = "xclass",
    iou_type: str = "box",
    ks: Sequence[int] | None = None,
    max_dets: int | None = None,
) -> OpenWorldResult:
    """
    Recall of unseen, seen and all objects.

        result = evaluate("instances_val2017.json", "results.json", seen="voc")
        print(result)
        result["unseen"]["AR@100"]

    Args:
        gt: ground truth in COCO format; a path or what was loaded from it.
        results: detections in COCO's results format; a path, what :func:`read_results` made of it,
            or a list of such entries.
        seen: the seen categories of a `gt` that is a path, see
            :func:`oln_d2.data.splits.seen_names`; an empty list if none is.
        protocol: "xclass" or "filtered", see :mod:`oln_d2.evaluation.open_world`.
        iou_type: "box" or "mask".
        ks: budgets to report, detections an image. None: `DEFAULT_KS` up to `max_dets`.
        max_dets: how many detections of an image take part, the highest scores first. None: 1500,
            or the largest of `ks` if that is more.

    Raises:
        InputError: a setting, file or entry that cannot be used.
    """
    if isinstance(gt, GroundTruth):
        if seen is not None:
            raise InputError("gt is a GroundTruth, which has its seen categories; leave out `seen`")
    elif seen is None:
        raise InputError(f"{gt}: seen is missing; give the seen categories, e.g. seen='voc'")
    else:
        gt = GroundTruth.load(gt, seen, keep=False)
    settings: dict[str, Any] = {"iou_type": iou_type, "ks": ks, "max_dets": max_dets}
    return evaluate_by(gt, results, [protocol], **settings)[0]


def evaluate_by(
    gt: GroundTruth,
    results: StrPath | Detections | Sequence[Mapping[str, Any]],
    protocols: Sequence[str],
    *,
    iou_type: str,
    ks: Sequence[int] | None,
    max_dets: int | None,
) -> list[OpenWorldResult]:
    """As :func:`evaluate`, by several protocols; a file is read once for all of them."""
    if max_dets is None:
        max_dets = max(DEFAULT_MAX_DETS, *(ks or [0]))
    if ks is None:
        ks = [k for k in DEFAULT_KS if k <= max_dets]
    settings: dict[str, Any] = {"iou_type": iou_type, "max_dets": max_dets, "ks": ks}
    masks = iou_type == "mask"
    if not isinstance(results, (str, os.PathLike, Detections)):
        results = convert_entries(results, gt, masks)

    def begin():
        return _Recalls([OpenWorldRecall(gt, each, **settings) for each in protocols])

    return [recall.result() for recall in give_detections(results, gt, begin, masks).recalls]


class _Recalls:
    def __init__(self, recalls: list[OpenWorldRecall]):
        self.recalls = recalls

    def update(self, detections: Detections) -> None:
        for recall in self.recalls:
            detections.add_to(recall)
