"""docs/compatibility.md: what was written and typed for version 0.1 goes on working."""

import json
import subprocess
import sys

import pytest
import torch
from conftest import NEEDS_DETECTRON2, ROOT, make_coco
from test_propose import noise

import oln_d2
from oln_d2.cli import COMMANDS, main

# The options that commands had in version 0.1.
OPTIONS = {
    "quickstart": "--control --engine --epochs --images --output --seed",
    "train": "--amp --batch-size --checkpoint-every --depth --device --epochs --images --lr "
    "--max-size --min-size --output --resume --scratch --seed --seen --split --train-json "
    "--val-images --val-json --warmup --weights --workers",
    "convert": "",
    "export": "",
    "propose": "--batch-size --config-file --contact-sheet --device --draw --draw-top --every "
    "--format --gt --nms --output --score --top-k --weights",
    "evaluate": "--bootstrap --iou --json --k --max-dets --per-category --plot --protocol --seed "
    "--seen --split",
    "visualize": "--html --images --masks --num-images --output --seen --split --top-k",
    "benchmark evaluator": "--dets --images --reference-images --seed --split",
    "benchmark masks": "--masks --seed --size",
}
# The names that its README imported.
NAMES = """
from oln_d2 import InputError, add_oln_config, model_zoo, register_open_world_coco
from oln_d2 import OLNRPN, OLNRPNHead, OLNMaskHead, OLNROIHeads, OLNOutputLayers, OpenWorldEvaluator
from oln_d2.evaluation import GroundTruth, OpenWorldRecall
from oln_d2.masks import RLEMasks
from oln_d2.standalone import load_detector, oln_box_resnet18_fpn, oln_box_resnet50_fpn
from oln_d2.standalone import oln_mask_resnet50_fpn
from oln_d2.standalone.data import read_image
from oln_d2.standalone.export import OnnxDetector
model_zoo.get, model_zoo.get_config, model_zoo.get_checkpoint_url
"""


def write_old_checkpoint(path):
    """As version 0.1 wrote it: its names, and a config of only what is not a default."""
    old = json.loads((ROOT / "tests/data/compatibility/checkpoint_0_1.json").read_text())
    generator = torch.Generator().manual_seed(0)
    parameters = {
        name: 0.05 * torch.randn(shape, generator=generator)
        for name, shape in old["shapes"].items()
    }
    config = {**old["config"], "anchor_sizes": tuple(old["config"]["anchor_sizes"])}
    torch.save({"model": parameters, "config": config}, path)


def test_checkpoint(tmp_path):
    """A model that somebody trained for days must load, with the settings it was trained with."""
    write_old_checkpoint(tmp_path / "model_final.pth")
    proposer = oln_d2.load(tmp_path / "model_final.pth")
    assert (proposer.min_size, proposer.max_size, proposer.max_detections) == (96, 160, 40)
    (found,) = proposer(noise(120, 90))
    assert 0 < len(found) <= 40 and found.objectness is not None


def test_results_files(tmp_path, capsys):
    """Files that lie on people's disks must be scored and drawn as before."""
    root = make_coco(tmp_path)
    gt = root / "coco/annotations/instances_val2017.json"
    entries = [
        {"image_id": a["image_id"], "category_id": 1, "bbox": a["bbox"], "score": 0.5}
        | {"objectness": 0.25, "box_score": 1.0, "mask_score": 0.5}
        for a in json.loads(gt.read_text())["annotations"]
    ]
    results = tmp_path / "coco_instances_results.json"
    results.write_text(json.dumps(entries))
    assert main(["evaluate", str(gt), str(results), "--split", "voc"]) == 0
    line = ["visualize", gt, results, "--split", "voc", "--images", root / "coco/val2017"]
    assert main([*map(str, line), "--output", str(tmp_path / "out"), "--html"]) == 0
    assert '"c":[0.25' in (tmp_path / "out/index_files/data.js").read_text()


@NEEDS_DETECTRON2
def test_yaml_keys(tmp_path):
    """A recipe that overrides every key must be read."""
    from oln_d2.model_zoo import load_config

    (tmp_path / "recipe.yaml").write_text(
        """
MODEL:
  OLN:
    BOX_CLS_LOSS_WEIGHT: 0.5
    BOX_SCORE_LOSS_WEIGHT: 0.5
    BOX_SCORE_TARGET: centerness
    LTRB_INIT: 0.5
    MASK_SCORE_LOSS_WEIGHT: 0.5
    OBJECTNESS_BATCH_SIZE_PER_IMAGE: 128
    OBJECTNESS_IOU_THRESHOLDS: [0.2, 0.4]
    OBJECTNESS_LOSS_WEIGHT: 0.5
    OBJECTNESS_NEGATIVES: False
    OBJECTNESS_TARGET: iou
    RPN_BOX_CODING: delta
    RPN_CLS_LOSS_WEIGHT: 0.5
    RPN_NMS_TEST: True
    RPN_NMS_TRAIN: True
    SCORES: [objectness, box_score, mask_score]
TEST: {OPEN_WORLD_PROTOCOLS: [filtered]}
"""
    )
    cfg = load_config(tmp_path / "recipe.yaml")
    assert cfg.MODEL.OLN.LTRB_INIT == 0.5 and cfg.TEST.OPEN_WORLD_PROTOCOLS == ["filtered"]


@pytest.mark.parametrize("command", OPTIONS)
def test_command_lines(command, capsys):
    """A script of somebody's must not stop at an option that is gone."""
    assert command.split()[0] in [c.__name__.rpartition(".")[2] for c in COMMANDS]
    with pytest.raises(SystemExit) as exit:
        main([*command.split(), "--help"])
    shown = capsys.readouterr().out.replace(",", " ").split()
    assert exit.value.code == 0 and set(OPTIONS[command].split()) <= set(shown)


@NEEDS_DETECTRON2
def test_python_names():
    """What was pasted from the README must still run."""
    subprocess.run([sys.executable, "-W", "ignore", "-c", NAMES], cwd=ROOT, check=True)


@pytest.mark.parametrize(
    "line, replacement",
    [
        (["-c", "from oln_d2.evaluation import OpenWorldEvaluator"], "from oln_d2 import OpenW"),
        (["-m", "oln_d2.model_zoo"], "tools/make_model_zoo.py"),
    ],
)
def test_what_took_the_place(line, replacement):
    """What is gone must say where it went, in its last line."""
    done = subprocess.run([sys.executable, *line], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and replacement in done.stderr.strip().splitlines()[-1]
