"""`tools/rcnn.py`: R-CNN, on a few small images."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, make_coco

sys.path.append(str(ROOT / "tools"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_coco(tmp_path_factory.mktemp("data"), num_train=8) / "coco"


def run(data, output, *more, **environment):
    files = [
        path
        for part in ("train", "val")
        for path in (data / f"annotations/instances_{part}2017.json", data / f"{part}2017")
    ]
    line = [*files, output, "--seen", "person,dog", "--crop", 64, "--boxes", 40, *more]
    command = [sys.executable, ROOT / "tools/rcnn.py", *line]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(
        list(map(str, command)), cwd=ROOT, env=environment, capture_output=True, text=True
    )


@pytest.mark.heavy
def test_from_photos_to_results(data, tmp_path):
    """
    The results must have the categories of the test file and be evaluated, per class and without
    classes; features that are there must not be made again.
    """
    for package in ("cv2.ximgproc", "sklearn", "timm"):
        pytest.importorskip(package)
    import timm

    weights = tmp_path / "weights.pth"
    torch.manual_seed(0)
    torch.save(timm.create_model("tf_efficientnet_lite0").state_dict(), weights)
    output = tmp_path / "out"
    done = run(data, output, "--weights", weights)
    assert done.returncode == 0, done.stderr
    assert "all classes: AP" in done.stdout and "dog: AP" in done.stdout
    assert "AR@100" in done.stdout
    entries = json.loads((output / "results.json").read_text())
    names = {
        c["name"]: c["id"] for c in json.loads((output / "test.json").read_text())["categories"]
    }
    assert {e["category_id"] for e in entries} == {names["person"], names["dog"]}
    assert all(e["bbox"][2] > 0 and 0 < e["score"] < 1 for e in entries)

    files = sorted((output / "features").glob("*.npz"))
    before = [path.stat().st_mtime_ns for path in files]
    files[0].unlink()
    (output / "results.json").unlink()
    assert run(data, output, "--weights", weights).returncode == 0
    assert [path.stat().st_mtime_ns == t for path, t in zip(files, before)].count(False) == 1
    assert json.loads((output / "results.json").read_text()) == entries

    done = run(data, output, "--weights", weights, "--boxes", 30)
    assert done.returncode and "features: is of other settings" in done.stderr


class Separable:
    """Features in which each class has a direction of its own, as a good CNN's would."""

    def __init__(self, proposals, found, own):
        self.content = proposals, found, own

    def read(self, data, image_id):
        return self.content


def test_what_it_learns():
    """A class must be found where its features are, moved to the object, and one box be left."""
    from rcnn import RCNN

    class Data:
        images = [{"id": 1}]
        boxes = {1: np.array([[10.0, 10, 50, 50], [60, 60, 90, 90]])}
        classes = {1: np.array([0, 1])}
        crowds = {1: np.array([False, False])}

    rng = np.random.RandomState(0)
    jitter = 3 + rng.uniform(-0.5, 0.5, (30, 4))  # too far right and down
    near = np.repeat(Data.boxes[1], 15, axis=0) + jitter
    far = np.array([[0.0, 70, 20, 90]]) + rng.randint(0, 5, (40, 4))
    proposals = np.vstack([near, far])
    found = np.zeros((70, 8), np.float32)
    found[:15, 0], found[15:30, 1], found[30:, 2] = 1, 1, 1
    found[:30, 4:] = jitter / 3
    own = np.eye(2, 8, dtype=np.float32)
    model = RCNN(Separable(proposals, found, own), Data, 3)
    assert set(model.svms) == {0, 1}  # of the third there is no object
    boxes, scores, classes = model.detect(proposals, found, (100, 100))
    for place in (0, 1):
        best = boxes[classes == place][0]
        assert np.abs(best - Data.boxes[1][place]).max() < 1.5
        assert scores[classes == place][0] > scores[classes == place][1:].max(initial=0) + 0.05


def test_encode_is_undone():
    from rcnn import decode, encode

    boxes = np.array([[10.0, 20, 50, 40], [0, 0, 5, 90]])
    objects = np.array([[14.0, 10, 60, 40], [1, 5, 6, 60]])
    np.testing.assert_allclose(decode(boxes, encode(boxes, objects)), objects)


def test_missing_package_is_one_sentence(data, tmp_path):
    """Who lacks scikit-learn must be told so before any work, and how to install it."""
    for name, text in (
        ("cv2", ""),
        ("cv2/ximgproc", ""),
        ("sklearn", "raise ImportError('hidden', name='sklearn')"),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(text)
    done = run(data, tmp_path / "out", PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT}")
    assert done.returncode == 1 and not (tmp_path / "out").exists()
    assert done.stderr.strip().endswith("needs scikit-learn: python -m pip install scikit-learn")
