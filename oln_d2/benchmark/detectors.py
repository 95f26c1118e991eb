"""
OLN-Box and a class-agnostic Faster R-CNN of the same size, to be measured side by side: built from
the same backbone, and with clocks at their stages.
"""

import copy
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms.functional import pil_to_tensor

from oln_d2 import weights
from oln_d2.benchmark.measure import peak_memory
from oln_d2.checks import InputError
from oln_d2.data.images import open_image, resized_shape
from oln_d2.files import StrPath
from oln_d2.propose.inputs import find_sources
from oln_d2.standalone import build_detector, load_detector
from oln_d2.standalone.build import DEFAULTS
from oln_d2.standalone.models import detect, training_losses

# Stages of inference; the rest is sorting, NMS, and boxes of the image's size.
BACKBONE, FIRST, ROIS, REST = "backbone", "first stage", "RoI stage", "post-processing"
# Of training; assignment comes with sampling.
FORWARD, ASSIGNMENT, BACKWARD, OPTIMIZER = "forward", "assignment", "backward", "optimizer"
PROPOSALS = 1000  # of Faster R-CNN
ALL = "all proposals"  # the public setting
EXAMPLES = Path(__file__).parents[2] / "examples/photos"


class Stages:
    """Seconds by stage, and the whole; measured by events on a GPU, which then need not wait."""

    def __init__(self, device: str):
        self.on_gpu = torch.device(device).type == "cuda"
        self.spans: dict[str, list[tuple[Any, Any]]] = defaultdict(list)
        self.begun: dict[str, Any] = {}

    def begin(self, name: str) -> None:
        self.begun[name] = self._now()

    def end(self, name: str) -> None:
        self.spans[name].append((self.begun.pop(name), self._now()))

    def _now(self):
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, name: str, first: nn.Module, last: nn.Module | None = None) -> None:
        """Measure from where `first` is called to where `last` returns."""
        first.register_forward_pre_hook(lambda *_: self.begin(name))
        (last or first).register_forward_hook(lambda *_: self.end(name))

    def within(self, name: str, owner: Any, method: str) -> None:
        """Measure a method."""
        original = getattr(owner, method)

        def timed(*args, **kwargs):
            self.begin(name)
            try:
                return original(*args, **kwargs)
            finally:
                self.end(name)

        setattr(owner, method, timed)

    def take(self) -> dict[str, float]:
        """The seconds so far; they begin anew."""
        if self.on_gpu:
            torch.cuda.synchronize()
            ret = {n: sum(a.elapsed_time(b) for a, b in s) / 1000 for n, s in self.spans.items()}
        else:
            ret = {n: sum(b - a for a, b in spans) for n, spans in self.spans.items()}
        self.spans.clear()
        return ret


Batches = list[list[tuple[Tensor, tuple[int, int], Tensor]]]  # see `make_batches`


