#!/usr/bin/env python3
"""
Kills what runs, again and again, and compares what it leaves behind in the end with what an
undisturbed run leaves, to the last bit:

    python tools/kill_and_resume.py train_net train --kills 20
    python tools/kill_and_resume.py evaluate propose compare audit quickstart --kills 20

`train_net` is the training with Detectron2, `train` that without, both with a checkpoint every
iteration. They are killed (SIGKILL) in turn at any moment from their start on, while they train,
and while a file is being written; commands at any moment and while a file is being written. After
each kill every file has to be there as a whole or not at all, and the next run goes on from it.
About ten seconds a kill on two cores. The same --seed chooses the same moments. Exit code 1 if
anything differs.
"""

import argparse
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from oln_d2.checks import InputError
from oln_d2.quickstart import make_dataset
from oln_d2.standalone.checkpoint import read_checkpoint

ROOT = Path(__file__).parents[1]
TRAININGS = ("train_net", "train")
COMMANDS = ("evaluate", "propose", "compare", "audit", "quickstart")
MOMENTS = ("at any moment", "in training", "while writing")
SEEN = "ellipse,rectangle,triangle,star"
HALF = ".oln-d2_"  # so begin the names of files while they are written
# Grow line by line, and say when something was done or how long it took.
LOGS = re.compile(
    r"(.*/)?(\.lock|log\.txt.*|metrics\.(json|csv)|hparams\.yaml|events\.out\..*|journal\.jsonl)"
)
SMALL_D2 = (
    "SEED 1 SOLVER.IMS_PER_BATCH 2 SOLVER.BASE_LR 0.01 SOLVER.STEPS () SOLVER.WARMUP_ITERS 5 "
    "SOLVER.LR_SCHEDULER_NAME WarmupCosineLR SOLVER.EMA_DECAY 0.9 SOLVER.CHECKPOINT_PERIOD 1 "
    "INPUT.SCALE_JITTER [0.5,1.5] INPUT.MAX_SIZE_TRAIN 128 INPUT.MIN_SIZE_TEST 96 "
    "MODEL.RPN.PRE_NMS_TOPK_TRAIN 50 MODEL.RPN.PRE_NMS_TOPK_TEST 50 MODEL.FPN.OUT_CHANNELS 32 "
    "MODEL.ROI_BOX_HEAD.FC_DIM 32 DATALOADER.NUM_WORKERS 1 TEST.EVAL_PERIOD 0 "
    "DATASETS.TRAIN ('my_train',) DATASETS.TEST ('my_test',)"
).split()
SMALL = {
    **{"depth": 10, "norm": "GN", "fpn_channels": 32, "representation_size": 32},
    **{"trainable_backbone_layers": 5, "anchor_sizes": [16, 32, 64, 128], "max_size": 128},
    **{"min_size": [64, 96], "rpn_pre_nms_top_n_train": 50, "rpn_pre_nms_top_n_test": 50},
    **{"box_batch_size_per_image": 32, "ltrb_init": 0.5},
}


def command_of(name, data, output, iterations):
    """The command line; for a training of so many iterations of 2 images."""
    train, test = (str(data / f"{part}.json") for part in ("train", "test"))
    images = {part: str(data / part) for part in ("train", "test")}
    options = {
        "evaluate": [test, str(data / "results.json"), "--seen", SEEN, "--per-category"]
        + ["--bootstrap", 500, "--json", output / "ar.json", "--plot", output / "ar.png"],
        "propose": [images["test"], "--gt", test, "--draw", "--contact-sheet", "--html"]
        + ["--batch-size", 1, "--output", output],
        "compare": [test, data / "results.json", data / "others.json", "--seen", SEEN]
        + ["--images", images["test"], "--num-images", 12, "--output", output],
        "audit": [train, "--images", images["train"], "--estimate", "--accept-top", 3]
        + ["--output", output],
        "quickstart": ["--engine", "standalone", "--images", 12, "--epochs", 1]
        + ["--output", output],
    }
    if name == "train_net":
        rows = [
            [f"my_{part}", str(data / f"{part}.json"), images[part], SEEN]
            for part in ("train", "test")
        ]
        own = ["DATASETS.OWN", str(rows), "SOLVER.MAX_ITER", iterations, "OUTPUT_DIR", output]
        recipe = ["--config-file", "cpu/oln_box_R_10_FPN_GN.yaml", "--resume"]
        line = ["oln_d2.train_net", *recipe, *SMALL_D2, *own]
    elif name == "train":
        recipe = {
            **{"train_json": train, "images": images["train"], "seen": SEEN, "val_json": test},
            **{"val_images": images["test"], "epochs": 2 * iterations / 20, "batch_size": 2},
            **{"accumulate": 2, "warmup": 5, "schedule": "cosine", "clip": 10.0, "ema": 0.9},
            **{"scale_jitter": [0.5, 1.5], "checkpoint_every": 1, "workers": 1, "device": "cpu"},
            **{"evaluate_every": 7, "scratch": True, "model": SMALL},
        }
        path = data / f"recipe_{iterations}.yaml"
        path.write_text(json.dumps(recipe))
        line = ["oln_d2", "train", "--config", path, "--resume", "--output", output]
    else:
        line = ["oln_d2", name, *options[name]]
    return [sys.executable, "-W", "ignore", "-m", *map(str, line)]


