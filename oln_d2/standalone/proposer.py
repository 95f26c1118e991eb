"""Models of PyTorch as proposers."""

from abc import abstractmethod
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from oln_d2.checks import InputError
from oln_d2.files import StrPath, file_digest
from oln_d2.propose.proposer import Proposer
from oln_d2.scores import SCORES
from oln_d2.standalone.build import load_detector
from oln_d2.standalone.models import detect


class TorchProposer(Proposer):
    """Passes images to the model as tensors, and says in a sentence where a GPU is too small."""

    def detect(
        self, pixels: list[NDArray[np.uint8]], sizes: list[tuple[int, int]]
    ) -> list[dict[str, Any]]:
        """See :meth:`Proposer.detect`."""
        tensors = [torch.from_numpy(image.transpose(2, 0, 1).copy()) for image in pixels]
        try:
            with torch.no_grad():
                return self.detect_tensors(tensors, sizes)
        except torch.cuda.OutOfMemoryError:
            raise InputError(
                f"the memory of the GPU is too small for {len(pixels)} images of "
                f"{list(tensors[0].shape[-2:])} pixels at once; use a smaller batch size (what is "
                "done stays)"
            ) from None

    @abstractmethod
    def detect_tensors(
        self, images: list[torch.Tensor], sizes: list[tuple[int, int]]
    ) -> list[dict[str, Any]]:
        """As :meth:`detect`; images (3, H', W'), uint8, RGB, in main memory."""


class StandaloneProposer(TorchProposer):
    """
    A self-describing checkpoint, on torch and torchvision.

    Args:
        weights: see :func:`oln_d2.standalone.load_detector`.
        device: "cpu" or "cuda".
    """

    def __init__(self, weights: StrPath, device: str):
        self.identity = file_digest(weights)
        self.device = device
        self.model = load_detector(weights).to(device)
        self.max_detections = self.model.roi_heads.detections_per_img
        transform = self.model.transform
        self.min_size, self.max_size = transform.min_size[-1], transform.max_size
        self.size_divisor = transform.size_divisible

    def keep_proposals(self, number: int) -> None:
        """See :meth:`Proposer.limit_proposals`."""
        kept = self.model.rpn._post_nms_top_n
        kept["testing"] = min(kept["testing"], number)

    def detect_tensors(
        self, images: list[torch.Tensor], sizes: list[tuple[int, int]]
    ) -> list[dict[str, Any]]:
        """See :meth:`TorchProposer.detect_tensors`."""
        names = ("boxes", "scores", *(score.attribute for score in SCORES))
        ret = []
        for found in detect(self.model, [image.to(self.device) for image in images], sizes):
            fields = {name: found[name].cpu().numpy() for name in names if name in found}
            ret.append({**fields, "masks": found.get("masks")})
        return ret
