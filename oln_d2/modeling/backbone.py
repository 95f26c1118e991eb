"""A backbone small enough to learn from scratch on a CPU in minutes."""

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.modeling.backbone import FPN, ResNet
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from detectron2.modeling.backbone.resnet import BasicBlock, BasicStem


@BACKBONE_REGISTRY.register()
def build_resnet10_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """
    ResNet-10, one basic block a stage, with FPN; Detectron2's own builder makes basic blocks of one
    width only and no GroupNorm of fewer channels.

    Args:
        cfg: MODEL.RESNETS.{RES2_OUT_CHANNELS, NORM} and MODEL.FPN.{OUT_CHANNELS, NORM} are used.
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
    names = ["res2", "res3", "res4", "res5"]
    bottom_up = ResNet(BasicStem(input_shape.channels, channels, norm), stages, out_features=names)
    return FPN(
        bottom_up,
        names,
        cfg.MODEL.FPN.OUT_CHANNELS,
        norm=cfg.MODEL.FPN.NORM,
        top_block=LastLevelMaxPool(),
    )
