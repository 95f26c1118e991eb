"""OLN-Mask: the mask head, which also learns how well its mask fits."""

from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.config import configurable
from detectron2.layers import ShapeSpec, cat, get_norm
from detectron2.modeling import ROI_MASK_HEAD_REGISTRY
from detectron2.modeling.roi_heads import MaskRCNNConvUpsampleHead
from detectron2.structures import BitMasks, Instances, PolygonMasks, ROIMasks
from detectron2.utils.events import get_event_storage
from torch import Tensor

from oln_d2.localization import mask_iou, quality_loss
from oln_d2.masks import MaskScoreHead, paste_masks

"""
Shape shorthand in this module:

    R: number of RoIs, combined over all images, in the minibatch
    C: channels of an RoI's features
    P: side of an RoI's features, 14
    M: side of a predicted mask, 2P
"""


class PastedAsRLE(ROIMasks):
    """
    Detectron2's :class:`ROIMasks` whose masks of the image's size are :class:`RLEMasks`: 1500 of
    them as a tensor would need gigabytes.
    """

    def to(self, device):
        return PastedAsRLE(self.tensor.to(device))

    def __getitem__(self, item):
        return PastedAsRLE(super().__getitem__(item).tensor)

    @staticmethod
    def cat(parts):
        return PastedAsRLE(torch.cat([part.tensor for part in parts]))

    def to_bitmasks(self, boxes, height, width, threshold=0.5):
        return SimpleNamespace(tensor=paste_masks(self.tensor, boxes.tensor, height, width))


@ROI_MASK_HEAD_REGISTRY.register()
class OLNMaskHead(MaskRCNNConvUpsampleHead):
    """:class:`MaskRCNNConvUpsampleHead`, class-agnostic, with a :class:`MaskScoreHead`."""

    @configurable
    def __init__(
        self,
        input_shape: ShapeSpec,
        *,
        score_fc_dims: list[int],
        score_loss_weight: float = 1.0,
        conv_dims: list[int],
        conv_norm: str = "",
        **kwargs,
    ):
        """
        Args:
            input_shape: shape of the input features.
            score_fc_dims: widths of the linear layers that predict a mask's score; its convolutions
                are as those of the mask.
            score_loss_weight: factor of "loss_mask_score".
            conv_dims, conv_norm, kwargs: see :class:`MaskRCNNConvUpsampleHead`.
        """
        kwargs["num_classes"] = 1  # also with more than one class in the data
        super().__init__(input_shape, conv_dims=conv_dims, conv_norm=conv_norm, **kwargs)
        self.score_loss_weight = score_loss_weight
        self.score = MaskScoreHead(
            input_shape.channels,
            input_shape.height,
            conv_dims[:-1],  # the last is that of the upsampling
            score_fc_dims,
            (lambda channels: get_norm(conv_norm, channels)) if conv_norm else None,
        )

    @classmethod
    def from_config(cls, cfg, input_shape):
        ret = super().from_config(cfg, input_shape)
        ret["score_fc_dims"] = [cfg.MODEL.ROI_BOX_HEAD.FC_DIM] * cfg.MODEL.ROI_BOX_HEAD.NUM_FC
        ret["score_loss_weight"] = cfg.MODEL.OLN.MASK_SCORE_LOSS_WEIGHT
        return ret

    def layers(self, x: Tensor) -> Tensor:
        for name, layer in self.named_children():
            if name != "score":  # registered beside the layers that the parent goes through
                x = layer(x)
        return x

    def forward(self, x: Tensor, instances: list[Instances]) -> Any:
        """
        Args:
            x: shape (R, C, P, P), features of the RoIs.
            instances: in training the positives, with `proposal_boxes`, `gt_masks` and, to measure
                each object once instead of each RoI, `gt_areas`, see :func:`mask_areas`; in
                inference the detections.

        Returns:
            In training dict[str, Tensor], scalars `loss_mask` and `loss_mask_score`. In inference
            the instances, which got `pred_masks`, shape (Ri, 1, M, M), in [0, 1], and
            `mask_scores`, shape (Ri,), in [0, 1]: the predicted IoU of mask and object.
        """
        logits = self.layers(x)
        masks = logits.float().sigmoid()
        # Detached: the score's loss must not train the mask.
        scores = self.score(x, masks.detach().to(x.dtype))
        if self.training:
            return self._losses(logits.float(), scores, instances)
        counts = [len(i) for i in instances]
        per_image = zip(instances, masks.split(counts), scores.float().sigmoid().split(counts))
        for instances_i, masks_i, scores_i in per_image:
            instances_i.pred_masks = masks_i
            instances_i.mask_scores = scores_i
        return instances

    def _losses(self, logits, scores, instances):
        gt_masks, gt_areas = [], []
        for instances_i in instances:
            if len(instances_i) > 0:
                boxes = instances_i.proposal_boxes
                cropped = instances_i.gt_masks.crop_and_resize(boxes.tensor, logits.shape[-1])
                gt_masks.append(cropped.to(logits.device) > 0.5)
                # Of whole objects, in cells of the mask: parts outside the RoI count.
                known = instances_i.has("gt_areas")
                areas = instances_i.gt_areas if known else mask_areas(instances_i.gt_masks)
                gt_areas.append(areas.to(logits) / boxes.area() * logits[0, 0].numel())
        num = len(logits)
        gt_masks = (
            cat(gt_masks) if num else logits.new_zeros(0, *logits.shape[2:], dtype=torch.bool)
        )
        gt_areas = cat(gt_areas) if num else logits.new_zeros(0)
        logits = logits[:, 0]
        targets = mask_iou(logits.detach() > 0, gt_masks, gt_areas)
        if num > 0:
            storage = get_event_storage()
            predicted = scores.detach().float().sigmoid()
            # One transfer: each `.item()` makes a GPU wait.
            target, predicted = torch.stack([targets.mean(), predicted.mean()]).tolist()
            storage.put_scalar("mask_head/iou_target", target)
            storage.put_scalar("mask_head/iou_pred", predicted)
        loss_mask = F.binary_cross_entropy_with_logits(logits, gt_masks.float(), reduction="sum")
        loss_score = quality_loss(scores, targets) / max(num, 1)
        return {
            "loss_mask": loss_mask / max(logits.numel(), 1) * self.loss_weight,
            "loss_mask_score": loss_score * self.score_loss_weight,
        }


def mask_areas(masks: BitMasks | PolygonMasks) -> Tensor:
    """
    Args:
        masks: of G objects.

    Returns:
        shape (G,), their areas in pixels, on the device of the masks (of polygons: the CPU).
    """
    return masks.tensor.flatten(1).sum(dim=1) if isinstance(masks, BitMasks) else masks.area()
