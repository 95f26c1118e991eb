"""The shipped model on onnxruntime beside other small detectors: images a second, and recall."""

import importlib.util
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from PIL import Image
from tabulate import tabulate

from oln_d2 import weights
from oln_d2.benchmark.measure import median, ratio, take_turns
from oln_d2.boxes import to_xywh
from oln_d2.checks import POSITIVE_INT, InputError, check_limits
from oln_d2.data.coco import load_coco
from oln_d2.data.images import open_image
from oln_d2.evaluation import evaluate
from oln_d2.evaluation.coco_results import write_results
from oln_d2.files import StrPath
from oln_d2.loading import load
from oln_d2.propose.inputs import find_sources
from oln_d2.propose.proposer import Proposer

OUTPUTS = 100  # boxes of an image
KS = 10, 100
TORCHVISION = "fasterrcnn_mobilenet_v3_large_320_fpn"


class TensorFlowDetector:
    """
    An ONNX file with the input and the outputs of TensorFlow's detection models: RGB (1, H, W, 3),
    uint8, to boxes, classes, scores and their number.

    Args:
        path: for example `object_detection_mobile_object_localizer_v1_1_default_1.onnx` of
            https://github.com/Kazuhito00/Mobile-Object-Localizer-Sample.
        threads: of onnxruntime.

    Raises:
        InputError: another file.
    """

    def __init__(self, path: StrPath, threads: int):
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # errors only
        options.intra_op_num_threads = threads
        try:
            self.session = onnxruntime.InferenceSession(
                os.fspath(path), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # its errors have no other common base
            reason = str(error).splitlines()[0]
            raise InputError(f"{path}: is no ONNX file that runs here ({reason})") from None
        (own, *more), outputs = self.session.get_inputs(), self.session.get_outputs()
        if more or own.type != "tensor(uint8)" or own.shape[3:] != [3] or len(outputs) != 4:
            raise InputError(
                f"{path}: takes {own.type} {own.shape}; only files of TensorFlow's form can be "
                "compared: tensor(uint8) [1, H, W, 3] to boxes, classes, scores and their number"
            )
        self.name = own.name
        height, width = own.shape[1:3]
        self.size = width, height

    def prepare(self, image: Image.Image) -> NDArray[np.uint8]:
        """An image as :meth:`detect` takes it, squeezed to the model's size."""
        return np.array(image.resize(self.size, Image.Resampling.BILINEAR))[None]

    def detect(self, pixels: NDArray[np.uint8]) -> tuple[NDArray[Any], NDArray[Any]]:
        """Boxes (D, 4), XYWH in shares of the image's sides, and scores (D,)."""
        boxes, _, scores, number = self.session.run(None, {self.name: pixels})
        top, left, bottom, right = boxes[0, : int(number[0])].astype(float).T
        return np.stack([left, top, right - left, bottom - top], axis=1), scores[0, : len(top)]


# From the index of an image to its boxes (D, 4), XYWH in pixels, and scores (D,).
Run = Callable[[int], tuple[NDArray[Any], NDArray[Any]]]


def benchmark_onnx(
    images: StrPath,
    gt: StrPath | None = None,
    *,
    split: str = "voc",
    other: StrPath | None = None,
    proposals: Sequence[int] = (700, 500),
    threads: Sequence[int] = (1, 2),
    repeats: int = 5,
) -> None:
    """
    Print tables: milliseconds of the shipped model, with all and with the best proposals only, and
    of others for the same images, resized before, one by one; 100 boxes of each. torchvision's
    small Faster R-CNN, without weights and for one class, is among them where torchvision is.

    Args:
        images: a folder.
        gt: a COCO file of the images there; recall of all objects is then printed, too, in percent.
        split: its seen categories, see :func:`oln_d2.evaluate`.
        other: a file for :class:`TensorFlowDetector`.
        proposals: so many of the best.
        threads: a table for each.
        repeats: turns through all images, of which the median is taken.

    Raises:
        InputError: an argument or file that cannot be used.
    """
    check_limits(repeats=(repeats, POSITIVE_INT))
    for name, numbers in ("proposals", proposals), ("threads", threads):
        for number in numbers:
            check_limits(**{name: (number, POSITIVE_INT)})
    if gt is None:
        paths, ids = [source.path for source in find_sources([os.fspath(images)])[1]], []
    else:
        entries = load_coco(gt)["images"]
        paths = [os.path.join(images, entry["file_name"]) for entry in entries]
        ids = [entry["id"] for entry in entries]
    photos = [open_image(path) for path in paths]
    for number in threads:
        runs = {"OLN-Box": _ours(photos, number)}
        for kept in proposals:
            runs[f"OLN-Box, the best {kept} proposals"] = _ours(photos, number, kept)
        known = list(runs)
        if other is not None:
            runs[os.path.basename(other)] = _other(photos, number, other)
            known.append(os.path.basename(other))
        if importlib.util.find_spec("torchvision"):
            runs |= _torchvision(photos, number)
        else:
            print("torchvision is not installed, so its model is not measured")
        measured = take_turns([_timed(run, len(photos)) for run in runs.values()], repeats)
        rows = []
        for (name, run), found in zip(runs.items(), measured):
            recall = _recall(run, ids, gt, split) if ids and name in known else [""] * len(KS)
            milliseconds = f"{1000 * median(found, 'seconds'):.1f}"
            rows.append([name, milliseconds, ratio(found, measured[0]), *recall])
        print(f"{len(photos)} images, median of {repeats} turns, threads: {number}")
        headers = ["", "ms an image", "ratio to the first", *(f"AR@{k}" for k in KS)]
        print(tabulate(rows, headers, disable_numparse=True))


def _timed(run, number):
    def turn():
        begin = time.perf_counter()
        for i in range(number):
            run(i)
        return {"seconds": (time.perf_counter() - begin) / number}

    return turn


def _recall(run, ids, gt, split):
    rows = [(own, *run(i), None, {}) for i, own in enumerate(ids)]
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "results.json")
        write_results(path, rows)
        result = evaluate(gt, path, seen=split)
    return [f"{100 * result.ar(k, 'all'):.1f}" for k in KS]


