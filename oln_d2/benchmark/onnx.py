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
from oln_d2.data.lookup import plural
from oln_d2.evaluation import GroundTruth, OpenWorldRecall
from oln_d2.evaluation.plot import require_format
from oln_d2.files import StrPath, write_whole
from oln_d2.loading import load
from oln_d2.propose.inputs import evenly, find_sources
from oln_d2.propose.onnx import session_options
from oln_d2.propose.proposer import Proposer

KS = 10, 100, 1000
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
        try:
            self.session = onnxruntime.InferenceSession(
                os.fspath(path), session_options(threads), providers=["CPUExecutionProvider"]
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
    number: int | None = None,
    other: Sequence[StrPath] = (),
    proposals: Sequence[int] = (2000, 200),
    sizes: Sequence[int] = (),
    top_k: int = 100,
    threads: Sequence[int] = (1, 2),
    repeats: int = 5,
    plot: StrPath | None = None,
) -> None:
    """
    Print tables: milliseconds of the shipped model, by default and with other numbers of proposals,
    and of others for the same images, resized before, one by one, in the same sort of session.
    torchvision's small Faster R-CNN, without weights and for one class, is among them where
    torchvision is.

    Args:
        images: a folder.
        gt: a COCO file of the images there; recall is then printed, too, in percent, of unseen and
            of all objects.
        split: its seen categories, see :func:`oln_d2.evaluate`.
        number: of images, evenly taken from all; None: all.
        other: files for :class:`TensorFlowDetector`, or such as `oln-d2 export` writes, which take
            as many proposals as the shipped model by default.
        proposals: see :meth:`Proposer.limit_proposals`; 2000 are more than there are.
        sizes: other lengths of the shorter image side.
        top_k: boxes of an image, of each; AR is at 10, 100 and 1000 boxes, as far as there are.
        threads: a table for each.
        repeats: turns through all images, of which the median is taken.
        plot: with `gt`, a picture of recall against time, of the first of `threads`.

    Raises:
        InputError: an argument or file that cannot be used.
    """
    check_limits(repeats=(repeats, POSITIVE_INT), top_k=(top_k, POSITIVE_INT))
    for name, numbers in ("proposals", proposals), ("threads", threads):
        for value in numbers:
            check_limits(**{name: (value, POSITIVE_INT)})
    if plot is not None:
        require_format(plot)
        if gt is None:
            raise InputError("a picture of recall needs annotations of the images; give gt")
    if number is not None:
        check_limits(number=(number, POSITIVE_INT))
    content = None
    if gt is None:
        paths = [source.path for source in find_sources([os.fspath(images)])[1]]
        paths = evenly(paths, number)
    else:
        content = load_coco(gt)
        entries = content["images"] = evenly(content["images"], number)
        ids = {entry["id"] for entry in entries}
        content["annotations"] = [a for a in content["annotations"] if a["image_id"] in ids]
        paths = [os.path.join(images, entry["file_name"]) for entry in entries]
    photos = [open_image(path) for path in paths]
    ks = [k for k in KS if k <= top_k]
    recalls: dict[str, list[tuple[float, float]]] = {}  # the same with any number of threads
    for count in threads:
        runs = {"OLN-Box": _ours(photos, top_k, count)}
        for kept in proposals:
            name = f"OLN-Box, {kept} proposals"
            runs[name] = _ours(photos, top_k, count, proposals=kept)
        for size in sizes:
            runs[f"OLN-Box, {size} pixels"] = _ours(photos, top_k, count, size=size)
        known = list(runs)
        for path in other:
            runs[os.path.basename(path)] = _other(photos, top_k, count, path)
            known.append(os.path.basename(path))
        if importlib.util.find_spec("torchvision"):
            runs |= _torchvision(photos, count)
        else:
            print("torchvision is not installed, so its model is not measured")
        measured = take_turns([_timed(run, len(photos)) for run in runs.values()], repeats)
        times = {name: median(found, "seconds") for name, found in zip(runs, measured)}
        rows = []
        for (name, run), found in zip(runs.items(), measured):
            if content and name in known and name not in recalls:
                recalls[name] = _recall(run, content, split, ks)
            ratios = ratio(found, measured[0])
            row = [name, f"{1000 * times[name]:.1f}", ratios]
            rows.append(row + [f"{u:.1f} / {a:.1f}" for u, a in recalls.get(name, [])])
        print(f"{plural(len(photos), 'image')}, median of {repeats} turns, threads: {count}")
        if content:
            print("AR of unseen / all objects in percent")
        headers = ["", "ms an image", "ratio to the first", *(f"AR@{k}" for k in ks if content)]
        print(tabulate(rows, headers, disable_numparse=True))
        if plot is not None and count == threads[0]:
            _plot(plot, times, recalls, ks)


