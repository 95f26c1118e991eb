"""Standalone training as users run it: real runs on tiny data."""

import argparse
import csv
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from inspect import signature

import numpy as np
import pytest
import torch
from conftest import ROOT, make_coco
from PIL import Image
from test_standalone import watch_first_stage
from torchvision.ops import box_iou

from oln_d2.checks import InputError
from oln_d2.cli import main
from oln_d2.commands.train import add_arguments
from oln_d2.precision import computes_bfloat16
from oln_d2.standalone import build_detector, load_detector, save_checkpoint, train
from oln_d2.standalone.data import (
    GROUPED,
    CocoImages,
    TrainingBatches,
    View,
    aspect_groups,
    read_image,
)
from oln_d2.standalone.models import Transform, training_losses
from oln_d2.standalone.names import detectron2_name
from oln_d2.standalone.schedule import lr_factor

CONFIG = {
    "depth": 10,
    "norm": "GN",
    "fpn_channels": 32,
    "trainable_backbone_layers": 5,
    "anchor_sizes": (16, 32, 64, 128),
    "min_size": (64, 96),
    "max_size": 128,
    "representation_size": 32,
    "box_batch_size_per_image": 32,
    "rpn_pre_nms_top_n_train": 100,
    "rpn_pre_nms_top_n_test": 100,
    "ltrb_init": 0.5,
}


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    return make_coco(tmp_path_factory.mktemp("data"))


def run(coco, output, **kwargs):
    """8 iterations of 2 of the 5 training images."""
    settings = {
        "config": CONFIG,
        "epochs": 3.2,
        "batch_size": 2,
        "warmup": 2,
        "checkpoint_every": 3,
    }
    settings.update(device="cpu", workers=0, seed=5)
    settings.update(kwargs)
    annotations = coco / "coco/annotations"
    return train(
        str(annotations / "instances_train2017.json"),
        str(coco / "coco/train2017"),
        "voc",
        str(output),
        val_json=str(annotations / "instances_val2017.json"),
        val_images=str(coco / "coco/val2017"),
        **settings,
    )


@pytest.fixture(scope="module")
def uninterrupted(coco, tmp_path_factory):
    output = tmp_path_factory.mktemp("train") / "whole"
    return output, run(coco, output)


def parameters(output, name="model_final.pth"):
    return torch.load(output / name, weights_only=True)["model"]


def test_training_learns_and_evaluates(coco, uninterrupted):
    """The weights must change, and what is written must be what the model finds."""
    output, result = uninterrupted
    torch.manual_seed(5)
    before = build_detector(**CONFIG)
    after = load_detector(str(output / "model_final.pth"))
    names = [name for name, _ in before.named_parameters()]
    same = [
        n for n, p, q in zip(names, before.parameters(), after.parameters()) if torch.equal(p, q)
    ]
    # P5 is too coarse for these images, and P4 almost: no anchor trains, no RoI is pooled there.
    coarse = "backbone.fpn.layer_blocks.3.", "backbone.fpn.layer_blocks.2.1."
    assert not [name for name in same if not name.startswith(coarse)]
    detections = json.loads((output / "coco_instances_results.json").read_text())
    for entry in detections[:20]:  # as `visualize` tells them
        assert entry["score"] ** 2 == pytest.approx(
            entry["objectness"] * entry["box_score"], rel=1e-4
        )
    assert {d["image_id"] for d in detections} == {1, 2, 3, 4, 5}
    report = json.loads((output / "open_world_results.json").read_text())["results"][0]
    assert report["protocol"] == "xclass" and report["num_images"] == 5
    assert report["seen"]["AR@1500"] == result["seen"]["AR@1500"]
    (found,) = after([read_image(str(coco / "coco/val2017/000000000001.jpg"))])
    first = next(d for d in detections if d["image_id"] == 1)
    assert first["score"] == pytest.approx(found["scores"][0].item(), abs=1e-5)


class Interrupt(Exception):
    pass


# Everything that a resumed run could get wrong.
FULL = dict(
    accumulate=2, ema=0.9, schedule="cosine", clip=1.0, scale_jitter=(0.5, 1.5), evaluate_every=3
)


@pytest.mark.parametrize(
    "settings, stop, workers",
    [({}, 3, 0), (FULL, 3, 2), (FULL, 6, 0), (FULL, 8, 0)],
    ids=["plain", "workers", "evaluated", "complete"],
)
def test_resumed_run_is_the_uninterrupted_one(
    coco, request, tmp_path, monkeypatch, capsys, settings, stop, workers
):
    """
    Order, flips, scales, samples, momentum, rate, average and the best evaluation must all continue
    where they were; with a mistyped output folder, a run that starts anew must say so.
    """
    import oln_d2.standalone.training as module

    write = module.write_checkpoint

    def write_then_stop(path, *args, **kwargs):
        write(path, *args, **kwargs)
        if kwargs["global_step"] == stop and os.path.basename(path) == "checkpoint.pth":
            raise Interrupt

    whole, expected = request.getfixturevalue("whole" if settings else "uninterrupted")
    output = tmp_path / "resumed"
    settings = {**settings, "workers": workers}
    monkeypatch.setattr(module, "write_checkpoint", write_then_stop)
    with pytest.raises(Interrupt):
        run(coco, output, resume=True, **settings)
    assert "from the start" in capsys.readouterr().out
    monkeypatch.undo()
    torch.manual_seed(99)  # what is drawn between must not matter
    result = run(coco, output, resume=True, **settings)
    out = capsys.readouterr().out
    assert f"resumed after {stop}" in out and (re.search("8/8|16/16", out) or stop == 8)
    for name in sorted({path.name for path in whole.glob("*.pth")}):
        wanted, found = parameters(whole, name), parameters(output, name)
        assert all(torch.equal(wanted[key], value) for key, value in found.items()), name
    assert result["all"]["AR@100"] == expected["all"]["AR@100"]
    # Complete: resumed once more, it only evaluates. Weights to start from may be gone by then.
    run(coco, output, resume=True, weights="gone.pth", **settings)


