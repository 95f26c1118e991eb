"""The second stage, which refines proposals and learns their IoU instead of a class."""

from collections.abc import Sequence

import torch
from detectron2.config import configurable
from detectron2.layers import ShapeSpec, cat, cross_entropy
from detectron2.modeling import ROI_HEADS_REGISTRY, StandardROIHeads
from detectron2.modeling.roi_heads.fast_rcnn import FastRCNNOutputLayers
from detectron2.structures import ImageList, Instances
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn

from oln_d2.checks import InputError
from oln_d2.localization import (
    QUALITIES,
    box_quality,
    fuse_scores,
    positives,
    quality_entropy,
    quality_loss,
)
from oln_d2.masks import MASKS_AT_ONCE
from oln_d2.modeling.mask_head import OLNMaskHead, PastedAsRLE, mask_areas
from oln_d2.scores import BOX_SCORE, FUSED, MASK_SCORE, OBJECTNESS, SCORES

"""
Shape shorthand in this module:

    R: number of RoIs, combined over all images, in the minibatch
    Ri: number of RoIs in image i

Naming convention:

    score: the quality of an RoI (IoU or centerness) as the head predicts it, sigmoid(pred_scores).

    positive: an RoI whose gt_classes is a foreground class. All foreground classes are one,
    "object".
"""


