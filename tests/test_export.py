"""`python -m oln_d2 export`: the exported files against the model that they are made of."""

import json
import subprocess
import sys

import numpy as np
import onnx
import pytest
import torch
from conftest import NEEDS_DETECTRON2, ROOT
from test_propose import noise, propose, results, same, small_recipe
from test_standalone import standalone_model
from torchvision.transforms.functional import to_tensor

from oln_d2.checks import InputError
from oln_d2.cli import main
from oln_d2.standalone import build_detector, load_detector, save_checkpoint
from oln_d2.standalone.export import OnnxDetector

# Smaller and larger than what the export looks at, upright and wide, with fewer locations on a
# level than are kept of it, and with more.
SIZES = [(320, 240), (90, 200), (31, 33), (500, 90), (1, 1), (2, 300)]


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """The folder of a checkpoint and of what is exported of it."""
    folder = tmp_path_factory.mktemp("exported")
    model = standalone_model(
        norm="FrozenBN",
        min_size=160,
        max_size=260,
        rpn_pre_nms_top_n_test=300,
        box_detections_per_img=50,
    )
    save_checkpoint(model, str(folder / "model.pth"))
    for ending in "onnx", "pt":
        assert main(["export", str(folder / "model.pth"), str(folder / f"model.{ending}")]) == 0
    return folder


def assert_same(found, expected, side):
    """Every detection is there, to 1e-3 of a pixel of a large image and 1e-4 of a score."""
    assert list(found) == ["boxes", "scores", "objectness", "box_scores"]
    assert found["scores"].shape == expected["scores"].shape
    if len(found["scores"]) == 0:
        return
    distance = torch.cdist(found["boxes"], expected["boxes"], p=float("inf"))
    nearest = distance.argmin(dim=1)
    close = distance.min(dim=1).values < 1e-3 * max(side / 300, 1)
    for name in ("scores", "objectness", "box_scores"):
        close &= (found[name] - expected[name][nearest]).abs() < 1e-4
    # At the cut and in NMS, equal scores may be decided the other way.
    assert close.float().mean() > 0.95


@pytest.mark.parametrize("size", SIZES)
def test_onnx(exported, size, monkeypatch):
    """onnxruntime must propose what PyTorch does, on images of any size."""
    monkeypatch.setenv("OMP_NUM_THREADS", "2,1")  # as nested OpenMP has it
    image = to_tensor(noise(*size, seed=size[0]))
    with torch.no_grad():
        (expected,) = load_detector(str(exported / "model.pth"))([image])
    (found,) = OnnxDetector(str(exported / "model.onnx"))([image])
    assert_same(found, expected, max(size))


def test_file_tells_what_it_is(exported):
    """Who runs the file without this package needs its opset, names, free sizes and settings."""
    model = onnx.load(exported / "model.onnx")
    onnx.checker.check_model(model, full_check=True)
    assert [(o.domain, o.version) for o in model.opset_import] == [("", 17)]
    (image,) = model.graph.input
    shape = [d.dim_param or d.dim_value for d in image.type.tensor_type.shape.dim]
    assert (image.name, shape) == ("image", [3, "height", "width"])
    assert [o.name for o in model.graph.output] == ["boxes", "scores", "objectness", "box_scores"]
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    assert json.loads(metadata["oln_d2"]) == {
        "min_size": 160,
        "max_size": 260,
        "max_detections": 50,
    }


def test_torchscript_needs_torch_and_torchvision_only(exported, tmp_path):
    """A process without this package must get the same boxes from the .pt file."""
    model = load_detector(str(exported / "model.pth"))
    image = torch.from_numpy(np.asarray(noise(200, 176)).transpose(2, 0, 1).copy())
    # The model resizes nothing of this size: 160 / 176 would, so it is given what it would make.
    pixels = model.transform.resized_pixels(image / 255.0)
    with torch.no_grad():
        (expected,) = model([pixels / 255])
    torch.save(pixels, tmp_path / "pixels.pt")
    code = (
        "import sys, torch, torchvision\n"
        "model = torch.jit.load(sys.argv[1], _extra_files=(extra := {'oln_d2': ''}))\n"
        "with torch.no_grad(): found = model(torch.load(sys.argv[2]))\n"
        "assert not any(name.startswith('oln_d2') for name in sys.modules)\n"
        "torch.save((found, extra['oln_d2']), sys.argv[3])\n"
    )
    files = exported / "model.pt", tmp_path / "pixels.pt", tmp_path / "found.pt"
    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, *map(str, files)], check=True, cwd=tmp_path
    )
    found, settings = torch.load(files[2])
    assert json.loads(settings) == {"min_size": 160, "max_size": 260, "max_detections": 50}
    assert_same(dict(zip(["boxes", "scores", "objectness", "box_scores"], found)), expected, 200)


