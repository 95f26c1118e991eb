"""`compare`: who finds more, by numbers, in words and on the page; and what is left out."""

import json
import os
import re
import shlex
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

import oln_d2
from oln_d2.checks import InputError
from oln_d2.cli import main
from oln_d2.evaluation import write_results

NAMES = ("person", "dog", "<b>zebra</b>", 'it\'s "$x$"')
SEEN = ["person", "dog"]
GROUPS = ("unseen", "seen", "all")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """40 images, and results files of a "good" and a "poor" detector, whose boxes fit less."""
    folder = tmp_path_factory.mktemp("compare")
    rng = np.random.default_rng(0)
    images, annotations, found = [], [], {"good": [], "poor": []}
    for image_id in range(1, 41):
        name = f"{image_id} <i>.jpg"
        Image.new("RGB", (200, 160)).save(folder / name)
        images.append({"id": image_id, "file_name": name, "width": 200, "height": 160})
        boxes = np.hstack([rng.uniform(0, 60, (8, 2)), np.exp(rng.uniform(2, 4.7, (8, 2)))])
        for category, box in enumerate(boxes):
            annotation = {"image_id": image_id, "bbox": box.tolist(), "area": box[2] * box[3]}
            annotation |= {"id": len(annotations) + 1, "category_id": category % 4 + 1}
            annotations.append(annotation)
        for detector, noise in ("good", 0.04), ("poor", 0.12):
            around = boxes.repeat(15, axis=0)
            moved = around + rng.normal(0, noise, around.shape) * np.tile(around[:, 2:], 2)
            moved[:, 2:] = moved[:, 2:].clip(1)
            found[detector].append((image_id, moved, rng.random(len(moved)), None, {}))
    categories = [{"id": i, "name": name} for i, name in enumerate(NAMES, 1)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "gt.json").write_text(json.dumps(content))
    for detector, entries in found.items():
        write_results(folder / f"{detector}.json", entries)
    return folder


def compare(data, output, *names, **options):
    files = [data / f"{name}.json" for name in names]
    return oln_d2.compare(data / "gt.json", files, output, **{"seen": SEEN, **options})


@pytest.mark.parametrize("protocol", ["xclass", "filtered"])
def test_numbers_are_those_of_evaluate(data, tmp_path, protocol):
    """The page and `evaluate` would give two answers to one question."""
    found = compare(data, tmp_path, "poor", "good", protocol=protocol, samples=200, seed=3)
    assert [row.name for row in found.rows] == ["good", "poor"]  # the best first
    assert (found.group, found.k) == ("unseen", 100)
    for row in found.rows:
        ks = (10, 30, 100)
        result = oln_d2.evaluate(
            data / "gt.json", row.files[0], seen=SEEN, protocol=protocol, ks=ks, max_dets=1500
        )
        intervals = result.bootstrap(200, 3)
        for group in GROUPS:
            assert tuple(row.ar[group]) == ks  # the lists have 120 boxes
            for k in ks:
                ar = row.ar[group][k]
                assert ar.value == result[group][f"AR@{k}"]
                assert (ar.low, ar.high) == pytest.approx(intervals[group][f"AR@{k}"], abs=1e-12)
        for area, suffix in ("small", "s"), ("medium", "m"), ("large", "l"):
            ar, name = row.by_size[area], f"AR{suffix}@100"
            assert ar.value == result["unseen"][name]
            assert (ar.low, ar.high) == pytest.approx(intervals["unseen"][name], abs=1e-12)
        assert row.found == round(160 * result.recall(100)[0])
        assert row.by_category == {c: n["AR@100"] for c, n in result.per_category().items()}
        assert row.warnings == result.warnings
    numbers = json.loads((tmp_path / "comparison.json").read_text())
    assert (
        numbers["rows"][0]["ar"]["unseen"]["100"]["value"] == found.rows[0].ar["unseen"][100].value
    )
    assert numbers["settings"]["protocol"].startswith(protocol)


