"""Recipes of OLN-Box as settings of the standalone runtime."""

import re
from typing import Any

from oln_d2.checks import InputError
from oln_d2.files import StrPath
from oln_d2.model_zoo import flatten, load_config
from oln_d2.scores import FUSED
from oln_d2.standalone.build import CHANNELS, NORMS

# What may differ from the paper's recipe: settings that the standalone model has, too, settings of
# the training, and those of other models.
_FREE = re.compile(
    r"MODEL\.(DEVICE|WEIGHTS|CHANNELS_LAST|PIXEL_|BACKBONE\.FREEZE|RESNETS\.DEPTH|FPN\.OUT_|ANCHOR_GENERATOR\.SIZES|"
    r"RPN\.(BATCH|POSITIVE|BOUNDARY|IOU|BBOX_REG_LOSS|LOSS|SMOOTH|PRE_|POST_|NMS)|"
    r"ROI_HEADS\.(BATCH|POSITIVE|IOU|PROPOSAL|NMS)|"
    r"ROI_BOX_HEAD\.(FC_DIM|POOLER_SAMPLING|BBOX_REG_LOSS|SMOOTH|TRAIN)|"
    r"OLN\.(OBJECTNESS|TIMM|LTRB|RPN_FEATURE|RPN_NMS|BOX_SCORE|MASK)|"
    r"(ROI_MASK|ROI_KEYPOINT|ROI_BOX_CASCADE|SEM_SEG)_HEAD|PANOPTIC_FPN|RETINANET)"
)
_RESNET10 = "build_resnet10_fpn_backbone"
_TIMM = "build_timm_fpn_backbone"


def detector_config(config_file: StrPath) -> dict[str, Any]:
    """
    Args:
        config_file: a config file of Detectron2, such as the `config.yaml` of a run, or the name of
            a recipe.

    Returns:
        the arguments of :func:`oln_d2.standalone.build_detector` for the model of the config.

    Raises:
        InputError: see :func:`load_config`; or a model that the standalone runtime does not have.
    """
    cfg, paper = load_config(config_file), load_config("oln_box_R_50_FPN.yaml")
    model, levels = cfg.MODEL, len(cfg.MODEL.ANCHOR_GENERATOR.SIZES)
    depth = 10 if model.BACKBONE.NAME == _RESNET10 else model.RESNETS.DEPTH
    timm = model.OLN.TIMM if model.BACKBONE.NAME == _TIMM else None
    norm = timm.NORM if timm else model.RESNETS.NORM if model.RESNETS.NORM in NORMS else "FrozenBN"
    fpn_norm = "GN" if "GN" in (norm, model.FPN.NORM) else None
    kept = model.RPN.POST_NMS_TOPK_TEST
    wanted = {
        **flatten(paper.MODEL, "MODEL."),
        "MODEL.RESNETS.NORM": norm,
        "MODEL.RESNETS.RES2_OUT_CHANNELS": CHANNELS.get(depth, 256),
        "MODEL.FPN.NORM": fpn_norm or "",
        "MODEL.RPN.IN_FEATURES": [f"p{2 + i}" for i in range(levels)],
        "INPUT.FORMAT": paper.INPUT.FORMAT,
    }
    if (depth == 10 or timm) and not model.FPN.IN_FEATURES:
        wanted["MODEL.FPN.IN_FEATURES"] = []  # all of them, too
    if depth == 10:
        wanted["MODEL.BACKBONE.NAME"] = _RESNET10
    if set(model.OLN.SCORES) <= set(FUSED):
        wanted["MODEL.OLN.SCORES"] = model.OLN.SCORES
    if timm:
        wanted.update(flatten(model.RESNETS, "MODEL.RESNETS."))  # not used
        wanted["MODEL.BACKBONE.NAME"] = _TIMM
    for key, value in {**flatten(model, "MODEL."), "INPUT.FORMAT": cfg.INPUT.FORMAT}.items():
        if not _FREE.match(key) and value != wanted.get(key):
            raise InputError(
                f"{config_file}: {key} is {value!r}; without Detectron2 it can only be "
                f"{wanted.get(key)!r}; this model runs with Detectron2 alone, in `oln-d2 propose` "
                "by its --config-file"
            )
    return {
        "architecture": "oln_box",
        "backbone": timm.NAME if timm else None,
        "depth": depth,
        "norm": norm,
        "fpn_norm": fpn_norm,
        "fpn_channels": model.FPN.OUT_CHANNELS,
        "anchor_sizes": tuple(sizes[0] for sizes in model.ANCHOR_GENERATOR.SIZES),
        "min_size": cfg.INPUT.MIN_SIZE_TEST,
        "max_size": cfg.INPUT.MAX_SIZE_TEST,
        "pixel_mean": tuple(model.PIXEL_MEAN),
        "pixel_std": tuple(model.PIXEL_STD),
        "rpn_feature_norm": model.OLN.RPN_FEATURE_NORM,
        "rpn_pre_nms_top_n_test": model.RPN.PRE_NMS_TOPK_TEST,
        "rpn_post_nms_top_n_test": kept if kept < levels * model.RPN.PRE_NMS_TOPK_TEST else None,
        "rpn_nms_thresh": model.RPN.NMS_THRESH if model.OLN.RPN_NMS_TEST else None,
        "rpn_boundary_thresh": model.RPN.BOUNDARY_THRESH,
        "objectness_negatives": model.OLN.OBJECTNESS_NEGATIVES,
        "box_score_negatives": model.OLN.BOX_SCORE_NEGATIVES,
        "scores": tuple(model.OLN.SCORES),
        "representation_size": model.ROI_BOX_HEAD.FC_DIM,
        "box_sampling_ratio": model.ROI_BOX_HEAD.POOLER_SAMPLING_RATIO,
        "box_nms_thresh": model.ROI_HEADS.NMS_THRESH_TEST,
        "box_detections_per_img": cfg.TEST.DETECTIONS_PER_IMAGE,
    }
