"""
OLN on torch and torchvision alone: detectors, checkpoints of either runtime, and plain training.
"""

from oln_d2.checks import needs

with needs("oln_d2.standalone", "torch"):
    from oln_d2.standalone.build import (
        build_detector,
        load_detector,
        oln_box_resnet18_fpn,
        oln_box_resnet50_fpn,
        oln_mask_resnet50_fpn,
    )
    from oln_d2.standalone.checkpoint import load_checkpoint, save_checkpoint
    from oln_d2.standalone.models import OLNBox
    from oln_d2.standalone.trainer import train

__all__ = [
    "OLNBox",
    "build_detector",
    "load_checkpoint",
    "load_detector",
    "oln_box_resnet18_fpn",
    "oln_box_resnet50_fpn",
    "oln_mask_resnet50_fpn",
    "save_checkpoint",
    "train",
]
