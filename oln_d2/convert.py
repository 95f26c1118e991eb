"""
Names of parameters: those of the authors' code (mmdet) and of the standalone runtime (torchvision)
in Detectron2's, the ones that checkpoints have. Needs no Detectron2.
"""

import os
import re

import torch

from oln_d2.errors import InputError
from oln_d2.files import check_output

# How names begin in the authors' code and in the standalone runtime, the first that fits; the rest
# of a name is the same in both.
_PUBLIC = {
    "backbone.": "backbone.body.",
    **{f"neck.lateral_convs.{i}.conv.": f"backbone.fpn.inner_blocks.{i}.0." for i in range(4)},
    **{f"neck.fpn_convs.{i}.conv.": f"backbone.fpn.layer_blocks.{i}.0." for i in range(4)},
    "rpn_head.rpn_conv.": "rpn.head.conv.0.0.",
    "rpn_head.rpn_obj.": "rpn.head.cls_logits.",
    "rpn_head.rpn_reg.": "rpn.head.bbox_pred.",
    "roi_head.bbox_head.shared_fcs.0.": "roi_heads.box_head.fc6.",
    "roi_head.bbox_head.shared_fcs.1.": "roi_heads.box_head.fc7.",
    "roi_head.bbox_head.fc_reg.": "roi_heads.box_predictor.bbox_pred.",
    "roi_head.bbox_head.fc_bbox_score.": "roi_heads.box_predictor.box_score.",
}
# Applied in order, each wherever it matches.
_OF_TORCHVISION = [
    (r"^backbone\.fpn\.inner_blocks\.(\d)\.", lambda m: f"backbone.fpn_lateral{int(m[1]) + 2}."),
    (r"^backbone\.fpn\.layer_blocks\.(\d)\.", lambda m: f"backbone.fpn_output{int(m[1]) + 2}."),
    (r"^(backbone\.fpn_\w+\.)0\.", r"\1"),
    (r"^(backbone\.fpn_\w+\.)1\.", r"\1norm."),
    (r"^backbone\.body\.conv1\.", "backbone.bottom_up.stem.conv1."),
    (r"^backbone\.body\.bn1\.", "backbone.bottom_up.stem.conv1.norm."),
    (r"^backbone\.body\.layer(\d)\.", lambda m: f"backbone.bottom_up.res{int(m[1]) + 1}."),
    (r"\.bn(\d)\.", r".conv\1.norm."),
    (r"\.downsample\.0\.", ".shortcut."),
    (r"\.downsample\.1\.", ".shortcut.norm."),
    (r"^rpn\.head\.conv\.0\.0\.", "proposal_generator.rpn_head.conv."),
    (r"^rpn\.head\.cls_logits\.", "proposal_generator.rpn_head.objectness_logits."),
    (r"^rpn\.head\.bbox_pred\.", "proposal_generator.rpn_head.anchor_deltas."),
    (r"^roi_heads\.box_head\.fc6\.", "roi_heads.box_head.fc1."),
    (r"^roi_heads\.box_head\.fc7\.", "roi_heads.box_head.fc2."),
    (r"^(roi_heads\.mask_head\.)(\d)\.0\.", lambda m: f"{m[1]}mask_fcn{int(m[2]) + 1}."),
    (r"^(roi_heads\.mask_head\.)(\d)\.1\.", lambda m: f"{m[1]}mask_fcn{int(m[2]) + 1}.norm."),
    (r"^roi_heads\.mask_predictor\.conv5_mask\.", "roi_heads.mask_head.deconv."),
    (r"^roi_heads\.mask_predictor\.mask_fcn_logits\.", "roi_heads.mask_head.predictor."),
    (r"^roi_heads\.mask_score\.", "roi_heads.mask_head.score."),
]
_UNUSED = re.compile(r"(rpn_head\.rpn_cls|bbox_head\.fc_cls)\.|\.num_batches_tracked$")
_OF_OLN = ("rpn_head.rpn_obj.weight", "roi_head.bbox_head.fc_bbox_score.weight")
_LTRB_OF_TBLR = [2, 0, 3, 1]  # their order is top, bottom, left, right

# Blocks of the four stages, and whether they are bottlenecks (three convolutions).
_DEPTHS = {
    ((2, 2, 2, 2), False): 18,
    ((3, 4, 6, 3), False): 34,
    ((3, 4, 6, 3), True): 50,
    ((3, 4, 23, 3), True): 101,
}
# A name that only such a file has, what the file seems to be, and what to do; the first that fits.
_OTHER_FILES = (
    (
        "roi_heads.box_predictor.box_score.weight",
        "an OLN-Box that is under our names already",
        "both runtimes take it as it is",
    ),
    (
        "backbone.bottom_up.stem.conv1.weight",
        "another detector of Detectron2",
        "train OLN-Box, or convert the authors' file",
    ),
    (
        "backbone.body.conv1.weight",
        "a state dict of a torchvision detector",
        "save an OLN-Box with oln_d2.standalone.save_checkpoint",
    ),
    (
        "roi_head.bbox_head.fc_cls.weight",
        "a Faster R-CNN of mmdet, which has no OLN heads",
        "convert the authors' OLN-Box",
    ),
    (
        "layer1.0.conv1.weight",
        "a ResNet alone, such as torchvision's ImageNet weights",
        "convert the authors' OLN-Box; training recipes fetch ImageNet weights themselves",
    ),
)


def detectron2_name(name):
    """
    Args:
        name (str): of a parameter of the standalone OLN-Box.

    Returns:
        str: of the same parameter in Detectron2's OLN-Box, and so in any checkpoint.
    """
    for pattern, replacement in _OF_TORCHVISION:
        name = re.sub(pattern, replacement, name)
    return name