def test_better_detector_is_said_to_be_better(data, tmp_path):
    """A clear difference would be called none, be turned around, or change from run to run."""
    found = compare(data, tmp_path / "a", "poor", "good")
    (difference,) = found.main_differences()
    assert difference.differs and difference.ar.low > 0.05
    assert re.fullmatch(
        r"good finds more of the unseen objects than poor: \+[\d.]+ AR@100 \([\d.]+ to [\d.]+\)\.",
        str(found),
    )
    page = (tmp_path / "a/index.html").read_text()
    assert "<h1>good finds more of the unseen objects than poor</h1>" in page
    assert re.search(r"good finds more than poor of: .*above all .+ \(\+[\d.]+, 80 objects\)", page)
    again = compare(data, tmp_path / "b", "poor", "good")
    assert found.differences == again.differences
    for name in "found.svg", "budgets.svg", "scores.svg", "categories.svg":
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_results_of_a_part_of_the_images_are_warned_of(data, tmp_path):
    """A detector that was run on half of the images would be called the worse one."""
    entries = [e for e in json.loads((data / "good.json").read_text()) if e["image_id"] <= 20]
    (tmp_path / "half.json").write_text(json.dumps(entries))
    results = {"whole": data / "good.json", "half": tmp_path / "half.json"}
    found = oln_d2.compare(data / "gt.json", results, tmp_path, seen=SEEN)
    assert "Warning: half: 20 of 40 images have no detection" in str(found)
    assert "Warning: whole" not in str(found)
    assert str(found).splitlines()[-1].startswith("whole finds more")


def test_page_of_another_command_is_kept(data, tmp_path, capsys):
    """Who gives all commands one folder would lose a page that took hours."""
    gt, out = str(data / "gt.json"), str(tmp_path / "out")
    photo = str(ROOT / "examples/photos/coffee.jpg")
    compared = ["compare", gt, str(data / "good.json"), "--seen", "person", "--output", out]
    proposed = ["propose", photo, "--html", "--output", out]
    assert main(compared) == 0 and main(compared) == 0
    page = (tmp_path / "out/index.html").read_text()
    visualized = ["visualize", gt, str(data / "good.json"), "--images", str(data), "--html"]
    audited = ["audit", gt, "--images", str(data)]
    for line in (
        proposed,
        [*visualized, "--seen", "person", "--output", out],
        [*audited, "--output", out],
    ):
        capsys.readouterr()
        assert main(line) == 2
        assert "out: holds what `oln-d2 compare` wrote (comparison.json)" in capsys.readouterr().err
    assert (tmp_path / "out/index.html").read_text() == page


def test_one_detector_alone(data, tmp_path, monkeypatch, capsys):
    """Who gave one file, or the same twice, would read an empty line."""
    monkeypatch.chdir(tmp_path)
    file = str(data / "good.json")
    main(["compare", str(data / "gt.json"), file, file, "--seen", "person,dog", "--output", "a"])
    printed = capsys.readouterr().out
    assert re.match(r"good alone: [\d.]+ AR@100 of unseen objects. Give results of ano", printed)
    assert f"{file}: is given twice; the second is left out" in printed


def test_interval_of_a_difference_is_paired(data, tmp_path):
    """What is hard for both detectors would count as doubt about which is better."""
    entries = json.loads((data / "good.json").read_text())
    for entry in entries:
        entry["bbox"] = [side * 0.999 for side in entry["bbox"]]
    (tmp_path / "moved.json").write_text(json.dumps(entries))
    files = {"good": data / "good.json", "moved": tmp_path / "moved.json"}
    found = oln_d2.compare(data / "gt.json", files, tmp_path, seen=SEEN)
    width = found.main_differences()[0].ar.high - found.main_differences()[0].ar.low
    alone = [row.ar["unseen"][100].high - row.ar["unseen"][100].low for row in found.rows]
    assert width < np.hypot(*alone) / 2


