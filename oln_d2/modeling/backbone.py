"""Backbones that Detectron2 lacks: one small enough to learn from scratch on a CPU; timm's."""

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.modeling.backbone import FPN, Backbone, ResNet
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from detectron2.modeling.backbone.resnet import BasicBlock, BasicStem
from torch import Tensor

from oln_d2.checks import check_limits, one_of
from oln_d2.standalone.timm_features import STRIDES, TimmFeatures


@BACKBONE_REGISTRY.register()
def build_resnet10_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """
    ResNet-10, one basic block a stage, with FPN; Detectron2's own builder makes basic blocks of one
    width only and no GroupNorm of fewer channels.

    Args:
        cfg: MODEL.RESNETS.{RES2_OUT_CHANNELS, NORM} and MODEL.FPN.{OUT_CHANNELS, NORM, FUSE_TYPE}
            are used.
        input_shape: the image's.

    Returns:
        a backbone with the features p2..p6.
    """
    norm, channels = cfg.MODEL.RESNETS.NORM, cfg.MODEL.RESNETS.RES2_OUT_CHANNELS
    stages, in_channels = [], channels
    for i in range(4):
        stages.append(
            ResNet.make_stage(
                BasicBlock,
                1,
                stride_per_block=[1 if i == 0 else 2],
                in_channels=in_channels,
                out_channels=channels * 2**i,
                norm=norm,
            )
        )
        in_channels = channels * 2**i
    names = [f"res{i}" for i in range(2, 6)]
    bottom_up = ResNet(BasicStem(input_shape.channels, channels, norm), stages, out_features=names)
    return _pyramid(bottom_up, cfg)


class TimmBackbone(TimmFeatures, Backbone):
    """:class:`TimmFeatures` as Detectron2 takes them; they are called res2 to res5."""

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return dict(zip(self.output_shape(), super().forward(images).values()))

    def output_shape(self) -> dict[str, ShapeSpec]:
        return {
            f"res{i}": ShapeSpec(channels=channels, stride=stride)
            for i, (channels, stride) in enumerate(zip(self.channels, STRIDES), 2)
        }


@BACKBONE_REGISTRY.register()
def build_timm_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """
    A model of timm with FPN.

    Args:
        cfg: MODEL.OLN.TIMM, MODEL.BACKBONE.FREEZE_AT and MODEL.FPN.{OUT_CHANNELS, NORM,
            FUSE_TYPE} are used.
        input_shape: the image's; timm's models want RGB.

    Returns:
        a backbone with the features p2..p6.

    Raises:
        InputError: a name or norm that cannot be used, see :class:`TimmFeatures`.
        ImportError: timm is missing.
    """
    timm, freeze_at = cfg.MODEL.OLN.TIMM, cfg.MODEL.BACKBONE.FREEZE_AT
    check_limits(**{"MODEL.OLN.TIMM.NORM": (timm.NORM, one_of("FrozenBN", "BN"))})
    return _pyramid(TimmBackbone(timm.NAME, timm.NORM, freeze_at), cfg)


def _pyramid(bottom_up, cfg):
    return FPN(
        bottom_up,
        cfg.MODEL.FPN.IN_FEATURES or list(bottom_up.output_shape()),
        cfg.MODEL.FPN.OUT_CHANNELS,
        norm=cfg.MODEL.FPN.NORM,
        top_block=LastLevelMaxPool(),
        fuse_type=cfg.MODEL.FPN.FUSE_TYPE,
    )
