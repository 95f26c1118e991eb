"""Recipes and weights by name."""

import subprocess
import sys

import pytest
from conftest import CONFIGS, NEEDS_DETECTRON2, ROOT

from oln_d2 import model_zoo, weights
from oln_d2.checks import InputError

RECIPES = [row["recipe"] for row in model_zoo.rows()]


def test_every_recipe_has_one_row():
    """A recipe that is not listed would not be found, one without a file could not be run."""
    files = {
        path.relative_to(CONFIGS).as_posix()
        for path in CONFIGS.rglob("*.yaml")
        if not path.name.startswith("Base-") and "standalone" not in path.parts
    }
    assert sorted(RECIPES) == sorted(files)
    known = {"recipe", "group", "what", "weights", "measured", "published"}
    for row in model_zoo.rows():
        assert {"recipe", "group", "what"} <= row.keys() <= known
        assert not row.get("published") or row["published"]["whose"]
        assert not row.get("measured") or row.get("weights")  # of which weights, otherwise?


def test_page_is_up_to_date():
    """`MODEL_ZOO.md` must show what `zoo.json` says: tools/make_model_zoo.py writes it."""
    command = [sys.executable, "tools/make_model_zoo.py"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout == (ROOT / "MODEL_ZOO.md").read_text(encoding="utf-8")


def test_page_shows_weights_and_metrics(monkeypatch):
    """Trained weights must come with their address, digest and what was measured of them."""
    row = {"recipe": "a.yaml", "group": "OLN", "what": "A", "measured": {"AR@100": 33.3}}
    row["weights"] = weights.SHIPPED
    digest = weights.card()["sha256"]["safetensors"]
    monkeypatch.syspath_prepend(ROOT / "tools")
    import make_model_zoo

    monkeypatch.setattr(make_model_zoo, "rows", lambda: [row])
    last = make_model_zoo.model_zoo_md().splitlines()[-1]
    file = f"oln_d2/weights/{weights.SHIPPED}.safetensors"
    assert last.endswith(f"| A | [file]({file}), sha256 `{digest}` | AR@100 33.3 |")


def test_config_file():
    """The path must be the recipe's; a misspelt name must be answered with near ones."""
    assert model_zoo.get_config_file("cpu/oln_box_R_18_FPN_GN.yaml") == str(
        CONFIGS / "cpu" / "oln_box_R_18_FPN_GN.yaml"
    )
    for call in (model_zoo.get_config_file, model_zoo.get_checkpoint_url):
        with pytest.raises(
            InputError, match="oln_bx.yaml: no such recipe; near it: .*oln_box_R_50"
        ):
            call("oln_bx.yaml")


def test_no_weights():
    """Who asks for weights that are not published must get the commands that make them."""
    commands = "train_net.py --config-file configs/oln_box_R_50_FPN.yaml; or .* -m oln_d2 convert"
    with pytest.raises(InputError, match=commands):
        model_zoo.get_checkpoint_url("oln_box_R_50_FPN.yaml")
    with pytest.raises(InputError) as error:
        model_zoo.get_checkpoint_url("oln_box_public_R_50_FPN.yaml")
    assert "convert" in str(error.value) and "train_net" not in str(error.value)


def test_without_detectron2(monkeypatch):
    """The error must say what is missing and how to install it."""
    monkeypatch.setitem(sys.modules, "detectron2.config", None)
    with pytest.raises(ImportError, match="needs detectron2.*install"):
        model_zoo.get_config("oln_box_R_50_FPN.yaml")


@NEEDS_DETECTRON2
def test_config():
    """The recipe must come with OLN's keys and its ImageNet weights to start from."""
    cfg = model_zoo.get_config("oln_rpn_R_50_FPN.yaml")
    assert cfg.MODEL.OLN.RPN_NMS_TEST and "ImageNet" in cfg.MODEL.WEIGHTS
    cfg = model_zoo.get_config("oln_box_public_R_50_FPN.yaml")
    assert cfg.MODEL.WEIGHTS == "oln_box_d2.pth"


@NEEDS_DETECTRON2
def test_models(monkeypatch, tmp_path):
    """`get` must give the recipe's model, with the trained weights where there are some."""
    import torch

    from oln_d2.standalone.checkpoint import read_checkpoint

    with pytest.raises(InputError, match="has no trained weights yet; train it with python"):
        model_zoo.get("cpu/oln_box_R_10_FPN_GN.yaml", trained=True)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    recipe = "small/oln_box_lite0_general.yaml"
    random = model_zoo.get(recipe)
    assert random.training and random.device.type == (
        "cuda" if torch.cuda.is_available() else "cpu"
    )
    expected = read_checkpoint(weights.find(".safetensors"))["model"]
    for trained, model in ((False, random), (True, model_zoo.get(recipe, True, device="cpu"))):
        found = model.state_dict()
        same = [torch.equal(found[name].cpu(), value) for name, value in expected.items()]
        assert all(same) == trained
    (made,) = (tmp_path / "oln_d2").iterdir()
    assert model_zoo.get_config(recipe, trained=True).MODEL.WEIGHTS == str(made)
    monkeypatch.setenv("XDG_CACHE_HOME", str(made))  # a file, where no folder can be made
    with pytest.raises(InputError, match="oln_d2"):
        model_zoo.get_checkpoint_url(recipe)
