"""`oln-d2 propose`, and the images of every kind that it reads."""

import csv
import json
import os
import signal
import subprocess
import sys
import threading
import time
import wave

import numpy as np
import pytest
import torch
from conftest import NEEDS_DETECTRON2, ROOT
from PIL import Image
from test_standalone import standalone_model

from oln_d2.checks import InputError
from oln_d2.cli import main
from oln_d2.data.images import open_image
from oln_d2.propose.ahead import ahead
from oln_d2.propose.inputs import find_sources, read_frames
from oln_d2.standalone import save_checkpoint
from oln_d2.standalone.proposer import StandaloneProposer

SETTINGS = {
    "min_size": 96, "max_size": 160, "rpn_pre_nms_top_n_test": 100,
    "anchor_sizes": (16, 32, 64, 128, 256),
}  # fmt: skip
SIZES = [(120, 90), (90, 120), (64, 200), (120, 90), (300, 30), (91, 121)]  # width, height


def noise(width, height, seed=0):
    pixels = np.random.RandomState(seed).randint(
        0, 256, (max(height // 8, 1), max(width // 8, 1), 3)
    )
    return Image.fromarray(pixels.astype(np.uint8)).resize(
        (width, height), Image.Resampling.BICUBIC
    )


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "model.pth"
    save_checkpoint(standalone_model(norm="GN", **SETTINGS), str(path))
    return path


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    for i, size in enumerate(SIZES):
        noise(*size, seed=i).save(folder / ("more" if i % 2 else "") / f"{i}.png")
    return folder


def propose(*arguments):
    return main(["propose", *map(str, arguments)])


def results(output):
    """{file name: entries} of a COCO results file."""
    images = json.loads((output / "images.json").read_text())["images"]
    entries = json.loads((output / "results.json").read_text())
    return {
        image["file_name"]: [e for e in entries if e["image_id"] == image["id"]] for image in images
    }


def array(entries, key="bbox"):
    return np.array([entry[key] for entry in entries])


def same(a, b, tolerance=1e-5, share=1.0):
    """
    The same boxes, to 100 x tolerance pixels, and scores; nearly equal ones may change places.
    """
    assert a.keys() == b.keys()
    for name in a:
        assert len(a[name]) == len(b[name]) > 5
        distance = np.abs(array(a[name])[:, None] - array(b[name])).max(axis=2)
        scores = np.abs(array(a[name], "score")[:, None] - array(b[name], "score"))
        assert ((distance < 100 * tolerance) & (scores < tolerance)).any(axis=1).mean() >= share


def test_boxes_of_the_command_are_those_of_the_model(weights, photos, tmp_path):
    """What the file holds must be what the model says, in pixels of the image, best first."""
    from oln_d2.standalone import load_detector
    from oln_d2.standalone.data import read_image

    assert propose(photos, "--weights", weights, "--output", tmp_path / "out", "--top-k", 50) == 0
    found = results(tmp_path / "out")
    names = ["0.png", "2.png", "4.png", "more/1.png", "more/3.png", "more/5.png"]
    assert list(found) == names
    model = load_detector(str(weights))
    for name in names:
        with torch.no_grad():
            (expected,) = model([read_image(str(photos / name))])
        boxes = array(found[name])
        boxes[:, 2:] += boxes[:, :2]
        assert len(boxes) == 50
        np.testing.assert_allclose(boxes, expected["boxes"][:50].numpy(), atol=1e-3)
        for key, field in ("scores", "score"), ("objectness",) * 2, ("box_scores", "box_score"):
            np.testing.assert_allclose(array(found[name], field), expected[key][:50], atol=1e-5)


@pytest.mark.parametrize(
    "runtime", ["standalone", "onnx", pytest.param("detectron2", marks=NEEDS_DETECTRON2)]
)
def test_max_proposals(weights, photos, tmp_path, capsys, runtime):
    """Who has little time must get the best proposals alone, in every runtime, not mixed up."""
    line = [photos / "0.png", "--device", "cpu", "--top-k", 1000]
    if runtime != "onnx":  # the shipped model
        line += ["--weights", weights]
    if runtime == "detectron2":
        line += ["--config-file", small_recipe(tmp_path)]
    assert propose(*line, "--output", tmp_path / "all") == 0
    assert propose(*line, "--output", tmp_path / "few", "--max-proposals", 6) == 0
    (every,), (few,) = (results(tmp_path / name).values() for name in ("all", "few"))
    best = sorted((entry["objectness"] for entry in every), reverse=True)
    assert 0 < len(few) <= 6 < len(every)
    # Copies come last, and what NMS left out of all may be among the six.
    assert max(entry["objectness"] for entry in few) >= best[0] - 1e-5
    capsys.readouterr()
    assert propose(*line, "--output", tmp_path / "few") == 2
    assert "max_proposals 6" in capsys.readouterr().err
    assert propose(*line, "--output", tmp_path / "none", "--max-proposals", 0) == 2
    assert "max_proposals is 0; it has to be 1 or more" in capsys.readouterr().err


def test_batch_size_does_not_change_boxes(weights, tmp_path):
    """A user must get the same boxes for an image, whatever it is processed with."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for i, size in enumerate(SIZES + SIZES[::-1]):
        noise(*size, seed=i).save(folder / f"{i:02d}.png")
    for batch_size in 1, 3:
        output = tmp_path / str(batch_size)
        assert propose(
            folder, "--weights", weights, "--output", output, "--batch-size", batch_size
        ) == 0  # fmt: skip
    same(results(tmp_path / "1"), results(tmp_path / "3"))


def test_selection(weights, photos, tmp_path, capsys):
    """`--top-k`, `--score` and `--nms` must do as they say."""
    common = [photos / "0.png", "--weights", weights, "--output"]
    assert propose(*common, tmp_path / "all", "--top-k", 2000) == 0
    assert "at most 1500 boxes an image, not 2000" in capsys.readouterr().out
    (every,) = results(tmp_path / "all").values()
    scores = array(every, "score")
    assert (np.diff(scores) <= 0).all() and len(every) > 20
    limit = float(scores[10])
    assert propose(*common, tmp_path / "score", "--score", limit) == 0
    (above,) = results(tmp_path / "score").values()
    assert above == [entry for entry in every if entry["score"] > limit]
    assert propose(*common, tmp_path / "nms", "--nms", 0.2, "--top-k", 8) == 0
    (apart,) = results(tmp_path / "nms").values()
    assert 1 < len(apart) <= 8 and apart[0] == every[0]
    from pycocotools import mask as mask_utils

    iou = mask_utils.iou(array(apart), array(apart), [0] * len(apart))
    assert iou[~np.eye(len(apart), dtype=bool)].max() <= 0.2 + 1e-6


def test_formats(weights, photos, tmp_path):
    """CSV and YOLO text must hold the boxes that the COCO file has, each in its own convention."""
    common = [photos, "--weights", weights, "--output", tmp_path / "out", "--top-k", 5]
    for form in "coco", "csv", "yolo":
        assert propose(*common, "--format", form) == 0
    expected = results(tmp_path / "out")
    with open(tmp_path / "out/proposals.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    assert len(rows) == 5 * len(SIZES)
    for name, entries in expected.items():
        boxes = array(entries)
        own = [row for row in rows if row["file_name"] == name]
        corners = np.array([[float(row[key]) for key in ("x1", "y1", "x2", "y2")] for row in own])
        np.testing.assert_allclose(corners, np.hstack([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]]))
        assert [float(row["objectness"]) for row in own] == [e["objectness"] for e in entries]
        text = (tmp_path / "out/labels" / name).with_suffix(".txt").read_text()
        lines = np.array([line.split() for line in text.splitlines()], float)
        with Image.open(photos / name) as image:
            size = np.array(image.size * 2)
        centre = boxes[:, :2] + boxes[:, 2:] / 2
        np.testing.assert_allclose(
            lines[:, 1:5] * size, np.hstack([centre, boxes[:, 2:]]), atol=size.max() * 1e-5
        )
        np.testing.assert_allclose(lines[:, 5], array(entries, "score"), rtol=1e-5)


def test_labels_do_not_replace_each_other(weights, photos, tmp_path, capsys):
    """YOLO's text of one image must not be lost to that of another with the same stem."""
    noise(50, 60).save(photos / "0.jpg")
    out = ["--weights", weights, "--output", tmp_path / "out", "--format", "yolo"]
    assert propose(photos, *out) == 2
    assert "0.jpg and" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_results_are_evaluated(weights, photos, tmp_path, capsys):
    """With `--gt` the file's ids are taken, so that `evaluate` reads the results as they are."""
    images, annotations = [], []
    for i, size in enumerate(SIZES[:3]):
        folder = "more/" if i % 2 else ""
        images.append(
            {"id": 70 - i, "file_name": f"{folder}{i}.png", "width": size[0], "height": size[1]}
        )
        annotations.append(
            {"id": i + 1, "image_id": 70 - i, "category_id": 1 + i % 2, "bbox": [5, 5, 20, 20]}
            | {"area": 400, "iscrowd": 0}
        )
    categories = [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]
    gt = tmp_path / "gt.json"
    gt.write_text(
        json.dumps({"images": images, "annotations": annotations, "categories": categories})
    )
    inputs = [photos / image["file_name"] for image in images]
    common = ["--weights", weights, "--output", tmp_path / "out", "--gt", gt]
    assert propose(*inputs, *common) == 0
    assert main(["evaluate", str(gt), str(tmp_path / "out/results.json"), "--seen", "cat"]) == 0
    assert "unseen" in capsys.readouterr().out
    ids = {e["image_id"] for e in json.loads((tmp_path / "out/results.json").read_text())}
    assert ids == {70, 69, 68}
    capsys.readouterr()
    before = (tmp_path / "out/results.json").read_bytes()
    assert propose(photos, *common) == 0  # also images that the file does not have
    told = capsys.readouterr().out
    assert "3 left out, not in" in told and "4.png" in told and "0 of them new" in told
    assert len(json.loads(before)) == len(json.loads((tmp_path / "out/results.json").read_text()))
    assert propose(photos / "4.png", *common) == 2
    assert "none of the 1 inputs (" in capsys.readouterr().err
    noise(50, 60).save(photos / "more/0.png")
    assert propose(*inputs, photos / "more/0.png", *common) == 2  # two images of one id
    error = capsys.readouterr().err
    assert str(photos / "0.png") in error and str(photos / "more/0.png") in error
    common[3] = tmp_path / "part"  # more/1.png is 1.png in its own folder
    assert propose(photos / "more/1.png", *common) == 0
    assert {e["image_id"] for e in json.loads((tmp_path / "part/results.json").read_text())} == {69}


def test_turned_images_of_a_ground_truth(weights, tmp_path, capsys):
    """
    Boxes of an image annotated as it is stored are of another frame than those of the upright one:
    runs with the ground truth and without must not take each other's.
    """
    exif = Image.Exif()
    exif[0x0112] = 6
    noise(120, 90).save(tmp_path / "a.jpg", exif=exif)
    noise(120, 90, seed=1).save(tmp_path / "b.jpg")
    images = [
        {"id": i, "file_name": name, "width": 120, "height": 90} for i, name in enumerate("ab")
    ]
    categories = [{"id": 1, "name": "cat"}]
    content = {"images": images, "annotations": [], "categories": categories}
    (tmp_path / "gt.json").write_text(json.dumps(content))
    run = [tmp_path / "a.jpg", tmp_path / "b.jpg", "--weights", weights, "--draw"]
    run += ["--output", tmp_path / "out"]
    gt = ["--gt", tmp_path / "gt.json"]
    sizes = []
    for options, new in ((gt, 2), (gt, 0), ([], 1), ([], 0), (gt, 1)):
        assert propose(*run, *options) == 0
        printed = capsys.readouterr().out
        assert f"{new} of them new" in printed
        assert ("1 image read as stored" in printed) == (options == gt)
        found = json.loads((tmp_path / "out/images.json").read_text())["images"]
        sizes.append([(image["width"], image["height"]) for image in found])
        right = max(x + width for x, _, width, _ in array(results(tmp_path / "out")["a.jpg"]))
        assert right <= sizes[-1][0][0] + 1e-3
        with Image.open(tmp_path / "out/pictures/a.jpg") as picture:
            assert (picture.width > picture.height) == (options == gt)
    assert sizes[0] == sizes[1] == sizes[4] == [(120, 90), (120, 90)]
    assert sizes[2] == sizes[3] == [(90, 120), (120, 90)]


def test_second_run_only_does_what_is_new(weights, photos, tmp_path, monkeypatch):
    """What is done must not be done again; new and changed images must."""
    from oln_d2.standalone.proposer import StandaloneProposer

    seen, detect = [], StandaloneProposer.detect

    def count(self, pixels, sizes):
        seen.extend((width, height) for height, width in sizes)
        return detect(self, pixels, sizes)

    monkeypatch.setattr(StandaloneProposer, "detect", count)
    run = [photos, "--weights", weights, "--output", tmp_path / "out", "--draw", "--draw-top", 3]
    assert propose(*run) == 0 and sorted(seen) == sorted(SIZES)
    before, picture = results(tmp_path / "out"), tmp_path / "out/pictures/0.png.jpg"
    drawn = picture.read_bytes()
    seen.clear()
    assert propose(*run) == 0 and seen == []
    assert results(tmp_path / "out") == before
    noise(77, 66, seed=9).save(photos / "0.png")
    noise(55, 44, seed=9).save(photos / "new.png")
    assert propose(*run) == 0 and sorted(seen) == [(55, 44), (77, 66)]
    after = results(tmp_path / "out")
    assert after["2.png"] == before["2.png"] and after["0.png"] != before["0.png"]
    assert picture.read_bytes() != drawn and len(after) == len(SIZES) + 1
    with Image.open(tmp_path / "out/pictures/more/1.png.jpg") as image:
        assert max(image.size) >= 960


def test_other_settings_are_not_mixed_in(weights, photos, tmp_path, capsys):
    """Proposals of two models or thresholds in one file would be wrong without a word."""
    common = [photos / "0.png", "--output", tmp_path / "out", "--weights"]
    assert propose(*common, weights) == 0
    assert propose(*common, weights, "--top-k", 7) == 2
    assert "top_k 100" in capsys.readouterr().err
    other = tmp_path / "other.pth"
    model = standalone_model(norm="GN", **SETTINGS)
    model.rpn.head.cls_logits.bias.data += 1
    save_checkpoint(model, str(other))
    assert propose(*common, other) == 2
    assert "another model" in capsys.readouterr().err
    assert propose(photos / "more/1.png", *common[1:], weights) == 2
    told = f"proposals for images in {photos}, not in {photos}/more, are in this folder"
    assert told in capsys.readouterr().err


BOXES = {"boxes": [[1, 1, 9, 9]], "scores": [0.5]}


@pytest.mark.parametrize(
    "entry",
    [
        {"frames": ["1.png/../../../000000.jpg"]},
        {"frames": ["/000000.jpg"]},
        {**BOXES, "boxes": [[10**400, 1, 9, 9]]},
        {**BOXES, "scores": None},
        {**BOXES, "masks": [{"size": [90, 120], "counts": "0`h9"}]},
        {**BOXES, "height": "90"},
    ],
)
def test_journals_of_others_are_checked(weights, tmp_path, capsys, entry):
    """Frames could be written to another folder, and numbers end a run with a traceback."""
    noise(90, 120).save(tmp_path / "1.png")
    line = (tmp_path, "--weights", weights, "--output", tmp_path / "out")
    assert propose(*line) == 0
    journal = tmp_path / "out/journal.jsonl"
    first, second = journal.read_text().splitlines()
    changed = {**{n: v for n, v in json.loads(second).items() if n not in BOXES}, **entry}
    journal.write_text(f"{first}\n{json.dumps(changed)}\n")
    capsys.readouterr()
    assert propose(*line) == 2
    told = f"journal.jsonl: the line at byte {len(first) + 1} is broken; remove the file to start"
    assert told in capsys.readouterr().err


def test_killed_run_goes_on(weights, tmp_path):
    """A run that is killed at any point must lose no image and repeat none that is written."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(40):
        noise(90, 120, seed=i).save(folder / f"{i:02d}.png")
    run = ["propose", folder, "--weights", weights, "--batch-size", 2, "--output"]
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", "oln_d2", *map(str, [*run, tmp_path / "killed"])],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    journal = tmp_path / "killed/journal.jsonl"
    while process.poll() is None and not (
        journal.exists() and journal.read_bytes().count(b"\n") > 5
    ):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = journal.read_bytes()
    assert 5 < done.count(b"\n")
    with open(journal, "ab") as f:
        f.write(b'{"name": "39.png", "stamp": [12')  # as if cut while it was written
    assert main(list(map(str, [*run, tmp_path / "killed"]))) == 0
    assert journal.read_bytes().startswith(done) and journal.read_bytes().count(b"\n") == 41
    assert main(list(map(str, [*run, tmp_path / "whole"]))) == 0
    same(results(tmp_path / "killed"), results(tmp_path / "whole"))


def test_images_are_read_while_the_model_runs(weights, photos, tmp_path, monkeypatch):
    """On two cores, a user must not wait for images to be read one after the other."""
    read = threading.Event()

    def prepare(self, image, name):
        ret = original_prepare(self, image, name)
        if name == "2.png":
            read.set()
        return ret

    def detect(self, *arguments):
        assert read.wait(60)  # the second image comes although the first is not done
        return original_detect(self, *arguments)

    original_prepare, original_detect = StandaloneProposer.prepare, StandaloneProposer.detect
    monkeypatch.setattr(StandaloneProposer, "prepare", prepare)
    monkeypatch.setattr(StandaloneProposer, "detect", detect)
    line = photos, "--weights", weights, "--device", "cpu", "--batch-size", 1
    assert propose(*line, "--output", tmp_path / "out") == 0
    assert len(results(tmp_path / "out")) == len(SIZES)


@pytest.mark.parametrize("leaves", [False, True])
def test_reading_ahead_has_a_limit_and_ends(leaves):
    """A million images must not pile up in memory, an error must not be lost, nor a thread stay."""
    made, used = 0, []

    def numbers():
        nonlocal made
        for number in range(20):
            made += 1
            yield number
        raise InputError("the disk is gone")

    threads = threading.active_count()
    with pytest.raises(ZeroDivisionError if leaves else InputError), ahead(numbers(), 3) as items:
        for number in items:
            used.append(number)
            time.sleep(0.005)
            assert made <= len(used) + 3
            if leaves and number == 4:
                _ = 1 / 0
    assert used == list(range(5 if leaves else 20)) and threading.active_count() == threads


def test_unreadable_images_do_not_stop_the_run(weights, photos, tmp_path, capsys):
    """One bad file among thousands must be named in the end, and cost nothing else."""
    (photos / "text.jpg").write_text("not an image")
    whole = (photos / "0.png").read_bytes()
    (photos / "cut.png").write_bytes(whole[: len(whole) // 2])
    (photos / "broken.png").write_bytes(whole[:40] + bytes(200) + whole[240:])
    (photos / "empty.png").write_bytes(b"")
    (photos / "link.png").symlink_to(tmp_path / "gone.png")
    run = [photos, "--weights", weights, "--output", tmp_path / "out", "--contact-sheet"]
    assert propose(*run) == 0
    told = capsys.readouterr().out
    listed = (tmp_path / "out/unreadable.txt").read_text()
    for name in "text.jpg", "cut.png", "broken.png", "empty.png":
        assert f"{photos / name}: " in told and name in listed
    assert f"{photos / 'link.png'}: no such file" in told
    assert len(results(tmp_path / "out")) == len(SIZES)
    assert (tmp_path / "out/contact_sheet_001.jpg").stat().st_size > 1000


def test_nothing_is_left_where_nothing_can_be_read(weights, photos, tmp_path, capsys):
    """A slip such as README.md must not leave a journal and empty results."""
    (tmp_path / "a.md").write_text("not an image")
    (tmp_path / "b.jpg").write_bytes((photos / "0.png").read_bytes()[:200])
    run = ["--weights", weights, "--output", tmp_path / "none"]
    assert propose(tmp_path / "a.md", tmp_path / "b.jpg", *run) == 1
    told = capsys.readouterr().out
    assert "2 could not be read, so nothing is written" in told
    assert f"{tmp_path / 'a.md'}: is no image" in told and f"{tmp_path / 'b.jpg'}: " in told
    assert not (tmp_path / "none").exists()


def test_a_video_without_its_package_stops_nothing(weights, photos, tmp_path, caplog, monkeypatch):
    """One video in a folder stopped all of it, and nobody said which; or it is told hours later."""
    monkeypatch.setitem(sys.modules, "av", None)
    (photos / "street.mp4").write_bytes(bytes(100))
    run = ["--weights", weights, "--output", tmp_path / "out"]
    assert propose(photos, *run) == 0
    for text in caplog.text, (tmp_path / "out/unreadable.txt").read_text():
        assert f"{photos / 'street.mp4'} needs av" in text and "the extra `video`" in text
    assert len(results(tmp_path / "out")) == len(SIZES)


def test_what_is_no_checkpoint_is_said_without_torch(photos, tmp_path, capsys, monkeypatch):
    """Who gave the wrong file had to install PyTorch, 6 GB, to be told so."""
    monkeypatch.setitem(sys.modules, "torch", None)
    assert propose(photos, "--weights", ROOT / "README.md", "--output", tmp_path / "out") == 2
    assert "README.md: is text, not a checkpoint" in capsys.readouterr().err


def test_bad_input_is_one_sentence(weights, photos, tmp_path, capsys):
    """Nothing must start, and the message must name what is wrong."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.txt").write_text("hello")
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / os.fsdecode(b"caf\xe9.jpg")).write_bytes(b"")  # as Latin-1 has it
    (tmp_path / "other.pth").write_bytes(b"not a checkpoint")
    torch.jit.trace(torch.nn.Identity(), torch.zeros(1)).save(str(tmp_path / "script.pt"))
    torch.save({"model": {"fc.weight": torch.zeros(2, 2)}}, tmp_path / "fc.pth")
    out = ["--output", tmp_path / "out"]
    good = ["--weights", weights, *out]
    cases = [
        ([tmp_path / "empty", *good], "no image or video is in this folder"),
        ([tmp_path / "missing.jpg", *good], "missing.jpg"),
        ([tmp_path / "*.tif", *good], "no file matches"),
        ([photos, "--weights", tmp_path / "none.pth", *out], "no such file"),
        ([photos, "--weights", tmp_path / "other.pth", *out], "other.pth"),
        ([photos, "--weights", tmp_path / "fc.pth", *out], "does not say how its model is built"),
        ([photos, "--config-file", "oln_box_R_50_FPN.yaml", *out], "no trained weights"),
        ([photos, *good, "--top-k", 0], "top_k is 0"),
        ([photos, *good, "--batch-size", 0], "batch_size is 0"),
        ([photos, *good, "--score", 2], "score is 2.0"),
        ([photos, *good, "--nms", "nan"], "nms is nan"),
        ([photos, "--weights", weights, "--output", tmp_path / "text.txt"], "is a file"),
        ([photos, "--weights", tmp_path / "script.pt", *out], "script.pt: is TorchScript"),
        ([photos, "--weights", weights, "--output", tmp_path / "text.txt/out"], "Not a directory"),
        ([photos, "--weights", weights, "--output", photos], "outside of"),
        ([tmp_path / "old", *good], "not UTF-8"),
        ([photos, *good, "--gt", tmp_path / "no.json"], "no.json"),
        ([photos, *good, "--gt", tmp_path / "no.json", "--format", "csv"], "has no image ids"),
    ]
    if not torch.cuda.is_available():
        cases.append(([photos, *good, "--device", "cuda"], "finds no CUDA device"))
    for arguments, expected in cases:
        assert propose(*arguments) == 2, expected
        error = capsys.readouterr().err
        assert expected in error and len(error.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_full_disk(weights, photos, tmp_path):
    """It must be said in a sentence; what is done must stay, and the next run go on from it."""
    code = (
        "import resource, signal, sys; from oln_d2.cli import main; "
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (30000, 30000)); sys.exit(main(sys.argv[1:]))"
    )
    run = ["propose", photos, "--weights", weights, "--output", tmp_path / "out"]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, *map(str, run)],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "journal.jsonl: cannot be written" in done.stderr and "what is done stays" in done.stderr
    lines = (tmp_path / "out/journal.jsonl").read_bytes().split(b"\n")
    assert len(lines) > 2
    assert main(list(map(str, run))) == 0
    assert len(results(tmp_path / "out")) == len(SIZES)
    assert (tmp_path / "out/journal.jsonl").read_bytes().split(b"\n")[: len(lines) - 1] == lines[
        :-1
    ]