def public_name(name):
    """
    Args:
        name (str): of a parameter of the standalone OLN-Box.

    Returns:
        str: of the same parameter in the authors' code.
    """
    return next(p + name[len(n) :] for p, n in _PUBLIC.items() if name.startswith(n))


def is_public(state_dict):
    """
    Args:
        state_dict (dict): with names of parameters.

    Returns:
        bool: whether they are those of the authors' code.
    """
    return not state_dict.keys().isdisjoint(_OF_OLN)


def convert_public_state_dict(state_dict):
    """
    Args:
        state_dict (dict[str, Tensor]): parameters of the authors' OLN-Box under their names.

    Returns:
        dict[str, Tensor]: the same under our names, distances in our order.
        list[str]: names that our model does not have: the classifiers, which OLN never uses, and
        the counters of batch norm.

    Raises:
        InputError: a name that the authors' OLN-Box does not have.
    """
    converted, unused = {}, []
    for name, tensor in state_dict.items():
        if _UNUSED.search(name):
            unused.append(name)
            continue
        standalone = next(
            (n + name[len(p) :] for p, n in _PUBLIC.items() if name.startswith(p)), None
        )
        if standalone is None:
            raise InputError(
                f"{name} is no parameter of the authors' OLN-Box, all that is converted"
            )
        if name.startswith("rpn_head.rpn_reg.") and len(tensor) == len(_LTRB_OF_TBLR):
            tensor = tensor[_LTRB_OF_TBLR]
        converted[detectron2_name(standalone)] = tensor
    return converted, unused


def convert_checkpoint(source, target):
    """
    Make a checkpoint of the authors' OLN-Box one of ours, for both runtimes:
    `load_detector(target)`, or `MODEL.WEIGHTS target`. How the model is built is told from names
    and shapes.

    Args:
        source (str): a file of the authors' code, or a bare state dict under its names.
        target (str): the file to write.

    Returns:
        nn.Module: the detector, with the weights, in inference mode.
        list[str]: names that were not used, see :func:`convert_public_state_dict`.

    Raises:
        InputError: `source` is another file, has a tensor too few, too many or of another shape, or
            holds values that are not finite; or `target` cannot be written. Nothing is written.
    """
    # They import this module.
    from oln_d2.standalone.checkpoint import read_checkpoint, save_checkpoint
    from oln_d2.standalone.detector import build_detector

    source, target = os.path.expanduser(source), os.path.expanduser(target)
    check_output(target, [source])
    state_dict = read_checkpoint(source)["model"]
    try:
        config = _detector_config(state_dict)
        model = build_detector(**config)
        converted, unused = convert_public_state_dict(state_dict)
        _check(state_dict, converted, model)
    except InputError as error:
        raise InputError(f"{source}: {error}") from None
    model.load_state_dict({name: converted[detectron2_name(name)] for name in model.state_dict()})
    save_checkpoint(model, target)
    return model.eval(), unused


def _detector_config(state_dict):
    """The arguments of `build_detector` for the model of the authors' state dict."""
    if not is_public(state_dict):
        for name, what, remedy in _OTHER_FILES:
            if name in state_dict:
                raise InputError(f"seems to be {what}; {remedy}")
        raise InputError(
            f"holds no OLN-Box of the authors' code (it has no {_OF_OLN[0]}, its first name is "
            f"{next(iter(state_dict))}); fetch their checkpoint"
        )
    widths = {}
    for key, name in (
        ("fpn_channels", "neck.lateral_convs.0.conv.weight"),
        ("representation_size", "roi_head.bbox_head.shared_fcs.0.weight"),
    ):
        if not isinstance(state_dict.get(name), torch.Tensor) or state_dict[name].dim() == 0:
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
        if not isinstance(found, torch.Tensor):
            raise InputError(_missing(public, f" ({our_name}, shape {list(tensor.shape)})"))
        if found.shape != tensor.shape:
            raise InputError(
                f"{public} has shape {list(found.shape)}; {our_name} of this "
                f"ResNet-{model.config['depth']} has {list(tensor.shape)}; fetch the OLN-Box anew"
            )
        if not found.isfinite().all():
            raise InputError(
                f"{public} ({our_name}) holds NaN or infinite values; fetch the file again"
            )
    for public in state_dict:
        if public not in expected and not _UNUSED.search(public):
            raise InputError(
                f"{public} is no parameter of OLN-Box with a ResNet-{model.config['depth']}, all "
                "that is converted"
            )


def _missing(name, ours=""):
    return f"{name}{ours} is missing; fetch the authors' OLN-Box again"


def convert_command(args):
    """`python -m oln_d2 convert`, see there."""
    model, unused = convert_checkpoint(args.source, args.target)
    config = model.config
    print(
        f"OLN-Box: ResNet-{config['depth']}, FPN {config['fpn_channels']}, "
        f"fc {config['representation_size']}. {len(model.state_dict())} tensors converted."
    )
    names = [name for name in unused if not name.endswith(".num_batches_tracked")]
    if len(names) < len(unused):
        names.append(f"{len(unused) - len(names)} counters of batch norm")
    print(f"Not used: {', '.join(names) or 'nothing'}.")
    print(f"Wrote {args.target}. Next, without Detectron2:")
    print(f"  from oln_d2.standalone import load_detector; model = load_detector({args.target!r})")
    if config["depth"] == 50:
        print("With Detectron2, on COCO val2017:")
        print(
            "  python train_net.py --config-file configs/oln_box_public_R_50_FPN.yaml --eval-only "
            f"MODEL.WEIGHTS {args.target}"
        )
