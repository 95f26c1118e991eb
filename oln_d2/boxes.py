"""Boxes (D, 4) as numpy arrays, in absolute pixels."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from oln_d2.checks import InputError

Boxes = NDArray[np.float64]
# XYXY boxes read as XYWH reach beyond their image; this share of them does not by accident.
SHARE_BEYOND = 0.2


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


class BoxFormat:
    """
    Whether the boxes of a file can be XYWH in pixels, judged by all that came so far.

    Args:
        source: named in errors, with an entry, such as "annotations[{}]", by its number.
    """

    def __init__(self, source: object, entry: str):
        self._source, self._entry = source, entry
        self._count = self._beyond = self._corners = 0
        self._largest, self._least_side = -np.inf, np.inf
        self._first: Any = None  # number and box of the first, and of the first beyond its image
        self._first_beyond: Any = None

    def check(self, boxes: Boxes, sizes: NDArray[np.float64], first: int = 0) -> None:
        """
        Args:
            boxes: (D, 4).
            sizes: (D, 2), height and width of their images; NaN where they are not known.
            first: the number of the first.

        Raises:
            InputError: they are plainly something else.
        """
        some = slice(None, None, 1 + len(boxes) // 100_000)  # enough to recognise the format
        boxes = boxes[some]
        x, y, w, h = boxes.T
        height, width = sizes[some].T
        beyond = (x + w > 1.05 * width + 2) | (y + h > 1.05 * height + 2)
        fits_as_corners = (w >= x) & (h >= y) & (w <= width + 2) & (h <= height + 2)
        if len(x):
            self._first = self._first or (first, boxes[0].tolist())
        if beyond.any():
            index = np.flatnonzero(beyond)[0]
            self._first_beyond = self._first_beyond or (
                first + index * some.step,
                boxes[index].tolist(),
            )
        self._count += len(x)
        self._beyond += int(np.count_nonzero(beyond))
        self._corners += int(np.count_nonzero(fits_as_corners))
        self._largest = np.max(boxes, initial=self._largest)
        sides = np.fmin.reduce([height, width], axis=None, initial=self._least_side)
        self._least_side = float(sides)
        if self._count < 10:
            return
        share = self._beyond / self._count
        if share > SHARE_BEYOND and self._corners / self._count > 0.999:
            raise InputError(
                f"{self._named(*self._first_beyond)} reaches beyond its image, as "
                f"{100 * share:.0f} % of the boxes do, and all fit if read as corners: they seem "
                "to be [x1, y1, x2, y2], write [x, y, width, height]"
            )
        if self._largest <= 1 and 1 < self._least_side < np.inf:
            raise InputError(
                f"{self._named(*self._first)}, as all others, is below one pixel: they seem to be "
                "fractions of the image size, write pixels"
            )

    def _named(self, number, box):
        return f"{self._source}: {self._entry.format(number)}: bbox {box}"
