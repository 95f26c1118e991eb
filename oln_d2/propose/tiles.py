"""
Small objects in large photographs: overlapping tiles, whose detections are merged with those of the
whole image.

Shapes: D detections of a tile. Boxes are XYXY in absolute pixels.
"""

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
from pycocotools import mask as mask_utils

from oln_d2.boxes import nms

OVERLAP = 0.2  # least share of a tile that its neighbour sees, too
# A box that comes so near to a border inside the image, in shares of the tile, is cut by it.
MARGIN = 0.01
MERGE_IOU = 0.7  # as the NMS of the models themselves


class Tile(NamedTuple):
    """A part of an image, in pixels of the image."""

    x: int
    y: int
    width: int
    height: int


def make_tiles(width: int, height: int, side: int | None) -> list[Tile]:
    """
    Args:
        width, height: the image's, in pixels.
        side: the tiles', in pixels; None: no tiles.

    Returns:
        the whole image, and, where it is larger than a tile, tiles that cover it.
    """
    whole = Tile(0, 0, width, height)
    if side is None or max(width, height) <= side:
        return [whole]
    w, h = min(side, width), min(side, height)
    return [whole] + [Tile(x, y, w, h) for y in _starts(height, h) for x in _starts(width, w)]


def _starts(length, side):
    number = math.ceil((length - side) / (side * (1 - OVERLAP))) + 1
    return np.linspace(0, length - side, number).round().astype(int).tolist()


def merge(
    parts: Iterable[tuple[Tile, dict[str, Any]]], width: int, height: int, limit: int
) -> dict[str, Any]:
    """
    Args:
        parts: tiles of an image, each with its detections as :meth:`Proposer.detect` gives them.
        width, height: the image's.
        limit: at most so many are kept.

    Returns:
        the same of the image. Boxes that a border inside the image cuts are left out: another tile
        or the whole image shows all of that object.
    """
    kept = []
    for tile, fields in parts:
        boxes = np.asarray(fields["boxes"], float).reshape(-1, 4)
        shift = np.array([tile.x, tile.y] * 2)
        margin = MARGIN * np.array([tile.width, tile.height])
        low, high = boxes[:, :2] < margin, boxes[:, 2:] > [tile.width, tile.height] - margin
        inside_low = shift[:2] > 0
        inside_high = shift[:2] + [tile.width, tile.height] < [width, height]
        whole = np.flatnonzero(~((low & inside_low) | (high & inside_high)).any(axis=1))
        fields = {**fields, "masks": getattr(fields.get("masks"), "rles", fields.get("masks"))}
        part = {n: [v[i] for i in whole] for n, v in fields.items() if v is not None}
        part["boxes"] = list(boxes[whole] + shift)
        part["tile"] = [tile] * len(whole)
        kept.append(part)
    names = set.intersection(*(set(part) for part in kept))
    together = {name: [value for part in kept for value in part[name]] for name in names}
    order = np.argsort(-np.array(together["scores"]), kind="stable")
    boxes = np.array(together["boxes"]).reshape(-1, 4)
    order = order[nms(boxes[order], MERGE_IOU)][:limit]
    ret: dict[str, Any] = {n: [values[i] for i in order] for n, values in together.items()}
    tiles = ret.pop("tile")
    ret["boxes"] = boxes[order]
    if "masks" in ret:
        ret["masks"] = [
            _in_image(mask, tile, width, height)
            for mask, tile in zip(ret["masks"], tiles, strict=True)
        ]
    return ret


def _in_image(mask, tile, width, height):
    """The RLE of a tile as one of the image's size."""
    ret = np.zeros((height, width), np.uint8, order="F")
    ret[tile.y : tile.y + tile.height, tile.x : tile.x + tile.width] = mask_utils.decode(mask)
    return mask_utils.encode(ret)
