"""
How often a training step makes a GPU wait: counted on a CPU, by the operations that would. Each
costs about 30 microseconds in which the GPU has nothing to do.
"""

import collections
import os
import traceback

import pytest
import torch
from conftest import NEEDS_DETECTRON2
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import oln_d2

TESTS = os.path.dirname(__file__)

# Their result's size or value is needed on the CPU.
WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "bincount", "equal", "nms"}
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}  # wait if indices are bools
COPIES = {"tolist", "cpu", "numpy", "tensor", "new_tensor", "as_tensor"}  # to or from the CPU


def folder_of(module):
    return os.path.join(os.path.dirname(module.__file__), "")


class Operations(TorchDispatchMode):
    """Counts what PyTorch does, also in a backward pass: by whether lines of this package do it."""

    def __init__(self):
        super().__init__()
        self.number = collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._opname
        if name in WAITS:
            self.count(1)
        elif name in INDEXING:
            bools = (torch.bool, torch.uint8)
            self.count(sum(i is not None and i.dtype in bools for i in args[1]))
        return func(*args, **(kwargs or {}))

    def count(self, number):
        files = [frame.filename for frame in reversed(traceback.extract_stack())]
        own = next((f for f in files if not f.startswith((TESTS, folder_of(torch)))), "")
        self.number["ours" if own.startswith(folder_of(oln_d2)) else "others"] += number


class Calls(TorchFunctionMode):
    """Adds what is a copy on a GPU alone, so that PyTorch has nothing to do on a CPU."""

    def __init__(self, operations):
        super().__init__()
        self.operations = operations

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", "") in COPIES:
            self.operations.count(1)
        return func(*args, **(kwargs or {}))


def waits(step):
    """How often lines of this package, and others, would make a GPU wait."""
    step()  # what is done once only
    operations = Operations()
    with Calls(operations), operations:
        step()
    return operations.number


SIZE = 96, 128
BOXES = torch.tensor([[10.0, 10, 60, 60], [40, 20, 120, 90]])


def images(number):
    return [torch.full((3, *SIZE), i, dtype=torch.uint8) for i in range(number)]


def detectron2_step(recipe, number):
    from detectron2.modeling import build_model
    from detectron2.structures import Boxes, Instances
    from detectron2.utils.events import EventStorage
    from test_configs import load_config

    cfg = load_config(f"cpu/{recipe}_R_10_FPN_GN.yaml")
    cfg.merge_from_list(["MODEL.FPN.OUT_CHANNELS", 32, "MODEL.ROI_BOX_HEAD.FC_DIM", 32])
    torch.manual_seed(0)
    model = build_model(cfg).train()
    objects = Instances(SIZE, gt_boxes=Boxes(BOXES), gt_classes=torch.zeros(2, dtype=torch.int64))
    batch = [{"image": image, "instances": objects} for image in images(number)]

    def step():
        with EventStorage():
            sum(model(batch).values()).backward()

    return step


def standalone_step(architecture, number):
    from oln_d2.standalone import build_detector
    from oln_d2.standalone.models import training_losses

    small = {"depth": 10, "norm": "GN", "fpn_channels": 32, "representation_size": 32}
    model = build_detector(architecture, **small, trainable_backbone_layers=5).train()
    target = {"boxes": BOXES, "labels": torch.ones(2, dtype=torch.int64)}
    return lambda: sum(
        training_losses(model, images(number), [target] * number).values()
    ).backward()


@pytest.mark.parametrize(
    "make, oln, reference, constant",
    [
        pytest.param(
            detectron2_step, "oln_box", "faster_rcnn_1_anchor", 12, marks=NEEDS_DETECTRON2
        ),
        (standalone_step, "oln_box", "faster_rcnn", 14),  # 1: where the gradient comes by
    ],
)
def test_steps_of_a_gpu_wait_little(make, oln, reference, constant):
    """
    Each image may make a GPU wait once in lines of this package, for the proposals that are left.
    What is counted, sampled or logged for a batch is brought to the CPU at once, and OLN waits less
    than a detector that classifies.
    """
    two, four = (waits(make(oln, number)) for number in (2, 4))
    assert four["ours"] - two["ours"] == 2
    assert two["ours"] - 2 <= constant
    theirs = waits(make(reference, 4))
    assert four.total() < theirs.total()
