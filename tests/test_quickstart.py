"""The quickstart as newcomers run it, with less data; and that its data is what its text says."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import NEEDS_DETECTRON2, ROOT
from PIL import Image

from oln_d2.checks import InputError
from oln_d2.cli import main
from oln_d2.quickstart import make_dataset, quickstart
from oln_d2.quickstart.run import describe
from oln_d2.quickstart.synthetic import KNOWN, NOVEL, NUM_KNOWN, NUM_NOVEL, SIZE, draw_image

FILES = {"proposals.png", "ar_novel.png", "ar_known.png"}


def load(folder, part):
    return json.loads((folder / f"{part}.json").read_text())


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("synthetic")
    make_dataset(folder / "data", seed=1, num_train=30, num_test=30)
    make_dataset(folder / "control", seed=1, num_train=30, num_test=30, control=True)
    return folder


def test_novel_objects_are_never_annotated_in_training(data):
    """Else the comparison would be of something else: annotations of the training images are of
    known objects only, those of the test images of both."""
    names = {
        category["id"]: category["name"] for category in load(data / "data", "train")["categories"]
    }
    found = {
        part: {names[a["category_id"]] for a in load(data / "data", part)["annotations"]}
        for part in ("train", "test")
    }
    assert found["train"] == set(KNOWN) and found["test"] == set(KNOWN + NOVEL)


def test_control_differs_in_the_novel_objects_of_the_training_images_only(data):
    """Any other difference would make the control none."""
    for part in ("train", "test"):
        for path in sorted((data / "data" / part).iterdir()):
            image = np.asarray(Image.open(path))
            control = np.asarray(Image.open(data / "control" / part / path.name))
            assert image.shape == (SIZE, SIZE, 3)
            assert np.array_equal(image, control) == (part == "test")
    assert load(data / "data", "test") == load(data / "control", "test")


def test_data_follows_from_the_seed():
    """Numbers could not be repeated, or seeds would not be independent."""
    images = [draw_image(np.random.default_rng([seed, 0, 0])) for seed in (0, 0, 1)]
    assert np.array_equal(images[0][0], images[1][0]) and images[0][1] == images[1][1]
    assert not np.array_equal(images[0][0], images[2][0])


def test_objects_are_what_the_annotations_say():
    """Boxes and areas must be those of what is drawn, and as many as the text says."""
    numbers = []
    for index in range(40):
        _, objects = draw_image(np.random.default_rng([5, 0, index]))
        known = sum(category <= len(KNOWN) for category, _, _ in objects)
        numbers.append((known, len(objects) - known))
        for _, (x, y, w, h), area in objects:
            assert 0 <= x and 0 <= y and x + w <= SIZE and y + h <= SIZE
            assert 0.2 * w * h < area <= w * h + 1 and min(w, h) > 15
    known, novel = np.transpose(numbers)
    assert known.min() >= NUM_KNOWN[0] and known.max() == NUM_KNOWN[1]
    assert novel.max() == NUM_NOVEL[1] and np.mean(novel >= NUM_NOVEL[0]) > 0.9


def test_boxes_are_tight(monkeypatch):
    """A box that is off by some pixels would cap the recall at high IoU."""
    import oln_d2.quickstart.synthetic as synthetic

    def flat(rng, colour, contrast, height, width):
        return np.full((height, width, 3), 0.0 if height == SIZE else 255.0, np.float32)

    monkeypatch.setattr(synthetic, "_texture", flat)
    monkeypatch.setattr(synthetic, "NUM_KNOWN", (1, 1))
    for index in range(20):
        image, objects = draw_image(np.random.default_rng([6, 0, index]), with_novel=False)
        ((_, (x, y, w, h), area),) = objects
        drawn = image[..., 0] > 100
        ys, xs = drawn.any(axis=1).nonzero()[0], drawn.any(axis=0).nonzero()[0]
        actual = [xs[0], ys[0], xs[-1] + 1, ys[-1] + 1]
        # The tip of a triangle or star covers less than half of its last pixels.
        np.testing.assert_allclose(actual, [x, y, x + w, y + h], atol=4)
        assert area == pytest.approx(drawn.sum(), rel=0.05)


def test_quickstart_command(tmp_path):
    """The README's first command: table, meaning and pictures; given again, it repeats no work."""
    output = tmp_path / "out"
    args = [
        "quickstart",
        "--engine",
        "standalone",
        "--images",
        8,
        "--epochs",
        1,
        "--output",
        output,
    ]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    runs = []
    for _ in range(2):
        run = subprocess.run(
            [sys.executable, "-m", "oln_d2", *map(str, args)],
            cwd=ROOT,
            env=env,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert run.returncode == 0, run.stderr
        runs.append(run.stdout)
    for text in ("OLN-Box", "Faster R-CNN", "novel @10", "known @100", "one seed", "designed"):
        assert text in runs[0]
    assert "2 iterations of 4" in runs[0] and runs[1].count("trained before") == 2
    assert "about 1 min" in runs[0].splitlines()[0]
    following = runs[0].splitlines()[-1].split()  # the next command that it suggests
    assert following[:4] == ["python", "-m", "oln_d2", "visualize"]
    subprocess.run([sys.executable, *following[1:]], cwd=ROOT, env=env, check=True, timeout=300)
    assert list((output / "pictures").glob("*.html"))
    table = [line for line in runs[0].splitlines() if "Faster R-CNN  " in line]
    assert table and table == [line for line in runs[1].splitlines() if "Faster R-CNN  " in line]
    for name in FILES:
        assert Image.open(output / name).size[0] > 500
    other = subprocess.run(
        [sys.executable, "-m", "oln_d2", *map(str, args), "--seed", "3"],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert other.returncode == 2 and "with seed 0, not 3; choose another --output" in other.stderr


@NEEDS_DETECTRON2
def test_engines_train_with_the_same_settings(tmp_path, monkeypatch):
    """The quickstart's numbers would depend on what is installed by more than chance."""
    import oln_d2.quickstart.detectron2_engine as detectron2_engine
    import oln_d2.quickstart.standalone_engine as standalone_engine
    from oln_d2.standalone.schedule import lr_factor
    from oln_d2.standalone.training import WEIGHT_DECAY

    class Configured(Exception):
        pass

    def stop(*args, **kwargs):
        raise Configured(*args, kwargs)

    make_dataset(tmp_path / "data", seed=0, num_train=22, num_test=4)
    monkeypatch.setattr(detectron2_engine, "Trainer", stop)
    monkeypatch.setattr(standalone_engine, "train", stop)
    for model in ("oln_box", "faster_rcnn"):
        with pytest.raises(Configured) as stopped:
            detectron2_engine.train_and_detect(model, tmp_path / "data", tmp_path, 3, 5.0)
        cfg = stopped.value.args[0]
        assert torch.initial_seed() == 3  # or the weights would follow from chance
        with pytest.raises(Configured) as stopped:
            standalone_engine.train_and_detect(model, tmp_path / "data", tmp_path, 3, 5.0)
        settings = stopped.value.args[-1]
        config = settings["config"]
        solver = cfg.SOLVER
        assert (solver.IMS_PER_BATCH, solver.BASE_LR, solver.WARMUP_ITERS, cfg.SEED) == (
            settings["batch_size"],
            settings["lr"],
            settings["warmup"],
            settings["seed"],
        )
        assert solver.MAX_ITER == round(22 * settings["epochs"] / 4) == 28
        assert solver.WEIGHT_DECAY == WEIGHT_DECAY
        factors = [lr_factor(i, solver.MAX_ITER, 0) for i in range(solver.MAX_ITER)]
        steps = [i for i in range(1, len(factors)) if factors[i] != factors[i - 1]]
        assert solver.STEPS == tuple(steps)
        assert (
            cfg.MODEL.FPN.OUT_CHANNELS,
            cfg.MODEL.FPN.NORM,
            cfg.INPUT.MAX_SIZE_TRAIN,
            cfg.MODEL.RPN.PRE_NMS_TOPK_TRAIN,
            cfg.MODEL.RPN.PRE_NMS_TOPK_TEST,
            cfg.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE,
            cfg.MODEL.ROI_BOX_HEAD.FC_DIM,
            cfg.TEST.DETECTIONS_PER_IMAGE,
        ) == tuple(
            config[name]
            for name in (
                "fpn_channels",
                "norm",
                "max_size",
                "rpn_pre_nms_top_n_train",
                "rpn_pre_nms_top_n_test",
                "box_batch_size_per_image",
                "representation_size",
                "box_detections_per_img",
            )
        )


@NEEDS_DETECTRON2
def test_quickstart_with_detectron2(tmp_path):
    """
    Where Detectron2 is installed it trains; its checkpoint must load in the standalone runtime.
    """
    from oln_d2.quickstart.standalone_engine import CONFIGS
    from oln_d2.standalone import build_detector, load_checkpoint

    results = quickstart(tmp_path, engine="detectron2", images=8, epochs=0.5)
    assert list(results) == ["OLN-Box", "Faster R-CNN"]
    assert all((tmp_path / name).exists() for name in FILES)
    model = build_detector(**CONFIGS["oln_box"])
    load_checkpoint(model, str(tmp_path / "oln_box/model_final.pth"))
    # The same settings in both engines: the same detections.
    detections = json.loads((tmp_path / "oln_box/detections.json").read_text())
    expected = [d for d in detections if d["image_id"] == 0]
    from oln_d2.standalone.data import read_image

    with torch.no_grad():
        (found,) = model.eval()([read_image(str(tmp_path / "data/test/000000.png"))])
    assert len(found["scores"]) == len(expected)
    scores = torch.tensor([d["score"] for d in expected])
    torch.testing.assert_close(found["scores"], scores.float(), rtol=0, atol=1e-4)


def test_interrupted_quickstart_goes_on(tmp_path, monkeypatch, capsys):
    """What was trained before the interruption must not be trained again."""
    import oln_d2.quickstart.standalone_engine as engine

    train, trained = engine.train, []

    def train_once(*args, **kwargs):
        trained.append(kwargs["config"]["architecture"])
        if len(trained) == 2:
            raise KeyboardInterrupt
        return train(*args, **kwargs)

    monkeypatch.setattr(engine, "train", train_once)
    settings = {"engine": "standalone", "images": 8, "epochs": 0.5}
    with pytest.raises(KeyboardInterrupt):
        quickstart(tmp_path, **settings)
    threads = torch.get_num_threads()
    quickstart(tmp_path, **settings)
    assert (
        trained == ["oln_box", "faster_rcnn", "faster_rcnn"] and torch.get_num_threads() == threads
    )
    assert "OLN-Box: trained before" in capsys.readouterr().out


def test_folders_of_others_are_left_alone(tmp_path):
    """A mistyped --output must not mix with a user's files."""
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(InputError, match="is not empty"):
        quickstart(tmp_path, engine="standalone")
    with pytest.raises(InputError, match="jax; it has to be one of auto"):
        quickstart(tmp_path / "new", engine="jax")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "option, value, message",
    [
        ("--images", "0", "images is 0; it has to be 1 or more"),
        ("--epochs", "nan", "epochs is nan; it has to be a number above 0"),
        ("--epochs", "-1", "epochs is -1.0; it has to be a number above 0"),
        ("--seed", "-1", "seed is -1; it has to be 0 or more"),
    ],
)
def test_options_have_limits(tmp_path, capsys, option, value, message):
    """A typing mistake must end in a sentence, and leave the folder free for the right value."""
    output = tmp_path / "out"
    assert main(["quickstart", "--output", str(output), option, value]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith(f"error: {message}") and printed.count("\n") == 1
    assert not output.exists()


def test_output_that_is_no_folder(tmp_path):
    """It would end in a traceback; so would a settings file that is not whole."""
    (tmp_path / "file").write_text("kept")
    for output, message in [("file", "is a file"), ("file/below", "cannot be made")]:
        with pytest.raises(InputError, match=f"{output}: {message}"):
            quickstart(tmp_path / output, engine="standalone")
    (tmp_path / "quickstart.json").write_text("")
    with pytest.raises(InputError, match="quickstart.json: not complete, valid JSON"):
        quickstart(tmp_path, engine="standalone")


@NEEDS_DETECTRON2
def test_automatic_engine(tmp_path, monkeypatch):
    """
    A mistake in the engine must not pass for Detectron2 not being installed, and a folder that
    torchvision began must be finished with it.
    """
    monkeypatch.setitem(sys.modules, "oln_d2.quickstart.detectron2_engine", None)
    with pytest.raises(ImportError, match="oln_d2.quickstart.detectron2_engine"):
        quickstart(tmp_path, engine="auto")
    monkeypatch.undo()
    settings = {"engine": "standalone", "seed": 0, "control": False, "images": 8, "epochs": 5.0}
    (tmp_path / "quickstart.json").write_text(json.dumps(settings))
    with pytest.raises(InputError, match="engine standalone, not detectron2; .* the same --engine"):
        quickstart(tmp_path, engine="auto", images=8)


class Result:
    """What `describe` needs of an OpenWorldResult."""

    ground_truth = type("GT", (), {"image_ids": range(100)})

    def __init__(self, novel):
        self.novel = novel

    def ar(self, k, group="unseen"):
        return self.novel


@pytest.mark.parametrize("control", [False, True])
def test_the_text_says_what_was_measured(control):
    """It must name the model that in fact found more, and what the training images showed."""
    text = describe({"OLN-Box": Result(0.2), "Faster R-CNN": Result(0.3)}, control)
    text = " ".join(text.split())
    assert "Here Faster R-CNN finds more" in text and "100 images" in text
    assert ("no novel objects" in text) == control and ("designed" in text) != control
    text = describe({"OLN-Box": Result(0.2), "Faster R-CNN": Result(0.2)}, control)
    assert "Here both find as many" in text
