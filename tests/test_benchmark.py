"""`benchmark train`, `infer` and `propose`: what they compare must be what they say."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from conftest import NEEDS_DETECTRON2
from test_propose import noise

from oln_d2 import weights
from oln_d2.cli import main
from oln_d2.model_zoo import get_config_file
from oln_d2.precision import computes_bfloat16

MODEL = {
    "depth": 10, "norm": "GN", "fpn_channels": 32, "representation_size": 32,
    "min_size": 96, "max_size": 128, "rpn_pre_nms_top_n_test": 50,
}  # fmt: skip


@pytest.fixture
def photos(tmp_path):
    (tmp_path / "photos").mkdir()
    for i, size in enumerate([(120, 90), (90, 120)]):
        noise(*size, seed=i).save(tmp_path / f"photos/{i}.png")
    return tmp_path / "photos"


@pytest.fixture(params=["standalone", pytest.param("detectron2", marks=NEEDS_DETECTRON2)])
def models(request, tmp_path):
    if request.param == "standalone":
        (tmp_path / "recipe.yaml").write_text(f"model: {json.dumps(MODEL)}\nepochs: 3")
        return ["--config", str(tmp_path / "recipe.yaml")]
    recipes = []
    for name in "oln_box", "faster_rcnn_1_anchor":
        recipes.append(str(tmp_path / f"{name}.yaml"))
        base = get_config_file(f"cpu/{name}_R_10_FPN_GN.yaml")
        small = "{RPN: {PRE_NMS_TOPK_TEST: 50}}\nINPUT: {MIN_SIZE_TEST: 96, MAX_SIZE_TEST: 128}"
        (tmp_path / f"{name}.yaml").write_text(f"_BASE_: {base}\nMODEL: {small}")
    return ["--detectron2", *recipes]


def rows(printed):
    """The cells of a printed table."""
    lines = printed.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("-----"))
    return [re.split(r"\s{2,}", line.strip()) for line in lines[start + 1 :] if "  " in line]


def test_inference(models, photos, capsys):
    """Ratios must be of the numbers of proposals that the rows name, and the stages be all."""
    more = "--proposals", "20", "--repeats", "2", "--photos", str(photos)
    assert main(["benchmark", "infer", *models, *more]) == 0
    printed = capsys.readouterr().out
    assert "2 images of 128 x 128 pixels at most" in printed
    ours, fewer, theirs = rows(printed)
    assert [row[0] for row in (ours, fewer, theirs)] == [
        "OLN-Box, all proposals", "OLN-Box, 20 proposals", "Faster R-CNN, 1000"
    ]  # fmt: skip
    assert int(ours[3]) > int(fewer[3]) == 20
    for row, shares in (ours, ours[4:8]), (fewer, fewer[4:8]), (theirs, theirs[3:7]):
        assert float(row[1]) > 0
        assert sum(map(float, shares)) == pytest.approx(100, abs=3)
        assert all(float(share) > 0 for share in shares)
    assert re.fullmatch(r"\d+\.\d\d \(\d+\.\d\d to \d+\.\d\d\)", fewer[2])


@pytest.mark.heavy
def test_compiled(photos, tmp_path, capsys):
    """What is compiled must stand beside what is not, and do the same work."""
    (tmp_path / "recipe.yaml").write_text(f"model: {json.dumps(MODEL)}")
    more = ["--proposals", "20", "--repeats", "1", "--photos", str(photos), "--compile"]
    line = ["benchmark", "infer", "--config", str(tmp_path / "recipe.yaml")]
    assert main([*line, *more]) == 0
    ours, compiled, *_ = rows(capsys.readouterr().out)
    assert compiled[0] == "OLN-Box, all proposals, torch.compile" and compiled[3] == ours[3]


def test_training(models, photos, capsys):
    """Both detectors must be there in every format, and the parts of a step be all of it."""
    more = ["--batch-size", "2", "--repeats", "1", "--photos", str(photos)]
    every = ["--every-format"] if models[0] == "--config" else []
    assert main(["benchmark", "train", *models, *more, *every]) == 0
    found = rows(capsys.readouterr().out)
    assert [row[0] for row in found] == ["OLN-Box", "Faster R-CNN"] * (len(found) // 2)
    assert len(found) == (8 if every and computes_bfloat16("cpu") else 4 if every else 2)
    for row in found:
        shares = list(map(float, row[-5:-1]))
        assert sum(shares) == pytest.approx(100, abs=3) and min(shares) > 0


def test_propose(photos, capsys):
    """All images must be counted, and the time in the model be a part of the whole."""
    assert main(["benchmark", "propose", str(photos)]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("2 images, ")
    (_, whole), (_, model, share), (_, reading) = rows(printed)
    assert 0 < float(model) <= float(whole) and float(reading) > 0 and share.endswith(" %")


def write_tensorflow_form(path):
    """A detector in the form of TensorFlow's that finds the left half of every image."""
    onnx = pytest.importorskip("onnx")
    helper, tensors = onnx.helper, onnx.TensorProto
    constants = {
        "boxes": np.array([[[0, 0, 1, 0.5]]]), "classes": np.ones((1, 1)),
        "scores": np.full((1, 1), 0.5), "number": np.ones(1),
    }  # fmt: skip
    nodes, outputs = [], []
    for name, value in constants.items():
        value = onnx.numpy_helper.from_array(value.astype(np.float32))
        nodes.append(helper.make_node("Constant", [], [name], value=value))
        outputs.append(helper.make_tensor_value_info(name, tensors.FLOAT, value.dims))
    image = helper.make_tensor_value_info("image", tensors.UINT8, [1, 64, 64, 3])
    graph = helper.make_graph(nodes, "halves", [image], outputs)
    opsets = [helper.make_opsetid("", 18)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), path)


