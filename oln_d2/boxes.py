"""Boxes (D, 4) as numpy arrays, in absolute pixels."""

import numpy as np
from numpy.typing import NDArray

Boxes = NDArray[np.float64]


def to_xywh(boxes: Boxes) -> Boxes:
    """x, y, width, height of boxes x1, y1, x2, y2."""
    return np.hstack([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]])


def to_xyxy(boxes: Boxes) -> Boxes:
    """x1, y1, x2, y2 of boxes x, y, width, height."""
    return np.hstack([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]])


def nms(boxes: Boxes, iou: float) -> NDArray[np.int64]:
    """
    Args:
        boxes (D, 4): XYXY, best first.
        iou: in [0, 1].

    Returns:
        indices of the boxes that do not overlap a better one that stays by more than `iou`. Row by
        row: it needs no D x D matrix.
    """
    x1, y1, x2, y2 = boxes.T
    area = (x2 - x1) * (y2 - y1)
    rest, kept = np.arange(len(boxes)), []
    while len(rest):
        best, rest = rest[0], rest[1:]
        kept.append(best)
        width = np.minimum(x2[rest], x2[best]) - np.maximum(x1[rest], x1[best])
        height = np.minimum(y2[rest], y2[best]) - np.maximum(y1[rest], y1[best])
        overlap = width.clip(0) * height.clip(0)
        rest = rest[overlap <= iou * (area[rest] + area[best] - overlap)]
    return np.array(kept, np.int64)