@pytest.mark.parametrize("number, code", [(signal.SIGKILL, -9), (signal.SIGTERM, 130)])
def test_killed_run_goes_on(coco, uninterrupted, tmp_path, number, code):
    """
    A power cut must cost the iterations since the last checkpoint, and nothing else; what comes
    after the command in a script must not take a run that was told to end for a complete one.
    """
    annotations = coco / "coco/annotations"
    recipe = {
        **{"train_json": f"{annotations}/instances_train2017.json", "split": "voc", "seed": 5},
        **{"images": f"{coco}/coco/train2017", "epochs": 3.2, "batch_size": 2, "warmup": 2},
        **{"checkpoint_every": 3, "device": "cpu", "workers": 2, "scratch": True, "model": CONFIG},
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    line = ["-m", "oln_d2", "train", "--config", tmp_path / "recipe.yaml", "--resume", "--output"]
    line = [sys.executable, "-W", "ignore", *map(str, line), str(tmp_path / "out")]
    # In one thread, as all runs here: several add up in another order.
    env, quiet = {**os.environ, "OMP_NUM_THREADS": "1"}, subprocess.DEVNULL
    process = subprocess.Popen(line, cwd=ROOT, env=env, stdout=quiet, stderr=quiet)
    while not (tmp_path / "out/checkpoint.pth").exists():
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(number)
    assert process.wait() == code
    done = command(*line[1:])
    assert done.returncode == 0 and re.search("resumed after [368],", done.stdout), done.stderr
    expected, found = parameters(uninterrupted[0]), parameters(tmp_path / "out")
    assert all(torch.equal(expected[name], value) for name, value in found.items())


@pytest.fixture(scope="module")
def whole(coco, tmp_path_factory):
    output = tmp_path_factory.mktemp("train") / "full"
    return output, run(coco, output, **FULL)


def test_average_is_what_is_kept(whole):
    """Else the weights of the last step would be evaluated and shipped, which are worse."""
    content = torch.load(whole[0] / "checkpoint.pth", weights_only=True)
    last = {detectron2_name(n[6:]): value for n, value in content["current_model_state"].items()}
    final = parameters(whole[0])
    assert all(torch.equal(final[name], value) for name, value in content["model"].items())
    assert not all(torch.equal(final[name], value) for name, value in last.items())
    # An average of few steps follows them closely: a plain decay of 0.9 would stay at the start.
    torch.manual_seed(5)
    first = {detectron2_name(n): v for n, v in build_detector(**CONFIG).state_dict().items()}
    name = "roi_heads.box_head.fc1.weight"
    assert (final[name] - last[name]).norm() < (final[name] - first[name]).norm()


def test_best_model_and_early_end(coco, tmp_path, whole):
    """A training that gets no better must end, and the best model must not be the last one."""
    result = run(coco, tmp_path, lr=1e-9, epochs=8, evaluate_every=2, patience=2)
    content = torch.load(tmp_path / "checkpoint.pth", weights_only=True)
    assert content["global_step"] == 6 and result is not None  # of 20: at 4 and 6 no better than 2
    assert torch.load(tmp_path / "model_best.pth", weights_only=True)["global_step"] == 2
    run(coco, tmp_path, lr=1e-9, epochs=8, evaluate_every=2, patience=2, resume=True)
    again = torch.load(tmp_path / "checkpoint.pth", weights_only=True)
    assert again["global_step"] == 6  # it was complete
    assert load_detector(tmp_path / "model_best.pth").config == content["config"]


def test_logs(coco, tmp_path, whole):
    """Losses and evaluations must be there to be plotted, of each part of a resumed run."""
    rows = list(csv.DictReader((whole[0] / "csv/from_0/metrics.csv").open()))
    assert [row["step"] for row in rows if row["AR@100 unseen"]] == ["2", "5", "8"]
    run(coco, tmp_path, epochs=8, loggers=["csv", "tensorboard"])
    rows = list(csv.DictReader((tmp_path / "csv/from_0/metrics.csv").open()))
    assert float(rows[0]["loss_rpn_obj"]) > 0 and rows[0]["step"] == "19"
    assert list((tmp_path / "tensorboard/from_0").glob("events*"))
    with pytest.raises(InputError, match="loggers is tensorbord; it has to be one of csv"):
        run(coco, tmp_path / "other", loggers=["tensorbord"])


@pytest.mark.parametrize(
    "change, message",
    [
        ({}, "checkpoint.pth: exists; resume"),
        ({"resume": True, "lr": 0.5}, "was trained with lr 0.0025, not 0.5"),
        ({"resume": True, "config": {**CONFIG, "max_size": 200}}, "with max_size 128, not 200"),
        ({"resume": True, "patience": 3, "evaluate_every": 2}, "trained with evaluate_every None"),
        ({"val_images": None}, "give both or neither"),
        ({"amp": True}, "amp is precision float16 on a GPU; .* leave amp out"),
        ({"config": {**CONFIG, "norm": "BN"}, "devices": 2}, "norm is BN, which learns in one"),
        ({"weights": "a.pth", "weights_backbone": "b.pth"}, "leave out weights_backbone"),
        ({"more_data": ["a.json"]}, "more_data: 'a.json' is not .annotations, folder, seen"),
        ({"data_weights": 2}, "data_weights is 2; it has to be a list"),
        ({"lr": "fast"}, "lr is fast; it has to be 0 or more"),
        ({"weights": "gone.pth"}, "gone.pth: no such file"),
        ({"config": {"architecture": "oln_mask"}}, "architecture is oln_mask; .* train_net.py"),
        ({"config": {"architecture": "yolo"}}, "architecture is yolo; it has to be one of oln_box"),
        ({"accumulate": 4}, "batch_size is 2; it has to be a multiple of 4"),
        ({"precision": "float16"}, "precision is float16, which needs a GPU"),
        ({"precision": "half"}, "precision is half; it has to be one of float32, auto"),
        ({"schedule": "exp"}, "schedule is exp; it has to be one of step, cosine"),
        ({"scale_jitter": (2, 1)}, "scale_jitter is .*; it has to be two numbers above 0, ascend"),
        ({"patience": 2}, "patience counts evaluations; give evaluate_every"),
        ({"data_weights": [1, 2]}, "data_weights are 2 for 1 data sets"),
        ({"data_weights": [0]}, "data_weights is 0; it has to be a number above 0"),
        ({"devices": 2, "batch_size": 3}, "batch_size is 3; it has to be a multiple of 2"),
        ({"more_data": [("gone.json", ".", "cat")]}, "gone.json: no such file"),
    ],
)
def test_bad_arguments_stop_before_training(coco, uninterrupted, tmp_path, change, message):
    """Nothing may be overwritten or trained for nothing."""
    output = uninterrupted[0] if "exists" in message or "resume" in change else tmp_path
    before = (uninterrupted[0] / "checkpoint.pth").stat().st_mtime_ns
    with pytest.raises(InputError, match=message):
        if "val_images" in change:
            train("a.json", "b", "voc", str(output), val_json="c.json", config=CONFIG)
        else:
            run(coco, output, **change)
    assert (uninterrupted[0] / "checkpoint.pth").stat().st_mtime_ns == before


def test_weights_are_the_start(coco, uninterrupted, tmp_path):
    """
    Training from a checkpoint must begin with its weights; without learning it must keep them.
    """
    run(coco, tmp_path, weights=str(uninterrupted[0] / "model_final.pth"), lr=0.0, epochs=0.8)
    expected = parameters(uninterrupted[0])
    assert all(torch.equal(expected[name], value) for name, value in parameters(tmp_path).items())


def test_faster_rcnn_trains(coco, tmp_path):
    """The detector to compare with must train and evaluate in the same way."""
    config = {key: value for key, value in CONFIG.items() if key != "ltrb_init"}
    result = run(coco, tmp_path, config={"architecture": "faster_rcnn", **config}, epochs=0.8)
    assert result["all"]["AR@1500"] >= 0
    assert load_detector(str(tmp_path / "model_final.pth")).config["architecture"] == "faster_rcnn"


def test_resume_takes_the_settings_of_the_run_only(coco, uninterrupted, tmp_path):
    """A resumed run with another setting or other data would be neither run."""
    content = torch.load(uninterrupted[0] / "checkpoint.pth", weights_only=True)
    settings = content["settings"]
    assert {
        *("seen", "digest of the training data", "depth", "norm", "min_size", "epochs"),
        *("batch_size", "lr", "warmup", "precision", "seed", "number of processes"),
    } <= set(settings)
    for name in settings:
        torch.save({**content, "settings": {**settings, name: "x"}}, tmp_path / "checkpoint.pth")
        with pytest.raises(InputError, match=f"was trained with {name} x, not"):
            run(coco, tmp_path, resume=True)


def test_resume_a_run_of_before(coco, tmp_path):
    """A checkpoint of the trainer of version 0.1 must say what can be done with it."""
    save_checkpoint(build_detector(**CONFIG), tmp_path / "checkpoint.pth", iteration=3, settings={})
    with pytest.raises(InputError, match="of an earlier version; give it as weights to start from"):
        run(coco, tmp_path, resume=True)


def images_of(*source, max_size=200):
    return CocoImages([source], max_size, training=True)


def test_digest_tells_data_apart(coco, tmp_path):
    """Other boxes or images of the same number would pass for the same data in a resumed run."""
    source = coco / "coco/annotations/instances_train2017.json"
    content = json.loads(source.read_text())
    original = json.dumps(content)
    digests = []
    for change in (
        lambda c: None,
        lambda c: c["annotations"][0]["bbox"].__setitem__(2, 21),
        lambda c: c["annotations"][0].update(category_id=c["annotations"][2]["category_id"]),
        lambda c: [c["images"][i].update(file_name=f"{2 - i:012d}.jpg") for i in (0, 1)],
    ):
        content = json.loads(original)
        change(content)
        (tmp_path / "train.json").write_text(json.dumps(content))
        arguments = str(tmp_path / "train.json"), str(coco / "coco/train2017"), "voc"
        digests.append(images_of(*arguments).digest())
        assert images_of(*arguments).digest() == digests[-1]
    assert len(set(digests)) == 4


def test_rate_warms_up_and_steps(uninterrupted):
    """A wrong schedule trains, only worse."""
    factors = [lr_factor(i, 100, 10) for i in (0, 5, 10, 74, 75, 87, 88)]
    assert factors == pytest.approx([0.001, 0.5005, 1, 1, 0.1, 0.1, 0.01])
    # 250 iterations: after 187.5 and 218.75.
    factors = [lr_factor(i, 250, 0) for i in (187, 188, 218, 219)]
    assert factors == pytest.approx([1, 0.1, 0.1, 0.01])
    # The paper's 0.02 is for 16 images; this is of the last iteration of 2.
    assert [lr_factor(i, 100, 10, "cosine") for i in (50, 100)] == pytest.approx([0.5, 0])
    content = torch.load(uninterrupted[0] / "checkpoint.pth", weights_only=True)
    for group in content["optimizer_states"][0]["param_groups"]:
        assert group["lr"] == pytest.approx(0.02 / 8 / 100)


def test_scales_are_drawn_in_training_only():
    """Of several --min-size training must see each, and inference the last."""
    torch.manual_seed(0)
    transform = Transform((64, 96), 200)
    image = torch.rand(3, 100, 120)
    for training, sides in ((True, {64, 96}), (False, {96})):
        transform.train(training)
        assert {transform.resize(image)[0].shape[1] for _ in range(20)} == sides


def options(coco, output, *more):
    """The arguments of a small `python -m oln_d2 train`."""
    options = (
        f"--train-json {coco}/coco/annotations/instances_train2017.json "
        f"--images {coco}/coco/train2017 --split voc --output {output} --depth 10 --scratch "
        "--min-size 64 --max-size 96 --epochs 0.8 --batch-size 2 --device cpu --workers 0"
    )
    return ["train", *options.split(), *map(str, more)]


@pytest.mark.parametrize(
    "option, value, message",
    [
        ("--epochs", "nan", "epochs is nan; it has to be a number above 0"),
        ("--epochs", "inf", "epochs is inf; it has to be a number above 0"),
        ("--epochs", "0", "epochs is 0.0; it has to be a number above 0"),
        ("--batch-size", "0", "batch_size is 0; it has to be 1 or more"),
        ("--lr", "nan", "lr is nan; it has to be 0 or more"),
        ("--lr", "-1", "lr is -1.0; it has to be 0 or more"),
        ("--warmup", "-5", "warmup is -5; it has to be 0 or more"),
        ("--workers", "-1", "workers is -1; it has to be 0 or more"),
        ("--checkpoint-every", "0", "checkpoint_every is 0; it has to be 1 or more"),
        ("--seed", "-1", "seed is -1; it has to be 0 or more, below 2**64"),
        ("--seed", str(2**64), "it has to be 0 or more, below 2**64"),
        ("--min-size", "0", "min_size is (0,) and max_size 96; both have to be 1 pixel or more"),
        ("--max-size", "-3", "max_size -3; both have to be 1 pixel or more"),
        ("--device", "foo", "device foo cannot be used"),
        ("--device", "meta", "device meta cannot be used"),
    ],
)
def test_options_have_limits(coco, tmp_path, capsys, option, value, message):
    """A typing mistake must end in a sentence with the option, its value and what is allowed."""
    assert main(options(coco, tmp_path / "out", option, value)) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: ") and printed.count("\n") == 1 and message in printed
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("output", ["file", "file/below", "/proc"])
def test_output_is_writable_before_training(coco, tmp_path, capsys, output):
    """Else hours of training end at the first checkpoint."""
    (tmp_path / "file").write_text("kept")
    assert main(options(coco, tmp_path / output)) == 2
    printed = capsys.readouterr()
    assert "give a folder" in printed.err or "choose another" in printed.err
    assert "Traceback" not in printed.err
    assert "iterations" not in printed.out and (tmp_path / "file").read_text() == "kept"


def test_full_disk(tmp_path):
    """The message of a checkpoint that does not fit must say so, and the old one must stay."""
    model = build_detector(**CONFIG)
    path = tmp_path / "model.pth"
    save_checkpoint(model, str(path))
    size = path.stat().st_size
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.getsignal(signal.SIGXFSZ)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(InputError, match=r"model.pth: cannot be written \(File too large"):
            save_checkpoint(model, str(path))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert path.stat().st_size == size and list(tmp_path.iterdir()) == [path]


def test_diverged_training_keeps_the_last_good_checkpoint(coco, tmp_path, capsys):
    """NaN weights in its place could never be resumed; the command must say what to do instead."""
    more = "--lr", 1e6, "--warmup", 0, "--epochs", 8, "--checkpoint-every", 1
    assert main(options(coco, tmp_path / "out", *more)) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("error: ") and "lower the learning rate" in message
    assert re.search(r"At iteration \d+, on .*00\d.jpg, .*00\d.jpg, .*loss_rpn_obj ", message)
    assert "in another output folder" in message and "checkpoint.pth" in message
    assert not (tmp_path / "out/model_final.pth").exists()
    last = torch.load(tmp_path / "out/checkpoint.pth", weights_only=True)["model"]
    assert all(value.isfinite().all() for value in last.values())


def test_nothing_to_train_on(coco, tmp_path):
    """A misspelt split would train on nothing for days."""
    annotations, folder = (
        coco / "coco/annotations/instances_train2017.json",
        coco / "coco/train2017",
    )
    for seen, more in (["pizza"], ()), ("voc", [(annotations, folder, "pizza")]):
        with pytest.raises(InputError, match="of the seen categories .pizza.; there is nothing to"):
            train(annotations, folder, seen, tmp_path / "out", more_data=more, config=CONFIG)
    assert not (tmp_path / "out").exists()


def test_folder_in_use(coco, tmp_path):
    """Of two runs in one folder, both would end well and one be lost."""
    (tmp_path / "out").mkdir()
    code = "import sys; from oln_d2.files import lock_folder\n"
    code += "with lock_folder(sys.argv[1]): print(flush=True), input()"
    other = subprocess.Popen(
        [sys.executable, "-c", code, tmp_path / "out"],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        other.stdout.readline()
        with pytest.raises(InputError, match="out: is in use by"):
            run(coco, tmp_path / "out")
    finally:
        other.communicate(b"\n")
    run(coco, tmp_path / "out")


def test_diverged_training_stops(coco, tmp_path, monkeypatch):
    """NaN weights must not be trained on for days, nor saved."""
    model = build_detector(**CONFIG)
    bias, path = model.roi_heads.box_predictor.bbox_pred.bias, str(tmp_path / "weights.pth")
    for value, error, message in (
        (float("nan"), InputError, "weights.pth: .*bbox_pred.bias holds NaN"),
        (
            3e38,
            FloatingPointError,
            r"At iteration 0, on .*00\d.jpg, .*00\d.jpg, the losses are NaN or infinite .*"
            r"loss_box_sc.*loss_box_reg inf, .*learning rate",
        ),
    ):
        torch.nn.init.constant_(bias, value)
        save_checkpoint(model, path)
        with pytest.raises(error, match=message):
            run(coco, tmp_path / "out", weights=path)
    # The loss of an iteration tells nothing of its step, which here goes beyond float32.
    monkeypatch.setattr("oln_d2.standalone.training.WEIGHT_DECAY", 1e30)
    with pytest.raises(FloatingPointError, match="Weights .* after iteration 0.*learning rate"):
        run(coco, tmp_path / "out", lr=1e30, warmup=0, checkpoint_every=1)
    assert not (tmp_path / "out/checkpoint.pth").exists()


def batches(*lengths, size=4, iterations=range(14), seed=3, **kwargs):
    kwargs = {"min_sizes": [96], **kwargs}
    return list(TrainingBatches(lengths, size, iterations, seed, **kwargs))


def test_batches_cover_every_epoch_and_are_shared():
    """
    Each image once an epoch; processes take disjoint parts of the same batch; any start will do.
    """
    for more in {}, {"min_sizes": [64, 96], "zooms": (0.5, 2.0), "weights": [1, 3]}:
        lengths = (7,) if not more else (3, 4)
        whole = batches(*lengths, **more)
        flat = [view for batch in whole for view in batch]
        assert batches(*lengths, iterations=range(5, 14), **more) == whole[5:]
        parts = [batches(*lengths, rank=rank, world_size=2, **more) for rank in range(2)]
        assert [a + b for a, b in zip(*parts)] == whole
        assert batches(*lengths, seed=4, **more) != whole
        assert 10 < sum(view.flip for view in flat) < 46
        if not more:
            for epoch in range(8):
                of_epoch = flat[7 * epoch : 7 * epoch + 7]
                assert sorted(view.index for view in of_epoch) == list(range(7))
            assert flat[:7] != flat[7:14]
            assert {(v.min_size, v.zoom) for v in flat} == {(96, 1)}
        else:
            assert {view.min_size for view in flat} == {64, 96}
            zooms = [view.zoom for view in flat]
            assert 0.5 <= min(zooms) < 0.8 and 1.7 < max(zooms) <= 2 and len(set(zooms)) == 56


def test_weights_of_data_sets():
    """A small set that matters must come as often as asked for, all its images equally often."""
    flat = [
        v.index for batch in batches(90, 10, iterations=range(50), weights=[1, 1]) for v in batch
    ]
    counts = np.bincount(flat, minlength=100)
    assert counts[:90].sum() == counts[90:].sum() == 100
    assert set(counts[90:]) == {10} and set(counts[:90]) <= {1, 2}


def test_batches_of_one_aspect():
    """Portraits beside landscapes would be padded to twice their pixels; all must still come."""
    sizes = np.array([(100, 150), (150, 100), (100, 100), (100, 300)])[np.arange(400) % 4]
    groups = aspect_groups(sizes)
    assert groups[:4].tolist() == [1, -1, 0, 2]
    whole = batches(400, iterations=range(100), groups=groups)
    pure = [len({groups[view.index] for view in batch}) == 1 for batch in whole]
    assert sum(pure) > 80
    # Not one group after another: the weights would follow the last.
    assert len({groups[batch[0].index] for batch in whole[:GROUPED]}) == 4
    seen = [v.index for batch in batches(400, iterations=range(400), groups=groups) for v in batch]
    assert set(np.bincount(seen, minlength=400)) <= {3, 4, 5}
    later = batches(400, iterations=range(41, 100), groups=groups)
    assert later == whole[41:]
    # Also where the run ends in the middle of what is grouped at once.
    epoch = batches(400, size=10, iterations=range(40), groups=groups)
    assert sorted(view.index for batch in epoch for view in batch) == list(range(400))


@pytest.fixture
def training_images(coco):
    annotations = coco / "coco/annotations/instances_train2017.json"
    return CocoImages([(annotations, coco / "coco/train2017", "voc")], 1000, training=True)


def test_flipped_images(training_images):
    """A flip must move boxes with the pixels; unseen objects and crowds must not be there."""
    assert training_images.image_ids == [1, 2, 3, 4, 5]
    heights = training_images.sizes.min(axis=1).tolist()
    views = [training_images[View(i, heights[i])] for i in range(5)]
    assert [len(target["boxes"]) for _, target in views] == [2, 1, 2, 2, 2]
    (image, target), (flipped, mirrored) = views[0], training_images[View(0, heights[0], True)]
    assert image.dtype == torch.uint8 and image.shape[1:] == tuple(target["size"].tolist())
    for box, other in zip(target["boxes"].int(), mirrored["boxes"].int()):
        part = image[:, box[1] : box[3], box[0] : box[2]]
        assert torch.equal(part.flip(2), flipped[:, other[1] : other[3], other[0] : other[2]])


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("zoom", [0.4, 1.0, 1.9])
def test_views_move_boxes_with_the_pixels(training_images, zoom, flip):
    """
    Boxes beside their objects would be learnt. The objects are bright and the rest is dark, so the
    brightness inside and around tells where they are.
    """
    checked = 0
    for index in range(5):
        for across, down in ((0.0, 0.0), (0.3, 0.8), (1.0, 1.0)):
            pixels, target = training_images[View(index, 200, flip, zoom, across, down)]
            height, width = pixels.shape[1:]
            shape = training_images[View(index, 200)][0].shape[1:]
            assert (height, width) == tuple(round(min(zoom, 1) * side) for side in shape)
            grey = pixels.float().mean(dim=0)
            for x1, y1, x2, y2 in target["boxes"].round().int().tolist():
                assert 0 <= x1 < x2 <= width and 0 <= y1 < y2 <= height
                assert grey[y1:y2, x1:x2].median() > 95
                for edge in (grey[y1:y2, x1 + 1 : x1 + 3], grey[y1:y2, x2 - 3 : x2 - 1]):
                    assert edge.median() > 70
                checked += 1
    assert checked > 10
    # Of what is cut off, an object goes as a whole where little of it is left.
    many = training_images[View(0, 200, zoom=6.0)][1]["boxes"]
    assert len(many) < 2


def test_what_one_set_lacks_is_no_negative_in_the_other(coco, tmp_path):
    """
    Data sets annotate different categories: the dogs of a set of persons must not be learnt as
    background. So what is predicted there must not matter to any loss.
    """
    annotations = coco / "coco/annotations/instances_train2017.json"
    folder = coco / "coco/train2017"
    small = {**CONFIG, "objectness_negatives": False}
    for config, more in ((CONFIG, ["dog"]), (small, ["dog"])):
        out = tmp_path / str(len(list(tmp_path.iterdir())))
        train(
            annotations,
            folder,
            ["person"],
            out,
            more_data=[(annotations, folder, more)],
            config=config,
            epochs=0.3,
            batch_size=2,
            device="cpu",
            workers=0,
        )
        content = torch.load(out / "checkpoint.pth", weights_only=True)
        assert content["config"]["objectness_negatives"] is False
        assert content["settings"]["seen"] == ["dog", "person"]
    persons = CocoImages([(annotations, folder, ["person"])], 1000, training=True)
    pixels, target = persons[View(0, 96)]
    ious = {}
    for negatives in (False, True):
        model = build_detector(**{**content["config"], "objectness_negatives": negatives})
        first, of_image = watch_first_stage(model), []
        model.rpn.anchor_generator.register_forward_hook(
            lambda *call, kept=of_image: kept.append(call[2][0])
        )
        losses = training_losses(model.train(), [pixels], [target])
        anchor, logits, _ = first
        (grad,) = torch.autograd.grad(sum(losses.values()), [logits])
        learns = anchor[grad[:, 0] != 0]
        (anchors,) = of_image
        ious[negatives] = box_iou(anchors[learns], target["boxes"]).amax(dim=1)
    assert len(ious[False]) and ious[False].min() >= 0.3  # the anchors that learn
    assert ious[True].min() < 0.1
    # Of one set, or of several with the same categories, nothing changes.
    train(annotations, folder, "voc", tmp_path / "one", config=CONFIG, epochs=0.3, device="cpu")
    content = torch.load(tmp_path / "one/checkpoint.pth", weights_only=True)
    assert content["config"]["objectness_negatives"] is True


def test_paths_with_colons_and_spaces(coco, tmp_path):
    """Such paths are common where data sets are mounted."""
    folder = tmp_path / "a: b"
    shutil.copytree(coco, folder)
    arguments = options(coco, tmp_path / "out")
    more = folder / "coco/annotations/instances_train2017.json", folder / "coco/train2017", "dog"
    assert main([*arguments, "--more-data", *map(str, more), "--data-weights", "1", "2"]) == 0
    content = torch.load(tmp_path / "out/checkpoint.pth", weights_only=True)
    assert content["settings"]["data_weights"] == [1, 2]


def test_recipe(coco, tmp_path, capsys):
    """A YAML file must hold all options, and the command line must go before it."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"""
        train-json: {coco}/coco/annotations/instances_train2017.json
        images: {coco}/coco/train2017
        split: voc
        epochs: 1e2
        depth: 10
        batch_size: 2
        ema: 0.9
        device: cpu
        scratch: true
        model: {{fpn_channels: 32, representation_size: 16, min_size: 64, max_size: 96}}
        """
    )
    command = ["train", "--config", str(recipe), "--output", str(tmp_path / "out")]
    assert main([*command, "--epochs", "0.8", "--seen", "person", "--max-size", "80"]) == 0
    content = torch.load(tmp_path / "out/checkpoint.pth", weights_only=True)
    settings, config = content["settings"], content["config"]
    assert (settings["epochs"], settings["ema"], settings["seen"]) == (0.8, 0.9, ["person"])
    assert (config["max_size"], config["representation_size"], config["norm"]) == (80, 16, "GN")
    assert config["depth"] == 10
    for text, message in (
        ("epoch: 3", "epoch is no option of train; near it: epochs"),
        ("epochs: [", "is no YAML"),
        ("- 3", "holds no options by name"),
        ("model: 3", "model holds no settings by name"),
        ("model: {dept: 3}", "dept"),
        ("{split: voc, seen: cat}", "has split and seen"),
        ("lr: many", "lr is 'many'; write a number"),
    ):
        recipe.write_text(text)
        assert main(options(coco, tmp_path / "no", "--config", recipe)) == 2, text
        printed = capsys.readouterr().err
        assert message in printed and printed.count("\n") == 1, printed
    assert main(["train", "--config", str(tmp_path / "gone.yaml")]) == 2
    assert "gone.yaml: cannot be read" in capsys.readouterr().err
    recipe.write_text("epochs: 3")
    assert main(["train", "--config", str(recipe)]) == 2
    assert "--train-json is missing" in capsys.readouterr().err


def test_go_on_from_weights(coco, uninterrupted, tmp_path):
    """To adapt a model, one gives it and the data: it must be built as it was, then learn these."""
    weights = uninterrupted[0] / "model_final.pth"
    data = options(coco, tmp_path / "out")
    data = [word for word in data if word != "--scratch"]
    for option in ("--depth", "--min-size", "--max-size"):
        del data[data.index(option) : data.index(option) + 2]
    data[data.index("voc")] = "person"
    assert main([*data, "--weights", str(weights), "--lr", "0"]) == 0
    out = tmp_path / "out/model_final.pth"
    assert load_detector(out).config == load_detector(weights).config
    expected, found = parameters(uninterrupted[0]), parameters(tmp_path / "out")
    assert all(torch.equal(expected[name], value) for name, value in found.items())
    assert (
        main([*data, "--weights", "gone.pth", "--lr", "0", "--resume"]) == 0
    )  # it is not read any more


def test_weights_by_name(coco, tmp_path, capsys, monkeypatch):
    """The zoo's names are understood; where there are no weights it says what to do."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    arguments = [*options(coco, tmp_path), "--weights", "oln_box_R_50_FPN.yaml"]
    arguments.remove("--scratch")
    assert main(arguments) == 2
    assert "has no trained weights yet" in capsys.readouterr().err
    arguments[-1] = "small/oln_box_lite0_general.yaml"
    for option in ("--depth", "--min-size", "--max-size"):
        del arguments[arguments.index(option) : arguments.index(option) + 2]
    sizes = ["--min-size", "64", "--max-size", "96", "--epochs", "0.1", "--lr", "0"]
    assert main([*arguments, *sizes]) == 0
    model = load_detector(tmp_path / "model_final.pth")
    assert model.config["backbone"] == "tf_efficientnet_lite0"


def test_bfloat16(coco, tmp_path):
    """The checkpoint must tell what it was computed with; elsewhere it is refused in a sentence."""
    if not computes_bfloat16("cpu"):
        with pytest.raises(InputError, match="precision is bfloat16, which cpu does not compute"):
            run(coco, tmp_path, precision="bfloat16")
        return
    run(coco, tmp_path / "half", precision="auto", channels_last=True, epochs=0.8)
    run(coco, tmp_path / "full", epochs=0.8, channels_last=True)
    half, full = (
        torch.load(tmp_path / name / "model_final.pth", weights_only=True)
        for name in ("half", "full")
    )
    assert (
        half["settings"]["precision"] == "bfloat16" and full["settings"]["precision"] == "float32"
    )
    assert half["processor"] == full["processor"] != ""
    name = "roi_heads.box_head.fc1.weight"
    assert half["model"][name].dtype == torch.float32
    assert not torch.equal(half["model"][name], full["model"][name])


def one_image(tmp_path, boxes=((10, 10, 30, 30),), width=120, height=100):
    """A file of one image of 120 x 100 px, whatever it says."""
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (100, 120, 3), np.uint8)).save(tmp_path / "a.png")
    annotations = [
        {"id": i + 1, "image_id": 1, "category_id": 1, "bbox": box, "area": box[2] * box[3]}
        for i, box in enumerate(boxes)
    ]
    image = {"id": 1, "file_name": "a.png", "height": height, "width": width}
    categories = [{"id": 1, "name": "cat"}]
    content = {"images": [image], "annotations": annotations, "categories": categories}
    (tmp_path / "train.json").write_text(json.dumps(content))
    return str(tmp_path / "train.json"), str(tmp_path), "cat"


