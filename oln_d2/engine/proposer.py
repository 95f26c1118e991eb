"""Models of Detectron2 as proposers."""

import hashlib
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model

from oln_d2.engine.evaluator import read_output
from oln_d2.engine.trainer import StrictCheckpointer, no_model_of_config
from oln_d2.files import file_digest
from oln_d2.scores import SCORES
from oln_d2.standalone.proposer import TorchProposer


class Detectron2Proposer(TorchProposer):
    """
    A recipe of this package, or any detector or proposal network of Detectron2.

    Args:
        cfg: describes the model; changed.
        weights: a checkpoint, which takes the place of MODEL.WEIGHTS.

    Raises:
        InputError: the checkpoint is missing or that of another model.
    """

    def __init__(self, cfg: CfgNode, weights: str):
        self.is_bgr = cfg.INPUT.FORMAT == "BGR"
        # Detectron2 writes 0 for "as it is".
        self.min_size = cfg.INPUT.MIN_SIZE_TEST or None
        self.max_size = cfg.INPUT.MAX_SIZE_TEST
        self.max_detections = cfg.TEST.DETECTIONS_PER_IMAGE
        if cfg.MODEL.META_ARCHITECTURE == "ProposalNetwork":
            self.max_detections = cfg.MODEL.RPN.POST_NMS_TOPK_TEST
        with no_model_of_config():
            self.model = build_model(cfg).eval()
        StrictCheckpointer(self.model).load(weights)
        backbone = getattr(self.model, "backbone", None)  # other projects' models may have none
        self.size_divisor = max(getattr(backbone, "size_divisibility", 0), 1)
        # What does not change the proposals.
        cfg.MODEL.DEVICE = cfg.MODEL.WEIGHTS = cfg.OUTPUT_DIR = ""
        cfg.DATASETS.pop("OWN", None)
        cfg.MODEL.pop("FROZEN", None)
        settings = hashlib.sha256(cfg.dump().encode()).hexdigest()
        self.identity = f"{file_digest(weights)} {settings}"

    def keep_proposals(self, number: int) -> None:
        """See :meth:`Proposer.limit_proposals`."""
        generator = getattr(self.model, "proposal_generator", None)
        if not hasattr(generator, "post_nms_topk"):
            super().keep_proposals(number)
        kept = generator.post_nms_topk
        kept[False] = min(kept[False], number)

    def detect_tensors(
        self, images: list[torch.Tensor], sizes: list[tuple[int, int]]
    ) -> list[dict[str, Any]]:
        """See :meth:`TorchProposer.detect_tensors`."""
        inputs = []
        for image, (height, width) in zip(images, sizes, strict=True):
            image = image.flip(0) if self.is_bgr else image
            inputs.append({"image": image.float(), "height": height, "width": width})
        return [
            {"boxes": boxes, "scores": scores, "masks": masks}
            | {score.attribute: qualities.get(score.field) for score in SCORES}
            for boxes, scores, masks, qualities in map(read_output, self.model(inputs))
        ]