def test_onnx(photos, tmp_path, capsys):
    """Times and recall must stand beside the right detector."""
    content = {
        "images": [
            {"id": i, "file_name": f"{i}.png", "width": w, "height": h}
            for i, (w, h) in enumerate([(120, 90), (90, 120)])
        ],
        "annotations": [
            {"id": 2 * i + c, "image_id": i, "category_id": c, "iscrowd": 0, "area": 5400}
            | {"bbox": [(c - 1) * w / 2, 0, w / 2, h]}
            for i, (w, h) in enumerate([(120, 90), (90, 120)])
            for c in (1, 2)
        ],
        "categories": [{"id": 1, "name": "half"}, {"id": 2, "name": "other half"}],
    }
    (tmp_path / "gt.json").write_text(json.dumps(content))
    write_tensorflow_form(tmp_path / "halves.onnx")
    line = ["benchmark", "onnx", str(photos), "--other"]
    more = ["--gt", str(tmp_path / "gt.json"), "--split", "half", "--threads", "1"]
    more += ["--proposals", "20", "--sizes", "64", "--repeats", "1"]
    plot, again = tmp_path / "recall.svg", tmp_path / "again.onnx"
    again.write_bytes(Path(weights.find(".onnx")).read_bytes())
    files = [str(tmp_path / "halves.onnx"), str(again)]
    assert main([*line, *files, *more, "--plot", str(plot)]) == 0
    ours, fewer, small, other, same, *torchvision = rows(capsys.readouterr().out)
    assert [ours[0], fewer[0], small[0], other[0], same[0]] == [
        "OLN-Box", "OLN-Box, 20 proposals", "OLN-Box, 64 pixels", "halves.onnx", "again.onnx"
    ]  # fmt: skip
    assert same[3:] == ours[3:]
    assert other[3:] == ["0.0 / 50.0", "0.0 / 50.0"] and len(ours) == len(fewer) == 5
    assert float(small[1]) < float(ours[1])
    texts = "OLN-Box, 64 pixels", *(f"AR@{k} of unseen, percent" for k in (10, 100))
    assert all(plot.read_text().count(f"<!-- {text} -->") == 1 for text in texts)
    assert len(torchvision) == 2 and all(float(row[1]) > float(other[1]) for row in torchvision)
    assert main(["benchmark", "onnx", str(photos), *more, "--number", "1"]) == 0
    assert capsys.readouterr().out.startswith("1 image")
    import onnx

    model = onnx.load(again)
    del model.metadata_props[:]
    onnx.save(model, again)
    assert main([*line, str(again), *more]) == 2
    assert "only files of TensorFlow's form can be compared" in capsys.readouterr().err
