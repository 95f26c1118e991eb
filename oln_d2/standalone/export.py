"""
Export of a trained OLN-Box to ONNX or TorchScript, and a detector that runs the ONNX file.

One trace of the model serves both formats. All supported versions of torch can make it and turn it
into ONNX without another package than onnx; `torch.export` takes shapes that depend on the data
(NMS, top k) in recent ones only.
"""

import json
import os
import warnings
from inspect import signature
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.onnx import symbolic_opset11
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from oln_d2.checks import InputError, needs
from oln_d2.files import StrPath, check_output, write_whole
from oln_d2.propose.onnx import OUTPUTS, SETTINGS, OnnxProposer
from oln_d2.standalone.build import load_detector
from oln_d2.standalone.models import OLNBox, Transform

OPSET = 17  # the first with all that the model needs is 16, for RoIAlign aligned to pixel centres


class ExportedGraph(nn.Module):
    """
    The exported part of an OLN-Box: all but the resizing of images, which Pillow does.

    Args:
        model: in inference mode.
    """

    def __init__(self, model: OLNBox):
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """
        Args:
            image: shape (3, H, W), float32, RGB, in [0, 255], resized as the model wants it.

        Returns:
            `OUTPUTS`, see :class:`OLNBox`; the boxes in pixels of this image.
        """
        height, width = image.shape[-2:]
        model = self.model
        normalized = GeneralizedRCNNTransform.normalize(model.transform, image)
        divisor = model.transform.size_divisible
        padded = F.pad(normalized, (0, -width % divisor, 0, -height % divisor))
        images = ImageList(padded[None], [(height, width)])
        features = model.backbone(images.tensors)
        proposals, _ = model.rpn(images, features)
        (found,), _ = model.roi_heads(features, proposals, images.image_sizes)
        return tuple(found[name] for name in OUTPUTS)


def export(checkpoint: StrPath, output: StrPath, config: dict[str, Any] | None = None) -> None:
    """
    Write a trained OLN-Box as one file that needs no part of this package.

    Args:
        checkpoint, config: see :func:`oln_d2.standalone.load_detector`.
        output: name.onnx, of opset `OPSET`; or name.pt, TorchScript, to run on a CPU with torch and
            torchvision. Both compute :class:`ExportedGraph`, for images of any size, and hold
            `min_size`, `max_size` and `max_detections` as JSON: the first under `oln_d2` in its
            metadata, the second in the extra file `oln_d2`.

    Raises:
        InputError: paths that cannot be used, or the checkpoint of another model.
        ImportError: onnx is missing.
    """
    ending = os.path.splitext(output)[1]
    if ending not in (".onnx", ".pt"):
        raise InputError(f"{output}: its ending has to be .onnx (ONNX) or .pt (TorchScript)")
    check_output(output, [checkpoint])
    if ending == ".onnx":
        with needs("export", "export"):
            import onnx
    model = load_detector(checkpoint, config)
    if not isinstance(model, OLNBox) or model.roi_heads.has_mask():
        raise InputError(
            f"{checkpoint}: holds the model {model.config['architecture']}, and only oln_box can "
            "be exported; give the checkpoint of an OLN-Box"
        )
    model.requires_grad_(False)
    transform = model.transform
    settings = {"min_size": transform.min_size[-1], "max_size": transform.max_size}
    settings = json.dumps({**settings, "max_detections": model.roi_heads.detections_per_img})
    # Noise of any size would do: no branch of the model depends on what it sees.
    example = torch.rand(3, 224, 320) * 255
    with warnings.catch_warnings(), write_whole(output) as temporary:
        # About constants of the trace that are constants of the model, and about its age.
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(ExportedGraph(model), example, check_trace=False)
        if ending == ".pt":
            traced.save(temporary, _extra_files={SETTINGS: settings})
            return
        torch.onnx.register_custom_op_symbolic("aten::sort", _stable_sort, OPSET)
        torch.onnx.export(
            traced,
            (example,),
            temporary,
            opset_version=OPSET,
            input_names=["image"],
            output_names=list(OUTPUTS),
            dynamic_axes={
                "image": {1: "height", 2: "width"},
                **{name: {0: "detections"} for name in OUTPUTS},
            },
            # Older versions know no other exporter, newer ones have another by default.
            **({"dynamo": False} if "dynamo" in signature(torch.onnx.export).parameters else {}),
        )
        graph = onnx.load(temporary)
        onnx.helper.set_model_props(graph, {SETTINGS: settings})
        onnx.checker.check_model(graph, full_check=True)
        onnx.save(graph, temporary)


def _stable_sort(g, x, *arguments):
    """torch's exporter does not know `stable`; ONNX's TopK, by which it sorts, is stable."""
    return symbolic_opset11.sort(g, x, *arguments[-2:])  # dim, descending


class OnnxDetector:
    """
    An OLN-Box that :func:`export` wrote as ONNX, called as :class:`OLNBox` in inference. Without
    PyTorch: :func:`oln_d2.load`.

    Args:
        path, device: see :class:`OnnxProposer`; errors as well.
    """

    def __init__(self, path: StrPath, device: str = "cpu"):
        self.proposer = OnnxProposer(path, device)
        self.transform = Transform(self.proposer.min_size, self.proposer.max_size).eval()

    def __call__(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        """
        Args:
            images: each (3, H, W), float, RGB, in [0, 1]; run one by one.

        Returns:
            for each image what :class:`OLNBox` says, on the CPU.
        """
        resized = [self.transform.resized_pixels(image).byte().cpu() for image in images]
        pixels = [image.permute(1, 2, 0).numpy() for image in resized]
        found = self.proposer.detect(pixels, [tuple(image.shape[-2:]) for image in images])
        return [{name: torch.from_numpy(value) for name, value in f.items()} for f in found]
