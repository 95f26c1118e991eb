"""Detectors by their settings: backbones, the models on them, and what a checkpoint describes."""

import difflib
import math
from collections import OrderedDict
from functools import partial
from inspect import signature
from numbers import Integral
from typing import Any

import torch
from torch import nn
from torchvision.models import (
    ResNet18_Weights,
    ResNet50_Weights,
    WeightsEnum,
    detection,
    get_model,
    get_model_weights,
)
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.detection.faster_rcnn import TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.resnet import BasicBlock
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from oln_d2.checks import NOT_NEGATIVE, POSITIVE_INT, InputError, Limit, check_limits, one_of
from oln_d2.files import StrPath
from oln_d2.masks import MaskScoreHead
from oln_d2.scores import FUSED
from oln_d2.standalone.checkpoint import (
    load_checkpoint,
    load_parameters,
    read_checkpoint,
    read_own_checkpoint,
)
from oln_d2.standalone.models import (
    FloatRPNHead,
    FrozenNorm,
    OLNBox,
    RoIAlign,
    SquareAnchors,
    Transform,
)
from oln_d2.standalone.timm_features import TimmFeatures, load_features

# Depths of the ResNet, and the channels of its first stage.
CHANNELS = {10: 32, 18: 64, 34: 64, 50: 256, 101: 256}
GROUPS = 32  # of group norm
NORMS = {
    "FrozenBN": FrozenNorm,
    "BN": nn.BatchNorm2d,
    "GN": partial(nn.GroupNorm, GROUPS),
}
_OLN_BOX = {
    name: parameter.default
    for name, parameter in signature(OLNBox).parameters.items()
    if name not in ("backbone", "mask_parts")
}
_SHARED = (
    "anchor_sizes min_size max_size pixel_mean pixel_std representation_size box_nms_thresh "
    "box_detections_per_img"
)
LEAST = {"box_sampling_ratio": 0, "rpn_boundary_thresh": -1}  # of integers that may be below 1
# The settings of each architecture, beside those that `build_detector` names, and their defaults.
DEFAULTS: dict[str, dict[str, Any]] = {
    "oln_box": _OLN_BOX,
    "oln_mask": {n: v for n, v in _OLN_BOX.items() if n != "scores"} | {"mask_channels": 256},
    "faster_rcnn": {
        **{name: _OLN_BOX[name] for name in _SHARED.split()},
        "rpn_post_nms_top_n_train": 1000,
        "rpn_post_nms_top_n_test": 2000,
        "box_score_thresh": 0.0,
    },
}