def test_detector_against_itself(data, tmp_path):
    """A copy of a detector would be found better, or worse, than the detector."""
    same = {"a": data / "good.json", "b": data / "good.json"}
    found = oln_d2.compare(data / "gt.json", same, tmp_path, seen=SEEN)
    assert len(found.differences) == 6  # of three groups, and of three sizes
    for difference in found.differences:
        assert not difference.differs
        assert difference.ar.value == difference.ar.low == difference.ar.high == 0
    assert "No difference can be seen" in (tmp_path / "index.html").read_text()
    assert all(image.found["a"] == image.found["b"] for image in found.images)


def test_images_that_differ_most_come_first(data, tmp_path):
    """Who looks at the first images would see nothing of the difference."""
    found = compare(data, tmp_path, "poor", "good", num_images=7)
    apart = [abs(image.found["good"] - image.found["poor"]) for image in found.images]
    assert len(apart) == 7 and apart == sorted(apart, reverse=True) and apart[0] > 0
    data_js = (tmp_path / "index_files/data.js").read_text()
    assert all(json.dumps(image.file_name) in data_js for image in found.images)


def test_page_has_no_network_references_and_names_do_no_harm(data, tmp_path):
    """The page would be empty without a network, or a name of a file would be run as script."""
    evil = {"<script>alert(1)</script>\"$'_\n": data / "good.json", "_$": data / "poor.json"}
    oln_d2.compare(data / "gt.json", evil, tmp_path, seen=SEEN, images=data)
    page = (tmp_path / "index.html").read_text()
    assert "<script>alert" not in page and "&lt;script&gt;alert" in page
    assert "<b>zebra" not in page and "&lt;b&gt;zebra" in page
    links = re.findall(r"(?:src|href)=\"([^\"]*)\"", page)
    assert len(links) > 6 and not [link for link in links if "//" in link]
    for link in links:
        assert link.startswith("#") or (tmp_path / link).is_file()
    figure = (tmp_path / "categories.svg").read_text()
    assert "<script" not in figure and "&lt;script&gt;alert" in figure and "$x$" in figure


def test_what_cannot_be_used_is_left_out(data, tmp_path, capsys, monkeypatch):
    """One bad file or image would cost the whole page, or be left out without a word."""
    monkeypatch.chdir(tmp_path)
    box = {"image_id": 1, "bbox": [0, 0, 5, 5]}
    bad = {"other": [{**box, "image_id": 77, "score": 1}], "bare": [box], "empty": []}
    for name, entries in bad.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(entries))
    images = tmp_path / "images"
    images.mkdir()
    for name in sorted(os.listdir(data)):
        if name.endswith(".jpg") and not name.startswith("3 "):
            os.link(data / name, images / name)
    (images / "5 <i>.jpg").unlink()
    (images / "5 <i>.jpg").write_text("no image")
    good = str(data / "good.json")
    files = [good, *(f"{name}.json" for name in bad), good, str(data / "poor.json"), "none.json"]
    options = ["--seen", "person,dog", "--images", "images", "--output", "report"]
    assert main(["compare", str(data / "gt.json"), *files, *options]) == 1
    printed = capsys.readouterr().out
    page = (tmp_path / "report/index.html").read_text()
    assert "good finds more of the unseen objects than poor" in printed
    for part in (
        "other.json: entry 0: image_id 77 is not in",
        "bare.json: entry 0: Object missing required field 'score'",
        "empty.json: holds no detection",
        "good.json: is given twice",
        "none.json: no such file; give detections",
        "3 <i>.jpg: is not among the images",
        "5 <i>.jpg: ",
    ):
        assert part in printed
        assert part.split(": ")[0].replace("<i>", "&lt;i&gt;") in page
    numbers = json.loads((tmp_path / "report/comparison.json").read_text())
    assert len(numbers["failures"]) == 7 and len(numbers["rows"]) == 2


def test_command_on_the_page_makes_it_again(data, tmp_path, capsys):
    """Who finds an old page could not say how it was made."""
    compare(data, tmp_path / "a", "poor", "good", samples=50, seed=2, protocol="filtered")
    numbers = json.loads((tmp_path / "a/comparison.json").read_text())
    first, *words = shlex.split(numbers["command"])
    assert first == "oln-d2" and main(words) == 0
    assert json.loads((tmp_path / "a/comparison.json").read_text()) == numbers


