"""Standalone training as users run it: real runs on tiny data."""

import json
import os
import resource
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, make_coco
from PIL import Image

from oln_d2.checks import InputError
from oln_d2.cli import main
from oln_d2.standalone import build_detector, load_detector, save_checkpoint, train
from oln_d2.standalone.data import CocoImages, TrainingBatches, read_image
from oln_d2.standalone.models import Transform


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
    # P5 is too coarse for these images: no anchor of it trains, no RoI is pooled from it.
    assert not [name for name in same if not name.startswith("backbone.fpn.layer_blocks.3.")]
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


def test_resumed_run_is_the_uninterrupted_one(coco, uninterrupted, tmp_path, monkeypatch, capsys):
    """
    Order, flips, scales, samples, momentum and rate must all continue where they were; with a
    mistyped output folder, a run that starts anew must say so.
    """
    import oln_d2.standalone.training as module

    save, saved = module.save_checkpoint, []

    def save_then_stop(*args, **kwargs):
        save(*args, **kwargs)
        saved.append(args)
        raise Interrupt

    output = tmp_path / "resumed"
    monkeypatch.setattr(module, "save_checkpoint", save_then_stop)
    with pytest.raises(Interrupt):
        run(coco, output, resume=True)
    assert "from the start" in capsys.readouterr().out
    monkeypatch.undo()
    torch.manual_seed(99)  # what is drawn between must not matter
    assert torch.load(output / "checkpoint.pth", weights_only=True)["iteration"] == 3
    result = run(coco, output, resume=True)
    assert "resumed after 3" in capsys.readouterr().out
    expected = parameters(uninterrupted[0])
    assert all(torch.equal(expected[name], value) for name, value in parameters(output).items())
    assert result["all"]["AR@100"] == uninterrupted[1]["all"]["AR@100"]
    # Complete: resumed once more, it only evaluates. Weights to start from may be gone by then.
    run(coco, output, resume=True, weights="gone.pth")