def build_detector(
    architecture: str = "oln_box",
    *,
    backbone: str | None = None,
    depth: int = 50,
    norm: str = "FrozenBN",
    fpn_norm: str | None = None,
    fpn_channels: int = 256,
    trainable_backbone_layers: int = 3,
    weights_backbone: WeightsEnum | StrPath | None = None,
    **settings: Any,
) -> nn.Module:
    """
    Args:
        architecture: "oln_box"; "oln_mask", for inference only; or "faster_rcnn": torchvision's,
            with the one class "object" and the same backbone and anchors, to compare with.
        backbone: a model of timm, such as "tf_efficientnet_lite0", see :class:`TimmFeatures`;
            `pixel_mean` and `pixel_std` are then timm's by default. None: a ResNet.
        depth: 18, 34, 50 or 101, of the ResNet; or 10, one of half the width for trying things out.
        norm: "FrozenBN", batch norm with frozen statistics, scale and shift, which needs pretrained
            weights; "BN", batch norm that learns, which needs large batches; or, of a ResNet, "GN",
            group norm in the backbone and the FPN, which learns from scratch.
        fpn_norm: "GN", group norm in the FPN, whatever the backbone has.
        fpn_channels: channels of the feature pyramid.
        trainable_backbone_layers: stages of the backbone that learn, from the last backwards; 5:
            all, also the stem.
        weights_backbone: pretrained weights of the backbone. Of a ResNet: torchvision's, by name,
            or a file that holds such a state dict. Of timm: see :class:`TimmFeatures`.
        settings: those in :data:`DEFAULTS`: arguments of :class:`OLNBox`, with 4 `anchor_sizes` for
            P2..P5 or 5 for P2..P6; with "faster_rcnn" also torchvision's `FasterRCNN` arguments.

    Returns:
        called as :class:`OLNBox` says. Its `config` is the dict of plain values that builds the
        same again, without pretrained weights: `build_detector(**model.config)`.

    Raises:
        InputError: a value that is not one of the above, or pretrained weights out of reach.
        ImportError: timm is needed and missing.
    """
    backbone_settings = {
        "backbone": backbone,
        "depth": depth,
        "norm": norm,
        "fpn_norm": fpn_norm,
        "fpn_channels": fpn_channels,
        "trainable_backbone_layers": trainable_backbone_layers,
    }
    fpn_norm = "GN" if norm == "GN" else fpn_norm
    multiple = Limit(lambda n: fpn_norm is None or n % GROUPS == 0, f"a multiple of {GROUPS} in GN")
    check_limits(
        backbone=(backbone, Limit(lambda name: isinstance(name, str), "the name of a timm model")),
        architecture=(architecture, one_of(*DEFAULTS)),
        depth=(depth, one_of(*CHANNELS)),
        norm=(norm, one_of(*NORMS) if backbone is None else one_of("FrozenBN", "BN")),
        fpn_norm=(fpn_norm, one_of("GN")),
        trainable_backbone_layers=(trainable_backbone_layers, one_of(*range(6))),
    )
    check_limits(fpn_channels=(fpn_channels, POSITIVE_INT))
    check_limits(fpn_channels=(fpn_channels, multiple))
    if backbone is None:
        body, channels = _resnet(depth, norm, trainable_backbone_layers, weights_backbone)
    else:
        body = TimmFeatures(backbone, norm, 5 - trainable_backbone_layers, weights_backbone)
        channels = body.channels
        settings = {"pixel_mean": body.pixel_mean, "pixel_std": body.pixel_std, **settings}
    _check_settings(architecture, settings)
    settings = {**DEFAULTS[architecture], **settings}
    levels = len(settings["anchor_sizes"])
    if levels not in (4, 5):
        raise InputError(
            f"anchor_sizes is {settings['anchor_sizes']}; give 4, for P2..P5, or 5, for P2..P6"
        )
    fpn = FeaturePyramidNetwork(
        channels,
        fpn_channels,
        LastLevelMaxPool() if levels == 5 else None,
        norm_layer=NORMS[fpn_norm] if fpn_norm else None,
    )
    pyramid = nn.Sequential(OrderedDict(body=body, fpn=fpn))
    pyramid.out_channels = fpn_channels
    try:
        if architecture == "oln_mask":
            model = _oln_mask(pyramid, norm=norm, **settings)
        else:
            model = (OLNBox if architecture == "oln_box" else _faster_rcnn)(pyramid, **settings)
    except TypeError as error:  # one of torchvision's
        raise InputError(f"a setting of {architecture} does not fit: {error}") from None
    model.config = {"architecture": architecture, **backbone_settings, **settings}
    return model


def _integer_from(least):
    return Limit(
        lambda value: isinstance(value, Integral) and int(value) >= least,
        f"an integer, {least} or more",
    )


def _check_settings(architecture, settings):
    """Raises InputError for a setting that is not known, or not of the kind of its default."""
    defaults = DEFAULTS[architecture]
    for name in settings:
        if name not in defaults and architecture != "faster_rcnn":  # which has torchvision's, too
            known = [*defaults, *signature(build_detector).parameters]
            near = difflib.get_close_matches(name, known, n=1)
            raise InputError(
                f"{name} is no setting of {architecture}; near it: {', '.join(near) or 'depth'}"
            )
    sizes = "min_size", "max_size"  # whose least value `Transform` checks
    integer = Limit(lambda value: isinstance(value, Integral), "an integer")
    for name, value in settings.items():
        default = defaults.get(name)
        if value is None and default is not None:
            raise InputError(f"{name} is None; leave it out for its default, {default}")
        if isinstance(default, bool):
            limit = one_of(True, False)
        elif name == "scores":
            limit = Limit(
                lambda names: len(names) > 0 and set(names) <= set(FUSED),
                f"a list of one or more of {', '.join(FUSED)}",
            )
        elif isinstance(default, tuple) or (
            name == "min_size" and isinstance(value, (list, tuple))
        ):
            limit = Limit(lambda values: len(values) > 0 and sum(values) < math.inf, "numbers")
        elif name in LEAST:
            limit = _integer_from(LEAST[name])
        elif isinstance(default, int):
            limit = integer if name in sizes else POSITIVE_INT
        else:
            limit = NOT_NEGATIVE
        if name in defaults:
            check_limits(**{name: (value, limit)})


