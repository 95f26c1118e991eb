"""Detectron2 components of OLN; importing this package registers them."""

from oln_d2.errors import require_detectron2

require_detectron2("oln_d2.modeling")

from oln_d2.modeling.backbone import build_resnet10_fpn_backbone  # noqa: E402
from oln_d2.modeling.mask_head import OLNMaskHead  # noqa: E402
from oln_d2.modeling.roi_heads import OLNOutputLayers, OLNROIHeads  # noqa: E402
from oln_d2.modeling.rpn import OLNRPN, LTRBTransform, OLNRPNHead  # noqa: E402

__all__ = [
    "LTRBTransform",
    "OLNMaskHead",
    "OLNOutputLayers",
    "OLNROIHeads",
    "OLNRPN",
    "OLNRPNHead",
    "build_resnet10_fpn_backbone",
]
