"""Pictures of what two detectors propose on the same images."""

import os

import numpy as np
from PIL import Image

from oln_d2.files import write_whole

TOP = 10
FOUND_IOU = 0.5
COLORS = {
    "known": "#3b9cff",
    "novel, found": "#19d219",
    "novel, missed": "#ff3030",
    "proposal": "white",
}


def draw_proposals(path, image_root, ground_truth, detections, num_images):
    """
    Write a picture: the first images of a data set in columns, the detectors in rows, each with its
    10 best boxes, the objects, and which novel objects these boxes find with an IoU of 0.5 or more.

    Args:
        path (str): e.g. PNG.
        image_root (Path): the folder of the images, named by their id.
        ground_truth (GroundTruth)
        detections (dict[str, Detections]): by the detector's name.
        num_images (int)
    """
    # Not pyplot: no window system, no global state.
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch, Rectangle

    rows, columns = len(detections), num_images
    figure = Figure(figsize=(3.1 * columns, 3.3 * rows + 0.5), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for row, (name, found) in zip(axes, detections.items()):
        for index, ax in enumerate(row):
            image_id = ground_truth.image_ids[index]
            ax.imshow(Image.open(os.path.join(image_root, f"{image_id:06d}.png")))
            ax.set(xticks=[], yticks=[])
            own = np.flatnonzero(found.image_ids == image_id)
            top = own[np.argsort(-found.scores[own], kind="stable")[:TOP]]
            boxes = found.boxes[top]
            gts = slice(*ground_truth.starts[index : index + 2])
            gt_boxes, seen = ground_truth.boxes[gts], ground_truth.seen[gts]
            is_found = _iou(gt_boxes, boxes).max(axis=1, initial=0) >= FOUND_IOU
            for box in boxes:
                ax.add_patch(_rectangle(Rectangle, box, COLORS["proposal"], 1.0))
            for box, known, hit in zip(gt_boxes, seen, is_found):
                kind = "known" if known else "novel, found" if hit else "novel, missed"
                ax.add_patch(_rectangle(Rectangle, box, COLORS[kind], 2.5))
            ax.set_title(f"{name}: {is_found[~seen].sum()} of {(~seen).sum()} novel", fontsize=10)
    handles = [
        Patch(facecolor=color, edgecolor="black", label=kind) for kind, color in COLORS.items()
    ]
    handles[-1].set_label(f"the {TOP} best proposals")
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    with write_whole(path) as temporary:
        figure.savefig(temporary, dpi=110)


def _rectangle(kind, box, color, width):
    return kind(box[:2], *box[2:], fill=False, edgecolor=color, linewidth=width)


def _iou(boxes1, boxes2):
    """(G, D) IoUs of boxes XYWH."""
    low = np.maximum(boxes1[:, None, :2], boxes2[:, :2])
    high = np.minimum((boxes1[:, :2] + boxes1[:, 2:])[:, None], boxes2[:, :2] + boxes2[:, 2:])
    inter = (high - low).clip(0).prod(axis=2)
    return inter / (boxes1[:, 2:].prod(axis=1)[:, None] + boxes2[:, 2:].prod(axis=1) - inter)
