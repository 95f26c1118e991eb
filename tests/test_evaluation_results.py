"""Results files: what is read is what was written, and bad files are refused by name and entry."""

import copy
import gzip
import json

import numpy as np
import pytest
from pycocotools import mask as mask_utils
from test_evaluation import KS as FEW
from test_evaluation import names, random_case, score

from oln_d2.checks import InputError
from oln_d2.evaluation import GroundTruth, coco_results, evaluate, read_results, write_results
from oln_d2.evaluation.comparison import measure_detector
from oln_d2.evaluation.open_world import OpenWorldRecall
from oln_d2.evaluation.result import draw_images
from oln_d2.files import read_json

CONTENT = {
    "images": [{"id": 3, "width": 640, "height": 480}, {"id": 8, "width": 480, "height": 640}],
    "categories": [{"id": 1, "name": "c1"}],
    "annotations": [],
}
ENTRY = {"image_id": 3, "category_id": 77, "bbox": [1, 2.5, 3, 4], "score": 0.123456789012345678}


@pytest.fixture
def gt():
    return GroundTruth(CONTENT, [], "gt.json")


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "results.json")


def write(path, text):
    with open(path, "w") as f:
        f.write(text if isinstance(text, str) else json.dumps(text))
    return path


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("piece", [700, 2000, 2**23])
def test_any_layout_in_pieces(gt, path, indent, piece, monkeypatch):
    """Entries would be lost where a large file is divided, or only one layout could be read."""
    monkeypatch.setattr(coco_results, "PIECE", piece)
    rng = np.random.default_rng(0)
    # With what JSON has to escape; of the images' sizes.
    masks = {
        3: {"size": [480, 640], "counts": "\\]f1k0iae7"},
        8: {"size": [640, 480], "counts": "Y\\]2c0Tcn6"},
    }
    entries = [
        {
            "caption": 'a "}, {" in a text',
            "image_id": (image := int(rng.choice([3, 8]))),
            "parts": [{"a": 1}, {"b": [{}, {}]}],
            "bbox": (rng.random(4) * 300).tolist(),
            "score": rng.random(),
            "segmentation": masks[image],
        }
        for _ in range(40)
    ]
    detections = read_results(write(path, json.dumps(entries, indent=indent)), gt, masks=True)
    assert detections.image_ids.tolist() == [e["image_id"] for e in entries]
    assert detections.boxes.tolist() == [e["bbox"] for e in entries]
    assert detections.scores.tolist() == [e["score"] for e in entries]
    assert [m["counts"] for m in detections.masks] == [e["segmentation"]["counts"] for e in entries]


def test_written_numbers_come_back(gt, path):
    """Scoring a model's results file would give other numbers than scoring the model."""
    rng = np.random.default_rng(1)
    boxes, scores = rng.random((50, 4)) * 200, rng.random(50)
    masks = [{"size": [640, 480], "counts": b"Y\\]2c0Tcn6"}] * 50
    write_results(path, [(3, boxes[:0], scores[:0], None, {}), (8, boxes, scores, masks, {})])
    detections = read_results(path, gt, masks=True)
    np.testing.assert_array_equal(detections.boxes, boxes)
    np.testing.assert_array_equal(detections.scores, scores)
    assert set(detections.image_ids) == {8}
    assert detections.masks[0] == {"size": (640, 480), "counts": "Y\\]2c0Tcn6"}
    assert detections.source == path
    write_results(path, [])
    assert len(read_results(path, gt).scores) == 0


@pytest.mark.parametrize("piece", [120, 2**23])
def test_scores_beside_the_score(gt, path, piece, monkeypatch):
    """Pictures would show the scores of other detections, or those that only some have."""
    monkeypatch.setattr(coco_results, "PIECE", piece)
    rng = np.random.default_rng(3)
    boxes, scores, objectness, box_score = rng.random((9, 4)), *rng.random((3, 9))
    more = {"objectness": objectness, "box_score": box_score, "speed": scores}
    write_results(path, [(8, boxes, scores, None, more)])
    qualities = read_results(path, gt).qualities
    assert list(qualities) == ["objectness", "box_score"]
    np.testing.assert_array_equal(qualities["objectness"], objectness)
    np.testing.assert_array_equal(qualities["box_score"], box_score)
    entries = json.load(open(path))
    del entries[7]["box_score"]
    assert list(read_results(write(path, entries), gt).qualities) == ["objectness"]
    write(path, [*entries, {**entries[0], "objectness": "high"}])
    with pytest.raises(InputError, match="entry 9: objectness: Expected 'float"):
        read_results(path, gt)


