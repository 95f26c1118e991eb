"""`tools/yolo.py`: the data that YOLO's own package trains on."""

import json
import subprocess
import sys

import pytest
from conftest import ROOT, make_coco

from oln_d2.data.coco import load_images


def test_data_for_yolo(tmp_path):
    """
    What trains must be what OLN would train on, boxes be where they were, and images be named so
    that the results belong to those of the test file.
    """
    data = make_coco(tmp_path / "data") / "coco"
    parts = {
        part: (data / f"annotations/instances_{part}2017.json", data / f"{part}2017")
        for part in ("train", "val")
    }
    output = tmp_path / "yolo"
    line = [*parts["train"], *parts["val"], output, "--seen", "person,dog"]
    command = [sys.executable, ROOT / "tools/yolo.py", *line]
    command = list(map(str, command))
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    content = json.loads((output / "data.yaml").read_text())
    assert content["names"] == ["object"] and content["path"] == str(output)
    for part, (json_file, folder) in parts.items():
        images = load_images(json_file, folder, ["person", "dog"], training=part == "train")
        files = sorted((output / content[part]).iterdir())
        assert [int(file.stem) for file in files] == [image["id"] for image in images]
        for file, image in zip(files, images):
            assert file.resolve() == (folder / image["file_name"]).resolve()
            objects = [a["bbox"] for a in image["annotations"] if not a["iscrowd"]]
            label = output / "labels" / part / f"{file.stem}.txt"
            rows = [[float(x) for x in row.split()] for row in label.read_text().splitlines()]
            assert len(rows) == len(objects)
            for (name, cx, cy, w, h), box in zip(rows, objects):
                own = [(cx - w / 2), (cy - h / 2), w, h]
                sides = [image["width"], image["height"]] * 2
                assert name == 0
                assert [x * s for x, s in zip(own, sides)] == pytest.approx(box, abs=1e-3)

    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "holds data already; choose another" in done.stderr
