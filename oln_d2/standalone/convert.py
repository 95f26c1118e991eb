"""Checkpoints of the authors' code (mmdet), of Detectron2 and of timm, made ones of ours."""

import os
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from oln_d2.checks import InputError
from oln_d2.files import StrPath, check_output
from oln_d2.standalone.build import build_detector, load_detector
from oln_d2.standalone.checkpoint import read_checkpoint, save_checkpoint, write_checkpoint
from oln_d2.standalone.names import (
    PUBLIC_SCORES,
    TIMM,
    detectron2_name,
    is_public,
    public_name,
    standalone_name,
)
from oln_d2.standalone.timm_features import TimmFeatures

_UNUSED = re.compile(r"(rpn_head\.rpn_cls|bbox_head\.fc_cls)\.|\.num_batches_tracked$")
_LTRB_OF_TBLR = [2, 0, 3, 1]  # their order is top, bottom, left, right

# Blocks of the four stages, and whether they are bottlenecks (three convolutions).
_DEPTHS = {
    ((2, 2, 2, 2), False): 18,
    ((3, 4, 6, 3), False): 34,
    ((3, 4, 6, 3), True): 50,
    ((3, 4, 23, 3), True): 101,
}
_OURS = "roi_heads.box_predictor.box_score.weight"
# A name that only such a file has, and what the file seems to be; the first that fits.
_OTHER_FILES = {
    "backbone.bottom_up.stem.conv1.weight": "another detector of Detectron2; train OLN-Box, or "
    "convert the authors' file",
    "backbone.body.conv1.weight": "a state dict of a torchvision detector; save an OLN-Box with "
    "oln_d2.standalone.save_checkpoint",
    "roi_head.bbox_head.fc_cls.weight": "a Faster R-CNN of mmdet, which has no OLN heads; convert "
    "the authors' OLN-Box",
    "layer1.0.conv1.weight": "a ResNet alone, such as torchvision's ImageNet weights; convert the "
    "authors' OLN-Box; training recipes fetch ImageNet weights themselves",
}


def convert_public_state_dict(
    state_dict: Mapping[str, Tensor],
) -> tuple[dict[str, Tensor], list[str]]:
    """
    Args:
        state_dict: parameters of the authors' OLN-Box under their names.

    Returns:
        the same under our names, distances in our order; and names that our model does not have:
        the classifiers, which OLN never uses, and the counters of batch norm.

    Raises:
        InputError: a name that the authors' OLN-Box does not have.
    """
    converted, unused = {}, []
    for name, tensor in state_dict.items():
        if _UNUSED.search(name):
            unused.append(name)
            continue
        standalone = standalone_name(name)
        if standalone is None:
            raise InputError(
                f"{name} is no parameter of the authors' OLN-Box, all that is converted"
            )
        if name.startswith("rpn_head.rpn_reg.") and len(tensor) == len(_LTRB_OF_TBLR):
            tensor = tensor[_LTRB_OF_TBLR]
        converted[detectron2_name(standalone)] = tensor
    return converted, unused


def convert_checkpoint(
    source: StrPath, target: StrPath, config: dict[str, Any] | None = None, half: bool = False
) -> tuple[nn.Module, list[str]]:
    """
    Write a checkpoint that describes itself, for both runtimes: `load_detector(target)`, or
    `MODEL.WEIGHTS target`.

    Args:
        source: of the authors' OLN-Box, a file of theirs, or a bare state dict under its names: how
            the model is built is inferred from names and shapes. Or one of ours.
        target: the file to write, see :func:`save_checkpoint`.
        config: see :func:`load_detector`, for a checkpoint of Detectron2.
        half: store floating point numbers in float16, half the size. Models compute in float32 with
            them as before.

    Returns:
        the detector, with the weights, in inference mode; and the names that were not used, see
        :func:`convert_public_state_dict`.

    Raises:
        InputError: `source` is another file, has a tensor too few, too many or of another shape, or
            holds values that are not finite; or `target` cannot be written. Nothing is written.
    """
    source, target = os.path.expanduser(source), os.path.expanduser(target)
    check_output(target, [source])
    content = read_checkpoint(source)
    state_dict = content["model"]
    if config or isinstance(content.get("config"), dict) or _OURS in state_dict:
        model = load_detector(source, config)
        _save(model, source, target, half)
        return model, []
    try:
        config = _detector_config(state_dict)
        model = build_detector(**config)
        converted, unused = convert_public_state_dict(state_dict)
        _check(state_dict, converted, model)
    except InputError as error:
        raise InputError(f"{source}: {error}") from None
    model.load_state_dict({name: converted[detectron2_name(name)] for name in model.state_dict()})
    _save(model, source, target, half)
    return model.eval(), unused


