"""Checkpoints as safetensors, and what `convert` makes of our own."""

import json

import pytest
import torch
from conftest import NEEDS_DETECTRON2
from safetensors import safe_open
from safetensors.torch import save_file
from test_propose import noise

import oln_d2
from oln_d2.checks import InputError
from oln_d2.cli import main
from oln_d2.standalone import build_detector, load_detector, save_checkpoint
from oln_d2.standalone.checkpoint import read_checkpoint

SMALL = {
    **{"depth": 10, "norm": "GN", "fpn_channels": 32, "representation_size": 32},
    **{"min_size": 96, "max_size": 160, "ltrb_init": 0.5, "rpn_pre_nms_top_n_test": 50},
}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return build_detector(**SMALL).eval()


@pytest.fixture(scope="module")
def file(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("safetensors") / "model.safetensors"
    save_checkpoint(model.to(memory_format=torch.channels_last), path)
    return path


def test_safetensors_are_the_same_model(model, file, tmp_path):
    """Weights and settings must survive, also those of a model in another memory format."""
    loaded = load_detector(file)
    assert loaded.config == model.config
    expected = model.state_dict()
    assert all(torch.equal(expected[name], t) for name, t in loaded.state_dict().items())
    save_checkpoint(model, tmp_path / "model.pth")
    assert {*read_checkpoint(file)["model"]} == {*read_checkpoint(tmp_path / "model.pth")["model"]}
    with safe_open(file, "np") as opened:  # as another program reads it
        assert json.loads(opened.metadata()["config"])["min_size"] == 96


def test_safetensors_propose(file, tmp_path):
    """The command must take the file as it takes .pth."""
    noise(120, 90).save(tmp_path / "photo.png")
    line = ["propose", tmp_path / "photo.png", "--weights", file, "--output", tmp_path / "out"]
    assert main([str(word) for word in line]) == 0
    assert json.loads((tmp_path / "out/results.json").read_text())


@NEEDS_DETECTRON2
def test_safetensors_are_weights_of_detectron2(file):
    """`MODEL.WEIGHTS x.safetensors` must load every parameter."""
    from detectron2.modeling import build_model
    from test_configs import load_config

    from oln_d2.engine.trainer import StrictCheckpointer

    cfg = load_config("cpu/oln_box_R_10_FPN_GN.yaml")
    cfg.merge_from_list(["MODEL.FPN.OUT_CHANNELS", 32, "MODEL.ROI_BOX_HEAD.FC_DIM", 32])
    theirs = build_model(cfg)
    StrictCheckpointer(theirs).load(str(file))
    written = read_checkpoint(file)["model"]
    assert all(torch.equal(written[name], t) for name, t in theirs.state_dict().items())


def test_safetensors_that_cannot_be_used(model, file, tmp_path):
    """A file that is cut, of another program or diverged must be named, with the remedy."""
    whole, parameters = file.read_bytes(), read_checkpoint(file)["model"]
    bad = tmp_path / "bad.safetensors"
    for size in (len(whole) - 8, len(whole) // 2, 600, 100):
        bad.write_bytes(whole[:size])
        with pytest.raises(InputError, match="bad.safetensors: is damaged or not complete; fetch"):
            load_detector(bad)
    for metadata in (None, {"format": "pt"}, {"config": "null"}):
        save_file(parameters, bad, metadata)
        with pytest.raises(InputError, match="bad.safetensors: does not say how its model is"):
            load_detector(bad)
        assert load_detector(bad, model.config).config == model.config
    save_file(parameters, bad, {"config": "{"})
    with pytest.raises(InputError, match="bad.safetensors: is damaged"):
        load_detector(bad)
    name = next(iter(parameters))
    save_file({**parameters, name: parameters[name] / 0}, bad, {"config": json.dumps(SMALL)})
    with pytest.raises(InputError, match=f"bad.safetensors: {name} holds NaN or infinite"):
        load_detector(bad)
    before = bad.read_bytes()
    with pytest.raises(InputError, match="bad.safetensors: safetensors cannot hold optimizer"):
        save_checkpoint(model, bad, optimizer={})
    assert bad.read_bytes() == before


def test_convert_our_own(file, tmp_path, capsys):
    """A checkpoint to publish must come out of one with an optimizer in it, in either format."""
    model = load_detector(file)
    save_checkpoint(model, tmp_path / "run.pth", optimizer={"state": torch.zeros(9)}, iteration=3)
    for source, target in (("run.pth", "own.safetensors"), ("own.safetensors", "own.pth")):
        assert main(["convert", str(tmp_path / source), str(tmp_path / target)]) == 0
        assert "oln_box: ResNet-10, FPN 32, fc 32" in capsys.readouterr().out
        content = read_checkpoint(tmp_path / target)
        assert content["config"] == model.config and content.keys() == {"model", "config"}
    (found,) = oln_d2.load(tmp_path / "own.pth")(noise(120, 90))
    (expected,) = oln_d2.load(file)(noise(120, 90))
    assert (found.boxes == expected.boxes).all() and len(found) > 0


@NEEDS_DETECTRON2
def test_convert_detectron2(tmp_path, capsys):
    """What train_net.py wrote must run without Detectron2 once it was converted with its config."""
    from detectron2.modeling import build_model
    from test_configs import load_config

    recipe, source, target = "cpu/oln_box_R_10_FPN_GN.yaml", tmp_path / "d2.pth", tmp_path / "o.pth"
    torch.save({"model": build_model(load_config(recipe)).state_dict(), "iteration": 3}, source)
    assert main(["convert", str(source), str(target)]) == 2
    assert "give its --config-file" in capsys.readouterr().err
    assert main(["convert", str(source), str(target), "--config-file", recipe]) == 0
    (found,) = oln_d2.load(target)(noise(120, 90))
    assert len(found) > 0