@pytest.mark.parametrize("architecture", ["oln_box", "faster_rcnn"])
def test_boxes_too_small_for_float32(tmp_path, architecture):
    """One such box in a large data set would end the training with an AssertionError."""
    boxes = [[1e-5, 10, 1e-5, 30], [100, 10, 1e-5, 30], [10, 10, 30, 30], [5.5, 5, 1e-6, 9]]
    config = {key: value for key, value in CONFIG.items() if key != "ltrb_init"}
    config["architecture"] = architecture
    arguments = one_image(tmp_path, boxes)
    train(
        *arguments,
        str(tmp_path / "out"),
        config=config,
        epochs=6,
        batch_size=1,
        workers=0,
        device="cpu",
    )
    assert (tmp_path / "out/model_final.pth").exists()
    target = {"boxes": torch.tensor([[0, 0, 1e-45, 9], [1, 2, 3, 4]]), "labels": torch.ones(2)}
    target = Transform(50, 60).resize(torch.rand(3, 100, 120), target)[1]
    assert target["boxes"].tolist() == [[0.5, 1, 1.5, 2]] and len(target["labels"]) == 1


def test_image_of_another_size(tmp_path):
    """The boxes of a file that speaks of larger images would be clipped and learnt."""
    arguments = one_image(tmp_path, width=240, height=200)
    with pytest.raises(InputError, match="a.png: is 120 x 100 px, but .*train.json says 240 x 200"):
        images_of(*arguments)[View(0, 100)]