def start(line, log):
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    # What processes that are killed leave in the folder for temporary files goes with the rest.
    temporary = os.path.dirname(log.name)
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, "TMPDIR": temporary}
    return subprocess.Popen(line, env=env, stdout=log, stderr=log, start_new_session=True)


def finish(line, log):
    """Runs to the end; returns the seconds that it took."""
    begin = time.monotonic()
    if code := start(line, log).wait():
        log.seek(0)
        raise SystemExit(f"exit code {code}: {log.read()[-3000:]}")
    return time.monotonic() - begin


def half_written(output):
    return set(output.rglob(f"{HALF}*"))


def last_iteration(output):
    """That of the last checkpoint of a training; -1 without one."""
    named = output / "last_checkpoint"
    path = output / named.read_text() if named.exists() else output / "checkpoint.pth"
    if not path.exists():
        return -1
    content = torch.load(path, weights_only=True)
    return content["iteration"] if "iteration" in content else content["global_step"] - 1


def kill(process, output, moment, seconds, rng):
    """
    Kills a run, and in half of the cases all that it has started.

    Args:
        moment: one of MOMENTS.
        seconds: that a run takes until it trains or, of a command, until it is done.

    Returns:
        the seconds that it ran; None if it had ended by itself.
    """
    begin = time.monotonic()
    if moment == "at any moment":
        time.sleep(rng.uniform(0, seconds))
    else:
        before = checkpoints(output)
        while moment == "in training" and checkpoints(output) == before and process.poll() is None:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.6 if moment == "in training" else seconds))
    if moment == "while writing":
        old = hidden(output)
        while process.poll() is None and not hidden(output) - old:
            pass
        time.sleep(rng.uniform(0, 0.004))
    if process.poll() is not None:
        return None
    if rng.random() < 0.5:
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.wait()
    return time.monotonic() - begin


def checkpoints(output):
    """What changes with each checkpoint."""
    paths = map(output.joinpath, ("last_checkpoint", "checkpoint.pth"))
    return [path.stat().st_mtime_ns for path in paths if path.exists()]


def hidden(output):
    """:func:`half_written` of the folder alone, quickly."""
    with os.scandir(output) as entries:
        return {entry.name for entry in entries if entry.name.startswith(HALF)}


def flat(value, name=""):
    """The tensors and plain values of a checkpoint, by their places."""
    if isinstance(value, dict):
        parts = value.items()
    elif isinstance(value, (list, tuple)):
        parts = enumerate(value)
    else:
        return {name: value}
    return {k: v for key, part in parts for k, v in flat(part, f"{name}/{key}").items()}


def content(path):
    """What has to be the same in two runs."""
    if path.suffix != ".pth":
        return {"": path.read_bytes()}
    return flat(torch.load(path, weights_only=True))


def different(path, other):
    """What differs between two files, a few words each."""
    one, two = content(path), content(other)
    if one.keys() != two.keys():
        return [f"{path.name} has other entries: {sorted(one.keys() ^ two.keys())[:3]}"]
    same = (
        type(v) is type(two[k])
        and (torch.equal(v, two[k]) if isinstance(v, torch.Tensor) else v == two[k] or v != v)
        for k, v in one.items()
    )
    return [f"{path.name}{key}" for key, equal in zip(one, same) if not equal]