@pytest.mark.parametrize("piece", [60, 2**23])
@pytest.mark.parametrize(
    "text, message",
    [
        ("", "is empty"),
        ("{}", "does not hold a list"),
        (json.dumps([ENTRY] * 5)[:-30], "entry 4: not complete"),
        (json.dumps([ENTRY] * 5)[:-1], "entry 4: not complete"),
        (json.dumps([ENTRY] * 5) + "]", "entry 4: not complete, valid"),
        ("[1]", "entry 0: Expected 'object', got 'int'"),
        ([ENTRY, ENTRY, {**ENTRY, "score": float("nan")}], "entry 2: NaN is not a finite number"),
        ([ENTRY, {**ENTRY, "bbox": [0, 0, float("inf"), 1]}], "entry 1: Infinity is not"),
        ([ENTRY, ENTRY, {**ENTRY, "score": "high"}], "entry 2: score: Expected 'float', got 'str'"),
        (
            [ENTRY, ENTRY, {**ENTRY, "bbox": [1, 2, 3]}],
            r"entry 2: bbox \[1.0, 2.0, 3.0\] is not four",
        ),
        (
            [ENTRY, {"image_id": 3, "bbox": [1, 2, 3, 4]}],
            "entry 1: .*missing required field 'score'",
        ),
        ([ENTRY, {**ENTRY, "image_id": 3.5}], "entry 1: image_id 3.5 is not an integer"),
        ([ENTRY, {**ENTRY, "image_id": "4"}], "entry 1: image_id '4' is neither id nor file name"),
        ([ENTRY, {**ENTRY, "image_id": 2**63}], "entry 1: image_id: Expected"),
        ([ENTRY, {"image_id": 3, "score": 1}], "entry 1: has neither 'bbox' nor 'segmentation'"),
        ([ENTRY, ENTRY, {**ENTRY, "image_id": 4}], "entry 2: image_id 4 is not in gt.json"),
        ([{**ENTRY, "bbox": [100, 100, 600, 400 + i]} for i in range(20)], "entry 0: .*corners"),
        ([{**ENTRY, "bbox": [0.1, 0.2, 0.3, 0.4]}] * 20, "entry 0: .*fractions"),
    ],
)
def test_bad_file(gt, path, text, message, piece, monkeypatch):
    """A broken file would give numbers, or an error that does not say where to look."""
    monkeypatch.setattr(coco_results, "PIECE", piece)
    with pytest.raises(InputError, match=f"results.json: {message}"):
        read_results(write(path, text), gt)


RLE = mask_utils.encode(np.asfortranarray(np.eye(480, 640, dtype=np.uint8)))
COUNTS = RLE["counts"].decode()


@pytest.mark.parametrize("piece", [300, 2**23])
@pytest.mark.parametrize(
    "name", [3, 3.0, "3", " 3", "3.0", "a.b", "a.b.jpg", "x/a.b.jpg", "x\\a.b", "/data/x/a.b.jpg"]
)
def test_images_by_any_name(path, piece, name, monkeypatch):
    """Results of ultralytics and pandas could not be scored, or be those of another image."""
    monkeypatch.setattr(coco_results, "PIECE", piece)
    content = copy.deepcopy(CONTENT)
    content["images"][0]["file_name"] = "x/a.b.jpg"
    gt = GroundTruth(content, [], "gt.json")
    entries = [{**ENTRY, "image_id": 8}] * 6 + [{**ENTRY, "image_id": name, "objectness": 0.5}] * 6
    for detections in (
        read_results(write(path, entries), gt),
        coco_results.convert_entries(entries, gt),
    ):
        assert detections.image_ids.tolist() == [8] * 6 + [3] * 6
        assert detections.boxes.tolist() == [ENTRY["bbox"]] * 12
        assert detections.scores.tolist() == [ENTRY["score"]] * 12


@pytest.mark.parametrize("name", ["a", "3", "b.jpg", "3.jpg"])
def test_images_that_could_be_several(path, name):
    """Detections would be counted on another image."""
    content = copy.deepcopy(CONTENT)
    content["images"] += [{"id": 5, "file_name": "y/a.jpg"}, {"id": 6, "file_name": "x/a.jpg"}]
    content["images"].append({"id": 7, "file_name": "3.png"})
    gt = GroundTruth(content, [], "gt.json")
    with pytest.raises(InputError, match=f"entry 1: image_id '{name}' .* write the image's id"):
        read_results(write(path, [ENTRY, {**ENTRY, "image_id": name}]), gt)


@pytest.mark.parametrize("piece", [300, 2**23])
@pytest.mark.parametrize(
    "segmentation",
    [
        {"size": [480, 640], "counts": COUNTS},
        {"size": [480.0, 640.0], "counts": COUNTS},
        {"size": [480, 640], "counts": str(RLE["counts"])},
        {"size": [480, 640], "counts": [0, *[1, 480] * 479, 1, 480 * 160]},
    ],
)
def test_masks_in_any_form(gt, path, piece, segmentation, monkeypatch):
    """Masks that are perfect would find nothing, or could not be read."""
    monkeypatch.setattr(coco_results, "PIECE", piece)
    for box in ([0, 0, 480, 480], None, []):
        entries = [{**ENTRY, "bbox": box, "segmentation": segmentation}] * 4
        for detections in (
            read_results(write(path, entries), gt, masks=True),
            coco_results.convert_entries(entries, gt, masks=True),
        ):
            assert detections.boxes.tolist() == [[0, 0, 480, 480]] * 4
            np.testing.assert_array_equal(mask_utils.decode(detections.masks[3]), np.eye(480, 640))
    assert read_results(path, gt).masks is None  # boxes are made of the masks here too


def test_polygons_and_bytes(gt, path):
    """pycocotools makes bytes, and some tools write polygons."""
    polygon = [[0, 0, 10, 0, 10, 20, 0, 20]]
    entry = {"image_id": 3, "score": 1, "segmentation": polygon}
    detections = read_results(write(path, [entry]), gt, masks=True)
    assert detections.boxes.tolist() == [[0, 0, 10, 20]]
    assert mask_utils.area(detections.masks[0]) == 200
    (mask,) = coco_results.convert_entries([{**ENTRY, "segmentation": RLE}], gt, masks=True).masks
    assert mask_utils.area(mask) == 480
    for bad in ("mask.png", {"size": [480, 640]}, [1, 2, 3], {"size": [9, 9], "counts": [3]}):
        with pytest.raises(InputError, match="entry 0: 'segmentation' is neither RLE nor polygons"):
            read_results(write(path, [{**entry, "segmentation": bad}]), gt)
    with pytest.raises(InputError, match="entry 1: has no 'segmentation', so these results have"):
        read_results(write(path, [{**ENTRY, "segmentation": polygon}, ENTRY]), gt, masks=True)


@pytest.mark.parametrize("piece", [101, 2**23])
@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("zipped", [False, True])
def test_encodings(gt, path, encoding, zipped, piece, monkeypatch):
    """Files that PowerShell or a text editor wrote could not be read."""
    monkeypatch.setattr(coco_results, "PIECE", piece)
    entries = [{**ENTRY, "caption": "\u00e9\U0001f600"}] * 20
    text = json.dumps(entries, ensure_ascii=False).encode(encoding)
    with open(path, "wb") as f:
        f.write(gzip.compress(text) if zipped else text)
    assert read_results(path, gt).boxes.tolist() == [ENTRY["bbox"]] * 20
    assert read_json(path) == entries
    with open(path, "wb") as f:
        f.write(gzip.compress(text)[:-20] if zipped else text[:-3])
    for read in (read_json, lambda path: read_results(path, gt)):
        with pytest.raises(InputError, match="results.json: .*not complete"):
            read(path)


def test_ids_of_other_images(tmp_path):
    """`propose` without --gt numbers images itself; by such ids recall would be wrong."""
    images = [{"id": i, "file_name": f"{name}.jpg"} for i, name in enumerate("ba", 1)]
    truth = GroundTruth({**CONTENT, "images": images}, [], "gt.json")
    path = write(str(tmp_path / "results.json"), [])

    def beside(*images):
        entries = [{"id": i, "file_name": name} for i, name in images]
        write(tmp_path / "images.json", {"images": entries})

    beside((1, "photos/b.jpg"), (2, "a.jpg"), (3, "unknown.jpg"))
    read_results(path, truth)
    beside((1, "a.jpg"), (2, "b.jpg"))
    with pytest.raises(InputError, match=r"calls a.jpg the image 1 .*, which is 2 in .* --gt gt"):
        read_results(path, truth)
    for other in ({"images": 3}, [], {"images": [{"id": 1}]}):  # another tool's
        write(tmp_path / "images.json", other)
        read_results(path, truth)


def test_missing_file(gt, path):
    """A mistyped path would end in a traceback."""
    with pytest.raises(InputError, match="results.json: no such file; give detections"):
        read_results(path, gt)


def test_an_entry_of_many_pieces(gt, path, monkeypatch):
    """Results with a list of objects in each entry would be called damaged."""
    monkeypatch.setattr(coco_results, "PIECE", 60)
    entries = [{**ENTRY, "parts": [{"name": "}, {"}] * 300, "score": i / 8} for i in range(4)]
    assert read_results(write(path, entries), gt).scores.tolist() == [0, 0.125, 0.25, 0.375]


def test_boxes_beyond_the_image_are_no_error(gt, path):
    """Detectors that do not clip their boxes would be refused as if their boxes were corners."""
    rng = np.random.default_rng(2)
    boxes = np.hstack([rng.uniform(300, 600, (50, 2)), rng.uniform(100, 500, (50, 2))])
    entries = [{**ENTRY, "bbox": box} for box in boxes.tolist()]
    assert len(read_results(write(path, entries), gt).scores) == 50


@pytest.fixture
def many(monkeypatch):
    """Ground truth of 30 images, and detections with all scores, an image after the other."""
    monkeypatch.setattr(coco_results, "PIECE", 1000)
    content, results = random_case(np.random.default_rng(3), num_images=30)
    results.sort(key=lambda entry: entry["image_id"])
    for number, entry in enumerate(results):
        entry["objectness"] = number / 1000
    return GroundTruth(content, names([1, 2]), "gt.json"), results


def shuffled(entries):
    return [entries[i] for i in np.random.default_rng(4).permutation(len(entries))]


@pytest.mark.parametrize("order", [list, shuffled, lambda e: e[1:] + e[:1]])
def test_files_in_parts_give_the_numbers_of_whole_ones(many, path, order):
    """A file larger than memory, in whatever order, would be scored as if parts were missing."""
    gt, results = many
    results = order(results)
    write(path, results)
    settings = {"ks": FEW, "max_dets": 100}
    whole = evaluate(gt, results, **settings)
    parts = evaluate(gt, path, **settings)
    assert parts.to_dict() == whole.to_dict()
    np.testing.assert_array_equal(parts.found, whole.found)
    draws = draw_images(30, 20, 0)
    compared = [
        measure_detector("a", gt, source, draws, "unseen", "xclass", "box", best=3)
        for source in (path, read_results(path, gt))
    ]
    for one, other in zip(*(detector for detector, _ in compared)):
        np.testing.assert_equal(one, other)
    ids = [best.image_ids for _, best in compared]
    np.testing.assert_array_equal(*ids)
    assert (np.diff(ids[0]) >= 0).all() and np.unique(ids[0], return_counts=True)[1].max() == 3
    for name in "boxes", "scores":
        np.testing.assert_array_equal(*(getattr(best, name) for _, best in compared))
    np.testing.assert_array_equal(*(best.qualities["objectness"] for _, best in compared))


def test_parts_hold_whole_images(many, path):
    """All detections of an image in a part, and no part much larger than a piece of the file."""
    gt, results = many
    parts = list(coco_results.read_in_parts(write(path, results), gt))
    assert len(parts) > 5 and max(len(part.scores) for part in parts) < len(results) / 3
    assert sum([part.scores.tolist() for part in parts], []) == [e["score"] for e in results]
    images = [set(part.image_ids.tolist()) for part in parts]
    assert sum(map(len, images)) == len(set.union(*images))
    numbers = np.cumsum([0] + [len(part.scores) for part in parts[:-1]]).tolist()
    assert [part.first for part in parts] == numbers
    with pytest.raises(coco_results.ScatteredError):
        list(coco_results.read_in_parts(write(path, results + results[:1]), gt))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"bbox": [5, 5, -1, 5]}, "box .* has a negative size"),
        ({"image_id": 99}, "image_id 99 is not in gt.json"),
        ({"score": "high"}, "score: Expected"),
    ],
)
def test_errors_of_parts_name_the_entry_of_the_file(many, path, change, message):
    """The number of an entry within a part would send users to an entry that is right."""
    gt, results = many
    number = len(results) - 2
    results[number].update(change)
    with pytest.raises(InputError, match=f"results.json: entry {number}: {message}"):
        evaluate(gt, write(path, results))


def test_ranks_beyond_two_bytes():
    """With a large `max_dets` a rank would come out negative, and with a large k all be found."""
    content, results = random_case(np.random.default_rng(6), num_images=5)
    small, large = (score(content, results, max_dets=n, ks=FEW) for n in (32767, 32768))
    assert small.result().found.dtype == np.int16 and large.result().found.dtype == np.int32
    assert small.result()["unseen"] == large.result()["unseen"]
    for k in 32767, 32768, 10**6:
        for result in small.result(), large.result():
            np.testing.assert_array_equal(result.recall(k), result.recall(32767))
    assert small.result().recall(10**6)[0] < 1


def test_results_stay_what_they_were():
    """A result would change when more detections come, though it is of those before."""
    content, results = random_case(np.random.default_rng(7), num_images=30)
    gt = GroundTruth(content, names([1, 2]))
    recall = OpenWorldRecall(gt, max_dets=100, ks=FEW)
    first, second = ([e for e in results if (e["image_id"] < 15) == low] for low in (True, False))
    coco_results.convert_entries(first, gt).add_to(recall)
    before = recall.result()
    expected = before.found.copy()
    coco_results.convert_entries(second, gt).add_to(recall)
    after = recall.result()
    np.testing.assert_array_equal(before.found, expected)
    assert (after.found != before.found).any()


def test_without_average_precision():
    """Recall would depend on whether AP is asked for, or AP be a number where it was not."""
    content, results = random_case(np.random.default_rng(8), num_images=8)
    with_ap, without = (
        score(content, results, max_dets=100, ks=FEW, with_ap=ap) for ap in (True, False)
    )
    assert not np.isnan(with_ap.result()["all"]["AP"])
    assert np.isnan(without.result()["all"]["AP"])
    np.testing.assert_array_equal(with_ap.result().found, without.result().found)
    assert without.result().summary() == with_ap.result().summary()


def test_scores_that_find_objects():
    """The curve of recall by score would be that of other detections."""
    content, results = random_case(np.random.default_rng(9), num_images=8)
    recall = score(content, results, max_dets=100, ks=FEW)
    gt, result = recall.ground_truth, recall.result()
    rank = result.found[2, 0, 0]
    for g, found in enumerate(recall.found_scores()):
        own = [e["score"] for e in results if e["image_id"] == gt.image_ids[gt.images[g]]]
        own.sort(reverse=True)
        assert found == (own[rank[g]] if rank[g] < 100 else -np.inf)
    assert np.isfinite(recall.found_scores()).any()


def test_ground_truth_without_its_file():
    """What is not kept to save memory must not be missed: names of images, masks, their errors."""
    content, _ = random_case(np.random.default_rng(10), num_images=3)
    for image in content["images"]:
        image["file_name"] = f"{image['id']}.jpg"
    for annotation in content["annotations"]:
        annotation["segmentation"] = [[10, 10, 30, 10, 30, 30, 10, 30]]
    gt, kept = (GroundTruth(content, [], keep=keep) for keep in (False, True))
    assert gt.find_image("2.jpg") == 2 and gt.has_masks and gt.masks == kept.masks
