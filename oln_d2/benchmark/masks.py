"""Time and memory from a mask head's squares to RLE, beside Detectron2."""

import numpy as np
from pycocotools import mask as mask_utils
from tabulate import tabulate

from oln_d2.benchmark.measure import measure, require_unix
from oln_d2.checks import POSITIVE_INT, SEED, check_limits, needs


def benchmark_masks(
    num_masks: int = 1500, height: int = 800, width: int = 1333, seed: int = 0
) -> None:
    """
    Print a table: seconds and memory from a mask head's squares to RLE, and how many pixels differ.

    Args:
        num_masks: how many the image has.
        height, width: the image's, in pixels.
        seed: for the masks and boxes.

    Raises:
        InputError: an argument out of its range, or Windows.
        ImportError: Detectron2 is missing.
    """
    check_limits(
        num_masks=(num_masks, POSITIVE_INT),
        height=(height, POSITIVE_INT),
        width=(width, POSITIVE_INT),
        seed=(seed, SEED),
    )
    require_unix()
    with needs("benchmark masks", "detectron2"):
        import torch
        from detectron2.layers.mask_ops import paste_masks_in_image

        from oln_d2.masks import paste_masks

    def paste(masks, boxes):
        return paste_masks(torch.from_numpy(masks), torch.from_numpy(boxes), height, width).rles

    def paste_detectron2(masks, boxes):
        size = height, width
        pasted = paste_masks_in_image(torch.from_numpy(masks), torch.from_numpy(boxes), size)
        return [
            mask_utils.encode(np.asfortranarray(mask.numpy().view(np.uint8))) for mask in pasted
        ]

    rng = np.random.default_rng(seed)
    cells = np.stack(np.meshgrid(*[np.linspace(-1, 1, 28, dtype=np.float32)] * 2))
    ellipses = (cells**2).sum(0) < rng.uniform(0.3, 1, (num_masks, 1, 1))
    masks = np.clip(ellipses + rng.normal(0, 0.2, ellipses.shape), 0, 1).astype(np.float32)
    size = np.array([width, height])
    sides = np.exp(rng.uniform(np.log(4), np.log(np.maximum(size, 5)), (num_masks, 2)))
    corner = rng.random((num_masks, 2)) * (size - sides)
    boxes = np.hstack([corner, corner + sides]).astype(np.float32)
    names = "this package", "Detectron2, then pycocotools' encode"
    measured = [measure(f, masks, boxes) for f in (paste, paste_detectron2)]
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