def test_images_of_every_kind(tmp_path):
    """An image must be looked at as people see it, whatever way its file stores it."""
    grey = np.linspace(0, 255, 40 * 30).reshape(30, 40).astype(np.uint8)
    color = np.stack([grey, grey[::-1], np.full_like(grey, 60)], axis=2)

    def read(image, name, **options):
        image.save(tmp_path / name, **options)
        read = open_image(str(tmp_path / name))
        assert read.mode == "RGB"
        return np.asarray(read).astype(int)

    expected = np.repeat(grey[:, :, None], 3, axis=2)
    assert (read(Image.fromarray(grey), "grey.png") == expected).all()
    deep = grey.astype(np.uint16) * 257
    assert (read(Image.fromarray(deep), "deep.png") == expected).all()
    assert (read(Image.fromarray(deep), "deep.tif") == expected).all()
    assert (read(Image.fromarray(grey.astype(np.float32) / 255), "float.tif") == expected).all()
    assert (read(Image.fromarray(grey > 99), "bits.png") == 255 * (expected > 99)).all()
    rgb = Image.fromarray(color)
    assert np.abs(read(rgb.quantize(256), "palette.png") - color).mean() < 12
    assert np.abs(read(rgb.convert("CMYK"), "cmyk.tif") - color).mean() < 3
    alpha = np.full_like(grey, 255)
    alpha[:10] = 0
    seen = read(Image.fromarray(np.dstack([color, alpha])), "alpha.png")
    assert (seen[:10] == 255).all() and (seen[10:] == color[10:]).all()
    seen = read(Image.fromarray(np.dstack([grey, alpha]), "LA"), "grey_alpha.png")
    assert (seen[:10] == 255).all() and (seen[10:] == expected[10:]).all()
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    turned = read(rgb, "turned.png", exif=exif)
    assert (turned == np.rot90(color, -1)).all()


