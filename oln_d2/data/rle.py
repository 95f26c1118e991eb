"""Masks as COCO writes them, checked before pycocotools, which trusts them, sees them."""

import ast
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from pycocotools import mask as mask_utils


def to_rle(mask: Any, height: float, width: float) -> dict[str, Any]:
    """
    Args:
        mask: a `segmentation` as COCO has it: polygons, or RLE with `counts` that are a list, text,
            bytes, or, by mistake, the text of Python bytes, "b'...'", which is put right.
        height, width: the image's, in pixels.

    Returns:
        compressed RLE.

    Raises:
        Exception: it is something else; pycocotools raises no narrower one.
    """
    if not mask:
        raise ValueError("it is empty")
    if isinstance(mask, list):
        height, width = int(height), int(width)
        check_polygons(mask, height, width)
        return mask_utils.merge(mask_utils.frPyObjects(mask, height, width))
    try:
        size, counts = [int(side) for side in mask["size"]], mask["counts"]
        if isinstance(counts, str) and is_text_of_bytes(counts):
            counts = ast.literal_eval(counts)
        rle = {"size": size, "counts": counts}
        if isinstance(counts, list):
            wrong = sum(counts) != size[0] * size[1] or min(counts) < 0
        else:
            wrong = wrong_rle([rle]) is not None
    except (LookupError, SyntaxError, TypeError, ValueError, AttributeError):
        raise ValueError("it has no size and counts that can be read") from None
    if wrong:
        raise ValueError("the counts do not make up the image")
    return mask_utils.frPyObjects(rle, *size) if isinstance(counts, list) else rle


def check_polygons(polygons: Sequence[Sequence[float]], height: int, width: int) -> None:
    """
    Raises Exception for polygons that are not finite or longer than their image has pixels:
    pycocotools draws them point by point, and ends the process where there are too many.
    """
    limit = 4 * (height + width) + height * width
    for polygon in polygons:
        try:
            quick = polygon and math.isfinite(sum(polygon))
            if quick and len(polygon) * max(*polygon, -min(polygon)) <= limit:
                continue  # it cannot be longer than that
            points = np.array(polygon[: len(polygon) // 2 * 2], float).reshape(-1, 2)
        except (LookupError, OverflowError, TypeError, ValueError):
            raise ValueError("a polygon is not a list of numbers") from None
        with np.errstate(all="ignore"):
            length = np.abs(np.diff(points, axis=0, prepend=0)).max(axis=1, initial=0).sum()
        if not length <= limit:
            raise ValueError("a polygon is longer than its image has pixels, or not finite")


def is_text_of_bytes(counts: str | bytes) -> bool:
    """Whether RLE went through `str(bytes)`; it never has quotes otherwise."""
    return counts[:2] in ("b'", 'b"')


def wrong_rle(rles: Sequence[Mapping[str, Any]]) -> int | None:
    """
    Args:
        rles: masks, each with `size`, two integers, and `counts`, text or bytes.

    Returns:
        the place of the first whose counts do not make up an image of its size: pycocotools would
        look for their end for ever. None: there is none.
    """
    if not rles:
        return None
    texts = [c.encode() if isinstance(c := rle["counts"], str) else c for rle in rles]
    n, lengths = len(texts), np.array([len(text) for text in texts], int)
    # Beyond that, pycocotools has no number for it.
    sizes = [rle["size"] for rle in rles]
    pixels = np.array([h * w if 0 <= h < 2**31 and 0 <= w < 2**31 else -1 for h, w in sizes], float)
    # A number is digits of 5 bits, the lowest first, and bit 6 of each says whether more follow.
    digits = np.frombuffer(b"".join(texts), np.uint8) - np.uint8(ord("0"))
    is_last = digits & 32 == 0
    ends = np.flatnonzero(is_last)
    after = np.cumsum(lengths)  # where each mask's digits end
    whole = lengths.min() > 0 and is_last[after - 1].all() and digits.max() < 64
    size = np.diff(ends, prepend=-1)  # digits of each number
    if not whole or size.max() > 7:
        if n == 1:
            return 0
        return next(i for i in range(n) if wrong_rle(rles[i : i + 1]) is not None)
    numbers = np.zeros(len(ends), np.int64)
    for place in range(size.max()):
        has = size > place
        begin = ends[has] - size[has] + 1 + place
        numbers[has] += (digits[begin] & 31).astype(np.int64) << 5 * place
    numbers -= np.where(digits[ends] & 16, 32 << 5 * (size - 1), 0)  # the sign
    bounds = np.searchsorted(ends, np.append(0, after))  # of each mask's numbers
    count = np.diff(bounds)  # of numbers of each mask
    first, rest = numbers[bounds[:-1]], np.delete(numbers, bounds[:-1])
    # From the fourth on, a number is the difference to the one two before: sums of columns of two.
    padded = count // 2 * 2
    begin = np.cumsum(padded) - padded
    at = np.arange(len(rest)) + np.repeat(begin - bounds[:-1] + np.arange(n), count - 1)
    columns = np.zeros((padded.sum() // 2, 2), np.int64)
    columns.ravel()[at] = rest
    sums = np.vstack([np.zeros((1, 2), np.int64), np.cumsum(columns, axis=0)])
    rest = (sums[1:] - np.repeat(sums[begin // 2], padded // 2, axis=0)).ravel()[at]
    owner = np.repeat(np.arange(n), count - 1)
    wrong = (first < 0) | (first + np.bincount(owner, rest, n) != pixels)
    wrong[owner[rest < 0]] = True
    return int(wrong.argmax()) if wrong.any() else None
