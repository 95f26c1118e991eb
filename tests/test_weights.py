"""The trained models that come with the package and with the repository."""

import json
import shutil

import numpy as np
import onnx
import pytest
import torch
from conftest import NEEDS_DETECTRON2, ROOT
from PIL import Image
from pycocotools import mask as mask_utils
from torchvision.ops import box_iou

import oln_d2
from oln_d2 import model_zoo, weights
from oln_d2.boxes import nms, to_xywh
from oln_d2.checks import InputError
from oln_d2.cli import main
from oln_d2.propose.low_rank import SHARES
from oln_d2.standalone import load_detector

PHOTOS = ROOT / "examples/photos"
# XYXY of what anybody sees first in each.
OBJECTS = {
    "astronaut.jpg": [(15, 15, 372, 512), (282, 345, 512, 512)],  # woman, helmet
    "coffee.jpg": [(76, 60, 480, 388), (173, 17, 410, 312)],  # saucer, cup
    "motorcycle.jpg": [(130, 265, 420, 625)],
}


def test_default():
    """Without weights it proposes with the shipped model: the obvious is among the likely boxes."""
    proposer = oln_d2.load()
    for name, objects in OBJECTS.items():
        found = next(proposer(PHOTOS / name))
        assert found.likely_score == weights.card()["likely_score"] > 0
        likely = found.likely()
        assert (likely.scores >= found.likely_score).all()
        assert len(likely) <= 20 < len(found)
        iou = mask_utils.iou(
            to_xywh(likely.boxes), to_xywh(np.array(objects, float)), [0] * len(objects)
        )
        assert (iou.max(axis=0) > 0.5).all(), name


def test_default_number_of_proposals():
    """By default a part of the proposals goes through the second stage; who asks gets all."""
    default, numbers = weights.card()["max_proposals"], {}
    for number in (None, default, 2000):
        proposer = oln_d2.load(max_proposals=number)
        numbers[number] = len(next(proposer(PHOTOS / "coffee.jpg", top_k=2000)))
    assert numbers[None] == numbers[default] < numbers[2000]


def test_default_size_of_images():
    """It sees images at the size that its card says was best, or as large as the caller wants."""
    size, photo = weights.card()["min_size"], Image.open(PHOTOS / "coffee.jpg")  # 600 x 400
    for ending in ".onnx", ".safetensors":
        path = weights.find(ending)
        assert oln_d2.load(path, device="cpu").input_shape(photo) == (size, 1.5 * size)
        assert oln_d2.load(path, device="cpu", min_size=320).input_shape(photo) == (320, 480)


def test_copies_come_later(tmp_path):
    """Near copies of a better box get a part of its score, wherever the weights lie."""
    path = shutil.copy(weights.find(".onnx"), tmp_path / "mine.onnx")
    factor = weights.card()["copy_factor"]
    assert 0.5 < factor < 1
    found = next(oln_d2.load(path)(PHOTOS / "coffee.jpg", top_k=1000))
    both = np.sqrt(found.objectness * found.box_scores)
    order = np.argsort(-both, kind="stable")
    first = order[nms(found.boxes[order], 0.5)]
    assert 5 < len(first) < len(found) - 5
    expected = factor * both
    expected[first] = both[first]
    np.testing.assert_allclose(found.scores, expected, rtol=1e-5)
    assert (np.diff(found.scores) <= 0).all()
    assert found.likely_score == weights.card()["likely_score"]


def test_pictures_show_likely_boxes(tmp_path):
    """A box that is unlikely an object is in the results, and not in the picture."""
    found = next(oln_d2.load()(PHOTOS / "coffee.jpg"))
    drawn = found.draw()
    likely = found[found.scores >= found.likely_score]
    assert 0 < len(likely) < len(found)
    assert drawn.tobytes() == likely.draw().tobytes()
    found.likely_score = 0.0
    assert drawn.tobytes() != found.draw().tobytes()
    found.likely_score = 1.0
    assert len(found.likely()) == 1  # the best one in any case
    assert len(found[:0].likely()) == 0


