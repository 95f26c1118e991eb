"""
Names of parameters: those of the authors' code (mmdet) and of the standalone runtime (torchvision)
in Detectron2's, the ones that checkpoints have. Needs no Detectron2.
"""

import re

import torch

from oln_d2.errors import InputError

# Applied in order, each wherever it matches.
_OF_PUBLIC = [
    (r"^neck\.lateral_convs\.(\d)\.conv\.", lambda m: f"backbone.fpn_lateral{int(m[1]) + 2}."),
    (r"^neck\.fpn_convs\.(\d)\.conv\.", lambda m: f"backbone.fpn_output{int(m[1]) + 2}."),
    (r"^backbone\.conv1\.", "backbone.bottom_up.stem.conv1."),
    (r"^backbone\.bn1\.", "backbone.bottom_up.stem.conv1.norm."),
    (r"^backbone\.layer(\d)\.", lambda m: f"backbone.bottom_up.res{int(m[1]) + 1}."),
    (r"\.bn(\d)\.", r".conv\1.norm."),
    (r"\.downsample\.0\.", ".shortcut."),
    (r"\.downsample\.1\.", ".shortcut.norm."),
    (r"^rpn_head\.rpn_conv\.", "proposal_generator.rpn_head.conv."),
    (r"^rpn_head\.rpn_obj\.", "proposal_generator.rpn_head.objectness_logits."),
    (r"^rpn_head\.rpn_reg\.", "proposal_generator.rpn_head.anchor_deltas."),
    (r"^roi_head\.bbox_head\.shared_fcs\.0\.", "roi_heads.box_head.fc1."),
    (r"^roi_head\.bbox_head\.shared_fcs\.1\.", "roi_heads.box_head.fc2."),
    (r"^roi_head\.bbox_head\.fc_reg\.", "roi_heads.box_predictor.bbox_pred."),
    (r"^roi_head\.bbox_head\.fc_bbox_score\.", "roi_heads.box_predictor.box_score."),
]
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
_PREFIXES = ("backbone.bottom_up.", "backbone.fpn_", "proposal_generator.", "roi_heads.")
_LTRB_OF_TBLR = [2, 0, 3, 1]  # their order is top, bottom, left, right


def detectron2_name(name):
    """
    Args:
        name (str): of a parameter of the standalone OLN-Box.

    Returns:
        str: of the same parameter in Detectron2's OLN-Box, and so in any checkpoint.
    """
    return _rename(name, _OF_TORCHVISION)


def _rename(name, renames):
    for pattern, replacement in renames:
        name = re.sub(pattern, replacement, name)
    return name


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
        new_name = _rename(name, _OF_PUBLIC)
        if not new_name.startswith(_PREFIXES):
            raise InputError(f"{name} is no parameter of the authors' OLN-Box")
        if ".anchor_deltas." in new_name:
            tensor = tensor[torch.tensor(_LTRB_OF_TBLR)]
        converted[new_name] = tensor
    return converted, unused
