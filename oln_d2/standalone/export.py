"""
Export of a trained OLN-Box to ONNX by PyTorch's exporter of `torch.export`, and a detector that
runs the file.
"""

import json
import os
import warnings
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from oln_d2 import weights
from oln_d2.checks import InputError, needs
from oln_d2.files import StrPath, file_digest, write_whole
from oln_d2.localization import without_copies
from oln_d2.propose.onnx import (
    FORMAT,
    INPUTS,
    OUTPUTS,
    SETTINGS,
    SHARES,
    OnnxProposer,
    check_target,
)
from oln_d2.scores import OBJECTNESS
from oln_d2.standalone.build import load_detector
from oln_d2.standalone.models import OLNBox, Transform

OPSET = 18  # the exporter's own
IR_VERSION = 8  # enough for this opset; the exporter's own is refused by older runtimes
LARGE = 256  # numbers of a tensor, from which storing it in float16 pays
CARD = (*SHARES, "min_size", "max_proposals")  # of `oln_d2.weights.card`
TORCH = "2.14"  # the first tried; slices whose end is an input came some versions before


class ExportedGraph(nn.Module):
    """
    The exported part of an OLN-Box: all but the resizing of images, which Pillow does.

    Args:
        model: in inference mode. Its own limits are taken away: they are inputs here.
    """

    def __init__(self, model: OLNBox):
        super().__init__()
        self.model = model
        model.rpn._post_nms_top_n["testing"] = 10**6
        model.rpn.exported = True
        model.roi_heads.detections_per_img = None

    def forward(
        self, image: Tensor, max_proposals: Tensor, max_detections: Tensor
    ) -> tuple[Tensor, ...]:
        """
        Args:
            image: shape (3, H, W), float32, RGB, in [0, 255], resized as the model wants it.
            max_proposals, max_detections: int64 scalars, 0 or more; at most so many proposals, of
                all levels together, go through the second stage, and so many boxes are returned.

        Returns:
            `OUTPUTS`, see :class:`OLNBox`; the boxes in pixels of this image.
        """
        height, width = image.shape[-2:]
        model = self.model
        normalized = GeneralizedRCNNTransform.normalize(model.transform, image)
        divisor = model.transform.size_divisible
        # In this form the exporter sees that the sides are multiples: exact halves further down.
        right, below = ((n + divisor - 1) // divisor * divisor - n for n in (width, height))
        padded = F.pad(normalized, (0, right, 0, below))
        images = ImageList(padded[None], [(height, width)])
        features = model.backbone(images.tensors)
        (proposals,), _ = model.rpn(images, features)
        order = without_copies(*(proposals[name] for name in ("boxes", OBJECTNESS.attribute)))
        best = order[_slice(max_proposals)].sort().values
        proposals = {name: value[best] for name, value in proposals.items()}
        (found,), _ = model.roi_heads(features, [proposals], images.image_sizes)
        kept = _slice(max_detections)
        return tuple(found[name][kept] for name in OUTPUTS)


def _slice(number):
    """The first `number`, a scalar tensor, of what descends."""
    number = number.item()
    torch._check(number >= 0)
    return slice(number)


def export(checkpoint: StrPath, output: StrPath, config: dict[str, Any] | None = None) -> None:
    """
    Write a trained OLN-Box as one file that needs no part of this package.

    Args:
        checkpoint, config: see :func:`oln_d2.standalone.load_detector`.
        output: name.onnx. It computes :class:`ExportedGraph`, for images of any size, and says in
            its metadata `SETTINGS`, as JSON, how images are resized and what the limits of the
            model are. It computes in float32; weights that float16 holds exactly, as `convert
            --half` makes them, are stored so.

    Raises:
        InputError: paths that cannot be used, the checkpoint of another model, or PyTorch older
            than `TORCH`.
        ImportError: onnx or onnxscript is missing.
    """
    check_target(output, checkpoint)
    if torch.torch_version.TorchVersion(torch.__version__) < TORCH:
        raise InputError(
            f"export needs PyTorch {TORCH} or later, and this is {torch.__version__}; update it, "
            "or export the same checkpoint where it is newer"
        )
    with needs("export", "export"):
        import onnx
        import onnxscript
    model = load_detector(checkpoint, config)
    if not isinstance(model, OLNBox) or model.roi_heads.has_mask():
        raise InputError(
            f"{checkpoint}: holds the model {model.config['architecture']}, and only oln_box can "
            "be exported; give the checkpoint of an OLN-Box"
        )
    model.requires_grad_(False)
    limits = model.rpn.post_nms_top_n(), model.roi_heads.detections_per_img
    settings = {
        "format": FORMAT,
        "min_size": model.transform.min_size[-1],
        "max_size": model.transform.max_size,
        "resize": "bilinear, antialiased",
        "normalization": "in the graph",
        "padding": "in the graph",
        **dict(zip(INPUTS[1:], limits)),
    }
    # Of the shipped model the file says what its card does, which does not know this file.
    card = weights.card_of(file_digest(os.path.expanduser(checkpoint))) or {}
    settings |= {name: card[name] for name in CARD if name in card}

    def stable_sort(x, stable=True, dim=-1, descending=False):
        """torch's exporter does not know `stable`; ONNX's TopK, by which it sorts, is stable."""
        op = onnxscript.opset18
        return op.TopK(x, op.Shape(x), axis=dim, largest=int(descending))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the exporter's own parts
        # Noise of any size would do: no branch of the model depends on what it sees.
        graph = torch.onnx.export(
            ExportedGraph(model),
            (torch.rand(3, 224, 320) * 255, *map(torch.tensor, limits)),
            dynamo=True,
            opset_version=OPSET,
            input_names=INPUTS,
            output_names=OUTPUTS,
            dynamic_shapes=({1: "height", 2: "width"}, None, None),
            custom_translation_table={torch.ops.aten.sort.stable: stable_sort},
            verbose=False,
        ).model_proto
    graph.ir_version = IR_VERSION
    for node in graph.graph.node:
        del node.metadata_props[:]  # lines of code, with paths of this machine
    for out in graph.graph.output:
        out.type.tensor_type.shape.dim[0].dim_param = "detections"
    _store_in_half(graph.graph, model.state_dict())
    onnx.helper.set_model_props(graph, {SETTINGS: json.dumps(settings)})
    onnx.checker.check_model(graph, full_check=True)
    with write_whole(output) as temporary:
        onnx.save(graph, temporary)


def _store_in_half(graph, parameters):
    """
    Store weights in float16 where that holds the model's `parameters` exactly. The exporter has
    multiplied convolutions by the scales of the norms that follow; their weights are stored without
    these scales, beside them. onnxruntime computes the float32 weights once, on loading the file.
    """
    from onnx import TensorProto, helper, numpy_helper

    nodes = []
    stored = {tensor.name: tensor for tensor in graph.initializer}
    for name, parameter in parameters.items():
        tensor = stored.get(f"model.{name}")
        half = parameter.half()
        if tensor is None or half.numel() < LARGE or not torch.equal(half.float(), parameter):
            continue
        own, half = numpy_helper.to_array(tensor), half.numpy()
        rows, own_rows = (x.reshape(len(half), -1).astype(np.float64) for x in (half, own))
        squares = (rows**2).sum(axis=1)
        scales = (rows * own_rows).sum(axis=1) / np.where(squares > 0, squares, 1)
        scales = scales.astype(np.float32).reshape(-1, *[1] * (half.ndim - 1))
        if not np.allclose(half * scales, own, rtol=1e-6, atol=0):
            continue
        name = tensor.name
        tensor.CopyFrom(numpy_helper.from_array(half, f"{name}_half"))
        if np.array_equal(half, own):
            nodes.append(helper.make_node("Cast", [tensor.name], [name], to=TensorProto.FLOAT))
            continue
        graph.initializer.append(numpy_helper.from_array(scales, f"{name}_scales"))
        nodes += [
            helper.make_node("Cast", [tensor.name], [f"{name}_cast"], to=TensorProto.FLOAT),
            helper.make_node("Mul", [f"{name}_cast", f"{name}_scales"], [name]),
        ]
    nodes += graph.node
    del graph.node[:]
    graph.node.extend(nodes)


class OnnxDetector:
    """
    An OLN-Box that :func:`export` wrote, called as :class:`OLNBox` in inference. Without PyTorch:
    :func:`oln_d2.load`.

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
