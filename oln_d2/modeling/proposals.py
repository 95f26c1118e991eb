"""OLN-Box as the first stage of a detector with classes."""

import torch
from detectron2.config import configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import PROPOSAL_GENERATOR_REGISTRY
from detectron2.structures import Boxes, ImageList, Instances
from torch import Tensor, nn

from oln_d2.modeling.roi_heads import OLNROIHeads
from oln_d2.modeling.rpn import OLNRPN

LEAST = 1e-6  # scores are taken to be at least so far from 0 and 1: logits have to be finite


@PROPOSAL_GENERATOR_REGISTRY.register()
class OLNProposals(nn.Module):
    """
    Both stages of OLN-Box where a detector of Detectron2 has its RPN: what it hands on are boxes
    that the second stage has refined, by their scores. It learns with the detector (approximate
    joint training), from all objects as one class.
    """

    @configurable
    def __init__(
        self, *, rpn: OLNRPN, roi_heads: OLNROIHeads, num_proposals: tuple[int, int] = (1000, 1000)
    ):
        """
        Args:
            rpn, roi_heads: the stages, without masks; of one class. NMS and least score of their
                detections are those of the proposals.
            num_proposals: (train, test), how many boxes of an image are handed on at most.
        """
        super().__init__()
        self.rpn = rpn
        self.roi_heads = roi_heads
        self.num_proposals = {True: num_proposals[0], False: num_proposals[1]}

    @classmethod
    def from_config(cls, cfg, input_shape: dict[str, ShapeSpec]):
        own = cfg.clone()
        own.defrost()
        own.MODEL.MASK_ON = own.MODEL.KEYPOINT_ON = False
        own.MODEL.ROI_HEADS.NUM_CLASSES = 1
        # MODEL.ROI_HEADS has those of the detector's boxes.
        own.MODEL.ROI_HEADS.NMS_THRESH_TEST = cfg.MODEL.RPN.NMS_THRESH
        own.MODEL.ROI_HEADS.SCORE_THRESH_TEST = 0.0
        return {
            "rpn": OLNRPN(own, input_shape),
            "roi_heads": OLNROIHeads(own, input_shape),
            "num_proposals": tuple(cfg.MODEL.OLN.NUM_PROPOSALS),
        }

    def forward(
        self,
        images: ImageList,
        features: dict[str, Tensor],
        gt_instances: list[Instances] | None = None,
    ) -> tuple[list[Instances], dict[str, Tensor]]:
        """
        Args, returns: see :meth:`RPN.forward`. The losses of the second stage are called
        `loss_oln_box_score` and `loss_oln_box_reg`, for those of the detector to stand beside them.
        """
        proposals, losses = self.rpn(images, features, gt_instances)
        if self.training:
            objects = []
            for gt in gt_instances:
                own = Instances(gt.image_size, gt_boxes=gt.gt_boxes)
                own.gt_classes = torch.zeros_like(gt.gt_classes)
                if gt.has("gt_weights"):
                    own.gt_weights = gt.gt_weights
                objects.append(own)
            _, second = self.roi_heads(images, features, proposals, objects)
            losses |= {name.replace("loss_", "loss_oln_", 1): loss for name, loss in second.items()}
        return self._refine(features, proposals), losses

    @torch.no_grad()
    def _refine(self, features, proposals):
        """What the second stage makes of them, in training, too."""
        heads, predictor = self.roi_heads, self.roi_heads.box_predictor
        levels = [features[name].float() for name in heads.box_in_features]
        pooled = heads.box_pooler(levels, [p.proposal_boxes for p in proposals])
        predictor.test_topk_per_image = self.num_proposals[self.training]
        detections, _ = predictor.inference(predictor(heads.box_head(pooled)), proposals)
        return [
            Instances(
                found.image_size,
                proposal_boxes=Boxes(found.pred_boxes.tensor),
                objectness_logits=found.scores.clamp(LEAST, 1 - LEAST).logit(),
            )
            for found in detections
        ]