class OLNOutputLayers(FastRCNNOutputLayers):
    """
    Two linear layers: one score and class-agnostic box deltas per RoI (OLN, sec. III-B). In place
    of the class scores of :class:`FastRCNNOutputLayers` there is none: no RoI is ever called
    background, unless `score_negatives` asks for it.
    """

    @configurable
    def __init__(
        self,
        input_shape: ShapeSpec,
        *,
        score_target: str = "iou",
        score_negatives: bool = False,
        fused: Sequence[str] = FUSED,
        classify: bool = False,
        loss_weight: dict[str, float] | None = None,
        **kwargs,
    ):
        """
        Args:
            score_target: what the score learns, "iou" or "centerness".
            score_negatives: whether RoIs on no object teach the score, too, by cross-entropy.
            fused: whose geometric mean is the score of a detection, of "objectness", the first
                stage's score, and "box_score", this one's.
            classify: whether the features also learn classes and background (an ablation).
                Detections do not use it.
            loss_weight: factors of "loss_box_score", "loss_box_reg" and "loss_cls", default 1.
            input_shape, kwargs: see :class:`FastRCNNOutputLayers`; box deltas are always
                class-agnostic.

        Raises:
            InputError: a score target or a score that does not exist.
        """
        kwargs["cls_agnostic_bbox_reg"] = True  # also with more than one class in the data
        super().__init__(input_shape, loss_weight=loss_weight or {}, **kwargs)
        if score_target not in QUALITIES:
            raise InputError(
                f"MODEL.OLN.BOX_SCORE_TARGET is {score_target!r}; use one of {list(QUALITIES)}"
            )
        if not fused or not set(fused) <= set(FUSED):
            raise InputError(f"MODEL.OLN.SCORES is {list(fused)}; use one or more of {list(FUSED)}")
        self.score_target = score_target
        self.fused = tuple(fused)
        self.score_negatives = score_negatives
        self.classify = classify
        self.box_score = nn.Linear(self.cls_score.in_features, 1)
        nn.init.normal_(self.box_score.weight, std=0.01)
        nn.init.zeros_(self.box_score.bias)
        if not classify:
            del self.cls_score

    @classmethod
    def from_config(cls, cfg, input_shape):
        ret = super().from_config(cfg, input_shape)
        oln = cfg.MODEL.OLN
        ret["score_target"] = oln.BOX_SCORE_TARGET
        ret["loss_weight"]["loss_box_score"] = oln.BOX_SCORE_LOSS_WEIGHT
        ret["loss_weight"]["loss_cls"] = oln.BOX_CLS_LOSS_WEIGHT
        ret["score_negatives"] = oln.BOX_SCORE_NEGATIVES
        ret["classify"] = oln.BOX_CLS_LOSS_WEIGHT > 0
        # That of the masks comes later, after NMS: see OLNROIHeads.
        ret["fused"] = [name for name in oln.SCORES if name != MASK_SCORE.field]
        return ret

    @property
    def learns_from_negatives(self) -> bool:
        """Whether :meth:`losses` depend on more than the positives and the number of RoIs."""
        return self.score_negatives or self.classify

    def is_positive(self, gt_classes: Tensor) -> Tensor:
        """Bools, of the same shape as `gt_classes`."""
        return (gt_classes >= 0) & (gt_classes < self.num_classes)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """
        Args:
            x: shape (R, ...), features of the RoIs.

        Returns:
            pred_scores, shape (R, 1), logits, followed by the class logits if there is a
            classifier; and box deltas, shape (R, 4).
        """
        x = torch.flatten(x, start_dim=1)
        scores = self.box_score(x)
        if self.classify:
            scores = torch.cat([scores, self.cls_score(x)], dim=1)
        return scores, self.bbox_pred(x)

    def losses(
        self, predictions: tuple[Tensor, Tensor], proposals: list[Instances]
    ) -> dict[str, Tensor]:
        """
        Args:
            predictions: what :meth:`forward` returned.
            proposals: the sampled RoIs, with `proposal_boxes`, `gt_classes` and, in images with
                objects, `gt_boxes`, also `gt_weights` where objects count differently.

        Returns:
            scalars `loss_box_score` and `loss_box_reg`, with a classifier also `loss_cls`.
        """
        pred_scores, pred_deltas = predictions
        gt_classes = cat([p.gt_classes for p in proposals])
        boxes = cat([p.proposal_boxes.tensor for p in proposals])
        # An image without objects has no `gt_boxes` and no positives; boxes without area will do.
        gt_boxes = [
            p.gt_boxes.tensor if p.has("gt_boxes") else boxes.new_zeros(len(p), 4)
            for p in proposals
        ]
        gt_boxes = cat(gt_boxes)

        positive = self.is_positive(gt_classes).nonzero().squeeze(1)
        # The quality of the RoI as it came, not as the box deltas refine it.
        targets = box_quality(self.score_target, boxes[positive], gt_boxes[positive])
        pred_qualities = pred_scores[positive, 0]
        weights = _gt_weights(proposals)
        if self.score_negatives:
            # Negatives, too, have the object that they overlap most.
            qualities = box_quality(self.score_target, boxes, gt_boxes)
            own = None if weights is None else weights.where(qualities > 0, 1)
            loss_score = quality_entropy(pred_scores[:, 0], qualities, own)
        else:
            own = None if weights is None else weights[positive]
            loss_score = quality_loss(pred_qualities, targets, own)
        if weights is None:
            loss_boxes = self.box_reg_loss(boxes, gt_boxes, pred_deltas, gt_classes)
        else:  # objects of other weights are no objects to each part
            loss_boxes = sum(
                w
                * self.box_reg_loss(
                    boxes, gt_boxes, pred_deltas, gt_classes.where(weights == w, self.num_classes)
                )
                for w in weights.unique()
            )

        storage = get_event_storage()
        if len(positive) > 0:
            name, predicted = self.score_target, pred_qualities.detach().float().sigmoid()
            # One transfer: each `.item()` makes a GPU wait.
            target, predicted = torch.stack([targets.mean(), predicted.mean()]).tolist()
            storage.put_scalar(f"roi_head/{name}_target", target)
            storage.put_scalar(f"roi_head/{name}_pred", predicted)

        losses = {
            # Divided by all sampled RoIs, as Detectron2 divides the box loss, though only positives
            # are scored: each positive then has the same influence in every batch.
            "loss_box_score": loss_score / max(len(gt_classes), 1),
            "loss_box_reg": loss_boxes,
        }
        if self.classify:
            losses["loss_cls"] = cross_entropy(pred_scores[:, 1:].float(), gt_classes)
        return {name: loss * self.loss_weight.get(name, 1.0) for name, loss in losses.items()}

    def predict_probs(
        self, predictions: tuple[Tensor, Tensor], proposals: list[Instances]
    ) -> list[Tensor]:
        """
        Args:
            predictions: what :meth:`forward` returned.
            proposals: with `objectness_logits`, of the first stage.

        Returns:
            shape (Ri, 2) each: the score of the detection, the geometric mean of the stages'
            qualities, in [0, 1], and the column of the background, which inference drops.
        """
        scores = []
        for qualities in self._qualities(predictions, proposals):
            score = fuse_scores(*(qualities[name] for name in self.fused))
            scores.append(torch.stack([score, 1 - score], dim=1))
        return scores

    def inference(
        self, predictions: tuple[Tensor, Tensor], proposals: list[Instances]
    ) -> tuple[list[Instances], list[Tensor]]:
        """
        See :meth:`FastRCNNOutputLayers.inference`. The detections also have `objectness` and
        `box_scores`, shape (Di,), in [0, 1]: the qualities that the two stages predict.
        """
        results, kept = super().inference(predictions, proposals)
        boxes = self.predict_boxes(predictions, proposals)
        per_image = zip(results, kept, boxes, self._qualities(predictions, proposals))
        for detections, index, boxes_i, qualities in per_image:
            # Detectron2 counts `index` in what is left without the boxes that are not finite.
            finite = boxes_i.isfinite().all(dim=1)
            for name in self.fused:
                finite &= qualities[name].isfinite()
            index = finite.nonzero().squeeze(1)[index]
            detections.set(OBJECTNESS.attribute, qualities[OBJECTNESS.field][index])
            detections.set(BOX_SCORE.attribute, qualities[BOX_SCORE.field][index])
        return results, kept

    def _qualities(self, predictions, proposals):
        """list[dict[str, Tensor]]: of each image, by the names of `FUSED`, shape (Ri,)."""
        box_scores = predictions[0][:, 0].float().sigmoid().split([len(p) for p in proposals])
        return [
            {OBJECTNESS.field: p.objectness_logits.float().sigmoid(), BOX_SCORE.field: box_score}
            for p, box_score in zip(proposals, box_scores)
        ]