@pytest.mark.parametrize(
    "change, message",
    [
        ({}, "checkpoint.pth: exists; resume"),
        ({"resume": True, "lr": 0.5}, "was trained with lr 0.0025, not 0.5"),
        ({"resume": True, "config": {**CONFIG, "max_size": 200}}, "with max_size 128, not 200"),
        ({"val_images": None}, "give both or neither"),
        ({"amp": True}, "amp needs a GPU"),
        ({"weights": "gone.pth"}, "gone.pth: no such file"),
        ({"config": {"architecture": "oln_mask"}}, "architecture is oln_mask; .* train_net.py"),
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
        *("batch_size", "lr", "warmup", "amp", "seed", "number of processes"),
    } <= set(settings)
    for name in settings:
        torch.save({**content, "settings": {**settings, name: "x"}}, tmp_path / "checkpoint.pth")
        with pytest.raises(InputError, match=f"was trained with {name} x, not"):
            run(coco, tmp_path, resume=True)


def test_resume_a_run_of_before(coco, uninterrupted, tmp_path):
    """Checkpoints held only the settings that were given; such runs must go on, and no others."""
    content = torch.load(uninterrupted[0] / "checkpoint.pth", weights_only=True)
    settings, later = content["settings"], content["config"].keys() - {"architecture", *CONFIG}
    old = {name: value for name, value in settings.items() if name not in later}
    assert "box_nms_thresh" in later
    torch.save({**content, "settings": old}, tmp_path / "checkpoint.pth")
    run(coco, tmp_path, resume=True)
    with pytest.raises(InputError, match="was trained with box_nms_thresh 0.7, not 0.5"):
        run(coco, tmp_path, resume=True, config={**CONFIG, "box_nms_thresh": 0.5})


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
        arguments = str(tmp_path / "train.json"), str(coco / "coco/train2017"), "voc", True
        digests.append(CocoImages(*arguments).digest())
        assert CocoImages(*arguments).digest() == digests[-1]
    assert len(set(digests)) == 4


def test_resume_restores_the_scale_of_half_precision(tmp_path):
    """Otherwise the first steps of a resumed run on a GPU would be lost to overflows."""
    model = build_detector(**CONFIG)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    states = {
        "optimizer": optimizer.state_dict(),
        "scaler": torch.amp.GradScaler("cpu", init_scale=8.0).state_dict(),
    }
    path = str(tmp_path / "checkpoint.pth")
    save_checkpoint(model, path, iteration=3, settings={}, **states)
    scaler = torch.amp.GradScaler("cpu")
    assert _restore(path, {}, model, optimizer, scaler) == 3 and scaler.get_scale() == 8


def test_rate_warms_up_and_steps(uninterrupted):
    """A wrong schedule trains, only worse."""
    factors = [_lr_factor(i, 100, 10) for i in (0, 5, 10, 74, 75, 87, 88)]
    assert factors == pytest.approx([0.001, 0.5005, 1, 1, 0.1, 0.1, 0.01])
    # 250 iterations: after 187.5 and 218.75.
    factors = [_lr_factor(i, 250, 0) for i in (187, 188, 218, 219)]
    assert factors == pytest.approx([1, 0.1, 0.1, 0.01])
    # The paper's 0.02 is for 16 images; this is of the last iteration of 2.
    content = torch.load(uninterrupted[0] / "checkpoint.pth", weights_only=True)
    for group in content["optimizer"]["param_groups"]:
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
    assert "in another output folder" in message and "checkpoint.pth" in message
    assert not (tmp_path / "out/model_final.pth").exists()
    last = torch.load(tmp_path / "out/checkpoint.pth", weights_only=True)["model"]
    assert all(value.isfinite().all() for value in last.values())


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
        (3e38, FloatingPointError, "iteration 0.*learning rate"),
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
        str(coco / "coco/train2017"),
        "voc",
        training=True,
    )
    assert dataset.image_ids == [1, 2, 3, 4, 5]
    assert [len(dataset[i, False][1]["boxes"]) for i in range(5)] == [2, 1, 2, 2, 2]
    (image, target), (flipped, flipped_target) = dataset[0, False], dataset[0, True]
    for box, other in zip(target["boxes"].int(), flipped_target["boxes"].int()):
        part = image[:, box[1] : box[3], box[0] : box[2]]
        assert torch.equal(part.flip(2), flipped[:, other[1] : other[3], other[0] : other[2]])


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
        CocoImages(*arguments, training=True)[0, False]


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
import oln_d2.standalone.training as training
from oln_d2.cli import main

def keep_then_evaluate(model, dataset, ground_truth, output, workers):
    torch.save(model.state_dict(), f"{output}/rank{rank}.pth")
    return evaluate(model, dataset, ground_truth, output, workers)

evaluate, training.evaluate_detector = training.evaluate_detector, keep_then_evaluate
rank, args = os.environ["RANK"], sys.argv[1:]
if "--resume" in args:
    args[args.index("--output") + 1] += ("", "/other")[int(rank)]
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


def test_two_processes(coco, tmp_path):
    """
    `torchrun` must train one model on shares of each batch, evaluate every image once, and refuse
    to go on from different iterations.
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
    args = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        tmp_path / "two.py",
        *options(coco, output, *validation),
    ]
    result = command(*args)
    assert result.returncode == 0, result.stderr
    assert "2 iterations of 2" in result.stdout and result.stdout.count("Protocol xclass") == 1
    detections = json.loads((output / "coco_instances_results.json").read_text())
    assert {d["image_id"] for d in detections} == {1, 2, 3, 4, 5}
    assert (output / "model_final.pth").exists()
    first, second = (torch.load(output / f"rank{i}.pth", weights_only=True) for i in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    result = command(*args, "--resume")
    assert result.returncode != 0
    assert "start at iterations [2, 0]; put the output folder where all nodes" in result.stderr


def test_command_names_bad_input(coco, tmp_path):
    """Bad input on the command line must end in one sentence and not in a traceback."""
    more = "--train-json", tmp_path / "gone.json"
    result = command("-m", "oln_d2", *options(coco, tmp_path / "out", *more))
    assert result.returncode == 2
    assert result.stderr.startswith("error: ") and "gone.json: no such file" in result.stderr
    assert "Traceback" not in result.stderr and not (tmp_path / "out").exists()
