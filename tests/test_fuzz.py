"""
Random changes of the files that we read, and random cases of the evaluator against the slow
reference, by hypothesis; a few examples of each by default, many in the group `heavy`.
"""

import contextlib
import copy
import json
import pickle
import warnings
from pathlib import Path

import numpy as np
import pytest
from conftest import NEEDS_DETECTRON2
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as mask_utils
from test_evaluation import KS, SEEN, assert_equal_to_pycocotools, names, score

from oln_d2.auditing.decisions import add_accepted, read_decisions
from oln_d2.checks import LONGEST, InputError
from oln_d2.data.coco import load_coco, load_images
from oln_d2.data.rle import to_rle, wrong_rle
from oln_d2.evaluation import GroundTruth, OpenWorldRecall, coco_results, evaluate, read_results
from oln_d2.propose.journal import Journal

SQUARE = [[4, 4, 24, 4, 24, 24, 4, 24]]
RLE = {"size": [64, 96], "counts": to_rle(SQUARE, 64, 96)["counts"].decode()}
BOXES = ([4, 4, 20, 20], [40, 8, 30, 40])
GT = {
    "images": [{"id": i, "file_name": f"p{i}.png", "width": 96, "height": 64} for i in (1, 2)],
    "annotations": [
        {"id": 2 * i + k, "image_id": i, "category_id": k, "bbox": BOXES[k - 1], "area": 400 * k}
        | {"iscrowd": int(i == k == 2), "segmentation": SQUARE}
        for i in (1, 2)
        for k in (1, 2)
    ],
    "categories": [{"id": 1, "name": "mug"}, {"id": 2, "name": "kite"}],
}
RESULTS = [
    {"image_id": a["image_id"], "category_id": 1, "bbox": a["bbox"], "score": 0.9 - i / 10}
    | {"segmentation": RLE, "objectness": 0.5}
    for i, a in enumerate(GT["annotations"])
]
DECISIONS = {
    "audit": "x",
    "decisions": [
        {"id": str(i), "what": what, "image_id": 1, "category_id": None, "bbox": BOXES[0]}
        | {"proposed": BOXES[0]}
        for i, what in enumerate(("accept", "reject"))
    ],
}
PROPOSALS = {
    "ids": [1, 2],
    "boxes": [[BOXES[0]], BOXES],
    "objectness_logits": [[0.5], [2.0, -1.0]],
    "bbox_mode": 1,
}
SETTINGS = {"model": "m", "root": "/photos", "top_k": 100}
JOURNAL = [
    SETTINGS,
    {"name": "a.png", "stamp": [5, 6], "height": 64, "width": 96, "boxes": [[1, 1, 9, 9]]}
    | {"scores": [0.5], "objectness": [0.5], "masks": [RLE]},
    {"name": "b.gif", "stamp": [5, 6], "frames": ["b.gif/000000.jpg"]},
]
# What programs and people write where something else is expected.
ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 9),
    st.sampled_from([2**31, 2**63, 2**64, -(2**63), 10**400, 1e308, -1e308, 1e-320, 0.5, 96.0]),
    st.sampled_from([float("nan"), float("inf"), float("-inf")]),
    st.sampled_from(["", "1", "1.0", "x", "a\0b", "\ud800", "..", "../p1.png", "é" * 300, "\n"]),
    st.sampled_from([[], {}, [[]], [{}], [1, 2, 3], [0, 0, 1, 1], [[1e9, 0, 0, 1e9, 5, 5]]]),
    st.sampled_from([RLE, {**RLE, "counts": "0`h9"}, {"size": [64, 96], "counts": [6144]}]),
    st.text(max_size=5),
    st.floats(),
)


def walk(value, path=()):
    """The path of every value in a JSON document, the document's own left out."""
    parts = value.items() if isinstance(value, dict) else enumerate(value)
    for key, part in parts:
        yield (*path, key)
        if isinstance(part, (dict, list)):
            yield from walk(part, (*path, key))


@st.composite
def changed(draw, document):
    """A JSON document with one to four changes."""
    document = copy.deepcopy(document)
    for _ in range(draw(st.integers(1, 4))):
        paths = list(walk(document))
        if not paths:
            break
        *way, key = draw(st.sampled_from(paths))
        home = document
        for step in way:
            home = home[step]
        what = draw(st.sampled_from(["replace"] * 3 + ["remove", "repeat", "rename"]))
        if what == "remove":
            del home[key]
        elif what == "repeat" and isinstance(home, list):
            home.append(copy.deepcopy(home[key]))
        elif what == "rename" and isinstance(home, dict):
            home[draw(st.text(max_size=3))] = home.pop(key)
        else:
            home[key] = copy.deepcopy(draw(ODD))
    return document


