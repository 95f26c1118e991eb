"""Detectron2's FCOS, which it has no config for."""

from detectron2.config import CfgNode
from detectron2.modeling import META_ARCH_REGISTRY, build_backbone
from detectron2.modeling.meta_arch.fcos import FCOS, FCOSHead
from torch import Tensor


class _FloatFCOS(FCOS):
    """Its box loss, fvcore's, fails with boxes in half precision."""

    def losses(self, anchors, pred_logits, gt_labels, deltas, *others) -> dict[str, Tensor]:
        deltas = [levels.float() for levels in deltas]
        return super().losses(anchors, pred_logits, gt_labels, deltas, *others)


@META_ARCH_REGISTRY.register()
def build_fcos(cfg: CfgNode) -> FCOS:
    """
    FCOS by the keys of MODEL.RETINANET, which it shares all of but those of the anchors and of the
    box loss.
    """
    keys = cfg.MODEL.RETINANET
    backbone = build_backbone(cfg)
    shapes = backbone.output_shape()
    channels = shapes[keys.IN_FEATURES[0]].channels
    head = FCOSHead(
        input_shape=[shapes[name] for name in keys.IN_FEATURES],
        num_classes=keys.NUM_CLASSES,
        conv_dims=[channels] * keys.NUM_CONVS,
        prior_prob=keys.PRIOR_PROB,
        norm=keys.NORM,
    )
    return _FloatFCOS(
        backbone=backbone,
        head=head,
        head_in_features=keys.IN_FEATURES,
        num_classes=keys.NUM_CLASSES,
        focal_loss_alpha=keys.FOCAL_LOSS_ALPHA,
        focal_loss_gamma=keys.FOCAL_LOSS_GAMMA,
        test_score_thresh=keys.SCORE_THRESH_TEST,
        test_topk_candidates=keys.TOPK_CANDIDATES_TEST,
        test_nms_thresh=keys.NMS_THRESH_TEST,
        max_detections_per_image=cfg.TEST.DETECTIONS_PER_IMAGE,
        pixel_mean=cfg.MODEL.PIXEL_MEAN,
        pixel_std=cfg.MODEL.PIXEL_STD,
    )
