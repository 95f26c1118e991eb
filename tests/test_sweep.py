"""The command `sweep`: real runs of recipes as processes, on a small data set."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import NEEDS_DETECTRON2, ROOT, make_coco

from oln_d2.files import lock_folder

# 30 iterations: time to be killed within them.
SMALL = (
    "INPUT.MIN_SIZE_TRAIN (96,) INPUT.MIN_SIZE_TEST 96 SOLVER.IMS_PER_BATCH 2 SOLVER.STEPS (1,) "
    "MODEL.RPN.PRE_NMS_TOPK_TRAIN 50 MODEL.RPN.PRE_NMS_TOPK_TEST 50 MODEL.FPN.OUT_CHANNELS 32 "
    "SOLVER.MAX_ITER 30 TEST.EVAL_PERIOD 0 SOLVER.CHECKPOINT_PERIOD 1 SEED 1"
).split()
BOX, RPN = "configs/cpu/oln_box_R_10_FPN_GN.yaml", "configs/cpu/oln_rpn_R_18_FPN_GN.yaml"


def command(*options):
    return [sys.executable, "-W", "ignore", "-m", "oln_d2", "sweep", *map(str, options)]


def run(data, *options):
    """Exit code and output of the finished command."""
    process = subprocess.run(
        command(*options),
        cwd=ROOT,
        env=environment(data),
        text=True,
        timeout=600,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    return process.returncode, process.stdout


def environment(data):
    return {**os.environ, "DETECTRON2_DATASETS": str(data), "OMP_NUM_THREADS": "1"}


@NEEDS_DETECTRON2
def test_killed_sweep_goes_on(tmp_path):
    """Days of runs must survive an interruption and a recipe that fails, and end in one table."""
    data = make_coco(tmp_path / "data")
    output = tmp_path / "output"
    # Read without error, but its data is not there.
    broken = tmp_path / "broken.yaml"
    broken.write_text(f'_BASE_: {ROOT / BOX}\nDATASETS:\n  TRAIN: ("no_such_data",)\n')
    recipes = [BOX, broken, RPN, "configs/cpu/Base-R18-GN.yaml"]
    arguments = [*recipes, "--output", output, "--opts", *SMALL]
    process = subprocess.Popen(
        command(*arguments),
        cwd=ROOT,
        env=environment(data),
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    folder = output / "oln_box_R_10_FPN_GN"
    try:
        while not (folder / "last_checkpoint").is_file():
            assert process.poll() is None, "ended before it trained"
            time.sleep(0.05)
    finally:
        process.send_signal(signal.SIGHUP)  # as when a terminal is closed
        process.wait(60)
    assert process.returncode == 129
    assert not (folder / "model_final.pth").exists()

    code, log = run(data, *arguments)
    assert code == 1, log
    assert "Base-R18-GN.yaml: is the base of other recipes" in log
    for line in (f"[1/3] {BOX}: finished", f"[3/3] {RPN}: finished", f"failed: {broken}"):
        assert line in log.splitlines()
    assert f"[2/3] {broken}: failed: exit code 1, train_net.py: DATASETS: no data set" in log
    training = (folder / "sweep.log").read_text()
    assert training.count("Starting training from iteration") == 2
    assert training.count("Starting training from iteration 0") == 1

    # The table has the numbers of the last evaluation, in percent.
    rows = json.loads((output / "results.json").read_text())["results"]
    table = (output / "results.md").read_text()
    assert table in log
    assert [(row["recipe"], row["protocol"]) for row in rows] == [
        (name, protocol)
        for name in ("oln_box_R_10_FPN_GN", "oln_rpn_R_18_FPN_GN")
        for protocol in ("xclass", "filtered")
    ]
    report = folder / "inference/coco_2017_voc_val/open_world_results.json"
    report = json.loads(report.read_text())
    assert rows[0]["unseen AR@100"] == report["results"][0]["unseen"]["AR@100"]
    assert rows[1]["seen AR@100"] == report["results"][1]["seen"]["AR@100"]
    assert f"{100 * rows[0]['unseen AR@100']:.2f}" in table.splitlines()[2]

    # Once more: what is finished is left alone. With other settings it is not taken for the same.
    before = training, sorted(folder.iterdir())
    code, log = run(data, BOX, RPN, "--output", output, "--opts", *SMALL)
    assert code == 0 and log.count("finished before") == 2 and table in log
    assert ((folder / "sweep.log").read_text(), sorted(folder.iterdir())) == before
    code, log = run(data, BOX, RPN, "--output", output, "--opts", *SMALL, "SEED", 2)
    assert code == 2 and f"{folder}: holds a run" in log and "another value of SEED;" in log


def test_collecting_and_bad_arguments(tmp_path, capsys):
    """A table of half a sweep must say what is missing, and arguments be refused before any run."""
    from oln_d2.cli import main

    for name, ar in (("a", 0.5), ("b", None), ("c", 0.25)):
        folder = tmp_path / name / "inference" / "my_val"
        folder.mkdir(parents=True)
        group = {"AR@10": ar, "AR@100": ar, "AR@1000": ar, "AUC": ar}
        result = {"iou_type": "mask", "protocol": "xclass", "unseen": group, "seen": group}
        (folder / "open_world_results.json").write_text(json.dumps({"results": [result]}))
        if name != "c":
            (tmp_path / name / "finished").touch()
    recipes = ["x/a.yaml", "x/b.yaml", "x/c.yaml"]
    assert main(["sweep", *recipes, "--output", str(tmp_path), "--collect-only"]) == 0
    printed = capsys.readouterr().out
    assert "not finished: x/c.yaml" in printed and "50.00" in printed and "25.00" not in printed
    table = (tmp_path / "results.md").read_text().splitlines()
    rows = [line.split("|")[1:-1] for line in table[2:]]
    assert [cell.strip() for cell in rows[1]] == ["b", "my_val", "mask", "xclass"] + ["n/a"] * 5
    for recipes, message in [
        (["x/a.yaml", "y/a.yaml"], "y/a.yaml: the second recipe named a"),
        (["x/Base-a.yaml"], "no recipes are given"),
    ]:
        assert main(["sweep", *recipes, "--output", str(tmp_path), "--collect-only"]) == 2
        assert message in capsys.readouterr().err


@NEEDS_DETECTRON2
@pytest.mark.parametrize(
    ("recipe", "opts", "message"),
    [
        (BOX, ["SOLVER.MAX_ITERS", "3"], "MAX_ITERS"),
        (BOX, ["OUTPUT_DIR", "elsewhere"], "OUTPUT_DIR: each recipe has its folder"),
        ("gone.yaml", [], "gone.yaml"),
    ],
)
def test_recipes_are_read_before_any_run(recipe, opts, message, tmp_path, monkeypatch, capsys):
    """A misspelt key of the last recipe must be found before days of training, not after."""
    from oln_d2.cli import main

    monkeypatch.chdir(ROOT)
    assert main(["sweep", RPN, recipe, "--output", str(tmp_path / "out"), "--opts", *opts]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@NEEDS_DETECTRON2
def test_two_sweeps_do_not_share_a_folder(tmp_path, monkeypatch, capsys):
    """Two trainings that write the same checkpoints would spoil both."""
    from oln_d2.cli import main

    monkeypatch.chdir(ROOT)
    folder = tmp_path / "oln_box_R_10_FPN_GN"
    folder.mkdir()
    with lock_folder(folder):
        assert main(["sweep", BOX, "--output", str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert f"{BOX}: failed: {folder}: is in use by " in out and f"process {os.getpid()} on" in out