@pytest.mark.parametrize("workers", [0, 1])
def test_bad_image_is_one_sentence(tmp_path, workers):
    """Loading in other processes must not bury the sentence in a worker's traceback."""
    arguments = one_image(tmp_path)
    (tmp_path / "a.png").write_text("no image")
    with pytest.raises(InputError) as error:
        train(*arguments, str(tmp_path / "out"), config=CONFIG, workers=workers, device="cpu")
    message = str(error.value)
    assert message.startswith(f"{tmp_path}/a.png: is no image") and "\n" not in message


def test_images_are_upright_rgb(tmp_path):
    """Cameras store turned pictures with a note; grey ones have one channel."""
    picture = Image.new("L", (40, 20), 255)
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.save(tmp_path / "turned.jpg", exif=exif)
    image = read_image(str(tmp_path / "turned.jpg"))
    assert image.shape == (3, 40, 20) and image.min() == 1
    (tmp_path / "broken.jpg").write_text("no image")
    for name in ("broken.jpg", "gone.jpg"):
        with pytest.raises(InputError, match=name):
            read_image(str(tmp_path / name))


# Keeps what each process has learnt. With --resume as on nodes without a shared folder.
TWO_PROCESSES = """
import os, sys, torch
from oln_d2.cli import main
from oln_d2.standalone.training import Training

rank, args = int(os.environ.get("LOCAL_RANK", 0)), sys.argv[1:]
output = args.index("--output") + 1
path = f"{args[output]}/rank{rank}.pth"
Training.on_train_end = lambda self: torch.save(self.model.state_dict(), path)
if "--resume" in args:
    args[output] += ("", "/other")[rank]
sys.exit(main(args))
"""


