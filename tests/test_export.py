"""`python -m oln_d2 export`: the exported file against the model that it is made of."""

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

import oln_d2
from oln_d2.checks import InputError
from oln_d2.cli import main
from oln_d2.propose.low_rank import SHARES
from oln_d2.propose.onnx import OnnxProposer
from oln_d2.standalone import build_detector, load_detector, save_checkpoint
from oln_d2.standalone.export import OnnxDetector, export

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
        rpn_nms_thresh=0.7,  # other tests export models without it
        box_detections_per_img=50,
    )
    save_checkpoint(model, str(folder / "model.pth"))
    assert main(["export", str(folder / "model.pth"), str(folder / "model.onnx")]) == 0
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


@pytest.mark.parametrize("proposals, detections", [(1, 50), (40, 10**6), (10**6, 3)])
def test_limits(exported, proposals, detections):
    """Who asks for fewer must get the best ones, as if the model had been built so."""
    model = load_detector(str(exported / "model.pth"))
    model.rpn._post_nms_top_n["testing"] = proposals
    model.roi_heads.detections_per_img = detections
    image = noise(320, 240)
    with torch.no_grad():
        (expected,) = model([to_tensor(image)])
    file = exported / "model.onnx"
    proposer = OnnxProposer(file, max_proposals=proposals, max_detections=detections)
    assert proposer.max_detections == detections
    # What is done already is skipped by it.
    assert proposer.identity != OnnxProposer(file).identity
    (found,) = proposer(image, top_k=10**6)
    found = {name: torch.from_numpy(getattr(found, name)).float() for name in expected}
    assert_same(found, expected, 320)


def test_nothing_to_find(exported, tmp_path):
    """An image without a box must give an empty result, not an error of onnxruntime."""
    model = onnx.load(exported / "model.onnx")
    # The bias of the distances; all boxes are turned inside out, so that none has area.
    (bias,) = (x for x in model.graph.initializer if list(x.dims) == [4, 1, 1])
    bias.CopyFrom(onnx.numpy_helper.from_array(np.full((4, 1, 1), -1e6, np.float32), bias.name))
    onnx.save(model, tmp_path / "model.onnx")
    (found,) = OnnxProposer(tmp_path / "model.onnx")(noise(320, 240))
    assert found.boxes.shape == (0, 4) and found.objectness.shape == found.scores.shape == (0,)