@st.composite
def written(draw, document, lines=False):
    """The bytes of a file: JSON, or JSON lines, sometimes cut or with other bytes in it."""
    document = draw(st.one_of(changed(document), ODD) if not lines else changed(document))
    rows = document if lines else [document]
    data = "".join(json.dumps(row) + "\n" * lines for row in rows).encode()
    if draw(st.integers(0, 5)) == 0:
        data = data[: draw(st.integers(0, len(data)))]
    if draw(st.integers(0, 5)) == 0:
        at = draw(st.integers(0, len(data)))
        data = data[:at] + draw(st.binary(max_size=3)) + data[at + draw(st.integers(0, 2)) :]
    return data


@st.composite
def pickled(draw, document):
    """The bytes of a pickle, of lists or of arrays, sometimes cut."""

    def arrays(value):
        if not isinstance(value, list) or draw(st.integers(0, 2)) == 0:
            return value
        try:
            return np.array(value)
        except (OverflowError, ValueError):  # of lists that differ in length
            parts = np.empty(len(value), object)
            for place, part in enumerate(value):
                parts[place] = arrays(part)
            return parts

    document = draw(st.one_of(changed(document), changed(document), ODD))
    if isinstance(document, dict) and draw(st.booleans()):
        document = {name: arrays(value) for name, value in document.items()}
    data = pickle.dumps(document, draw(st.integers(0, 5)))
    return data[: draw(st.integers(0, len(data)))] if draw(st.integers(0, 5)) == 0 else data


