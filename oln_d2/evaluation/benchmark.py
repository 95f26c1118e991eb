"""
Time and memory on simulated detections: the evaluator beside pycocotools, masks beside Detectron2.
"""

import copy
import multiprocessing
import resource
import time

import numpy as np
import torch
from pycocotools import mask as mask_utils
from tabulate import tabulate

from oln_d2.data.coco import load_coco
from oln_d2.errors import InputError, require_detectron2
from oln_d2.evaluation.ground_truth import GroundTruth
from oln_d2.evaluation.open_world import AREA_RANGES, OpenWorldRecall
from oln_d2.evaluation.reference import evaluate
from oln_d2.masks import paste_masks

KS = (10, 100, 1500)


def simulate_detections(ground_truth, images, dets, seed=0):
    """
    Detections as a detector might give them: a part of them around the gts, the others anywhere.

    Args:
        ground_truth (GroundTruth)
        images (n,): index of the images.
        dets (int): detections of each image.
        seed (int)

    Returns:
        image_ids (n * dets,), boxes (n * dets, 4) as XYWH, scores (n * dets,).
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


def benchmark(gt_path, seen, num_images=None, dets=1500, reference_images=100, seed=0):
    """
    Print a table: seconds for all images, ratio, memory, and the largest difference to our numbers.

    Args:
        gt_path (str): ground truth in COCO format.
        seen (str): the seen categories, see :func:`oln_d2.data.splits.seen_names`.
        num_images (int): only the first images; None: all of them.
        dets (int): detections of each image.
        reference_images (int): how many of the images the others run on; their time is scaled.
        seed (int): of the detections.
    """
    if min(dets, reference_images, num_images or 1) < 1:
        raise InputError("numbers of images and detections have to be positive")
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

    ours = _measure(_ours, gt, image_ids, boxes, scores)
    rows = [["this package, all images", *_row(ours, 1, ours), ""]]
    ours_on_some = _measure(_ours, GroundTruth(some_content, seen, gt_path), *some_detections)
    rivals = {
        "pycocotools with the xclass rule": (0, evaluate, {"seen_ids": seen_ids}),
        "pycocotools, plain": (1, evaluate, {}),
    }
    try:
        import faster_coco_eval  # noqa: F401

        rivals["faster-coco-eval, plain"] = (1, _faster_coco_eval, {})
    except ImportError:
        print("faster-coco-eval is not installed, so it is not measured")
    for name, (which, function, rule) in rivals.items():
        measured = _measure(function, some_content, entries, ks=KS, max_dets=max(KS), **rule)
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


def benchmark_masks(num_masks=1500, height=800, width=1333, seed=0):
    """
    Print a table: seconds and memory from a mask head's squares to RLE, and how many pixels differ.

    Args:
        num_masks (int): of the image.
        height, width (int): its size in pixels.
        seed (int): of the masks and boxes.
    """
    if min(num_masks, height, width) < 1:
        raise InputError("the number of masks and the size of the image have to be positive")
    require_detectron2("benchmark masks")
    rng = np.random.default_rng(seed)
    cells = np.stack(np.meshgrid(*[np.linspace(-1, 1, 28, dtype=np.float32)] * 2))
    ellipses = (cells**2).sum(0) < rng.uniform(0.3, 1, (num_masks, 1, 1))
    masks = np.clip(ellipses + rng.normal(0, 0.2, ellipses.shape), 0, 1).astype(np.float32)
    size = np.array([width, height])
    sides = np.exp(rng.uniform(np.log(4), np.log(np.maximum(size, 5)), (num_masks, 2)))
    corner = rng.random((num_masks, 2)) * (size - sides)
    boxes = np.hstack([corner, corner + sides]).astype(np.float32)
    names = "this package", "Detectron2, then pycocotools' encode"
    measured = [_measure(f, masks, boxes, height, width) for f in (_paste, _paste_detectron2)]
    difference = sum(
        int((mask_utils.decode(a) != mask_utils.decode(b)).sum())
        for a, b in zip(*(rles for rles, *_ in measured))
    )
    area = sum(int(mask_utils.area(rle)) for rle in measured[0][0])
    rows = [
        [name, f"{seconds:.2f}", f"{seconds / measured[0][1]:.1f}", f"{memory / 2**20:.0f}"]
        for name, (_, seconds, memory) in zip(names, measured)
    ]
    print(f"{num_masks} masks of {height} x {width}, one process for each row")
    print(tabulate(rows, ["", "seconds", "ratio", "memory (MiB)"], disable_numparse=True))
    print(f"{difference} pixels differ, of {area} in masks.")


def _paste(masks, boxes, height, width):
    return paste_masks(torch.from_numpy(masks), torch.from_numpy(boxes), height, width).rles


def _paste_detectron2(masks, boxes, height, width):
    from detectron2.layers.mask_ops import paste_masks_in_image

    pasted = paste_masks_in_image(torch.from_numpy(masks), torch.from_numpy(boxes), (height, width))
    return [mask_utils.encode(np.asfortranarray(mask.numpy().view(np.uint8))) for mask in pasted]


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


def _measure(function, *args, **kwargs):
    """(returned value, seconds, bytes of memory used on top), in a process of its own."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)

    def work():
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        start = time.perf_counter()
        result = function(*args, **kwargs)
        seconds = time.perf_counter() - start
        more = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        sender.send((result, seconds, 1024 * more))

    process = context.Process(target=work)
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        raise InputError(
            f"{function.__name__} ended without a result: not enough memory?"
        ) from None
    finally:
        process.join()


def _row(measured, scale, ours):
    _, seconds, memory = measured
    scaled = seconds * scale
    return f"{seconds:.2f}", f"{scaled:.1f}", f"{scaled / ours[1]:.1f}", f"{memory / 2**20:.0f}"
