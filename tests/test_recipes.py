"""Recipes that `compare` trains: real runs of both runtimes as processes, on a small data set."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import NEEDS_DETECTRON2, ROOT, make_coco

import oln_d2
from oln_d2.cli import main
from oln_d2.files import lock_folder

SMALL = (
    "INPUT.MIN_SIZE_TRAIN (96,) INPUT.MIN_SIZE_TEST 96 SOLVER.IMS_PER_BATCH 2 SOLVER.STEPS (1,) "
    "MODEL.RPN.PRE_NMS_TOPK_TRAIN 50 MODEL.RPN.PRE_NMS_TOPK_TEST 50 MODEL.FPN.OUT_CHANNELS 32 "
    "SOLVER.MAX_ITER 30 TEST.EVAL_PERIOD 0 SOLVER.CHECKPOINT_PERIOD 1"
).split()
BOX, RPN = "cpu/oln_box_R_10_FPN_GN.yaml", "cpu/oln_rpn_R_18_FPN_GN.yaml"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_coco(tmp_path_factory.mktemp("data")) / "coco"


def standalone(path, **options):
    """A small recipe of `oln-d2 train`."""
    model = {"min_size": 96, "max_size": 128, "fpn_channels": 32, "representation_size": 32}
    recipe = {"depth": 10, "scratch": True, "epochs": 2, "batch_size": 2, "warmup": 0, "lr": 0.001}
    path.write_text(json.dumps({**recipe, "workers": 0, "model": model, **options}))
    return path


def command(data, output, *files, more=()):
    annotations = data / "annotations"
    line = ["compare", annotations / "instances_val2017.json", *files, "--seen", "person,dog"]
    line += ["--images", data / "val2017", "--output", output, "--bootstrap", 50]
    line += ["--train-json", annotations / "instances_train2017.json"]
    line += ["--train-images", data / "train2017", *more]
    return [str(word) for word in line]


def test_seeds_are_one_row(data, tmp_path, capsys):
    """
    Runs of one recipe must be one row, of their means, with their spread, beside results files; and
    what is done must not be done again.
    """
    recipe = standalone(tmp_path / "small.yaml")
    output = tmp_path / "out"
    line = command(data, output, recipe, more=["--seeds", 0, 1])
    assert main(line) == 0, capsys.readouterr()
    runs = [output / f"runs/small/seed_{seed}" for seed in (0, 1)]
    weights = [(run / "model_final.pth").read_bytes() for run in runs]
    assert weights[0] != weights[1]
    numbers = json.loads((output / "comparison.json").read_text())
    (row,) = numbers["rows"]
    files = [str(run / "proposals/results.json") for run in runs]
    gt = data / "annotations/instances_val2017.json"
    ar = [oln_d2.evaluate(gt, file, seen=["person", "dog"])["all"]["AR@100"] for file in files]
    assert row["files"] == files and row["ar"]["all"]["100"]["value"] == pytest.approx(sum(ar) / 2)
    assert row["spread"]["all"]["100"] == pytest.approx(sorted(ar))
    assert row["cost"]["parameters"] > 1e5 and row["cost"]["milliseconds"] > 0
    assert "million parameters" in (output / "index.html").read_text()

    before = [(run / "model_final.pth").stat().st_mtime_ns for run in runs]
    line.insert(2, files[1])  # beside what is known already
    assert main(line) == 0
    assert capsys.readouterr().out.count("trained before") == 2
    assert [(run / "model_final.pth").stat().st_mtime_ns for run in runs] == before
    rows = json.loads((output / "comparison.json").read_text())["rows"]
    assert {row["name"]: bool(row["cost"]) for row in rows} == {"small": True, "results": False}


@NEEDS_DETECTRON2
def test_killed_comparison_goes_on(data, tmp_path):
    """Days of runs must survive an interruption and a recipe that fails, and end in one table."""
    output = tmp_path / "out"
    broken = tmp_path / "broken.yaml"  # read without error, but it cannot start
    broken.write_text(f"_BASE_: {ROOT / 'configs' / BOX}\nMODEL:\n  WEIGHTS: gone.pth\n")
    line = command(data, output, BOX, broken, RPN, more=["--opts", *SMALL])
    run = [sys.executable, "-W", "ignore", "-m", "oln_d2", *line]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        run,
        cwd=ROOT,
        env=environment,
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    folder = output / "runs/oln_box_R_10_FPN_GN/seed_0"
    # As when a terminal is closed; under nohup that is ignored.
    is_ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    number = signal.SIGTERM if is_ignored else signal.SIGHUP
    try:
        while not (folder / "last_checkpoint").is_file():
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.05)
    finally:
        process.send_signal(number)
        process.wait(60)
    assert process.returncode == 128 + number, process.stderr.read()
    assert not (folder / "model_final.pth").exists()

    done = subprocess.run(run, cwd=ROOT, env=environment, text=True, capture_output=True)
    assert done.returncode == 1, done
    assert f"[2/3] {broken}, seed 0: failed: exit code 1, train_net.py: gone.pth" in done.stdout
    assert "Left out:" in done.stdout and f"{broken}, seed 0: exit code 1" in done.stdout
    training = (folder / "compare.log").read_text()
    assert training.count("Starting training from iteration") == 2
    assert training.count("Starting training from iteration 0") == 1
    rows = json.loads((output / "comparison.json").read_text())["rows"]
    assert {row["name"] for row in rows} == {"oln_box_R_10_FPN_GN", "oln_rpn_R_18_FPN_GN"}

    # With other settings a run is not taken for the same.
    done = subprocess.run(
        [*run, "SOLVER.BASE_LR", "0.5"], cwd=ROOT, env=environment, text=True, capture_output=True
    )
    assert done.returncode == 2 and "holds a run with another value of" in done.stderr


@pytest.mark.parametrize(
    ("files", "more", "message"),
    [
        (["a/x.yaml", "b/x.yaml"], [], "b/x.yaml: the second recipe named x"),
        (["epoch.yaml"], [], "epoch is no option of train; near it: epochs"),
        (["a/x.yaml"], ["--seeds", "-1"], "seeds is -1; it has to be 0 or more"),
        (["a/x.yaml"], ["--num-gpus", "0"], "num_gpus is 0"),
    ],
)
def test_recipes_are_read_before_any_run(data, tmp_path, monkeypatch, capsys, files, more, message):
    """A misspelt key of the last recipe must be found before days of training, not after."""
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        standalone(tmp_path / name / "x.yaml")
    (tmp_path / "epoch.yaml").write_text("epoch: 3")
    assert main(command(data, tmp_path / "out", *files, more=more)) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@NEEDS_DETECTRON2
@pytest.mark.parametrize(
    ("recipe", "opts", "message"),
    [
        (BOX, ["SOLVER.MAX_ITERS", "3"], "MAX_ITERS"),
        (BOX, ["OUTPUT_DIR", "elsewhere"], "OUTPUT_DIR: each run has its folder"),
        ("gone.yaml", [], "gone.yaml"),
    ],
)
def test_recipes_of_detectron2_too(data, tmp_path, capsys, recipe, opts, message):
    assert main(command(data, tmp_path / "out", RPN, recipe, more=["--opts", *opts])) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_what_recipes_need(data, tmp_path, capsys):
    """Data and images must be asked for by their options; `sweep` says where it has gone."""
    recipe = str(standalone(tmp_path / "x.yaml"))
    gt = str(data / "annotations/instances_val2017.json")
    line = ["compare", gt, recipe, "--seen", "dog", "--output", str(tmp_path / "out")]
    for more, message in (
        ([], "--images is missing; recipes have to propose on the images of GT"),
        (["--images", str(data / "val2017")], "lacks images and train_json; give --train-json"),
        (["--images", ".", "--train-json", "x"], "train_json and train_images go together"),
    ):
        assert main([*line, *more]) == 2
        assert message in capsys.readouterr().err
    assert main([*line[:2], "r.json", *line[3:], "--train-json", "x"]) == 2
    assert "are for recipes; give one" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["sweep", "a.yaml", "--output", "out"])
    assert "sweep is a part of compare now" in capsys.readouterr().err


def test_two_do_not_share_a_folder(data, tmp_path, capsys):
    """Two trainings that write the same checkpoints would spoil both."""
    recipe = standalone(tmp_path / "small.yaml")
    folder = tmp_path / "out/runs/small/seed_0"
    folder.mkdir(parents=True)
    with lock_folder(folder):
        assert main(command(data, tmp_path / "out", recipe)) == 2
    assert f"failed: {folder}: is in use by " in capsys.readouterr().out