def test_file_tells_what_it_is(exported):
    """Who runs the file without this package needs its opset, names, free sizes and settings."""
    model = onnx.load(exported / "model.onnx")
    onnx.checker.check_model(model, full_check=True)
    assert [(o.domain, o.version) for o in model.opset_import] == [("", 18)]
    assert model.ir_version == 8  # onnxruntime 1.17 reads up to 9
    shapes = {
        value.name: [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
        for value in (*model.graph.input, *model.graph.output)
    }
    assert shapes == {
        "image": [3, "height", "width"],
        "max_proposals": [],
        "max_detections": [],
        "boxes": ["detections", 4],
        **{name: ["detections"] for name in ("scores", "objectness", "box_scores")},
    }
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    assert json.loads(metadata["oln_d2"]) == {
        "format": 2,
        "min_size": 160,
        "max_size": 260,
        "resize": "bilinear, antialiased",
        "normalization": "in the graph",
        "padding": "in the graph",
        "max_proposals": 1500,
        "max_detections": 50,
    }
    # The folders of who exported it are nobody's business.
    assert b"oln_d2/standalone" not in (exported / "model.onnx").read_bytes()


def write_format(path, settings):
    """A file whose graph takes an image and finds one box, with these settings."""
    box = np.array([[1, 2, 11, 22]], np.float32)
    values = {"boxes": box, **dict.fromkeys(("scores", "objectness", "box_scores"), box[0, :1])}
    helper, tensor = onnx.helper, onnx.numpy_helper.from_array
    graph = helper.make_graph(
        [helper.make_node("Constant", [], [k], value=tensor(v)) for k, v in values.items()],
        "old",
        [helper.make_tensor_value_info("image", onnx.TensorProto.FLOAT, [3, "height", "width"])],
        [helper.make_tensor_value_info(k, onnx.TensorProto.FLOAT, None) for k in values],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    helper.set_model_props(model, {"oln_d2": json.dumps(settings)})
    onnx.save(model, path)


def test_files_of_other_versions(tmp_path):
    """An old file must go on working, and a later one must not be misread."""
    settings = {"min_size": 160, "max_size": 260, "max_detections": 50}
    write_format(tmp_path / "old.onnx", settings)
    (found,) = OnnxProposer(tmp_path / "old.onnx")(noise(260, 160))
    assert found.boxes.tolist() == [[1, 2, 11, 22]]
    with pytest.raises(InputError, match="old.onnx: .*no max_proposals; export"):
        OnnxProposer(tmp_path / "old.onnx", max_proposals=10)
    write_format(tmp_path / "new.onnx", {"format": 3, **settings})
    with pytest.raises(InputError, match="new.onnx: .*later version.*; update oln_d2"):
        OnnxProposer(tmp_path / "new.onnx")


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


def test_bad_input_is_one_sentence(exported, tmp_path, capsys, monkeypatch):
    """Nothing may be written, and the message has to name the file and the remedy."""
    checkpoint = exported / "model.pth"
    mask = build_detector(
        "oln_mask", depth=10, norm="GN", fpn_channels=32, representation_size=32, mask_channels=32
    )
    save_checkpoint(mask, str(tmp_path / "mask.pth"))
    cases = [
        (checkpoint, "model.h5", "its ending has to be"),
        (checkpoint, "model.pt", "ends in .onnx"),
        (checkpoint, "no/model.onnx", "its folder does not exist"),
        (tmp_path / "none.pth", "model.onnx", "none.pth"),
        (tmp_path / "mask.pth", "model.onnx", "only oln_box can be exported"),
    ]
    for source, target, expected in cases:
        assert main(["export", str(source), str(tmp_path / target)]) == 2
        error = capsys.readouterr().err
        assert expected in error and len(error.strip().splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["mask.pth"]
    whole = str(exported / "model.onnx")
    for line, expected in (
        ([whole, "int8.onnx"], "is exported already; give --low-rank or --int8"),
        (["int8.onnx"], "OUT is missing"),
        ([str(exported / "model.pth")], "OUT is missing"),
        ([whole, "--int8", str(ROOT / "examples")], "is there already; if it is the model, give"),
        ([whole, "int8.onnx", "--int8", str(ROOT / "examples"), "--int8-images", "0"], "--int8-im"),
        ([whole, "int8.onnx", "--int8", "no"], "no: "),
        ([whole, "int8.onnx", "--int8", "."], "no image or video"),
        ([whole, "low.onnx", "--low-rank", "no"], "no: "),
        (["low.onnx", "--low-rank", str(ROOT / "examples")], "OUT is missing"),
        ([whole, "int8.h5", "--int8", str(ROOT / "examples")], "its ending has to be"),
        ([whole, whole, "--int8", str(ROOT / "examples")], "model.onnx"),
        ([str(exported / "model.pth"), "int8.onnx", "--int8", "no"], "no: "),
        ([str(exported / "model.pth"), "int8.h5", "--int8", str(ROOT / "examples")], "its ending"),
    ):
        monkeypatch.chdir(tmp_path)
        assert main(["export", *line]) == 2
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
    with pytest.raises(InputError, match="max_proposals is 0"):
        OnnxProposer(exported / "model.onnx", max_proposals=0)


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(3):
        noise(200 + 20 * i, 180, seed=i).save(folder / f"{i}.png")
    return folder


@pytest.mark.parametrize("source", ["model.pth", "model.onnx"])
def test_int8(source, exported, photos, tmp_path, capsys):
    """It finds nearly the same, by integers in the wide layers only, and as large an image."""
    path = tmp_path / "int8.onnx"
    assert main(["export", str(exported / source), str(path), "--int8", str(photos)]) == 0
    model = onnx.load(path)
    quantized = {
        t.name.removesuffix("_quantized") for t in model.graph.initializer if t.data_type == 3
    }
    parts = "fpn.inner_blocks.0", "fpn.layer_blocks.3", "rpn.head.conv", "box_head.fc6"
    assert all(any(part in name for name in quantized) for part in parts)
    assert not any("body" in name or "cls_logits" in name for name in quantized)
    assert {used.domain for used in model.opset_import} == {""}
    assert main(["export", str(path), str(tmp_path / "b.onnx"), "--int8", str(photos)]) == 2
    assert "in 8-bit integers already" in capsys.readouterr().err
    whole, found = (oln_d2.load(file) for file in (exported / "model.onnx", path))
    assert repr(found) == repr(whole) and found.limits == whole.limits
    for name in ("0.png", "2.png"):
        (expected,), (ours,) = (list(p(photos / name, top_k=5)) for p in (whole, found))
        assert ours.scores == pytest.approx(expected.scores, abs=0.02)


def test_int8_of_the_shipped_model(photos, tmp_path):
    """What its card says goes along: as large images, as few boxes to look at."""
    path = tmp_path / "int8.onnx"
    assert main(["export", str(path), "--int8", str(photos), "--int8-images", "2"]) == 0
    whole, found = oln_d2.load(), oln_d2.load(path)
    assert repr(found).startswith("OnnxProposer(min_size=384")
    names = "min_size max_size likely_score copy_factor limits"
    assert all(getattr(found, name) == getattr(whole, name) for name in names.split())
    assert path.stat().st_size < 16e6


@pytest.fixture(scope="module")
def narrow(tmp_path_factory):
    """A folder with a checkpoint whose wide layers say few things, and what is exported of it."""
    folder = tmp_path_factory.mktemp("narrow")
    model = standalone_model(10, min_size=160, max_size=260, box_nms_thresh=0.5)
    for name, share in SHARES.items():
        layer = model.get_submodule(name.removeprefix("model."))
        outputs = len(layer.weight)
        basis = torch.linalg.qr(torch.randn(outputs, int(share * outputs))).Q
        weight = basis @ basis.T @ layer.weight.detach().flatten(1)
        layer.weight.data = weight.reshape(layer.weight.shape)
        layer.bias.data.normal_()
    save_checkpoint(model, str(folder / "model.pth"))
    assert main(["export", str(folder / "model.pth"), str(folder / "model.onnx")]) == 0
    return folder


@pytest.mark.parametrize("source", ["model.pth", "model.onnx"])
def test_low_rank(source, narrow, photos, tmp_path, capsys):
    """Layers that say few things must say the same in fewer numbers; and not be cut again."""
    path = tmp_path / "low.onnx"
    line = ["export", str(narrow / source), str(path), "--low-rank", str(photos)]
    assert main(line) == 0
    assert capsys.readouterr().out.count(": 100.0 % of the variance is kept") == len(SHARES)
    assert path.stat().st_size < (narrow / "model.onnx").stat().st_size - 100_000
    shapes = {tensor.name: list(tensor.dims) for tensor in onnx.load(path).graph.initializer}
    for name, share in SHARES.items():
        first, second = (shapes[f"{name}.{i}.weight"] for i in range(2))
        assert first[0] == second[1] == int(share * second[0])
        assert f"{name}.weight" not in shapes
    image = to_tensor(noise(320, 240))
    whole, found = (OnnxDetector(file)([image])[0] for file in (narrow / "model.onnx", path))
    assert len(found["scores"]) > 20
    assert_same(found, whole, 320)
    assert main(["export", str(path), str(tmp_path / "b.onnx"), "--low-rank", str(photos)]) == 2
    assert "low.onnx: has no model.backbone.fpn.layer_blocks.0.0 in one" in capsys.readouterr().err
    assert not (tmp_path / "b.onnx").exists()


def test_low_rank_in_half_and_in_int8(narrow, photos, tmp_path):
    """One option must not undo what another gains."""
    half, low, both = (tmp_path / name for name in ("half.pth", "low.onnx", "both.onnx"))
    assert main(["convert", str(narrow / "model.pth"), str(half), "--half"]) == 0
    assert main(["export", str(half), str(low), "--low-rank", str(photos)]) == 0
    assert low.stat().st_size < 0.55 * (narrow / "model.onnx").stat().st_size
    steps = ["--low-rank", str(photos), "--int8", str(photos)]
    assert main(["export", str(narrow / "model.onnx"), str(both), *steps]) == 0
    quantized = {t.name for t in onnx.load(both).graph.initializer if t.data_type == 3}
    assert {f"{name}.{i}.weight_quantized" for name in SHARES for i in range(2)} <= quantized
    (photo,) = sorted(photos.iterdir())[:1]
    expected = next(oln_d2.load(narrow / "model.onnx")(photo, top_k=5))
    for path, close in ((low, 2e-3), (both, 0.02)):
        found = next(oln_d2.load(path)(photo, top_k=5))
        assert found.scores == pytest.approx(expected.scores, abs=close)


def test_too_few_proposals(narrow, tmp_path, capsys):
    """From a few proposals, one of each level, nobody can tell what a layer says."""
    folder = tmp_path / "dots"
    folder.mkdir()
    noise(1, 1).save(folder / "dot.png")
    model = str(tmp_path / "few.pth")
    few = load_detector(narrow / "model.pth")
    few.config["rpn_pre_nms_top_n_test"] = 1
    save_checkpoint(few, model)
    out = tmp_path / "low.onnx"
    assert main(["export", model, str(out), "--low-rank", str(folder)]) == 2
    assert "give more photographs" in capsys.readouterr().err
    assert not out.exists()


def test_older_pytorch(exported, tmp_path, monkeypatch):
    """Its exporter would end in a traceback, or leave out what depends on the image."""
    monkeypatch.setattr(torch, "__version__", "2.13.1")
    with pytest.raises(InputError, match="needs PyTorch 2.14 or later, and this is 2.13.1"):
        export(exported / "model.pth", tmp_path / "model.onnx")


@pytest.mark.parametrize("package", ["onnx", "onnxscript"])
def test_without_onnx(package, exported, tmp_path):
    """Who lacks the extra must be given its name."""
    code = (
        f"import sys; sys.modules['{package}'] = None\n"
        "from oln_d2.cli import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    command = [sys.executable, "-W", "ignore", "-c", code, "export", exported / "model.pth"]
    done = subprocess.run(
        [*map(str, command), str(tmp_path / "model.onnx")], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2 and "[export]" in done.stderr and "Traceback" not in done.stderr


def test_half_the_size(tmp_path):
    """Weights that float16 holds stay so in the file, also where a norm scales them."""
    model = standalone_model(norm="FrozenBN", min_size=160, max_size=260, box_nms_thresh=0.5)
    for name, value in model.state_dict().items():
        if name.endswith("running_var"):
            value.uniform_(0.3, 3)  # so that the exporter changes the convolutions
    whole, half = tmp_path / "whole.pth", tmp_path / "half.safetensors"
    save_checkpoint(model, str(whole))
    assert main(["convert", str(whole), str(half), "--half"]) == 0
    sizes = {}
    for path in (whole, half):
        export(path, tmp_path / f"{path.stem}.onnx")
        sizes[path.stem] = path.stat().st_size, (tmp_path / f"{path.stem}.onnx").stat().st_size
    for of_whole, of_half in zip(sizes["whole"], sizes["half"]):
        assert of_half < 0.55 * of_whole
    model = load_detector(half)
    assert all(value.dtype == torch.float32 for value in model.parameters())
    image = to_tensor(noise(320, 240))
    with torch.no_grad():
        (expected,) = model([image])
    (found,) = OnnxDetector(tmp_path / "half.onnx")([image])
    assert len(found["scores"]) > 20
    assert_same(found, expected, 320)


def test_numbers_beyond_half(tmp_path, capsys):
    model = standalone_model(norm="FrozenBN")
    model.backbone.body.bn1.running_mean[0] = 1e5
    save_checkpoint(model, str(tmp_path / "model.pth"))
    out = tmp_path / "half.safetensors"
    assert main(["convert", str(tmp_path / "model.pth"), str(out), "--half"]) == 2
    assert "bn1.running_mean holds numbers beyond float16; leave out --half" in (
        capsys.readouterr().err
    )
    assert not out.exists()