def _resnet(depth, norm, trainable_layers, weights):
    """A ResNet as the features of its four stages, and their channels."""
    file = None
    if depth == 10:
        if weights is not None:
            raise InputError(
                "there are no pretrained weights for depth 10; train it from scratch: --scratch on "
                'the command line, weights_backbone=None and norm="GN" in Python'
            )
        resnet = _small_resnet(NORMS[norm])
    else:
        name = f"resnet{depth}"
        known = get_model_weights(name).__members__
        is_name = isinstance(weights, WeightsEnum) or str(weights).rpartition(".")[2] in known
        if weights is not None and not is_name:
            file, weights = weights, None
        try:
            resnet = get_model(name, weights=weights, norm_layer=NORMS[norm])
        except OSError as error:
            raise InputError(
                f"the ImageNet weights cannot be fetched ({error}); fetch them on another machine "
                f"into {torch.hub.get_dir()}/checkpoints (the environment variable TORCH_HOME "
                "names another folder), or train from scratch"
            ) from None
    stages = ["layer4", "layer3", "layer2", "layer1", "conv1", "bn1"]
    learning = stages[: trainable_layers if trainable_layers < 5 else None]
    for name, parameter in resnet.named_parameters():
        parameter.requires_grad_(name.split(".")[0] in learning)
    body = IntermediateLayerGetter(resnet, {f"layer{i + 1}": str(i) for i in range(4)})
    if file is not None:
        load_features(body, read_checkpoint(file)["model"], file, f"torchvision's resnet{depth}")
    return body, [CHANNELS[depth] * 2**i for i in range(4)]