@contextlib.contextmanager
def one_line():
    """All that may go wrong is an InputError of one short line; numpy warns of nothing."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            yield
        except InputError as error:
            assert str(error).isprintable() and 10 < len(str(error)) <= LONGEST


def annotations(data):
    Path("gt.json").write_bytes(data)
    with one_line():
        content = load_coco("gt.json")
        gt = GroundTruth(content, ["mug"], "gt.json")
        check_numbers(gt, read_results("good.json", gt))
    with one_line():
        for image in load_images("gt.json", "images", ["mug"], training=True):
            assert Path("images", image["file_name"]).resolve().parent == Path("images").resolve()
            boxes = np.array([a["bbox"] for a in image["annotations"]], float)
            assert np.isfinite(boxes).all()


def check_numbers(gt, detections, iou_type="box"):
    recall = OpenWorldRecall(gt, iou_type=iou_type, ks=(1, 10))
    recall.update(*detections[:3], masks=detections.masks, box_format="xywh")
    result = recall.result()
    assert str(result)
    for group in "unseen", "seen", "all":
        numbers = np.array(list(result[group].values()))
        assert ((numbers >= 0) & (numbers <= 1) | np.isnan(numbers)).all()


def results(data):
    """A file is read as a whole and in small pieces, of which all has to be the same."""
    Path("d.json").write_bytes(data)
    gt = GroundTruth.load("good_gt.json", ["mug"])
    for iou_type in "box", "mask":
        read = []
        for piece in 10**6, 60:
            with one_line(), pytest.MonkeyPatch.context() as patch:
                patch.setattr(coco_results, "PIECE", piece)
                read.append(read_results("d.json", gt, masks=iou_type == "mask"))
        assert len(read) in (0, 2)
        if read:
            np.testing.assert_equal(*(part._asdict() for part in read))
            with one_line():
                check_numbers(gt, read[0], iou_type)


def proposals(data):
    from oln_d2.engine.datasets import add_proposals

    Path("p.pkl").write_bytes(data)
    records = [{"image_id": i, "file_name": f"p{i}.png"} for i in (1, 2)]
    with one_line():
        add_proposals(records, "p.pkl")
        for record in records:
            boxes, logits = record["proposal_boxes"], record["proposal_objectness_logits"]
            assert boxes.shape == (len(logits), 4)
            assert np.isfinite(boxes).all() and (np.diff(logits) <= 0).all()


def decisions(data):
    Path("m.json").write_bytes(data)
    content = load_coco("good_gt.json")
    with one_line():
        merged = add_accepted(content, read_decisions(["m.json"], content))
        Path("merged.json").write_text(json.dumps(merged))
        load_coco("merged.json")


def journal(data):
    Path("out").mkdir(exist_ok=True)
    Path("out/journal.jsonl").write_bytes(data)
    with one_line():
        read = Journal("out", SETTINGS)
        try:
            for name, place in read.places.items():
                for frame in place.frames or ():
                    assert frame.startswith(f"{name}/") and frame.endswith(".jpg")
                    assert frame.count("/") == name.count("/") + 1
                if place.frames is None:
                    found = read.read_proposals(name)
                    assert np.isfinite(found.boxes).all() and len(found.boxes) == len(found.scores)
                    assert found.masks is None or wrong_rle(found.masks.rles) is None
            read.add("c.png", [1], {"frames": []})
        finally:
            for lock in read.locks:
                lock.close()
            read.file.close()


def masks(mask):
    """What is taken for a mask must be one that pycocotools can use, and have its size."""
    try:
        rle = to_rle(mask, 64, 96)
    except Exception as error:  # named by those who read the file
        assert str(error)
        return
    pixels = mask_utils.decode(rle)
    assert mask_utils.area(rle) == pixels.sum()
    assert mask_utils.iou([rle], [rle], [0]).shape == (1, 1)


SIDE = st.sampled_from([0, 1, 2, 3, 4, 6, 10])
PLACE = st.integers(0, 3)
BOX = st.tuples(PLACE, PLACE, SIDE, SIDE).map(lambda box: [8.0 * side for side in box])


@st.composite
def cases(draw):
    """Ground truth and results on a coarse grid, so that equal IoUs and scores are the rule."""
    images = range(draw(st.integers(1, 4)))
    content = {
        "images": [{"id": i, "width": 300, "height": 300} for i in images],
        "categories": [{"id": i, "name": f"c{i}"} for i in (1, 2, 3, 4)],
        "annotations": [],
    }
    results = []
    for image in images:
        for box in draw(st.lists(BOX, max_size=6)):
            entry = {"id": len(content["annotations"]), "image_id": image, "bbox": box}
            entry["area"] = draw(st.sampled_from([box[2] * box[3], 900.0, 32.0**2, 96.0**2]))
            entry["category_id"] = draw(st.integers(1, 4))
            entry["iscrowd"] = draw(st.integers(0, 5)) // 5
            content["annotations"].append(entry)
        for box in draw(st.lists(BOX, max_size=10)):
            number = draw(st.integers(0, 4)) / 4
            results.append({"image_id": image, "category_id": 1, "bbox": box, "score": number})
    results = draw(st.permutations(results))
    if draw(st.booleans()):  # a file that need not be in memory as a whole
        results.sort(key=lambda entry: entry["image_id"])
    return content, results, draw(st.sampled_from(["xclass", "filtered"]))


def evaluator(case):
    content, results, protocol = case
    if not results:
        return
    settings = {"protocol": protocol, "max_dets": 100, "ks": KS}
    recall = score(content, results, **settings)
    assert_equal_to_pycocotools(content, results, recall)
    Path("d.json").write_text(json.dumps(results))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(coco_results, "PIECE", 200)
        of_file = evaluate(GroundTruth(content, names(SEEN)), "d.json", **settings)
    np.testing.assert_equal(of_file.to_dict(), recall.result().to_dict())


CHECKS = {
    "annotations": (annotations, written(GT), 150),
    "results": (results, written(RESULTS), 150),
    "proposals": (proposals, pickled(PROPOSALS), 150),
    "decisions": (decisions, written(DECISIONS), 100),
    "journal": (journal, written(JOURNAL, lines=True), 100),
    "masks": (masks, st.one_of(changed(SQUARE), changed(RLE), ODD), 200),
    "evaluator": (evaluator, cases(), 60),
}
NAMES = [
    pytest.param(name, marks=[NEEDS_DETECTRON2] if name == "proposals" else []) for name in CHECKS
]


def run(name, folder, monkeypatch, times=1, **options):
    monkeypatch.chdir(folder)
    Path("good_gt.json").write_text(json.dumps(GT))
    Path("good.json").write_text(json.dumps(RESULTS))
    Path("images").mkdir()
    for i in 1, 2:
        Image.new("RGB", (96, 64)).save(f"images/p{i}.png")
    check, strategy, number = CHECKS[name]
    options |= {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}
    settings(max_examples=times * number, **options)(given(strategy)(check))()


@pytest.mark.parametrize("name", NAMES)
def test_a_few(name, tmp_path, monkeypatch):
    """Some broken file would end in a traceback, wrong numbers or a sentence of many lines."""
    run(name, tmp_path, monkeypatch, derandomize=True)


@pytest.mark.heavy
@pytest.mark.parametrize("name", NAMES)
def test_many(name, tmp_path, monkeypatch, request):
    """As above; others with --hypothesis-seed=random, which prints the one that fails."""
    is_fixed = request.config.getoption("--hypothesis-seed") is None
    run(name, tmp_path, monkeypatch, times=10, derandomize=is_fixed, print_blob=not is_fixed)
