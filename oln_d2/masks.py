"""
Masks of both runtimes: how well they fit, and the way from the head's small squares to COCO's RLE.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from pycocotools import mask as mask_utils
from torch import Tensor, nn

from oln_d2.results import RLEMasks

THRESHOLD = 0.5
# Boxes whose masks are predicted at once: the features of thousands need gigabytes.
MASKS_AT_ONCE = 256
# Masks of the size of the image that are held at once. 1500 of 800 x 1333 pixels would be 1.6 GB.
CHUNK = 32


class MaskScoreHead(nn.Module):
    """
    Predicts the IoU of a mask with its object from the RoI's features and the mask itself, as Mask
    Scoring R-CNN does (Huang et al., 2019, sec. 3.2).

    Args:
        channels: C, of the RoI's features.
        size: P, their side.
        conv_dims, fc_dims: widths of the layers; the last convolution halves P.
        norm: makes the norm of a convolution of so many channels, if it is to have one.
    """

    def __init__(
        self,
        channels: int,
        size: int,
        conv_dims: Sequence[int],
        fc_dims: Sequence[int],
        norm: Callable[[int], nn.Module] | None = None,
    ):
        super().__init__()
        layers, width = [], channels + 1
        for i, conv_dim in enumerate(conv_dims):
            stride = 2 if i == len(conv_dims) - 1 else 1
            layers.append(nn.Conv2d(width, conv_dim, 3, stride, padding=1, bias=norm is None))
            layers += [norm(conv_dim)] if norm else []
            layers.append(nn.ReLU())
            size, width = (size + stride - 1) // stride, conv_dim
        layers.append(nn.Flatten())
        width *= size * size
        for fc_dim in fc_dims:
            layers += [nn.Linear(width, fc_dim), nn.ReLU()]
            width = fc_dim
        for layer in layers:
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(layer, nn.Linear):
                nn.init.kaiming_uniform_(layer.weight, a=1)
            if getattr(layer, "bias", None) is not None:
                nn.init.zeros_(layer.bias)
        self.layers = nn.Sequential(*layers)
        self.predictor = nn.Linear(width, 1)
        nn.init.normal_(self.predictor.weight, std=0.01)
        nn.init.zeros_(self.predictor.bias)

    def forward(self, x: Tensor, masks: Tensor) -> Tensor:
        """
        Args:
            x: shape (R, C, P, P).
            masks: shape (R, 1, 2P, 2P), in [0, 1].

        Returns:
            shape (R,), logits of the IoU.
        """
        x = torch.cat([x, F.max_pool2d(masks, 2)], dim=1)
        return self.predictor(self.layers(x))[:, 0]


def paste_masks(probabilities: Tensor, boxes: Tensor, height: int, width: int) -> RLEMasks:
    """
    Scale the masks of boxes to their boxes (bilinear, as Detectron2 does) and cut them at 0.5.

    Args:
        probabilities: shape (D, M, M), in [0, 1].
        boxes: shape (D, 4), XYXY, absolute pixels.
        height, width: the image's, in pixels.

    Returns:
        D masks of the size of the image.
    """
    probabilities = probabilities.detach().float().cpu().numpy()
    boxes = boxes.detach().float().cpu().numpy()
    rles = []
    for begin in range(0, len(boxes), CHUNK):
        chunk = probabilities[begin : begin + CHUNK], boxes[begin : begin + CHUNK]
        # Column by column, the order of RLE.
        masks = np.zeros((len(chunk[0]), width, height), dtype=np.uint8)
        for mask, small, (x1, y1, x2, y2) in zip(masks, *chunk):
            columns, of_columns = _bilinear(x1, x2, len(small), width)
            rows, of_rows = _bilinear(y1, y2, len(small), height)
            mask[columns, rows] = of_columns @ small.T @ of_rows.T >= THRESHOLD
        rles += mask_utils.encode(masks.transpose(2, 1, 0))
    return RLEMasks(rles, height, width)


def _bilinear(low, high, size, limit):
    """
    Along one axis: the slice of pixels that a mask may cover, and for each of them the weights,
    shape (pixels, size), of the mask's cells; a cell beyond the mask is 0.
    """
    scale = (high - low) / size
    if not 0 < scale < np.inf:  # of a box without area
        return slice(0, 0), np.zeros((0, size), np.float32)
    begin = int(np.clip(np.floor(low - scale), 0, limit))
    end = int(np.clip(np.ceil(high + scale), begin, limit))
    position = (np.arange(begin, end, dtype=np.float32) + 0.5 - low) / scale - 0.5
    distance = np.abs(position[:, None] - np.arange(size, dtype=np.float32))
    return slice(begin, end), np.maximum(1 - distance, 0)
