"""`alternate`: real trainings of the four steps, on a small data set."""

import re
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import NEEDS_DETECTRON2, ROOT, make_coco

from oln_d2.checks import InputError
from oln_d2.cli import main

pytestmark = NEEDS_DETECTRON2
TINY = (
    "INPUT.MIN_SIZE_TRAIN (96,) INPUT.MIN_SIZE_TEST 96 SOLVER.IMS_PER_BATCH 2 SOLVER.STEPS () "
    "MODEL.RPN.PRE_NMS_TOPK_TRAIN 30 MODEL.RPN.POST_NMS_TOPK_TRAIN 40 MODEL.FPN.OUT_CHANNELS 32 "
    "SOLVER.MAX_ITER 3 SOLVER.CHECKPOINT_PERIOD 1 SOLVER.WARMUP_ITERS 0 SEED 1 "
    "DATALOADER.NUM_WORKERS 0 MODEL.DEVICE cpu"
).split()
BACKBONE = "MODEL.BACKBONE.NAME build_resnet10_fpn_backbone MODEL.RESNETS.RES2_OUT_CHANNELS 32"


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A backbone's, as ImageNet's would be."""
    from detectron2.modeling import build_model

    from oln_d2.model_zoo import load_config

    model = build_model(load_config("cpu/oln_box_R_10_FPN_GN.yaml", [*TINY, *BACKBONE.split()]))
    path = tmp_path_factory.mktemp("weights") / "backbone.pth"
    parameters = model.backbone.bottom_up.state_dict()
    torch.save({f"backbone.bottom_up.{n}": p for n, p in parameters.items()}, path)
    return path


@pytest.fixture
def command(tmp_path, weights):
    """`alternate` with a recipe, and more KEY VALUE pairs."""
    from detectron2.data import DatasetCatalog, MetadataCatalog

    root = make_coco(tmp_path / "data") / "coco"
    own = [
        [
            f"own_{part}",
            str(root / f"annotations/instances_{part}2017.json"),
            str(root / f"{part}2017"),
            ["person", "dog"],
        ]
        for part in ("train", "val")
    ]

    def make(recipe, *more):
        options = ["DATASETS.OWN", own, "DATASETS.TRAIN", "('own_train',)"]
        options += ["DATASETS.TEST", "('own_val',)", "MODEL.WEIGHTS", weights]
        line = ["alternate", recipe, "--output", tmp_path / "out", "--opts", *options]
        return [str(word) for word in [*line, *TINY, *BACKBONE.split(), *more]]

    yield make
    for name, *_ in own:
        if name in DatasetCatalog.list():
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)


def parameters(folder):
    return torch.load(folder / "model_final.pth", weights_only=True)["model"]


def part(of, name):
    return {key: value for key, value in of.items() if key.startswith(name)}


def same(a, b):
    return a.keys() == b.keys() and all(a[name].equal(b[name]) for name in a)


RECIPES = {
    "oln_box": ["cpu/oln_box_R_18_FPN_GN.yaml"],
    "faster_rcnn": ["cpu/faster_rcnn_1_anchor_R_18_FPN_GN.yaml"],
    "oln_proposals": [
        "cpu/oln_faster_rcnn_R_18_FPN_GN.yaml",
        *("DATASETS.CLASSES", "True", "MODEL.ROI_HEADS.NUM_CLASSES", "2"),
        *("MODEL.OLN.NUM_PROPOSALS", "[30, 20]"),
    ],
}


@pytest.mark.heavy
@pytest.mark.parametrize("name", RECIPES)
def test_four_steps_make_one_model(command, tmp_path, weights, capsys, name):
    """
    The steps must start where the paper says, the shared layers stay as step 2 left them, and both
    stages be one model of the recipe, which can be evaluated.
    """
    line = command(*RECIPES[name])
    assert main(line) == 0, capsys.readouterr()
    out = tmp_path / "out"
    first, second, third, fourth = (parameters(folder) for folder in sorted(out.glob("[1-4]_*")))
    final = parameters(out)
    shared = part(second, "backbone.")
    assert same(part(third, "backbone."), shared) and same(part(fourth, "backbone."), shared)
    assert not same(part(first, "backbone."), shared)  # each learned its own before
    start = torch.load(weights, weights_only=True)
    assert not same(part(second, "backbone.bottom_up."), start)
    loaded = [
        re.findall(r"\[Checkpointer\] Loading from (\S+)", (folder / "train.log").read_text())
        for folder in sorted(out.glob("[1-4]_*"))
    ]
    step_2 = str(out / "2_second_stage/model_final.pth")
    assert loaded == [[str(weights)], [str(weights)], [step_2], [step_2]]
    assert not same(part(first, "proposal_generator."), part(third, "proposal_generator."))
    assert not same(part(second, "roi_heads."), part(fourth, "roi_heads."))
    assert not part(third, "roi_heads.") and not part(fourth, "proposal_generator.")
    assert same(part(final, "backbone."), shared)
    assert same(part(final, "proposal_generator."), part(third, "proposal_generator."))
    assert same(part(final, "roi_heads."), part(fourth, "roi_heads."))

    evaluate = [sys.executable, "-m", "oln_d2.train_net", "--config-file", out / "config.yaml"]
    done = subprocess.run([*evaluate, "--eval-only"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "AR@100" in done.stdout or "AP50" in done.stdout


@pytest.mark.heavy
def test_interrupted_steps_go_on(command, tmp_path, capsys):
    """What is done must not be done again, nor a model be made of steps that do not fit."""
    line = command("cpu/oln_box_R_18_FPN_GN.yaml")
    assert main(line) == 0
    out = tmp_path / "out"
    before = parameters(out)
    capsys.readouterr()

    # As if it was killed in step 3, after its second iteration.
    third = out / "3_first_stage"
    (third / "finished").unlink()
    (third / "model_final.pth").unlink()
    (third / "last_checkpoint").write_text("model_0000001.pth")
    shutil.rmtree(out / "4_second_stage")
    # As an older version wrote it, which did not know all keys.
    settings = out / "1_first_stage/config.yaml"
    assert "  FROZEN: []\n" in settings.read_text()
    settings.write_text(settings.read_text().replace("  FROZEN: []\n", ""))
    assert main(line) == 0
    said = capsys.readouterr().out
    assert said.count("trained before") == 2 and said.count("training, see") == 2
    assert "Starting training from iteration 2" in (third / "train.log").read_text()
    assert same(parameters(out), before)

    shutil.rmtree(out / "2_second_stage")
    assert main([*line, "SEED", "2"]) == 2
    assert "holds a run with another value of SEED" in capsys.readouterr().err
    assert not (out / "2_second_stage").exists()


def test_steps_of_different_runs(command, tmp_path, capsys):
    """Stages on different backbones would make a model that finds nothing, without a word."""
    from oln_d2 import alternating

    line = command("cpu/oln_box_R_18_FPN_GN.yaml")
    for step in alternating.STEPS:
        folder = tmp_path / "out" / step
        folder.mkdir(parents=True)
        (folder / "finished").touch()
        own = {"backbone.x": torch.full((2,), float(step[0] == "3"))}
        torch.save({"model": own}, folder / "model_final.pth")
    assert main(line) == 2
    assert "3_first_stage/model_final.pth: backbone.x is not that of" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("recipe", "more", "message"),
    [
        ("cpu/retinanet_R_18_FPN_GN.yaml", [], "has no two stages to train in turn"),
        ("cpu/fast_rcnn_R_18_FPN_GN.yaml", [], "has no two stages to train in turn"),
        ("cpu/oln_box_R_18_FPN_GN.yaml", ["OUTPUT_DIR", "x"], "--opts OUTPUT_DIR: each step"),
        ("cpu/oln_box_R_18_FPN_GN.yaml", ["DATASETS.TRAIN", "('gone',)"], "registered as 'gone'"),
        ("cpu/oln_box_R_18_FPN_GN.yaml", ["SOLVER.MAX_ITERS", "3"], "MAX_ITERS"),
    ],
)
def test_what_cannot_be_trained_in_turn(command, tmp_path, capsys, recipe, more, message):
    """Must be said before the first step, not after days of it."""
    assert main(command(recipe, *more)) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_failed_step_says_why(command, tmp_path, capsys):
    assert main(command("cpu/oln_box_R_18_FPN_GN.yaml", "MODEL.WEIGHTS", "gone.pth")) == 2
    error = capsys.readouterr().err
    assert "1_first_stage: the step failed: exit code 1" in error and "gone.pth: no such" in error


def test_frozen_parts_do_not_learn():
    """Weights and statistics of a frozen part must stay, in training mode, too; others must not."""
    from oln_d2.engine.trainer import Trainer
    from oln_d2.model_zoo import load_config

    options = [*TINY, *BACKBONE.split(), "MODEL.RESNETS.NORM", "BN", "MODEL.BACKBONE.FREEZE_AT", 0]
    for frozen in (["backbone.bottom_up"], []):
        cfg = load_config("cpu/oln_rpn_R_18_FPN_GN.yaml", [*options, "MODEL.FROZEN", frozen])
        torch.manual_seed(0)
        model = Trainer.build_model(cfg).train()
        before = {name: value.clone() for name, value in model.backbone.state_dict().items()}
        optimizer = Trainer.build_optimizer(cfg, model)
        features = model.backbone(torch.rand(2, 3, 64, 64))
        sum(x.square().sum() for x in features.values()).backward()
        optimizer.step()
        after = model.backbone.state_dict()
        changed = {name for name in after if not after[name].equal(before[name])}
        assert any("running_mean" in name for name in changed) == (not frozen)
        assert any(name.startswith("bottom_up.") for name in changed) == (not frozen)
        assert any(name.startswith("fpn_") for name in changed)
    with pytest.raises(InputError, match="has no part neck; its largest are backbone, proposal_"):
        cfg.MODEL.FROZEN = ["neck"]
        Trainer.build_model(cfg)