def test_images_that_are_refused(tmp_path):
    """Values without a meaning and images of a dangerous size must be told, not shown as black."""
    Image.fromarray(np.full((4, 4), np.nan, np.float32)).save(tmp_path / "nan.tif")
    Image.fromarray(np.full((4, 4), 200, np.float32)).save(tmp_path / "high.tif")
    Image.new("1", (20000, 9000)).save(tmp_path / "huge.png")
    for name, reason in (
        ("nan", "not finite"),
        ("high", "expected 0 to 1"),
        ("huge", "million pixels"),
    ):
        (path,) = tmp_path.glob(f"{name}.*")
        with pytest.raises(InputError, match=reason) as error:
            open_image(str(path))
        assert str(path) in str(error.value)


@pytest.mark.parametrize(
    "runtime", ["standalone", pytest.param("detectron2", marks=NEEDS_DETECTRON2)]
)
def test_extreme_sizes(weights, tmp_path, runtime):
    """A single pixel and a very wide panorama must give boxes inside of them, or none."""
    Image.new("RGB", (1, 1), "red").save(tmp_path / "dot.png")
    noise(20000, 1000).save(tmp_path / "panorama.jpg")
    noise(3, 2000).save(tmp_path / "line.png")
    options = ["--weights", weights]
    if runtime == "detectron2":
        options += ["--config-file", small_recipe(tmp_path)]
    paths = [tmp_path / name for name in ("dot.png", "line.png", "panorama.jpg")]
    assert propose(*paths, *options, "--output", tmp_path / "out") == 0
    for path, (name, entries) in zip(paths, results(tmp_path / "out").items()):
        assert path.name == name
        with Image.open(path) as image:
            limits = np.array(image.size)
        boxes = array(entries).reshape(-1, 4)
        assert (boxes >= 0).all() and (boxes[:, 2:] > 0).all()
        assert (boxes[:, :2] + boxes[:, 2:] <= limits + 1e-3).all()
    assert len(results(tmp_path / "out")["panorama.jpg"]) > 10