def _small_resnet(norm_layer):
    """A ResNet-10, one basic block a stage, of half the width, under the names of torchvision's."""
    width = CHANNELS[10]
    layers = {
        "conv1": nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False),
        "bn1": norm_layer(width),
        "relu": nn.ReLU(inplace=True),
        "maxpool": nn.MaxPool2d(3, stride=2, padding=1),
    }
    for i in range(4):
        channels, stride, shortcut = width * 2**i, 1, None
        if i > 0:
            stride = 2
            shortcut = nn.Conv2d(channels // 2, channels, 1, stride=2, bias=False)
            shortcut = nn.Sequential(shortcut, norm_layer(channels))
        block = BasicBlock(channels // stride, channels, stride, shortcut, norm_layer=norm_layer)
        layers[f"layer{i + 1}"] = nn.Sequential(block)
    resnet = nn.Sequential(OrderedDict(layers))
    for layer in resnet.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    return resnet


def _oln_mask(backbone, *, norm, mask_channels, representation_size, **settings):
    """OLN-Mask, for inference."""
    norm_layer = NORMS[norm] if norm == "GN" else None
    channels = backbone.out_channels
    parts = {
        "mask_roi_pool": RoIAlign(14),
        "mask_head": MaskRCNNHeads(channels, [mask_channels] * 4, 1, norm_layer),
        "mask_predictor": MaskRCNNPredictor(mask_channels, mask_channels, num_classes=1),
        "mask_score": MaskScoreHead(
            channels, 14, [mask_channels] * 4, [representation_size] * 2, norm_layer
        ),
    }
    return OLNBox(backbone, representation_size=representation_size, mask_parts=parts, **settings)


def _faster_rcnn(
    backbone,
    *,
    anchor_sizes,
    min_size,
    max_size,
    pixel_mean,
    pixel_std,
    representation_size,
    **settings,
):
    model = detection.FasterRCNN(
        backbone,
        rpn_anchor_generator=SquareAnchors(anchor_sizes),
        rpn_head=FloatRPNHead(backbone.out_channels, 1),
        box_head=TwoMLPHead(backbone.out_channels * 7 * 7, representation_size),
        box_predictor=detection.faster_rcnn.FastRCNNPredictor(representation_size, num_classes=2),
        **settings,
    )
    model.transform = Transform(min_size, max_size, pixel_mean, pixel_std)
    return model


def load_detector(path: StrPath, config: dict[str, Any] | None = None) -> nn.Module:
    """
    Args:
        path: a checkpoint that :func:`save_checkpoint`, `oln-d2 train` or `oln-d2 convert` wrote;
            or, with `config`, one of Detectron2.
        config: arguments of :func:`build_detector`, for a file that does not hold them.

    Returns:
        the detector it holds, in inference mode.

    Raises:
        InputError: see :func:`load_checkpoint`; or the file does not say how its model is built.
    """
    content = read_own_checkpoint(path)
    config = config or content.get("config")
    if not isinstance(config, dict):
        raise InputError(
            f"{path}: does not say how its model is built; if Detectron2 trained it, give its "
            "--config-file too; or build the model in Python, e.g. "
            "oln_box_resnet50_fpn(checkpoint=...)"
        )
    try:
        model = build_detector(**config)
    except ImportError:
        raise
    except Exception as error:  # of a later version of this package; or somebody has changed them
        reason = str(error).partition("\n")[0]
        raise InputError(
            f"{path}: has settings that are not known here ({reason}); update oln_d2, or fetch the "
            "file again"
        ) from None
    load_parameters(model, content["model"], path)
    return model.eval()


def oln_box_resnet50_fpn(
    *,
    checkpoint: StrPath | None = None,
    weights_backbone: WeightsEnum | str | None = ResNet50_Weights.IMAGENET1K_V1,
    **settings: Any,
) -> nn.Module:
    """
    OLN-Box with a ResNet-50-FPN backbone, by default with the paper's settings: see :class:`OLNBox`
    for what goes in and what comes out.

    Example::

        >>> model = oln_box_resnet50_fpn(checkpoint="model_final.pth").eval()
        >>> predictions = model([torch.rand(3, 300, 400), torch.rand(3, 500, 400)])
        >>> predictions[0]["boxes"], predictions[0]["scores"]

    Args:
        checkpoint: weights of the whole detector, see :func:`load_checkpoint`; those of the
            backbone are then not fetched.
        weights_backbone, settings: see :func:`build_detector`; from scratch wants norm="GN".
    """
    return _oln_box(50, checkpoint, weights_backbone, settings)


def oln_box_resnet18_fpn(
    *,
    checkpoint: StrPath | None = None,
    weights_backbone: WeightsEnum | str | None = ResNet18_Weights.IMAGENET1K_V1,
    **settings: Any,
) -> nn.Module:
    """The same as :func:`oln_box_resnet50_fpn` with a ResNet-18, small enough for a CPU."""
    return _oln_box(18, checkpoint, weights_backbone, settings)


def oln_mask_resnet50_fpn(checkpoint: StrPath, **settings: Any) -> nn.Module:
    """
    OLN-Mask with a ResNet-50-FPN backbone, for inference; see :func:`oln_box_resnet50_fpn`. Trained
    with `train_net.py`.
    """
    return _oln_box(50, checkpoint, None, {"architecture": "oln_mask", **settings})


def _oln_box(depth, checkpoint, weights_backbone, settings):
    if checkpoint is not None:
        weights_backbone = None
    elif weights_backbone is None:
        settings = {"trainable_backbone_layers": 5, **settings}
    model = build_detector(depth=depth, weights_backbone=weights_backbone, **settings)
    if checkpoint is not None:
        load_checkpoint(model, checkpoint)
    return model