def test_command(tmp_path, monkeypatch, capsys):
    """The first line that anybody tries: no model, no output named."""
    monkeypatch.chdir(tmp_path)
    assert main(["propose", str(PHOTOS), "--draw", "--html"]) == 0
    folder = tmp_path / "output/propose"
    assert "are in output/propose" in capsys.readouterr().out
    names = {path.name for path in PHOTOS.glob("*.jpg")}
    assert {path.name for path in (folder / "pictures").glob("*.jpg")} == names
    score = f'id="score" min="0" max="1" step="0.01" value="{weights.card()["likely_score"]}"'
    assert score in (folder / "index.html").read_text(encoding="utf-8")
    assert len(json.loads((folder / "results.json").read_text())) == 100 * len(names)
    more = ["propose", str(PHOTOS / "coffee.jpg"), "--top-k", "900", "--output"]
    for options, most in (
        ([], "300 boxes an image (--max-proposals), not 900"),
        (["--tiles", "400"], None),
    ):
        assert main([*more, str(len(options)), *options]) == 0
        told = capsys.readouterr().out
        assert f"at most {most}" in told if most else "at most" not in told


def test_forms_agree():
    """The file for PyTorch holds the model that the other was made of, and finds the same."""
    whole = load_detector(weights.find(".safetensors"))
    stored = {t.name: t for t in onnx.load(weights.find(".onnx")).graph.initializer}
    for name in SHARES:
        weight = whole.get_submodule(name.removeprefix("model.")).weight.detach().flatten(1)
        first, second = (
            torch.tensor(onnx.numpy_helper.to_array(stored[f"{name}.{i}.weight_half"])).float()
            for i in range(2)
        )
        expected = second.flatten(1).T @ weight
        assert (first.flatten(1) - expected).abs().max() < 2e-3 * expected.abs().max()
    proposers = [oln_d2.load(weights.find(e), device="cpu") for e in (".onnx", ".safetensors")]
    for name in OBJECTS:
        ours, theirs = (torch.tensor(next(p(PHOTOS / name, top_k=100)).boxes) for p in proposers)
        for best, others in ((ours[:5], theirs), (theirs[:5], ours)):
            assert box_iou(best, others).amax(dim=1).min() > 0.7


def test_exported(tmp_path):
    """A file made of the shipped weights proposes as they do: as large images, as few boxes."""
    path = tmp_path / "model.onnx"
    assert main(["export", weights.find(".safetensors"), str(path)]) == 0
    proposers = [oln_d2.load(file, device="cpu") for file in (weights.find(".safetensors"), path)]
    for name in ("min_size", "likely_score", "copy_factor"):
        whole, exported = (getattr(proposer, name) for proposer in proposers)
        assert whole == exported == weights.card()[name]
    for name in OBJECTS:
        same(*(next(proposer(PHOTOS / name)) for proposer in proposers))
    photo = PHOTOS / "coffee.jpg"
    few, all_ = (oln_d2.load(path, max_proposals=number) for number in (None, 2000))
    assert few.limits["max_proposals"] == weights.card()["max_proposals"]
    assert len(next(few(photo, top_k=1000))) < len(next(all_(photo, top_k=1000)))


def same(one, other):
    """Every box and score of one is among those of the other."""
    ours, theirs = (
        np.hstack([found.boxes / max(found.size), found.scores[:, None]]) for found in (one, other)
    )
    distance = np.abs(ours[:, None] - theirs[None]).max(axis=2)
    # At the cut and in NMS, nearly equal scores may be decided the other way.
    assert (distance.min(axis=1) < 1e-3).mean() > 0.95