def small_recipe(folder):
    """A config file for the model of `weights`."""
    path = folder / "recipe.yaml"
    path.write_text(
        f"_BASE_: {ROOT}/configs/cpu/oln_box_R_18_FPN_GN.yaml\n"
        "MODEL:\n  FPN: {OUT_CHANNELS: 32}\n  ROI_BOX_HEAD: {FC_DIM: 64}\n"
        "  RPN: {PRE_NMS_TOPK_TEST: 100}\n"
        "INPUT: {MIN_SIZE_TEST: 96, MAX_SIZE_TEST: 160}\n"
    )
    return path


@NEEDS_DETECTRON2
def test_runtimes_agree(weights, photos, tmp_path):
    """With Detectron2 and without, the same weights must propose the same."""
    options = [photos, "--weights", weights, "--output"]
    assert propose(*options, tmp_path / "a") == 0
    assert propose(*options, tmp_path / "b", "--config-file", small_recipe(tmp_path)) == 0
    same(results(tmp_path / "a"), results(tmp_path / "b"), 1e-4, 0.97)


@NEEDS_DETECTRON2
@pytest.mark.parametrize("name", ["oln_mask", "oln_rpn", "faster_rcnn_1_anchor"])
def test_recipes_of_the_model_zoo(name, photos, tmp_path):
    """A recipe's name is enough, whatever it finds: masks, proposals, detections."""
    from detectron2.modeling import build_model
    from test_configs import load_config

    recipe = f"cpu/{name}_R_18_FPN_GN.yaml"
    path = tmp_path / "model.pth"
    torch.manual_seed(0)
    torch.save({"model": build_model(load_config(recipe)).state_dict()}, path)
    options = ["--config-file", recipe, "--weights", path, "--output", tmp_path / "out"]
    # As a process: in this one the components are registered already.
    line = ["propose", photos / "0.png", *options, "--top-k", 5, "--draw"]
    command = [sys.executable, "-W", "ignore", "-m", "oln_d2", *map(str, line)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (entries,) = results(tmp_path / "out").values()
    assert len(entries) == 5 and ("objectness" in entries[0]) == (name == "oln_mask")
    assert ("segmentation" in entries[0]) == ("mask_score" in entries[0]) == (name == "oln_mask")
    if name == "oln_mask":
        qualities = [array(entries, key) for key in ("objectness", "box_score", "mask_score")]
        np.testing.assert_allclose(
            np.prod(qualities, axis=0) ** (1 / 3), array(entries, "score"), rtol=1e-4
        )
    assert (tmp_path / "out/pictures/0.png.jpg").exists()


def test_video(weights, tmp_path):
    """Frames must be those asked for, and a second run must not decode what is done."""
    import av

    path = tmp_path / "street.mp4"
    with av.open(str(path), "w") as video:
        stream = video.add_stream("mpeg4", rate=10)
        stream.width, stream.height = 128, 96
        for i in range(7):
            frame = av.VideoFrame.from_image(noise(128, 96, seed=i))
            video.mux(stream.encode(frame))
        video.mux(stream.encode())
    (tmp_path / "broken.mp4").write_bytes(path.read_bytes()[:300])
    inputs = [path, tmp_path / "broken.mp4"]
    run = [*inputs, "--weights", weights, "--output", tmp_path / "out", "--every", 3, "--draw"]
    assert propose(*run) == 0
    names = [f"street.mp4/{i:06d}.jpg" for i in (0, 3, 6)]
    assert list(results(tmp_path / "out")) == names
    assert all((tmp_path / "out/pictures" / name).exists() for name in names)
    assert "broken.mp4" in (tmp_path / "out/unreadable.txt").read_text()
    before = (tmp_path / "out/journal.jsonl").read_bytes()
    assert propose(*run) == 0
    assert (tmp_path / "out/journal.jsonl").read_bytes() == before


def test_videos_are_upright(tmp_path):
    """Phones store turned videos with a note: boxes must be those of the video as it is played."""
    import av

    with av.open(str(tmp_path / "phone.mp4"), "w") as video:
        stream = video.add_stream("mpeg4", rate=10)
        stream.width, stream.height = 128, 64
        stream.set_display_rotation(-90)  # counterclockwise: to be turned clockwise
        image = Image.new("RGB", (128, 64), "blue")
        image.paste("red", (0, 0, 64, 64))
        video.mux(stream.encode(av.VideoFrame.from_image(image)))
        video.mux(stream.encode())
    _, (source,) = find_sources([str(tmp_path / "phone.mp4")], str(tmp_path / "out"))
    ((_, image, _),) = read_frames(source)
    pixels = np.asarray(image).astype(int)
    assert pixels.shape == (128, 64, 3)
    assert pixels[:56, :, 0].min() > 200 and pixels[72:, :, 2].min() > 200


def test_videos_that_are_not_whole(weights, tmp_path):
    """What can be read of a video must be there, also as pictures, and the rest be told."""
    import av

    with av.open(str(tmp_path / "a.avi"), "w") as video:
        stream = video.add_stream("png", rate=10)
        stream.width, stream.height, stream.pix_fmt = 128, 96, "rgb24"
        for i in range(5):
            video.mux(stream.encode(av.VideoFrame.from_image(noise(128, 96, seed=i))))
        video.mux(stream.encode())
    frames = (tmp_path / "a.avi").read_bytes().split(b"\x89PNG")
    whole = b"\x89PNG".join(frames)
    (tmp_path / "cut.avi").write_bytes(whole[: len(whole) // 2])
    frames[4] = bytes(200) + frames[4][200:]
    (tmp_path / "a.avi").write_bytes(b"\x89PNG".join(frames))
    with wave.open(str(tmp_path / "sound.mp4"), "wb") as sound:
        sound.setparams((1, 2, 8000, 0, "NONE", None))
        sound.writeframes(bytes(8000))
    run = [tmp_path / name for name in ("a.avi", "cut.avi", "sound.mp4")]
    assert propose(*run, "--weights", weights, "--output", tmp_path / "out", "--draw") == 0
    names = [f"a.avi/{i:06d}.jpg" for i in range(3)] + ["cut.avi/000000.jpg", "cut.avi/000001.jpg"]
    assert list(results(tmp_path / "out")) == names
    assert all((tmp_path / "out/pictures" / name).exists() for name in names)
    told = (tmp_path / "out/unreadable.txt").read_text().splitlines()
    assert len(told) == 3 and "a.avi: cannot be read as a video" in told[0]
    # On one core FFmpeg tells of the half of a frame at the end, on more it leaves that out.
    assert "ends after 2 of 5 frames" in told[1] or "cut.avi: cannot be read" in told[1]
    assert "sound only" in told[2]


def test_pictures_are_not_proposed_on(weights, photos):
    """With the output beside the photos, the next run must not take its pictures for photos."""
    run = [photos, f"{photos}/**/*.jpg", f"{photos}/*.png", "--weights", weights]
    noise(60, 60).save(photos / "a.jpg")
    for _ in range(2):
        assert propose(*run, "--output", photos / "out", "--contact-sheet") == 0
        assert len(results(photos / "out")) == len(SIZES) + 1


def test_pictures_are_those_asked_for(weights, photos, tmp_path):
    """
    Pictures must have as many boxes as the last command says, and none be of an image that broke.
    """
    run = [photos, "--weights", weights, "--output", tmp_path / "out"]
    picture = tmp_path / "out/pictures/0.png.jpg"
    assert propose(*run, "--draw", "--draw-top", 1) == 0
    few = picture.read_bytes()
    assert propose(*run, "--draw", "--draw-top", 30) == 0
    assert picture.read_bytes() != few
    assert propose(*run, "--draw", "--draw-top", 1) == 0
    assert picture.read_bytes() == few
    picture.unlink()
    (photos / "0.png").write_text("broken by now")
    assert propose(*run, "--draw-top", 1, "--contact-sheet") == 0
    assert not picture.exists() and "0.png" in (tmp_path / "out/unreadable.txt").read_text()


def test_no_box_is_left(weights, photos, tmp_path, capsys):
    """Who asks for too high a score must hear so, not look for what went wrong."""
    run = [photos, "--weights", weights, "--output", tmp_path / "out"]
    assert propose(*run) == 0
    assert "--score" not in capsys.readouterr().out
    assert propose(*run[:-1], tmp_path / "none", "--score", 0.999) == 0
    assert "None of them has a box with a score above 0.999" in capsys.readouterr().out


def test_globs_and_repeated_inputs(weights, photos, tmp_path):
    """A glob that the shell left alone must work, and an image named twice count once."""
    inputs = [f"{photos}/*.png", photos / "0.png", f"{photos}/**/1.png"]
    assert propose(*inputs, "--weights", weights, "--output", tmp_path / "out") == 0
    assert list(results(tmp_path / "out")) == ["0.png", "2.png", "4.png", "more/1.png"]
    assert not (tmp_path / "out/unreadable.txt").exists()
