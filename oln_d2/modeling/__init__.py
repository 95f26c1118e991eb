"""Detectron2 components of OLN; importing this package registers them."""

from oln_d2.checks import needs

with needs("oln_d2.modeling", "detectron2"):
    from oln_d2.modeling.backbone import build_resnet10_fpn_backbone, build_timm_fpn_backbone
    from oln_d2.modeling.fcos import build_fcos
    from oln_d2.modeling.mask_head import OLNMaskHead
    from oln_d2.modeling.proposals import OLNProposals
    from oln_d2.modeling.roi_heads import OLNOutputLayers, OLNROIHeads
    from oln_d2.modeling.rpn import OLNRPN, LTRBTransform, OLNRPNHead

__all__ = [
    "LTRBTransform",
    "OLNMaskHead",
    "OLNOutputLayers",
    "OLNProposals",
    "OLNROIHeads",
    "OLNRPN",
    "OLNRPNHead",
    "build_fcos",
    "build_resnet10_fpn_backbone",
    "build_timm_fpn_backbone",
]
