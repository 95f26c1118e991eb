"""OLN-Box: the second stage, which refines proposals and learns their IoU instead of a class."""

import torch
from detectron2.config import configurable
from detectron2.layers import cat
from detectron2.modeling import ROI_HEADS_REGISTRY, StandardROIHeads
from detectron2.modeling.roi_heads.fast_rcnn import FastRCNNOutputLayers
from detectron2.utils.events import get_event_storage
from torch import nn

from oln_d2.errors import InputError
from oln_d2.localization import QUALITIES, box_quality, fuse_scores, quality_loss

"""
Shape shorthand in this module:

    R: number of RoIs, combined over all images, in the minibatch
    Ri: number of RoIs in image i

Naming convention:

    score: the quality of an RoI (IoU or centerness) as the head predicts it, sigmoid(pred_scores).

    positive: an RoI whose gt_classes is a foreground class. All foreground classes are one, "object".
"""


class OLNOutputLayers(FastRCNNOutputLayers):
    """
    Two linear layers: one score and class-agnostic box deltas per RoI (OLN, sec. III-B). In place of
    the class scores of :class:`FastRCNNOutputLayers` there is none: no RoI is ever called background.
    """

    @configurable
    def __init__(
        self,
        input_shape,
        *,
        score_target: str = "iou",
        loss_weight=None,
        **kwargs,
    ):
        """
        Args:
            input_shape (ShapeSpec): shape of the input features.
            score_target: what the score learns, "iou" or "centerness".
            loss_weight (dict[str, float]): factors of "loss_box_score" and "loss_box_reg", default 1.
            kwargs: arguments of :class:`FastRCNNOutputLayers`; box deltas are always class-agnostic.

        Raises:
            InputError: a score target that does not exist.
        """
        kwargs["cls_agnostic_bbox_reg"] = True  # also with more than one class in the data
        super().__init__(input_shape, loss_weight=loss_weight or {}, **kwargs)
        if score_target not in QUALITIES:
            raise InputError(
                f"MODEL.OLN.BOX_SCORE_TARGET is {score_target!r}; use one of {list(QUALITIES)}"
            )
        self.score_target = score_target
        self.box_score = nn.Linear(self.cls_score.in_features, 1)
        nn.init.normal_(self.box_score.weight, std=0.01)
        nn.init.zeros_(self.box_score.bias)
        del self.cls_score

    @classmethod
    def from_config(cls, cfg, input_shape):
        ret = super().from_config(cfg, input_shape)
        ret["score_target"] = cfg.MODEL.OLN.BOX_SCORE_TARGET
        ret["loss_weight"]["loss_box_score"] = cfg.MODEL.OLN.BOX_SCORE_LOSS_WEIGHT
        return ret

    def forward(self, x):
        """
        Args:
            x (Tensor): shape (R, ...), features of the RoIs.

        Returns:
            (Tensor, Tensor): pred_scores, shape (R, 1), logits; and box deltas, shape (R, 4).
        """
        x = torch.flatten(x, start_dim=1)
        return self.box_score(x), self.bbox_pred(x)

    def losses(self, predictions, proposals):
        """
        Args:
            predictions: what :meth:`forward` returned.
            proposals (list[Instances]): the sampled RoIs, with `proposal_boxes`, `gt_classes` and, in
                images with objects, `gt_boxes`.

        Returns:
            dict[str, Tensor]: scalars `loss_box_score` and `loss_box_reg`.
        """
        pred_scores, pred_deltas = predictions
        gt_classes = cat([p.gt_classes for p in proposals])
        boxes = cat([p.proposal_boxes.tensor for p in proposals])
        # An image without objects has no `gt_boxes` and no positives; any box will do.
        gt_boxes = cat([(p.gt_boxes if p.has("gt_boxes") else p.proposal_boxes).tensor for p in proposals])

        positive = ((gt_classes >= 0) & (gt_classes < self.num_classes)).nonzero().squeeze(1)
        # The quality of the RoI as it came, not as the box deltas refine it.
        targets = box_quality(self.score_target, boxes[positive], gt_boxes[positive])
        pred_scores = pred_scores[positive, 0]

        storage = get_event_storage()
        if len(positive) > 0:
            name, predicted = self.score_target, pred_scores.detach().float().sigmoid()
            storage.put_scalar(f"roi_head/{name}_target", targets.mean().item())
            storage.put_scalar(f"roi_head/{name}_pred", predicted.mean().item())

        losses = {
            # Divided by all sampled RoIs, as Detectron2 divides the box loss, though only positives
            # are scored: each positive then has the same influence in every batch.
            "loss_box_score": quality_loss(pred_scores, targets) / max(len(gt_classes), 1),
            "loss_box_reg": self.box_reg_loss(boxes, gt_boxes, pred_deltas, gt_classes),
        }
        return {name: loss * self.loss_weight.get(name, 1.0) for name, loss in losses.items()}

    def predict_probs(self, predictions, proposals):
        """
        Args:
            predictions: what :meth:`forward` returned.
            proposals (list[Instances]): with `objectness_logits`, of the first stage.

        Returns:
            list[Tensor]: shape (Ri, 2) each: the score of the detection, the geometric mean of both
            stages' qualities, in [0, 1], and the column of the background, which inference drops.
        """
        box_qualities = predictions[0][:, 0].float().sigmoid()
        scores = []
        for proposals_i, box_quality_i in zip(proposals, box_qualities.split([len(p) for p in proposals])):
            score = fuse_scores(proposals_i.objectness_logits.float().sigmoid(), box_quality_i)
            scores.append(torch.stack([score, 1 - score], dim=1))
        return scores


@ROI_HEADS_REGISTRY.register()
class OLNROIHeads(StandardROIHeads):
    """:class:`StandardROIHeads` with :class:`OLNOutputLayers` as box predictor."""

    @classmethod
    def _init_box_head(cls, cfg, input_shape):
        ret = super()._init_box_head(cfg, input_shape)
        ret["box_predictor"] = OLNOutputLayers(cfg, ret["box_head"].output_shape)
        return ret
