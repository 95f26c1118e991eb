"""Half precision: which types are taken, and that they find and learn the same."""

import builtins
import io

import numpy as np
import pytest
import torch
from conftest import NEEDS_DETECTRON2, ROOT
from PIL import Image
from torchvision.ops import box_iou

from oln_d2 import weights
from oln_d2.checks import InputError
from oln_d2.precision import computes_bfloat16, usable_dtype


@pytest.mark.parametrize(
    "flags, expected",
    [
        ("fpu avx512_bf16 vaes", True),
        ("fpu amx_bf16", True),
        ("fpu avx512f my_avx512_bf16x", False),
    ],
)
def test_processors(flags, expected, monkeypatch):
    """Where the processor has to emulate it, bfloat16 would make training slower without a word."""
    real = builtins.open
    content = f"processor\t: 0\nflags\t\t: {flags}\n"
    # The only way to have another processor.
    monkeypatch.setattr(
        builtins,
        "open",
        lambda path, *args, **kwargs: (
            io.StringIO(content) if path == "/proc/cpuinfo" else real(path, *args, **kwargs)
        ),
    )
    assert computes_bfloat16("cpu") is expected
    if expected:
        assert usable_dtype("bfloat16", "cpu") is torch.bfloat16
    else:
        with pytest.raises(InputError, match="KEY is bfloat16, .* avx512_bf16 .*; use float32"):
            usable_dtype("bfloat16", "cpu", "KEY")


def test_names():
    """A type that cannot be had must be named with what can."""
    assert usable_dtype("", "cpu") is None
    assert usable_dtype("float16", "cuda") is torch.float16
    with pytest.raises(InputError, match="KEY is float16, which needs a GPU; use bfloat16"):
        usable_dtype("float16", "cpu", "KEY")
    with pytest.raises(InputError, match="KEY is 'half'; use bfloat16, float16 or float32"):
        usable_dtype("half", "cpu", "KEY")


SIZE = weights.card()["min_size"]
BOXES = torch.tensor([[0.1875, 0.0625, 0.78125, 0.96875]]) * SIZE  # of the astronaut


def standalone():
    """The trained model of the package: what it finds in an image, and its losses there."""
    from oln_d2.standalone import load_detector

    model = load_detector(weights.find(".safetensors"))

    def find(image):
        (found,) = model.eval()([image.float() / 255])
        return found["boxes"], found["scores"]

    return find, lambda image: model.train()([image.float() / 255], [{"boxes": BOXES}])


def detectron2():
    """The same model in Detectron2."""
    from detectron2.structures import Boxes, Instances
    from detectron2.utils.events import EventStorage

    from oln_d2 import model_zoo

    recipe = next(row["recipe"] for row in model_zoo.rows() if row.get("weights"))
    model = model_zoo.get(recipe, trained=True, device="cpu")

    def find(image):
        (found,) = model.eval()([{"image": image}])
        return found["instances"].pred_boxes.tensor, found["instances"].scores

    def learn(image):
        objects = Instances(tuple(image.shape[1:]), gt_boxes=Boxes(BOXES))
        objects.gt_classes = torch.zeros(1, dtype=torch.int64)
        with EventStorage():
            return model.train()([{"image": image, "instances": objects}])

    return find, learn


@pytest.mark.parametrize(
    "make", [standalone, pytest.param(detectron2, marks=NEEDS_DETECTRON2)], ids=lambda f: f.__name__
)
def test_half_precision_finds_and_learns_the_same(make, tmp_path, monkeypatch):
    """Who saves time and memory with it must neither lose the best boxes nor the training."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    find, learn = make()
    with Image.open(ROOT / "examples/photos/astronaut.jpg") as photo:
        pixels = np.asarray(photo.convert("RGB").resize((SIZE, SIZE)))
    image = torch.from_numpy(pixels.copy()).permute(2, 0, 1)
    with torch.no_grad():
        boxes, scores = find(image)
    torch.manual_seed(0)
    losses = learn(image)
    for dtype, overlap, difference in (torch.float16, 0.99, 0.003), (torch.bfloat16, 0.9, 0.02):
        with torch.autocast("cpu", dtype):
            with torch.no_grad():
                half_boxes, half_scores = find(image)
            torch.manual_seed(0)
            half = learn(image)
        assert half_boxes.dtype == half_scores.dtype == torch.float32
        best, place = box_iou(boxes[:10], half_boxes[:12]).max(dim=1)
        assert best.min() > overlap
        assert (scores[:10] - half_scores[place]).abs().max() < difference
        for name, loss in half.items():
            assert loss.dtype == torch.float32 and loss.isfinite(), name
            assert loss.item() == pytest.approx(losses[name].item(), rel=0.2), name
        assert sum(half.values()).requires_grad