def _save(model, source, target, half):
    if half:
        model.half()
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point() and not tensor.isfinite().all():
                raise InputError(f"{source}: {name} holds numbers beyond float16; leave out --half")
    save_checkpoint(model, target)
    model.float()


def convert_backbone(source: StrPath, target: StrPath, backbone: str) -> None:
    """
    Write pretrained weights of a model of timm as Detectron2's MODEL.WEIGHTS for a training with
    `build_timm_fpn_backbone`. (The standalone runtime takes them as `weights_backbone`.)

    Args:
        source, backbone: `weights` and `name` of :class:`TimmFeatures`.
        target: the file to write.

    Raises:
        InputError: see :class:`TimmFeatures`; or `target` cannot be written.
    """
    source, target = os.path.expanduser(source), os.path.expanduser(target)
    check_output(target, [source])
    features = TimmFeatures(backbone, weights=source)
    parameters = {TIMM + name: tensor for name, tensor in features.timm.state_dict().items()}
    write_checkpoint(target, parameters)


def _detector_config(state_dict):
    """The arguments of `build_detector` for the model of the authors' state dict."""
    if not is_public(state_dict):
        for name, what in _OTHER_FILES.items():
            if name in state_dict:
                raise InputError(f"seems to be {what}")
        raise InputError(
            f"holds no OLN-Box of the authors' code (it has no {PUBLIC_SCORES[0]}, its first name "
            f"is {next(iter(state_dict))}); fetch their checkpoint"
        )
    widths = {}
    for key, name in (
        ("fpn_channels", "neck.lateral_convs.0.conv.weight"),
        ("representation_size", "roi_head.bbox_head.shared_fcs.0.weight"),
    ):
        if name not in state_dict or state_dict[name].dim() == 0:
            raise InputError(_missing(name))
        widths[key] = len(state_dict[name])
    stages = [set() for _ in range(4)]
    for name in state_dict:
        block = re.match(r"backbone\.layer([1-4])\.(\d+)\.", name)
        if block:
            stages[int(block[1]) - 1].add(block[2])
    blocks = tuple(map(len, stages))
    bottleneck = any(re.match(r"backbone\.layer\d\.\d+\.conv3\.", name) for name in state_dict)
    if (blocks, bottleneck) not in _DEPTHS:
        raise InputError(
            f"its ResNet has {blocks} {'bottleneck' if bottleneck else 'basic'} blocks; only "
            f"depths {', '.join(map(str, _DEPTHS.values()))} can be converted"
        )
    return {"depth": _DEPTHS[blocks, bottleneck], **widths}


def _check(state_dict, converted, model):
    """Refuse the first tensor that does not fit, under the authors' name."""
    expected = {public_name(name): (name, tensor) for name, tensor in model.state_dict().items()}
    for public, (name, tensor) in expected.items():
        our_name = detectron2_name(name)
        found = converted.get(our_name)
        if found is None:
            raise InputError(_missing(public, f" ({our_name}, shape {list(tensor.shape)})"))
        if found.shape != tensor.shape:
            raise InputError(
                f"{public} has shape {list(found.shape)}; {our_name} of this "
                f"ResNet-{model.config['depth']} has {list(tensor.shape)}; fetch the OLN-Box anew"
            )
    for public in state_dict:
        if public not in expected and not _UNUSED.search(public):
            raise InputError(
                f"{public} is no parameter of OLN-Box with a ResNet-{model.config['depth']}, all "
                "that is converted"
            )


def _missing(name, ours=""):
    return f"{name}{ours} is missing; fetch the authors' OLN-Box again"