class TimedDetector:
    """
    A detector to be measured.

    Attributes:
        rois (int): how many went through the second stage in the last run.
        sides (int, int): height and width that no image exceeds as the model sees it.
    """

    def __init__(self, name: str, model: nn.Module, device: str, batches: Batches):
        self.name, self.model, self.device, self.batches = name, model, device, batches
        self.images = sum(map(len, batches))
        shapes = [pixels.shape for batch in batches for pixels, *_ in batch]
        self.sides = max(shape[1] for shape in shapes), max(shape[2] for shape in shapes)
        self.stages = Stages(device)
        self.rois = 0

    def infer(self) -> dict[str, float]:
        """Seconds an image by stage, "seconds" in all, and "memory"; for :func:`take_turns`."""
        found: dict[str, float] = {}
        self.rois = 0
        self.model.eval()
        with torch.no_grad(), peak_memory(found, self.device):
            self.stages.begin("seconds")
            for batch in self.batches:
                self.detect(batch)
            self.stages.end("seconds")
            seconds = self.stages.take()
        seconds[REST] = seconds["seconds"] - sum(seconds[n] for n in (BACKBONE, FIRST, ROIS))
        return {**found, **{n: value / self.images for n, value in seconds.items()}}

    def watch_inference(self, first: nn.Module, heads: nn.Module, pooler: nn.Module) -> None:
        self.stages.between(BACKBONE, self.model.backbone)
        self.stages.between(FIRST, first)
        self.stages.between(ROIS, pooler, heads.box_predictor)
        pooler.register_forward_hook(lambda module, inputs, pooled: self._count(len(pooled)))

    def _count(self, rois):
        self.rois += rois

    def train(self, autocast: torch.dtype | None) -> Callable[[], dict[str, float]]:
        """A training step on each batch, measured as :meth:`infer` does."""
        learning = [p for p in self.model.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(learning, lr=1e-5, momentum=0.9)

        def step() -> dict[str, float]:
            found: dict[str, float] = {}
            stages, kind = self.stages, torch.device(self.device).type
            self.model.train()
            with peak_memory(found, self.device):
                stages.begin("seconds")
                for batch in self.batches:
                    stages.begin(FORWARD)
                    with torch.autocast(kind, autocast, enabled=autocast is not None):
                        loss = sum(self.losses(batch).values())
                    stages.end(FORWARD)
                    stages.begin(BACKWARD)
                    optimizer.zero_grad()
                    loss.backward()
                    stages.end(BACKWARD)
                    stages.begin(OPTIMIZER)
                    optimizer.step()
                    stages.end(OPTIMIZER)
                stages.end("seconds")
                seconds = stages.take()
            seconds[FORWARD] -= seconds[ASSIGNMENT]
            return {**found, **{n: value / self.images for n, value in seconds.items()}}

        return step

    def detect(self, batch: Any) -> Any:
        raise NotImplementedError

    def losses(self, batch: Any) -> dict[str, Tensor]:
        raise NotImplementedError


class StandaloneDetector(TimedDetector):
    """One of :func:`oln_d2.standalone.build_detector`."""

    def __init__(self, name: str, model: nn.Module, device: str, batches: Batches):
        super().__init__(name, model.to(device), device, batches)
        first, heads = model.rpn, model.roi_heads
        self.watch_inference(first, heads, heads.box_roi_pool)
        self.stages.within(ASSIGNMENT, heads, "select_training_samples")
        own = ["_label_and_sample"]  # OLN's
        if not hasattr(first, own[0]):
            own = ["assign_targets_to_anchors", "fg_bg_sampler"]
        for method in own:
            self.stages.within(ASSIGNMENT, first, method)

    def detect(self, batch):
        pixels, sizes, _ = zip(*batch)
        return detect(self.model, [image.to(self.device) for image in pixels], sizes)

    def losses(self, batch):
        pixels, _, boxes = zip(*batch)
        boxes = [b.to(self.device) for b in boxes]
        targets = [{"boxes": b, "labels": torch.ones_like(b[:, 0]).long()} for b in boxes]
        return training_losses(self.model, [image.to(self.device) for image in pixels], targets)


class Detectron2Detector(TimedDetector):
    """A recipe of Detectron2."""

    def __init__(self, name: str, model: nn.Module, device: str, batches: Batches):
        super().__init__(name, model, device, batches)
        first, heads = model.proposal_generator, model.roi_heads
        self.watch_inference(first, heads, heads.box_pooler)
        self.stages.within(ASSIGNMENT, first, "label_and_sample_anchors")
        self.stages.within(ASSIGNMENT, heads, "label_and_sample_proposals")

    def detect(self, batch):
        return self.model(self._inputs(batch))

    def losses(self, batch):
        from detectron2.utils.events import EventStorage

        with EventStorage():
            return self.model(self._inputs(batch))

    def _inputs(self, batch):
        from detectron2.structures import Boxes, Instances

        inputs = []
        for pixels, (height, width), boxes in batch:
            instances = Instances(pixels.shape[-2:])
            instances.gt_boxes = Boxes(boxes)
            instances.gt_classes = torch.zeros(len(boxes), dtype=torch.int64)
            one = {"image": pixels, "height": height, "width": width, "instances": instances}
            inputs.append(one)
        return inputs


def read_photographs(folder: StrPath | None, number: int | None = None) -> list[Image.Image]:
    """
    Args:
        folder: of photographs; None: the examples in the repository.
        number: the first so many, again from the start where there are fewer; None: each once.

    Raises:
        InputError: there is none.
    """
    if folder is None and not EXAMPLES.is_dir():
        raise InputError("the examples' photographs are not here; name a folder: --photos DIR")
    _, sources = find_sources([str(folder or EXAMPLES)])
    paths = [source.path for source in sources if not source.is_video]
    if not paths:
        raise InputError(f"{folder}: there is no photograph")
    number = number or len(paths)
    photos = {path: open_image(path) for path in paths[:number]}
    return [photos[paths[i % len(paths)]] for i in range(number)]


def make_batches(
    photos: list[Image.Image], min_size: int, max_size: int, batch_size: int
) -> Batches:
    """
    Args:
        min_size, max_size: limits of an image's sides, see :func:`resized_shape`.

    Returns:
        batches of pixels (3, H', W'), uint8, RGB; height and width before; and the boxes of 5
        objects, anywhere, (5, 4), in pixels of the resized image.
    """
    ret = []
    for photo in photos:
        height, width = resized_shape(photo.height, photo.width, min_size, max_size)
        pixels = pil_to_tensor(photo.resize((width, height), Image.Resampling.BILINEAR))
        corners = torch.rand(5, 2) * 0.6
        boxes = torch.cat([corners, corners + 0.1 + 0.3 * torch.rand(5, 2)], dim=1)
        boxes = boxes * torch.tensor([width, height, width, height])
        ret.append((pixels, (photo.height, photo.width), boxes))
    return [ret[i : i + batch_size] for i in range(0, len(ret), batch_size)]


def standalone(
    config: dict[str, Any] | None,
    photos: list[Image.Image],
    batch_size: int,
    device: str,
    proposals: Sequence[int] = (),
    compiled: bool = False,
) -> list[TimedDetector]:
    """
    Args:
        config: arguments of :func:`build_detector`, for a model without weights. None: the shipped
            model; the other's backbone has its weights, too.
        proposals: numbers of proposals that go through the second stage, instead of all.
        compiled: also with backbone and pyramid by `torch.compile`, on a GPU also as CUDA graphs.

    Returns:
        OLN-Box, compiled, then with so many `proposals`, and last the Faster R-CNN of the same
        backbone, pyramid, anchors and widths, with :data:`PROPOSALS`.
    """
    if config is None:
        ours = load_detector(weights.find(".safetensors"))
        min_size = weights.card()["min_size"]
    else:
        ours = settle(build_detector(**{"ltrb_init": 0.5, **config}))  # anchors as boxes
        min_size = ours.transform.min_size[-1]
    max_size = round(ours.transform.max_size * min_size / ours.transform.min_size[-1])
    models = {f"OLN-Box, {ALL}": ours}
    for name, mode in (compiled_modes(device) if compiled else {}).items():
        faster = models[f"OLN-Box, {ALL}, {name}"] = copy.deepcopy(ours)
        # In this way the clocks around it are not compiled.
        faster.backbone.forward = torch.compile(faster.backbone.forward, dynamic=True, mode=mode)
    for number in proposals:
        fewer = build_detector(**{**ours.config, "rpn_post_nms_top_n_test": number})
        fewer.load_state_dict(ours.state_dict())
        models[f"OLN-Box, {number} proposals"] = fewer
    names = DEFAULTS["faster_rcnn"].keys() | {"box_batch_size_per_image"}
    shared = {n: v for n, v in ours.config.items() if n in names or n not in DEFAULTS["oln_box"]}
    shared |= {"architecture": "faster_rcnn", "rpn_post_nms_top_n_test": PROPOSALS}
    theirs = build_detector(**shared)
    theirs.backbone.load_state_dict(ours.backbone.state_dict())
    models[f"Faster R-CNN, {PROPOSALS}"] = theirs
    batches = make_batches(photos, min_size, max_size, batch_size)
    return [StandaloneDetector(n, model, device, batches) for n, model in models.items()]


def compiled_modes(device: str) -> dict[str, str]:
    """Modes of `torch.compile` by what the rows of the table call them."""
    modes = {"torch.compile": "default"}
    if torch.device(device).type == "cuda":
        modes["CUDA graphs"] = "reduce-overhead"  # PyTorch's name for these
    return modes


def detectron2(
    recipes: Sequence[StrPath],
    photos: list[Image.Image],
    batch_size: int,
    device: str,
    proposals: Sequence[int] = (),
) -> list[TimedDetector]:
    """
    As :func:`standalone`, of two recipes of Detectron2, ours first, without weights.

    Raises:
        InputError: a recipe that cannot be read.
        ImportError: Detectron2 is missing.
    """
    from oln_d2.model_zoo import load_config

    ours, theirs = recipes
    top_n = "MODEL.RPN.POST_NMS_TOPK_TEST"
    wanted = [(f"OLN-Box, {ALL}", ours, ["MODEL.OLN.LTRB_INIT", 0.5])]
    for number in proposals:
        opts = ["MODEL.OLN.LTRB_INIT", 0.5, top_n, number]
        wanted.append((f"OLN-Box, {number} proposals", ours, opts))
    wanted.append((f"Faster R-CNN, {PROPOSALS}", theirs, [top_n, PROPOSALS]))
    configs = [load_config(recipe, ["MODEL.DEVICE", device, *opts]) for _, recipe, opts in wanted]
    from detectron2.modeling import build_model

    limits = configs[0].INPUT
    batches = make_batches(photos, limits.MIN_SIZE_TEST, limits.MAX_SIZE_TEST, batch_size)
    return [
        Detectron2Detector(name, settle(build_model(cfg)), device, batches)
        for (name, *_), cfg in zip(wanted, configs)
    ]


def settle(model: nn.Module) -> nn.Module:
    """Keep the features of a ResNet-50 without weights as small as those of one with weights."""
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        if name.endswith(("bn3.weight", "conv3.norm.weight")):
            value.data.fill_(0.2)
    return model