def _gt_weights(proposals):
    """How much the object of each RoI counts, shape (R,); None where all count 1."""
    if not any(p.has("gt_weights") for p in proposals):
        return None
    boxes = [p.proposal_boxes.tensor for p in proposals]
    return cat(
        [
            p.gt_weights if p.has("gt_weights") else b.new_ones(len(b))
            for p, b in zip(proposals, boxes)
        ]
    )


@ROI_HEADS_REGISTRY.register()
class OLNROIHeads(StandardROIHeads):
    """
    :class:`StandardROIHeads` with :class:`OLNOutputLayers` as box predictor. Where the score of a
    detection is made of its mask's too, all detections that NMS leaves get a mask, and only then
    the best are kept.
    """

    @configurable
    def __init__(self, *, mask_scores: bool = False, **kwargs):
        """
        Args:
            mask_scores: whether the score of a detection is also made of its mask's. Needs a mask
                head that predicts one, :class:`OLNMaskHead`.
            kwargs: arguments of :class:`StandardROIHeads`.
        """
        super().__init__(**kwargs)
        self.mask_scores = mask_scores
        if mask_scores:
            # Both limits are for the score that the mask has a part in.
            self.num_detections = self.box_predictor.test_topk_per_image
            self.box_predictor.test_topk_per_image = -1  # all
            self.score_thresh = self.box_predictor.test_score_thresh
            self.box_predictor.test_score_thresh = min(self.score_thresh, 0.0)

    @classmethod
    def from_config(cls, cfg, input_shape):
        """
        Raises:
            InputError: masks that should be scored, but are not predicted.
        """
        ret = super().from_config(cfg, input_shape)
        ret["mask_scores"] = MASK_SCORE.field in cfg.MODEL.OLN.SCORES
        scores_masks = isinstance(ret.get("mask_head"), OLNMaskHead)
        if ret["mask_scores"] and not scores_masks:
            raise InputError(
                f"MODEL.OLN.SCORES has {MASK_SCORE.field!r}, but there is no mask head that "
                "predicts it; set MODEL.MASK_ON True and MODEL.ROI_MASK_HEAD.NAME OLNMaskHead"
            )
        return ret

    @classmethod
    def _init_box_head(cls, cfg, input_shape):
        ret = super()._init_box_head(cfg, input_shape)
        ret["box_predictor"] = OLNOutputLayers(cfg, ret["box_head"].output_shape)
        return ret

    def forward(
        self,
        images: ImageList,
        features: dict[str, Tensor],
        proposals: list[Instances],
        targets: list[Instances] | None = None,
    ) -> tuple[list[Instances], dict[str, Tensor]]:
        """
        See :meth:`StandardROIHeads.forward`. Detections with masks have `pred_masks`, which
        Detectron2's postprocessing turns into :class:`oln_d2.masks.RLEMasks` of the image's size.
        """
        # In half precision, ROIAlign would round the boxes as well, by up to pixels.
        features = {name: feature.float() for name, feature in features.items()}
        results, losses = super().forward(images, features, proposals, targets)
        if self.mask_on and not self.training:
            results = [self._finish(detections) for detections in results]
        return results, losses

    def label_and_sample_proposals(
        self, proposals: list[Instances], targets: list[Instances]
    ) -> list[Instances]:
        """
        See :meth:`StandardROIHeads.label_and_sample_proposals`. For :class:`OLNMaskHead` the RoIs
        also get `gt_areas`, the areas of their objects' masks in pixels.
        """
        if isinstance(getattr(self, "mask_head", None), OLNMaskHead):
            for targets_i in targets:
                if targets_i.has("gt_masks"):
                    areas = mask_areas(targets_i.gt_masks)
                    targets_i.gt_areas = areas.to(targets_i.gt_boxes.device)
        return super().label_and_sample_proposals(proposals, targets)

    def _forward_box(self, features, proposals):
        # True of predictors that are not ours.
        negatives = getattr(self.box_predictor, "learns_from_negatives", True)
        if not self.training or negatives or self.train_on_pred_boxes:
            return super()._forward_box(features, proposals)
        # Pooling and head of the others, three quarters of a sample or more, would teach nothing.
        labels = [self.box_predictor.is_positive(p.gt_classes) for p in proposals]
        learnt = [p[index] for p, index in zip(proposals, positives(labels))]
        # The losses are divided by all RoIs of the sample, as in :meth:`OLNOutputLayers.losses`.
        share = sum(map(len, learnt)) / max(sum(map(len, proposals)), 1)
        losses = super()._forward_box(features, learnt)
        return {name: loss * share for name, loss in losses.items()}

    def _finish(self, detections):
        if self.mask_scores:
            fused = *self.box_predictor.fused, MASK_SCORE.field
            qualities = (detections.get(s.attribute) for s in SCORES if s.field in fused)
            detections.scores = fuse_scores(*qualities)
            best = detections.scores.argsort(descending=True, stable=True)
            detections = detections[best[: self.num_detections]]
            detections = detections[detections.scores > self.score_thresh]
        detections.pred_masks = PastedAsRLE(detections.pred_masks[:, 0])
        return detections

    def _forward_mask(self, features, instances):
        if self.training or not self.mask_on:
            return super()._forward_mask(features, instances)
        # In parts, since the features of thousands of boxes need gigabytes.
        results = []
        for i, detections in enumerate(instances):
            own = {name: feature[i : i + 1] for name, feature in features.items()}
            begins = range(0, max(len(detections), 1), MASKS_AT_ONCE)
            parts = [detections[begin : begin + MASKS_AT_ONCE] for begin in begins]
            parts = [super(OLNROIHeads, self)._forward_mask(own, [part])[0] for part in parts]
            results.append(Instances.cat(parts))
        return results
