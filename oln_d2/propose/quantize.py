"""An exported OLN-Box whose largest layers compute in 8-bit integers."""

import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from oln_d2.checks import InputError, needs
from oln_d2.data.images import open_image
from oln_d2.files import StrPath, write_whole
from oln_d2.propose.inputs import evenly, find_sources
from oln_d2.propose.onnx import INPUTS, SETTINGS, OnnxProposer, check_target

# Feature pyramid, first stage and the wide layers of the second: most of the time. The backbone
# stays in float32, where 8 bits cost recall or gain no time, as do the small layers that predict.
PARTS = "model.backbone.fpn.", "model.rpn.head.conv.", "model.roi_heads.box_head."


def find_photos(images: StrPath, number: int) -> list[str]:
    """
    Args:
        images: a folder.
        number: 1 or more.

    Returns:
        at most so many of the photographs in it, evenly taken from all.

    Raises:
        InputError: there are none.
    """
    photos = [s.path for s in find_sources([os.fspath(images)])[1] if not s.is_video]
    if not photos:
        raise InputError(f"{images}: holds videos alone; give a folder of photographs")
    return evenly(photos, number)


def calibration_inputs(
    proposer: OnnxProposer, photos: Sequence[StrPath]
) -> Iterator[dict[str, NDArray[Any]]]:
    """What the graph of `proposer` takes, of one photograph after the other."""
    for photo in tqdm(photos, desc="measuring", unit="image", disable=None):
        ((_, pixels),) = proposer.prepare(open_image(photo)).parts
        image = np.ascontiguousarray(pixels.transpose(2, 0, 1), np.float32)
        yield {INPUTS[0]: image, **proposer.limits}


def write_settings(model: Any, proposer: OnnxProposer) -> None:
    """
    Put the settings of `proposer` into an ONNX model that was made of it; also what the card of the
    shipped model says, which knows its own file only.
    """
    import onnx

    names = "min_size max_size max_detections likely_score copy_factor".split()
    settings = {**proposer.settings, **{name: getattr(proposer, name) for name in names}}
    settings |= {name: int(value) for name, value in proposer.limits.items()}
    onnx.helper.set_model_props(model, {SETTINGS: json.dumps(settings)})


def quantize(proposer: OnnxProposer, output: StrPath, photos: Sequence[StrPath]) -> None:
    """
    Write an exported OLN-Box anew, `PARTS` of it in 8-bit integers: less time on processors that
    multiply these faster (VNNI, AMX, Arm's dot product), and scores and boxes that differ a little.

    Args:
        proposer: what :func:`oln_d2.load` makes of a file that `oln-d2 export` wrote, or of none.
        output: name.onnx, a file that :func:`oln_d2.load` takes.
        photos: files of images like those that it will see; the range of the numbers in each layer
            is measured on them.

    Raises:
        InputError: files that cannot be used.
        ImportError: onnx is missing.
    """
    path = proposer.path
    check_target(output, path)
    with needs("export --int8", "export"):
        import onnx
        from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
        from onnxruntime.quantization.shape_inference import quant_pre_process

    class Images(CalibrationDataReader):
        def __init__(self):
            self.left = calibration_inputs(proposer, photos)

        def get_next(self):
            return next(self.left, None)

    with tempfile.TemporaryDirectory() as folder:
        folded = os.path.join(folder, "folded.onnx")
        # Weights that are stored in float16 become constants of float32. Shapes that are no numbers
        # are not needed, and would need one more package.
        quant_pre_process(path, folded, skip_symbolic_shape=True)
        graph = onnx.load(folded).graph
        layers = [n.name for n in graph.node if len(n.input) > 1 and n.input[1].startswith(PARTS)]
        if any(node.op_type == "QuantizeLinear" for node in graph.node):
            raise InputError(f"{path}: is in 8-bit integers already; give what it was made of")
        if not layers:
            raise InputError(f"{path}: has no layer named as `oln-d2 export` names them")
        with write_whole(output) as temporary:
            quantize_static(
                folded,
                temporary,
                Images(),
                per_channel=True,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                nodes_to_quantize=layers,
            )
            written = onnx.load(temporary)
            write_settings(written, proposer)
            domains = {node.domain for node in written.graph.node}
            imports = [used for used in written.opset_import if used.domain in domains]
            del written.opset_import[:]
            written.opset_import.extend(imports)
            onnx.save(written, temporary)
