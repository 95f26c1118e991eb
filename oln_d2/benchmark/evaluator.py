"""Time and memory of the evaluator beside pycocotools, on simulated detections."""

import copy
import importlib.util
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tabulate import tabulate

from oln_d2.benchmark.measure import measure, require_unix
from oln_d2.benchmark.reference import evaluate
from oln_d2.checks import POSITIVE_INT, SEED, check_limits
from oln_d2.data.coco import load_coco
from oln_d2.evaluation.ground_truth import GroundTruth
from oln_d2.evaluation.open_world import AREA_RANGES, OpenWorldRecall
from oln_d2.files import StrPath

KS = (10, 100, 1500)


def simulate_detections(
    ground_truth: GroundTruth, images: NDArray[np.int64], dets: int, seed: int = 0
) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.float64]]:
    """
    Detections as a detector might give them: a part of them around the gts, the others anywhere.

    Args:
        ground_truth: the objects.
        images (n,): index of the images.
        dets: detections of each image.
        seed: for the random numbers.

    Returns:
        image ids (n * dets,), boxes (n * dets, 4) as XYWH in pixels, scores (n * dets,).
    """
    rng = np.random.default_rng(seed)
    boxes = np.empty((len(images), dets, 4))
    scores = rng.random((len(images), dets))
    for image, box, score in zip(images, boxes, scores):
        size = ground_truth.image_sizes[image][::-1]
        size = np.where(np.isnan(size), 500, size)
        box[:, 2:] = np.exp(rng.uniform(np.log(8), np.log(np.maximum(size, 9)), (dets, 2)))
        box[:, :2] = rng.random((dets, 2)) * (size - box[:, 2:])
        gts = ground_truth.boxes[ground_truth.starts[image] : ground_truth.starts[image + 1]]
        if len(gts):
            around = rng.integers(len(gts), size=dets // 5)
            shift = rng.normal(0, 0.15, (len(around), 4)) * np.tile(gts[around, 2:], 2)
            box[: len(around)] = gts[around] + shift
            box[: len(around), 2:] = np.maximum(box[: len(around), 2:], 1)
            score[: len(around)] **= 0.5  # better than chance
    image_ids = np.repeat(ground_truth.image_ids[images], dets)
    return image_ids, boxes.reshape(-1, 4), scores.ravel()


def benchmark_evaluator(
    gt_path: StrPath,
    seen: StrPath | Sequence[str],
    num_images: int | None = None,
    dets: int = 1500,
    reference_images: int = 100,
    seed: int = 0,
) -> None:
    """
    Print a table: seconds for all images, ratio, memory, and the largest difference to our numbers.

    Args:
        gt_path: ground truth in COCO format.
        seen: the seen categories, see :func:`oln_d2.data.splits.seen_names`.
        num_images: only the first images; None: all of them.
        dets: detections of each image.
        reference_images: how many of the images the others run on; their time is scaled.
        seed: for the detections.

    Raises:
        InputError: an argument out of its range, a file that cannot be used, or Windows.
    """
    check_limits(
        num_images=(num_images, POSITIVE_INT),
        dets=(dets, POSITIVE_INT),
        reference_images=(reference_images, POSITIVE_INT),
        seed=(seed, SEED),
    )
    require_unix()
    content = load_coco(gt_path)
    content = _only(content, [image["id"] for image in content["images"]][:num_images])
    gt = GroundTruth(content, seen, gt_path)
    num_images = len(gt.image_ids)
    image_ids, boxes, scores = simulate_detections(gt, np.arange(num_images), dets, seed)
    print(
        f"{num_images} images, {len(gt.areas)} objects, {dets} simulated detections an image, "
        f"{(boxes.nbytes + scores.nbytes + image_ids.nbytes) / 2**20:.0f} MiB of detections; one "
        "process for each row"
    )
    # Evenly over the data set.
    some = np.linspace(0, num_images - 1, min(reference_images, num_images)).astype(int)
    some_content = _only(content, gt.image_ids[some].tolist())
    chosen = np.isin(image_ids, gt.image_ids[some])
    some_detections = image_ids[chosen], boxes[chosen], scores[chosen]
    entries = [
        {"image_id": image, "bbox": box, "score": score, "category_id": 1}
        for image, box, score in zip(*(column.tolist() for column in some_detections))
    ]
    seen_ids = np.unique(gt.category_ids[gt.seen]).tolist()

    ours = measure(_ours, gt, image_ids, boxes, scores)
    rows = [["this package, all images", *_row(ours, 1, ours), ""]]
    ours_on_some = measure(_ours, GroundTruth(some_content, seen, gt_path), *some_detections)
    rivals: dict[str, tuple[int, Any, dict[str, Any]]] = {
        "pycocotools with the xclass rule": (0, evaluate, {"seen_ids": seen_ids}),
        "pycocotools, plain": (1, evaluate, {}),
    }
    if importlib.util.find_spec("faster_coco_eval"):
        rivals["faster-coco-eval, plain"] = (1, _faster_coco_eval, {})
    else:
        print("faster-coco-eval is not installed, so it is not measured")
    for name, (which, function, rule) in rivals.items():
        measured = measure(function, some_content, entries, ks=KS, max_dets=max(KS), **rule)
        recall = np.where(measured[0][0] < 0, np.nan, measured[0][0])
        difference = np.nanmax(np.abs(recall - ours_on_some[0][which]), initial=0)
        scaled = num_images / len(some)
        rows.append(
            [f"{name}, {len(some)} images", *_row(measured, scaled, ours), f"{difference:.1e}"]
        )
    headers = ["", "seconds", "scaled to all", "ratio", "memory (MiB)", "difference of AR"]
    print(tabulate(rows, headers, disable_numparse=True, colalign=["left"] + ["right"] * 5))
    print(
        "This package computes unseen, seen and all objects, each of the others one of these. "
        "Memory is what is used beyond the detections."
    )


def _only(content, image_ids):
    kept = set(image_ids)
    return {
        "images": [image for image in content["images"] if image["id"] in kept],
        "annotations": [a for a in content["annotations"] if a["image_id"] in kept],
        "categories": content["categories"],
    }


def _ours(gt, image_ids, boxes, scores):
    """Recalls (T, A, K) of unseen and of all objects."""
    recall = OpenWorldRecall(gt)
    recall.update(image_ids, boxes, scores, box_format="xywh")
    result = recall.result()
    return [
        np.array([[result.recall(k, group, area) for k in KS] for area in AREA_RANGES]).transpose(
            2, 0, 1
        )
        for group in ("unseen", "all")
    ]


def _faster_coco_eval(content, results, ks, max_dets):
    from faster_coco_eval import COCO, COCOeval_faster

    coco_gt = COCO(copy.deepcopy(content))
    coco_dt = coco_gt.loadRes([dict(entry) for entry in results])
    evaluator = COCOeval_faster(coco_gt, coco_dt, "bbox", print_function=lambda *args: None)
    evaluator.params.useCats = 0
    evaluator.params.maxDets = [*(k for k in ks if k < max_dets), max_dets]
    evaluator.evaluate()
    evaluator.accumulate()
    return evaluator.eval["recall"][:, 0], None


def _row(measured, scale, ours):
    _, seconds, memory = measured
    scaled = seconds * scale
    return f"{seconds:.2f}", f"{scaled:.1f}", f"{scaled / ours[1]:.1f}", f"{memory / 2**20:.0f}"
