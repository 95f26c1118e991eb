"""Open-world recall of any detector, from results files or arrays."""

import os
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from oln_d2.checks import InputError
from oln_d2.evaluation.coco_results import (
    Detections,
    convert_entries,
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
        gt = GroundTruth.load(gt, seen)
    if max_dets is None:
        max_dets = max(DEFAULT_MAX_DETS, *(ks or [0]))
    if ks is None:
        ks = [k for k in DEFAULT_KS if k <= max_dets]
    recall = OpenWorldRecall(gt, protocol, iou_type=iou_type, max_dets=max_dets, ks=ks)
    if isinstance(results, Detections):
        detections = results
    elif isinstance(results, (str, os.PathLike)):
        detections = read_results(results, gt, masks=iou_type == "mask")
    else:
        detections = convert_entries(results, gt, masks=iou_type == "mask")
    try:
        recall.update(*detections[:3], masks=detections.masks, box_format="xywh")
    except InputError as error:
        raise InputError(f"{detections.source}: {error}") from None
    return recall.result()
