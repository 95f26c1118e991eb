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

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.onnx import symbolic_opset11
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from oln_d2.errors import InputError, require_extra
from oln_d2.files import check_output, write_whole
from oln_d2.standalone.checkpoint import load_detector
from oln_d2.standalone.detector import OLNBox, Transform

OPSET = 17  # the first with all that the model needs is 16, for RoIAlign aligned to pixel centres
OUTPUTS = ("boxes", "scores", "objectness", "box_scores")
SETTINGS = "oln_d2"  # name of the file's metadata that tells how images are resized


class ExportedGraph(nn.Module):
    """
    What is exported of an OLN-Box: all of it but the resizing of images, which Pillow does.

    Args:
        model (OLNBox): in inference mode.
    """

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, image):
        """
        Args:
            image (Tensor): shape (3, H, W), float32, RGB, in [0, 255], resized as the model wants
                it.

        Returns:
            tuple[Tensor]: `OUTPUTS`, see :class:`OLNBox`; the boxes in pixels of this image.
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


def export(checkpoint, output):
    """
    Write a trained OLN-Box as one file that needs no part of this package.

    Args:
        checkpoint (str): what :func:`oln_d2.standalone.load_detector` reads.
        output (str): name.onnx, of opset `OPSET`; or name.pt, TorchScript, to run on a CPU with
            torch and torchvision. Both compute :class:`ExportedGraph`, for images of any size, and
            tell `min_size`, `max_size` and `max_detections` as JSON: the first under `oln_d2` in
            its metadata, the second in the extra file `oln_d2`.

    Raises:
        InputError: paths that cannot be used, or the checkpoint of another model.
        ImportError: onnx is missing.
    """
    ending = os.path.splitext(output)[1]
    if ending not in (".onnx", ".pt"):
        raise InputError(f"{output}: its ending has to be .onnx (ONNX) or .pt (TorchScript)")
    check_output(output, [checkpoint])
    if ending == ".onnx":
        onnx = require_extra("onnx", "export", "export")
    model = load_detector(checkpoint)
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
    An OLN-Box that :func:`export` wrote as ONNX, called as :class:`OLNBox` in inference.

    Args:
        path (str): the .onnx file.
        device (str): "cpu", or "cuda", for which onnxruntime-gpu has to be installed.

    Raises:
        InputError: not such a file, or the device is not there.
        ImportError: onnxruntime is missing.
    """

    def __init__(self, path, device="cpu"):
        onnxruntime = require_extra("onnxruntime", "an .onnx file", "export")
        if not os.path.isfile(path):
            raise InputError(f"{path}: no such file; give one that `python -m oln_d2 export` wrote")
        provider = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}.get(device)
        if provider not in onnxruntime.get_available_providers():
            raise InputError(
                f"onnxruntime cannot run on the device {device!r} here; use cpu, or install "
                "onnxruntime-gpu for cuda"
            )
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # errors only
        options.intra_op_num_threads = torch.get_num_threads()
        try:
            self.session = onnxruntime.InferenceSession(path, options, providers=[provider])
        except Exception as error:  # its errors have no other common base
            reason = str(error).splitlines()[0]
            raise InputError(
                f"{path}: is no ONNX file that onnxruntime can run ({reason}); export it again"
            ) from None
        settings = self.session.get_modelmeta().custom_metadata_map.get(SETTINGS)
        if settings is None:
            raise InputError(
                f"{path}: does not tell how it wants its images; give a file that "
                "`python -m oln_d2 export` wrote"
            )
        settings = json.loads(settings)
        self.max_detections = settings["max_detections"]
        self.transform = Transform(settings["min_size"], settings["max_size"]).eval()

    def __call__(self, images):
        """
        Args:
            images (list[Tensor]): each (3, H, W), float, RGB, in [0, 1]; run one by one.

        Returns:
            list[dict[str, Tensor]]: for each image what :class:`OLNBox` says, on the CPU.
        """
        detections = []
        for image in images:
            pixels = self.transform.resized_pixels(image).float().cpu()
            arrays = self.session.run(OUTPUTS, {"image": np.ascontiguousarray(pixels.numpy())})
            found = {name: torch.from_numpy(array) for name, array in zip(OUTPUTS, arrays)}
            shapes = [pixels.shape[-2:]], [image.shape[-2:]]
            detections += self.transform.postprocess([found], *shapes)
        return detections