@NEEDS_DETECTRON2
@pytest.mark.parametrize("recipe", [r["recipe"] for r in model_zoo.rows() if r.get("weights")])
def test_detectron2(recipe, tmp_path, monkeypatch):
    """As in Detectron2's tutorial: the zoo's config and weights, and its own predictor."""
    from detectron2.config import get_cfg
    from detectron2.engine import DefaultPredictor

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cfg = get_cfg()
    oln_d2.add_oln_config(cfg)
    cfg.merge_from_file(model_zoo.get_config_file(recipe))
    cfg.MODEL.WEIGHTS = model_zoo.get_checkpoint_url(recipe)
    cfg.MODEL.DEVICE = "cpu"
    image = np.asarray(Image.open(PHOTOS / "astronaut.jpg"))[:, :, ::-1]  # BGR, as it wants it
    found = DefaultPredictor(cfg)(image)["instances"]
    name = next(row["weights"] for row in model_zoo.rows() if row["recipe"] == recipe)
    proposer = oln_d2.load(weights.find(".safetensors", name), device="cpu")
    proposer.copy_factor = 1.0  # of which Detectron2's predictor knows nothing
    expected = next(proposer(PHOTOS / "astronaut.jpg", top_k=1000))
    assert len(found) == pytest.approx(len(expected), abs=5)
    theirs = oln_d2.Proposals(found.pred_boxes.tensor, found.scores, size=expected.size)
    same(expected, theirs)
    assert model_zoo.get_config(recipe, trained=True).MODEL.WEIGHTS == cfg.MODEL.WEIGHTS


@pytest.fixture
def copy(tmp_path, monkeypatch):
    """A copy of the shipped files that a test may spoil."""
    folder = tmp_path / "weights"
    folder.mkdir()
    for path in weights.PACKAGE.glob(f"{weights.SHIPPED}.*"):
        shutil.copy(path, folder)
    monkeypatch.setattr(weights, "PACKAGE", folder)
    weights.card.cache_clear()
    yield folder
    weights.card.cache_clear()


def test_damaged_installation(copy, tmp_path, capsys):
    command = ["propose", str(PHOTOS), "--output", str(tmp_path / "out")]

    def refused(reason):
        assert main(command) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert reason in line and "install it again" in line
        assert not (tmp_path / "out").exists()

    card, onnx = (copy / f"{weights.SHIPPED}{ending}" for ending in (".json", ".onnx"))
    whole = onnx.read_bytes()
    onnx.write_bytes(whole[:-1] + b"\0")
    refused(f"{onnx}: has the SHA-256 ")
    onnx.unlink()
    refused(f"{onnx}: is missing")
    onnx.write_bytes(whole)
    card.write_text(json.dumps({**json.loads(card.read_text()), "format": 2}))
    weights.card.cache_clear()
    refused(f"{card}: is of the format 2, not 1")


def test_not_in_the_package(tmp_path, monkeypatch):
    """Weights that only the repository has: the remedy is not to install again."""
    monkeypatch.setattr(weights, "REPOSITORY", tmp_path)
    with pytest.raises(InputError, match="oln_box_lite0_voc_v1: .*clone the repository"):
        weights.find(".safetensors", "oln_box_lite0_voc_v1")


def test_no_images(tmp_path, capsys):
    assert main(["propose", str(tmp_path)]) == 2
    assert f"{tmp_path}: no image" in capsys.readouterr().err


def test_sizes():
    """What everybody downloads stays small."""
    files = [*weights.PACKAGE.glob("*.onnx"), *weights.PACKAGE.glob("*.safetensors")]
    assert len(files) == 2 and sum(path.stat().st_size for path in files) < 30e6


def test_card():
    """Who downloads weights must be able to tell how they were made, and that they are whole."""
    card = weights.card()
    assert {"sha256", "likely_score", "copy_factor", "trained", "measured", "limits"} <= card.keys()
    trained = {"recipe", "command", "commit", "images", "seed", "number format"}
    assert trained <= card["trained"].keys()
    for ending in card["sha256"]:
        weights.find(f".{ending}")
