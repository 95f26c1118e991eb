"""
Names of parameters: those of the authors' code (mmdet) and of the standalone runtime (torchvision)
in Detectron2's, the ones that checkpoints have.
"""

import re
from collections.abc import Iterable

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
# How the names of a backbone of timm begin in the standalone runtime, and in Detectron2.
_TIMM = "backbone.body.timm."
TIMM = "backbone.bottom_up.timm."
# Names that only OLN's authors have.
PUBLIC_SCORES = ("rpn_head.rpn_obj.weight", "roi_head.bbox_head.fc_bbox_score.weight")


def detectron2_name(name: str) -> str:
    """
    Args:
        name: a parameter's name in the standalone OLN-Box.

    Returns:
        the name of the same parameter in Detectron2's OLN-Box, and so in any checkpoint.
    """
    if name.startswith(_TIMM):  # timm's own names follow
        return name.replace(_TIMM, TIMM, 1)
    for pattern, replacement in _OF_TORCHVISION:
        name = re.sub(pattern, replacement, name)
    return name


def public_name(name: str) -> str:
    """The name in the authors' code of a parameter of the standalone OLN-Box."""
    return next(p + name[len(n) :] for p, n in _PUBLIC.items() if name.startswith(n))


def standalone_name(public: str) -> str | None:
    """Inverse of :func:`public_name`; None for names that do not begin as the authors' do."""
    return next((n + public[len(p) :] for p, n in _PUBLIC.items() if public.startswith(p)), None)


def is_public(names: Iterable[str]) -> bool:
    """Whether names of parameters, or the keys of a state dict, are those of the authors' code."""
    return not set(PUBLIC_SCORES).isdisjoint(names)