def _timed(run, number):
    def turn():
        begin = time.perf_counter()
        for i in range(number):
            run(i)
        return {"seconds": (time.perf_counter() - begin) / number}

    return turn


def _recall(run, content, split, ks):
    """Of unseen and all objects at each of `ks`, in percent."""
    recall = OpenWorldRecall(GroundTruth(content, split))
    for i, entry in enumerate(content["images"]):
        recall.update(entry["id"], *run(i), box_format="xywh")
    result = recall.result()
    return [(100 * result.ar(k, "unseen"), 100 * result.ar(k, "all")) for k in ks]


def _plot(path, times, recalls, ks):
    """AR of unseen objects against the time of an image, a panel for each k."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2 * len(ks), 3.6), layout="constrained")
    for axes, (i, k) in zip(figure.subplots(1, len(ks), squeeze=False)[0], enumerate(ks)):
        for number, (name, recall) in enumerate(recalls.items()):
            marker = "os^D"[number // 10 % 4]  # colours come again after ten
            axes.plot(1000 * times[name], recall[i][0], marker, label=name)
        axes.set(xscale="log", xlabel="ms an image", ylabel=f"AR@{k} of unseen, percent")
        axes.grid(alpha=0.3)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=5)
    with write_whole(path) as temporary:
        figure.savefig(temporary, dpi=150)


def _shipped(threads: int, proposals: int | None = None, path: StrPath | None = None) -> Proposer:
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = str(threads)  # which the proposer goes by
    try:
        return load(path or weights.find(".onnx"), device="cpu", max_proposals=proposals)
    finally:
        del os.environ["OMP_NUM_THREADS"]
        if before is not None:
            os.environ["OMP_NUM_THREADS"] = before


def _ours(
    photos: list[Image.Image],
    top_k: int,
    threads: int,
    proposals: int | None = None,
    size: int | None = None,
    path: StrPath | None = None,
) -> Run:
    proposer = _shipped(threads, proposals, path)
    proposer.look_closer(size)
    prepared = [proposer.prepare(photo) for photo in photos]

    def run(i):
        (found,) = proposer.propose([prepared[i]], top_k, 0.0, None)
        return to_xywh(found.boxes), found.scores

    return run


def _other(photos: list[Image.Image], top_k: int, threads: int, path: StrPath) -> Run:
    try:
        return _ours(photos, top_k, threads, weights.card()["max_proposals"], path=path)
    except InputError:  # it is of another form
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

    def pixels(i):  # in the time, as the shipped one's are
        return np.ascontiguousarray(resized[i], np.float32) / 255

    @torch.inference_mode()
    def eager(i):
        torch.set_num_threads(threads)
        (found,) = model([torch.from_numpy(pixels(i))])
        return found["boxes"].numpy(), found["scores"].numpy()

    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its exporter by tracing is deprecated
        path = os.path.join(folder, "model.onnx")
        torch.onnx.export(
            model,
            ([torch.from_numpy(pixels(0))],),
            path,
            dynamo=False,
            opset_version=18,
            input_names=["image"],
            output_names=["boxes", "labels", "scores"],
            dynamic_axes={"image": {1: "height", 2: "width"}},
        )
        session = onnxruntime.InferenceSession(
            path, session_options(threads), providers=["CPUExecutionProvider"]
        )

    def exported(i):
        return session.run(["boxes", "scores"], {"image": pixels(i)})

    return {f"torchvision's {TORCHVISION}": eager, "the same as ONNX": exported}