def _shipped(threads: int, proposals: int | None = None) -> Proposer:
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = str(threads)  # which the proposer goes by
    try:
        return load(weights.find(".onnx"), device="cpu", max_proposals=proposals)
    finally:
        del os.environ["OMP_NUM_THREADS"]
        if before is not None:
            os.environ["OMP_NUM_THREADS"] = before


def _ours(photos: list[Image.Image], threads: int, proposals: int | None = None) -> Run:
    proposer = _shipped(threads, proposals)
    prepared = [proposer.prepare(photo) for photo in photos]

    def run(i):
        (found,) = proposer.propose([prepared[i]], OUTPUTS, 0.0, None)
        return to_xywh(found.boxes), found.scores

    return run


def _other(photos: list[Image.Image], threads: int, path: StrPath) -> Run:
    detector = TensorFlowDetector(path, threads)
    prepared = [detector.prepare(photo) for photo in photos]

    def run(i):
        boxes, scores = detector.detect(prepared[i])
        return boxes * [*photos[i].size, *photos[i].size], scores

    return run


def _torchvision(photos: list[Image.Image], threads: int) -> dict[str, Run]:
    """torchvision's model in eager mode and as ONNX, on the pixels that the shipped one sees."""
    import torch
    from torchvision.models import detection

    torch.manual_seed(0)
    model = getattr(detection, TORCHVISION)(
        weights=None, weights_backbone=None, num_classes=2, box_score_thresh=0.0
    ).eval()
    model.transform.resize = lambda image, target=None: (image, target)  # it is done
    proposer = _shipped(threads)
    resized = [proposer.prepare(photo).parts[0][1].transpose(2, 0, 1) for photo in photos]
    pixels = [np.ascontiguousarray(image, np.float32) / 255 for image in resized]
    tensors = [torch.from_numpy(image) for image in pixels]

    @torch.inference_mode()
    def eager(i):
        torch.set_num_threads(threads)
        (found,) = model([tensors[i]])
        return found["boxes"].numpy(), found["scores"].numpy()

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors only
    options.intra_op_num_threads = threads
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its exporter by tracing is deprecated
        path = os.path.join(folder, "model.onnx")
        torch.onnx.export(
            model,
            ([tensors[0]],),
            path,
            dynamo=False,
            opset_version=18,
            input_names=["image"],
            output_names=["boxes", "labels", "scores"],
            dynamic_axes={"image": {1: "height", 2: "width"}},
        )
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def exported(i):
        return session.run(["boxes", "scores"], {"image": pixels[i]})

    return {f"torchvision's {TORCHVISION}": eager, "the same as ONNX": exported}