def test_propose(exported, tmp_path):
    """`propose` must write the same for the exported file as for the checkpoint."""
    for i, size in enumerate([(320, 240), (200, 300), (500, 90)]):
        noise(*size, seed=i).save(tmp_path / f"{i}.png")
    for name in "model.pth", "model.onnx":
        inputs = [f"{tmp_path}/*.png", "--weights", exported / name]
        assert propose(*inputs, "--output", tmp_path / name) == 0
    same(results(tmp_path / "model.pth"), results(tmp_path / "model.onnx"), share=0.95)


@NEEDS_DETECTRON2
def test_model_of_train_net(tmp_path):
    """A checkpoint of Detectron2, with its config file, must export as the model that it is."""
    from detectron2.modeling import build_model

    from oln_d2.model_zoo import load_config

    recipe = small_recipe(tmp_path)
    torch.manual_seed(0)
    model = build_model(load_config(recipe))
    torch.save({"model": model.state_dict(), "iteration": 3}, tmp_path / "d2.pth")
    line = ["export", tmp_path / "d2.pth", tmp_path / "d2.onnx", "--config-file", recipe]
    assert main([str(word) for word in line]) == 0
    noise(120, 90).save(tmp_path / "photo.png")
    for name, *config in (("d2.pth", "--config-file", recipe), ("d2.onnx",)):
        output = tmp_path / f"of {name}"
        inputs = [tmp_path / "photo.png", "--weights", tmp_path / name, *config]
        assert propose(*inputs, "--output", output) == 0
    same(results(tmp_path / "of d2.pth"), results(tmp_path / "of d2.onnx"), share=0.95)


def test_bad_input_is_one_sentence(exported, tmp_path, capsys):
    """Nothing may be written, and the message has to name the file and the remedy."""
    checkpoint = exported / "model.pth"
    mask = build_detector(
        "oln_mask", depth=10, norm="GN", fpn_channels=32, representation_size=32, mask_channels=32
    )
    save_checkpoint(mask, str(tmp_path / "mask.pth"))
    cases = [
        (checkpoint, "model.h5", "its ending has to be"),
        (checkpoint, "no/model.onnx", "its folder does not exist"),
        (tmp_path / "none.pth", "model.onnx", "none.pth"),
        (tmp_path / "mask.pth", "model.onnx", "only oln_box can be exported"),
    ]
    for source, target, expected in cases:
        assert main(["export", str(source), str(tmp_path / target)]) == 2
        error = capsys.readouterr().err
        assert expected in error and len(error.strip().splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["mask.pth"]


def test_files_that_are_not_ours(exported, tmp_path):
    """Another ONNX model or half a file would give nonsense or a traceback."""
    whole = (exported / "model.onnx").read_bytes()
    (tmp_path / "cut.onnx").write_bytes(whole[: len(whole) // 2])
    model = onnx.load(exported / "model.onnx")
    del model.metadata_props[:]
    onnx.save(model, tmp_path / "other.onnx")
    reasons = {"cut": "no ONNX file that", "other": "does not say", "none": "no such file"}
    for name, reason in reasons.items():
        with pytest.raises(InputError, match=reason) as error:
            OnnxDetector(str(tmp_path / f"{name}.onnx"))
        assert f"{name}.onnx" in str(error.value)
    with pytest.raises(InputError, match="device 'tpu'"):
        OnnxDetector(str(exported / "model.onnx"), device="tpu")


def test_without_onnx(exported, tmp_path):
    """Who lacks the extra must be given its name."""
    code = (
        "import sys; sys.modules['onnx'] = None\n"
        "from oln_d2.cli import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    command = [sys.executable, "-W", "ignore", "-c", code, "export", exported / "model.pth"]
    done = subprocess.run(
        [*map(str, command), str(tmp_path / "model.onnx")], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2 and "[export]" in done.stderr and "Traceback" not in done.stderr