def command(*args, **kwargs):
    env = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "PYTHONWARNINGS": "ignore",
    }
    return subprocess.run(
        [sys.executable, *map(str, args)],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
        **kwargs,
    )


TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


@pytest.mark.parametrize(
    "launcher, number",
    [(TORCHRUN, 2), ([], 2), pytest.param([], 3, marks=pytest.mark.heavy)],
    ids=["torchrun", "devices", "three"],
)
def test_several_processes(coco, tmp_path, launcher, number):
    """
    `torchrun` and `--devices` must train one model on shares of each batch, find in the evaluation
    what one process finds, and refuse to go on from different iterations.
    """
    (tmp_path / "two.py").write_text(TWO_PROCESSES)
    output = tmp_path / "out"
    annotations = coco / "coco/annotations"
    validation = [
        "--val-json",
        annotations / "instances_val2017.json",
        "--val-images",
        coco / "coco/val2017",
    ]
    args = [*launcher, tmp_path / "two.py", *options(coco, output, *validation)]
    args += [] if launcher else ["--devices", number, "--batch-size", number]
    result = command(*args)
    assert result.returncode == 0, result.stderr
    assert f"{4 - number} iterations of {number}" in result.stdout
    assert result.stdout.count("Protocol xclass") == 1
    detections = json.loads((output / "coco_instances_results.json").read_text())
    assert {d["image_id"] for d in detections} == {1, 2, 3, 4, 5}
    first, *others = (torch.load(output / f"rank{i}.pth", weights_only=True) for i in range(number))
    for other in others:
        assert all(torch.equal(first[name], other[name]) for name in first)
    if not launcher:
        weights = ["--weights", output / "model_final.pth", "--lr", "0"]
        alone = options(coco, tmp_path / "alone", *validation, *weights)
        for option in ("--depth", "--min-size", "--max-size"):
            del alone[alone.index(option) : alone.index(option) + 2]
        alone.remove("--scratch")
        assert main(alone) == 0
        for name in ("coco_instances_results.json", "open_world_results.json"):
            assert (output / name).read_text() == (tmp_path / "alone" / name).read_text()
    if number == 3:
        return
    result = command(*args, "--resume")
    assert result.returncode != 0
    assert "start at iterations [2, 0]; put the output folder where all nodes" in result.stderr


def test_several_processes_end_when_told_to(coco, tmp_path):
    """SIGTERM, as SLURM sends it, must end all processes, and not leave them waiting for ever."""
    args = [sys.executable, "-m", "oln_d2", *map(str, options(coco, tmp_path / "out"))]
    args += ["--devices", "2", "--batch-size", "2", "--epochs", "999", "--checkpoint-every", "3"]
    env, quiet = {**os.environ, "OMP_NUM_THREADS": "1"}, subprocess.DEVNULL
    process = subprocess.Popen(
        args, cwd=ROOT, env=env, stdout=quiet, stderr=quiet, start_new_session=True
    )
    try:
        while not (tmp_path / "out/checkpoint.pth").exists():
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(signal.SIGSTOP)
        time.sleep(1)  # the other process now waits for the gradients of this one
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGCONT)
        assert process.wait(60) == 130
        for _ in range(100):  # what is killed takes a moment to be gone
            if not _group_lives(process.pid):
                break
            time.sleep(0.1)
        assert not _group_lives(process.pid)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def _group_lives(group):
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize("arguments", [["train"], ["quickstart", "--engine", "standalone"]])
def test_without_lightning(coco, tmp_path, monkeypatch, capsys, arguments):
    """Who lacks the extra must be given its name, and needs it for training only."""
    monkeypatch.setitem(sys.modules, "pytorch_lightning", None)
    monkeypatch.delitem(sys.modules, "oln_d2.standalone.training", raising=False)
    if arguments == ["train"]:
        arguments = options(coco, tmp_path / "out")
    else:
        arguments = [*arguments, "--output", str(tmp_path / "out"), "--images", "4"]
    assert main(arguments) == 2
    assert "install the extra `train`" in capsys.readouterr().err


def test_help_tells_the_defaults():
    """The command leaves what is not given to the function: its help must not say otherwise."""
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    told = {action.dest: action.help for action in parser._actions}
    checked = 0
    for name, parameter in signature(train).parameters.items():
        value = parameter.default
        if type(value) in (int, float, str):
            value = int(value) if isinstance(value, float) else value
            assert re.search(rf"default {value}\b", told[name]), name
            checked += 1
    assert checked == 12


def test_command_names_bad_input(coco, tmp_path):
    """Bad input on the command line must end in one sentence and not in a traceback."""
    more = "--train-json", tmp_path / "gone.json"
    result = command("-m", "oln_d2", *options(coco, tmp_path / "out", *more))
    assert result.returncode == 2
    assert result.stderr.startswith("error: ") and "gone.json: no such file" in result.stderr
    assert "Traceback" not in result.stderr and not (tmp_path / "out").exists()