def files(output):
    found = (path.relative_to(output) for path in output.rglob("*") if path.is_file())
    return {p for p in found if not LOGS.fullmatch(p.as_posix()) and not p.name.startswith(HALF)}


def check_whole(output, whole, training):
    """Raises SystemExit for a file that is neither whole nor gone."""
    for path in files(output):
        if path.suffix == ".pth":
            try:
                read_checkpoint(output / path)
            except InputError as error:
                raise SystemExit(f"after a kill: {error}") from None
        elif training or path.parts[0] == "data.tmp":  # of an evaluation meanwhile; of no name yet
            continue
        elif not (whole / path).exists():
            raise SystemExit(f"after a kill: {output / path} is no file of an undisturbed run")
        elif difference := different(output / path, whole / path):
            raise SystemExit(f"after a kill: {difference}")


def run(name, folder, data, kills, seed):
    """Returns what differs in the end."""
    rng = random.Random(f"{name} {seed}")
    training = name in TRAININGS
    iterations = 4 * kills + 8
    # Both in a folder of the same name, which is in some of the files.
    output, whole = folder / name / "output", folder / name / "whole"
    output.mkdir(parents=True)
    line = command_of(name, data, output, iterations)
    with open(folder / name / "log.txt", "w+") as log:
        seconds = finish(line, log)
        output.rename(whole)
        output.mkdir()
        made = f" of {iterations} iterations" if training else ""
        print(f"{name}: an undisturbed run{made} took {seconds:.1f} s", flush=True)
        moments = MOMENTS
        if training:
            seconds = min(seconds, 12)
        else:
            moments = [moment for moment in MOMENTS if moment != "in training"]
        done = writing = 0
        while done < kills:
            moment, old = moments[done % len(moments)], half_written(output)
            process = start(line, log)
            after = kill(process, output, moment, seconds, rng)
            if after is None:
                if process.returncode:
                    log.seek(0)
                    raise SystemExit(f"exit code {process.returncode}: {log.read()[-3000:]}")
                seconds *= 0.8  # it was done before
                shutil.rmtree(output)
                output.mkdir()
                continue
            done += 1
            half = half_written(output) - old
            writing += bool(half)
            where = f", after iteration {last_iteration(output)}" if training else ""
            print(
                f"  kill {done}: {moment}, after {after:.2f} s{where}"
                f"{', with a file half written' if half else ''}",
                flush=True,
            )
            check_whole(output, whole, training)
        finish(line, log)
    compared = files(whole) | files(output)
    differences = [f"{path} was left half written" for path in half_written(output)]
    for path in sorted(compared):
        if not (whole / path).exists() or not (output / path).exists():
            differences.append(f"{path} is there only once")
        elif path.name != "config.yaml":
            differences += different(whole / path, output / path)
    print(
        f"{name}: killed {done} times, {writing} of them with a file half written; "
        f"{len(compared)} files compared, {len(differences)} differences"
    )
    for difference in differences[:20]:
        print(f"  {difference}")
    return differences


def main() -> None:
    parser = argparse.ArgumentParser(description="See the head of this file.")
    parser.add_argument("what", nargs="+", choices=[*TRAININGS, *COMMANDS])
    parser.add_argument("--kills", type=int, default=20, help="of each, default 20")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="of the moments")
    args = parser.parse_args()
    print(f"seed {args.seed}")
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder, "data")
        make_dataset(data, 0, 20, 20)
        for name, seed in (("results", 0), ("others", 1)):
            (data / f"{name}.json").write_text(json.dumps(detections(data / "test.json", seed)))
        differences = [
            difference
            for name in args.what
            for difference in run(name, Path(folder), data, args.kills, args.seed)
        ]
    sys.exit(bool(differences))


def detections(gt, seed):
    """Boxes near the objects of a COCO file, as a results file holds them."""
    rng = random.Random(seed)
    return [
        {
            "image_id": a["image_id"],
            "category_id": 1,
            "bbox": [value + rng.uniform(-9, 9) for value in a["bbox"][:2]] + a["bbox"][2:],
            "score": rng.random(),
        }
        for a in json.loads(gt.read_text())["annotations"]
        for _ in range(5)
    ]


if __name__ == "__main__":
    main()
