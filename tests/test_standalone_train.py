"""Standalone training as users run it: real runs on tiny data."""

import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, make_coco
from PIL import Image

from oln_d2.errors import InputError
from oln_d2.standalone import build_detector, load_detector, save_checkpoint, train
from oln_d2.standalone.data import CocoImages, TrainingBatches, read_image

CONFIG = {
    "depth": 10, "norm": "GN", "fpn_channels": 32, "trainable_backbone_layers": 5,
    "anchor_sizes": (16, 32, 64, 128), "min_size": (64, 96), "max_size": 128,
    "representation_size": 32, "box_batch_size_per_image": 32, "rpn_pre_nms_top_n_train": 100,
    "rpn_pre_nms_top_n_test": 100, "ltrb_init": 0.5,
}  # fmt: skip


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
        str(annotations / "instances_train2017.json"), str(coco / "coco/train2017"), "voc",
        str(output), val_json=str(annotations / "instances_val2017.json"),
        val_images=str(coco / "coco/val2017"),
        **settings,
    )  # fmt: skip


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
    # P5 is too coarse for these images: no anchor of it trains, no RoI is pooled from it.
    assert not [name for name in same if not name.startswith("backbone.fpn.layer_blocks.3.")]
    detections = json.loads((output / "coco_instances_results.json").read_text())
    assert {d["image_id"] for d in detections} == {1, 2, 3, 4, 5}
    report = json.loads((output / "open_world_results.json").read_text())["results"][0]
    assert report["protocol"] == "xclass" and report["num_images"] == 5
    assert report["seen"]["AR@1500"] == result["seen"]["AR@1500"]
    (found,) = after([read_image(str(coco / "coco/val2017/000000000001.jpg"))])
    first = next(d for d in detections if d["image_id"] == 1)
    assert first["score"] == pytest.approx(found["scores"][0].item(), abs=1e-5)


class Interrupt(Exception):
    pass


def test_resumed_run_is_the_uninterrupted_one(coco, uninterrupted, tmp_path, monkeypatch):
    """Order, flips, scales, samples, momentum and rate must all continue where they were."""
    import oln_d2.standalone.training as module

    save, saved = module.save_checkpoint, []

    def save_then_stop(*args, **kwargs):
        save(*args, **kwargs)
        saved.append(args)
        raise Interrupt

    output = tmp_path / "resumed"
    monkeypatch.setattr(module, "save_checkpoint", save_then_stop)
    with pytest.raises(Interrupt):
        run(coco, output)
    monkeypatch.undo()
    torch.manual_seed(99)  # what is drawn between must not matter
    assert torch.load(output / "checkpoint.pth", weights_only=True)["iteration"] == 3
    result = run(coco, output, resume=True)
    expected = parameters(uninterrupted[0])
    assert all(torch.equal(expected[name], value) for name, value in parameters(output).items())
    assert result["all"]["AR@100"] == uninterrupted[1]["all"]["AR@100"]
    # Complete: resumed once more, it only evaluates.
    run(coco, output, resume=True)


@pytest.mark.parametrize(
    "change, message",
    [
        ({}, "checkpoint.pth: exists; resume"),
        ({"resume": True, "lr": 0.5}, "was trained with lr 0.0025, not 0.5"),
        ({"resume": True, "config": {**CONFIG, "max_size": 200}}, "was trained with config"),
        ({"val_images": None}, "give both or neither"),
        ({"batch_size": 0}, "batch_size 0"),
        ({"amp": True}, "amp needs a GPU"),
        ({"weights": "gone.pth"}, "gone.pth: no such file"),
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


def test_diverged_training_stops(coco, tmp_path):
    """NaN weights must not be trained on for days, nor saved."""
    model = build_detector(**CONFIG)
    torch.nn.init.constant_(model.roi_heads.box_predictor.box_score.bias, float("nan"))
    save_checkpoint(model, str(tmp_path / "nan.pth"))
    with pytest.raises(FloatingPointError, match="iteration 0.*learning rate"):
        run(coco, tmp_path / "out", weights=str(tmp_path / "nan.pth"))
    assert not (tmp_path / "out/checkpoint.pth").exists()


def test_batches_cover_every_epoch_and_are_shared():
    """
    Each image once an epoch; processes take disjoint parts of the same batch; any start will do.
    """
    whole = list(TrainingBatches(7, 4, range(14), seed=3))
    flat = [index for batch in whole for index in batch]
    for epoch in range(8):
        assert sorted(i for i, _ in flat[7 * epoch : 7 * epoch + 7]) == list(range(7))
    assert flat[:7] != flat[7:14] and 10 < sum(flip for _, flip in flat) < 46
    assert list(TrainingBatches(7, 4, range(5, 14), seed=3)) == whole[5:]
    parts = [list(TrainingBatches(7, 4, range(14), 3, rank, 2)) for rank in range(2)]
    assert [a + b for a, b in zip(*parts)] == whole
    assert list(TrainingBatches(7, 4, range(14), seed=4)) != whole


def test_flipped_images(coco):
    """A flip must move boxes with the pixels; unseen objects and crowds must not be there."""
    dataset = CocoImages(
        str(coco / "coco/annotations/instances_train2017.json"),
        str(coco / "coco/train2017"), "voc", training=True,
    )  # fmt: skip
    assert dataset.image_ids == [1, 2, 3, 4, 5]
    assert [len(dataset[i, False][1]["boxes"]) for i in range(5)] == [2, 1, 2, 2, 2]
    (image, target), (flipped, flipped_target) = dataset[0, False], dataset[0, True]
    for box, other in zip(target["boxes"].int(), flipped_target["boxes"].int()):
        part = image[:, box[1] : box[3], box[0] : box[2]]
        assert torch.equal(part.flip(2), flipped[:, other[1] : other[3], other[0] : other[2]])


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


def command(*args, launcher=("-m",), **kwargs):
    env = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "PYTHONWARNINGS": "ignore",
    }
    return subprocess.run(
        [sys.executable, *launcher, "oln_d2", *map(str, args)],
        cwd=ROOT, env=env, capture_output=True, text=True, timeout=300, **kwargs,
    )  # fmt: skip


def test_two_processes(coco, tmp_path):
    """`torchrun` must train one model on shares of each batch, and evaluate every image once."""
    annotations = coco / "coco/annotations"
    result = command(
        "train", "--train-json", annotations / "instances_train2017.json",
        "--images", coco / "coco/train2017", "--split", "voc",
        "--val-json", annotations / "instances_val2017.json", "--val-images", coco / "coco/val2017",
        "--output", tmp_path, "--depth", 10, "--scratch", "--min-size", 64, "--max-size", 96,
        "--epochs", 0.8, "--batch-size", 2, "--device", "cpu", "--workers", 0,
        launcher=("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m"),
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "2 iterations of 2" in result.stdout and result.stdout.count("Protocol xclass") == 1
    detections = json.loads((tmp_path / "coco_instances_results.json").read_text())
    assert {d["image_id"] for d in detections} == {1, 2, 3, 4, 5}
    assert (tmp_path / "model_final.pth").exists()


def test_command_names_bad_input(coco, tmp_path):
    """Bad input on the command line must end in one sentence and not in a traceback."""
    images = coco / "coco/train2017"
    result = command(
        "train", "--train-json", tmp_path / "gone.json", "--images", images, "--split", "voc",
        "--scratch", "--output", tmp_path / "out",
    )  # fmt: skip
    assert result.returncode == 2
    assert result.stderr.startswith("error: ") and "gone.json: no such file" in result.stderr
    assert "Traceback" not in result.stderr and not (tmp_path / "out").exists()