def test_files_of_the_same_name(data, tmp_path):
    """Two detectors' `results.json` could not be distinguished on the page."""
    for name, source in ("oln", "good"), ("rpn", "poor"):
        (tmp_path / name).mkdir()
        os.link(data / f"{source}.json", tmp_path / name / "results.json")
    files = [tmp_path / "oln/results.json", tmp_path / "rpn/results.json"]
    found = oln_d2.compare(data / "gt.json", files, tmp_path / "report", seen=SEEN)
    assert [row.name for row in found.rows] == ["oln/results", "rpn/results"]


def test_images_of_no_or_absurd_size(tmp_path):
    """One odd entry of the ground truth would cost the page."""
    images = [{"id": 1, "file_name": "a.jpg", "width": 0, "height": 0}, {"id": 2, "file_name": "b"}]
    boxes = {1: [0, 0, 0, 0], 2: [5, 5, 10**7, 2]}
    content = {
        "images": images,
        "annotations": [{"image_id": i, "category_id": 1, "bbox": box} for i, box in boxes.items()],
        "categories": [{"id": 1, "name": "mug"}],
    }
    (tmp_path / "gt.json").write_text(json.dumps(content))
    detections = [{"image_id": i, "bbox": [0, 0, 5, 5], "score": 0.5} for i in boxes]
    (tmp_path / "d.json").write_text(json.dumps(detections))
    compare(tmp_path, tmp_path / "report", "d", seen=["mug"])
    assert (tmp_path / "report/comparison.json").exists()


@pytest.mark.parametrize(
    "options, part",
    [
        ({"images": "no/folder"}, "no/folder: no such folder"),
        ({"protocol": "coco"}, "protocol is coco; it has to be one of xclass, filtered"),
        ({"samples": 0}, "samples is 0"),
        ({"seen": ["cat"]}, "no category named 'cat'"),
    ],
)
def test_bad_arguments(data, tmp_path, options, part):
    """A slip would be found only after the work, or not at all."""
    with pytest.raises(InputError, match=re.escape(part)):
        compare(data, tmp_path / "report", "good", **options)
    assert not (tmp_path / "report").exists()


def test_too_many_files_or_none_that_can_be_used(data, tmp_path):
    """A page that nobody can read, or one without a row."""
    with pytest.raises(InputError, match="21 results files are given; compare 1 to 20"):
        compare(data, tmp_path, *["good"] * 21)
    with pytest.raises(InputError, match="none.json: no such file"):
        compare(data, tmp_path, "none", "none")


def test_one_detector_no_unseen_objects_few_images(data, tmp_path):
    """Cases at the edge: nothing to compare with, nothing unseen, too few images to say."""
    path = data / "good.json"
    assert oln_d2.compare(data / "gt.json", path, tmp_path, seen=SEEN).differences == []
    found = compare(data, tmp_path, "good", "poor", seen=list(NAMES))
    assert found.group == "all" and str(found).startswith(
        "good finds more of the objects than poor"
    )
    content = json.loads((data / "gt.json").read_text())
    content["images"] = content["images"][:3]
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] <= 3]
    (tmp_path / "gt.json").write_text(json.dumps(content))
    results = {}
    for name in "good", "poor":
        entries = json.loads((data / f"{name}.json").read_text())
        results[name] = tmp_path / f"{name}.json"
        results[name].write_text(json.dumps([e for e in entries if e["image_id"] <= 3]))
    found = oln_d2.compare(tmp_path / "gt.json", results, tmp_path, seen=SEEN)
    assert "too few images hold unseen objects (3)" in str(found)
    assert not any(difference.differs for difference in found.differences)


def test_needs_no_torch(data, tmp_path):
    """Who has results files only would have to install PyTorch."""
    code = (
        "import sys, oln_d2\n"
        f"oln_d2.compare('gt.json', ['good.json', 'poor.json'], {str(tmp_path)!r}, seen={SEEN})\n"
        "print([m for m in ('torch', 'torchvision', 'detectron2') if m in sys.modules])"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=data, env=env, timeout=120
    )
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr
