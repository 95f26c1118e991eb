"""The open-world recall rule on arrays: against the public evaluator's numbers and pycocotools."""

import copy
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from pycocotools import mask as mask_utils

from oln_d2.benchmark.reference import evaluate
from oln_d2.checks import InputError
from oln_d2.evaluation import GroundTruth, OpenWorldRecall
from oln_d2.evaluation.open_world import AREA_RANGES, IOU_THRESHOLDS
from oln_d2.evaluation.result import GROUPS, auc

GOLDEN = sorted((Path(__file__).parent / "data/evaluator").glob("*.json"))
GOLDEN_KS = (10, 20, 30, 50, 100, 300, 500, 1000, 1500)
KS = (1, 2, 3, 5, 100)
SEEN = [1, 2]


def names(ids):
    return [f"c{i}" for i in ids]


def score(content, results, seen=SEEN, iou_type="box", **settings):
    recall = OpenWorldRecall(GroundTruth(content, names(seen)), iou_type=iou_type, **settings)
    add(recall, results)
    return recall


def add(recall, results):
    recall.update(
        np.array([entry["image_id"] for entry in results], int),
        np.array([entry["bbox"] for entry in results], float),
        np.array([entry["score"] for entry in results], float),
        masks=[entry.get("segmentation") for entry in results],
        box_format="xywh",
    )


def random_case(rng, num_images=3, max_gts=6, max_dets=12, crowds=0.15, num_boxes=None):
    """
    Boxes and scores on a coarse grid, so that equal IoUs and scores are the rule; some without
    area. `crowds`: their share of the gts. `num_boxes`: how many different boxes there are at most.
    """

    def boxes(n):
        size = rng.choice([0, 1, 2, 3, 4, 6, 10], (n, 2), p=[0.04, 0.16, 0.2, 0.2, 0.2, 0.1, 0.1])
        return np.hstack([rng.integers(0, 4, (n, 2)), size]) * float(rng.choice([8, 16, 1.1]))

    if num_boxes:
        few = boxes(num_boxes)

        def boxes(n):
            return few[rng.integers(num_boxes, size=n)]

    content = {
        "images": [{"id": i, "width": 300, "height": 300} for i in range(num_images)],
        "categories": [{"id": i, "name": f"c{i}"} for i in (1, 2, 3, 4)],
        "annotations": [],
    }
    results = []
    for image in range(num_images):
        for box in boxes(rng.integers(0, max_gts + 1)).tolist():
            content["annotations"].append(
                {
                    "id": len(content["annotations"]),
                    "image_id": image,
                    "category_id": int(rng.integers(1, 5)),
                    "bbox": box,
                    "area": float(rng.choice([box[2] * box[3], 900, 32**2, 96**2])),
                    "iscrowd": int(rng.random() < crowds),
                }
            )
        for box in boxes(rng.integers(0, max_dets + 1)).tolist():
            entry = {"image_id": image, "category_id": int(rng.integers(1, 5)), "bbox": box}
            results.append({**entry, "score": int(rng.integers(0, 5)) / 4})
    rng.shuffle(results)
    return content, results


def pycocotools_numbers(content, results, protocol, group, iou_type="bbox", max_dets=100):
    """What the plain implementation says: recall and precision, NaN where undefined, (A, T, K)."""
    content = copy.deepcopy(content)
    for annotation in content["annotations"]:
        annotation["id"] += 1  # pycocotools takes id 0 for "not matched"
    seen = set(SEEN)
    others = {"unseen": seen, "seen": {1, 2, 3, 4} - seen, "all": set()}[group]
    rule = {}
    if protocol == "filtered":
        kept = [a for a in content["annotations"] if a["category_id"] not in others]
        content["annotations"] = kept
    elif group != "all":
        rule = {"seen_ids": others, "free_seen": group == "unseen"}
    numbers = evaluate(content, results, iou_type, KS, max_dets, **rule)
    return [np.where(x < 0, np.nan, x).swapaxes(0, 1) for x in numbers]


def assert_equal_to_pycocotools(content, results, recall, **settings):
    result = recall.result()
    precision = {k: recall.average_precision(k) for k in KS}
    for v, group in enumerate(GROUPS):
        expected = pycocotools_numbers(content, results, recall.protocol, group, **settings)
        for a, area in enumerate(AREA_RANGES):
            for i, k in enumerate(KS):
                found = result.recall(k, group, area)
                np.testing.assert_allclose(found, expected[0][a, :, i], rtol=0, atol=1e-12)
                np.testing.assert_allclose(
                    precision[k][v, a], expected[1][a, :, i], rtol=0, atol=1e-12
                )


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_public_evaluator(path):
    """Numbers would not be those of the public OLN code, so not comparable with any paper."""
    case = json.loads(path.read_text())
    recall = score(case["gt"], case["dt"], case["seen"], ks=GOLDEN_KS)
    result = recall.result()
    if path.stem == "gt_id_zero":  # the public code never finds a gt whose id is 0
        assert result["unseen"]["AR@10"] == 1
        return
    expected = {
        k: math.nan if v == -1 else v for k, v in case["expected"].items() if k[:2] in ("AR", "AP")
    }
    assert recall._counts[0].sum(-1).tolist() == case["expected"]["npig"]
    ours = {re.sub("^AR([sml])", r"AR_\1", name): v for name, v in result["unseen"].items()}
    for k in GOLDEN_KS:
        for a, suffix in enumerate(("", "_s", "_m", "_l")):
            ours[f"AP{suffix}@{k}"] = recall.average_precision(k)[0, a].mean()
    assert set(expected) <= set(ours)
    for name, value in expected.items():
        assert ours[name] == pytest.approx(value, abs=1e-12, nan_ok=True), name
    if sum(
        case["expected"]["npig"]
    ):  # the public code averages its -1 for "undefined" into the AUC
        assert result["unseen"]["AUC"] == pytest.approx(case["expected"]["AUC"], abs=1e-12)
    else:
        assert math.isnan(result["unseen"]["AUC"])


@pytest.mark.parametrize("seed", range(16))
def test_random_cases_against_pycocotools(seed):
    """In some rare case (crowd, tie, box without area, empty image) a number would be wrong."""
    rng = np.random.default_rng(seed)
    for _ in range(130):
        content, results = random_case(rng)
        if not results:
            continue
        protocol = str(rng.choice(["xclass", "filtered"]))
        recall = score(content, results, protocol=protocol, max_dets=100, ks=KS)
        assert_equal_to_pycocotools(content, results, recall)


def test_few_detections_allowed():
    """Detections beyond the limit would take part: `max_dets` 900 and 1500 would be the same."""
    rng = np.random.default_rng(1)
    for _ in range(30):
        content, results = random_case(rng, max_dets=20)
        if results:
            recall = score(content, results, max_dets=7, ks=(1, 7))
            result = recall.result()
            expected, _ = pycocotools_numbers(content, results, "xclass", "unseen", max_dets=7)
            for i, k in enumerate((1, 2, 3, 5, 7)):
                for a, area in enumerate(AREA_RANGES):
                    np.testing.assert_allclose(
                        result.recall(k, area=area), expected[a, :, i], rtol=0, atol=1e-12
                    )


def test_crowded_scenes_against_pycocotools():
    """Chains of detections that take one another's objects would be resolved in wrong order."""
    rng = np.random.default_rng(2)
    for _ in range(8):
        content, results = random_case(rng, num_images=2, max_gts=40, max_dets=150)
        recall = score(content, results, max_dets=100, ks=KS)
        assert_equal_to_pycocotools(content, results, recall)


def test_crowds_against_pycocotools():
    """Where crowds and objects overlap, detections would go to the wrong one and be free or not."""
    rng = np.random.default_rng(11)
    for i in range(150):
        content, results = random_case(
            rng, num_images=4, max_gts=7, max_dets=25, crowds=0.4, num_boxes=(None, 4, 12)[i % 3]
        )
        recall = score(content, results, max_dets=100, ks=KS)
        assert_equal_to_pycocotools(content, results, recall)


def test_plain_pycocotools_without_seen_categories():
    """Without a split, AR would not be the class-agnostic AR that everybody knows."""
    rng = np.random.default_rng(3)
    for _ in range(30):
        content, results = random_case(rng)
        if results:
            result = score(content, results, seen=[], max_dets=100, ks=KS).result()
            expected, _ = pycocotools_numbers(content, results, "xclass", "all")
            for i, k in enumerate(KS):
                np.testing.assert_allclose(result.recall(k), expected[0, :, i], rtol=0, atol=1e-12)
            assert math.isnan(result["seen"]["AR@1"]) and math.isnan(result["seen"]["AUC"])


def test_masks_against_pycocotools():
    """Mask recall would be wrong, or be that of the boxes."""
    rng = np.random.default_rng(4)
    for _ in range(20):
        content, results = random_case(rng, num_images=2)
        for entry in content["annotations"] + results:
            x, y, w, h = np.array(entry["bbox"]) + rng.integers(0, 3, 4)
            mask = np.zeros((300, 300), np.uint8, order="F")
            mask[int(y) : int(y + h), int(x) : int(x + w)] = 1
            mask[:: rng.integers(2, 9)] = 0
            entry["segmentation"] = mask_utils.encode(mask)
        if results:
            recall = score(content, results, iou_type="mask", max_dets=100, ks=KS)
            assert_equal_to_pycocotools(content, results, recall, iou_type="segm")


def test_more_than_255_masks_in_an_image():
    """OLN-Mask finds 1500 an image; pycocotools' own area of so many fails under numpy 2."""
    content, _ = one_image([[50, 50, 20, 20]])
    masks = np.zeros((300, 300, 400), np.uint8, order="F")
    masks[50:70, 50:70] = 1
    masks = mask_utils.encode(masks)
    content["annotations"][0]["segmentation"] = masks[0]
    recall = OpenWorldRecall(GroundTruth(content, []), iou_type="mask")
    recall.update(0, None, np.linspace(1, 0.5, 400), masks=masks)
    assert recall.result()["unseen"]["AR@10"] == 1


def test_polygons_and_uncompressed_masks():
    """Masks as COCO's own annotation files have them could not be scored."""
    content, _ = one_image([[10, 10, 20, 20], [50, 50, 20, 20]])
    square = [10, 10, 30, 10, 30, 30, 10, 30]
    content["annotations"][0]["segmentation"] = [square]
    mask = np.zeros((300, 300), np.uint8)
    mask[50:70, 50:70] = 1
    runs = np.diff(np.flatnonzero(np.diff(mask.T.ravel(), prepend=0, append=0)), prepend=0).tolist()
    runs.append(300 * 300 - sum(runs))
    content["annotations"][1]["segmentation"] = {"size": [300, 300], "counts": runs}
    gt = GroundTruth(content, [])
    recall = OpenWorldRecall(gt, iou_type="mask")
    recall.update(0, None, [0.9, 0.8], masks=gt.masks)
    assert recall.result()["unseen"]["AR@10"] == 1


def test_merged_parts_are_the_whole():
    """Evaluation on several GPUs, or image by image, would give other numbers than on one."""
    rng = np.random.default_rng(5)
    content, results = random_case(rng, num_images=40)
    whole = score(content, results, max_dets=100, ks=KS)
    by_image = {}
    for entry in results:
        by_image.setdefault(entry["image_id"], []).append(entry)
    images = list(by_image)
    rng.shuffle(images)
    parts = []
    for part in range(3):
        recall = OpenWorldRecall(whole.ground_truth, max_dets=100, ks=KS)
        for image in images[part::3]:
            add(recall, by_image[image])
            if rng.random() < 0.2:
                recall.result()
        parts.append(recall)
    parts[0].merge(parts[1])
    parts[2].merge(parts[0])
    assert parts[2].result().to_dict() == whole.result().to_dict()
    np.testing.assert_array_equal(parts[2].result().found, whole.result().found)
    for k in KS:
        np.testing.assert_array_equal(parts[2].average_precision(k), whole.average_precision(k))
    with pytest.raises(InputError, match="both results"):
        whole.merge(parts[2])
    with pytest.raises(InputError, match="different settings"):
        whole.merge(OpenWorldRecall(whole.ground_truth, "filtered", max_dets=100, ks=KS))


def one_image(gts, dets=(), scores=None, category=4):
    content = {
        "images": [{"id": 0, "width": 300, "height": 300}],
        "categories": [{"id": i, "name": f"c{i}"} for i in (1, 2, 3, 4)],
        "annotations": [
            {"id": i, "image_id": 0, "category_id": category, "bbox": box, "area": box[2] * box[3]}
            for i, box in enumerate(gts)
        ],
    }
    scores = np.linspace(1, 0.1, len(dets)) if scores is None else scores
    results = [{"image_id": 0, "bbox": b, "score": s} for b, s in zip(dets, scores)]
    return content, results


def test_no_detections():
    """A detector that finds nothing would crash the evaluation after hours of inference."""
    content, _ = one_image([[10, 10, 50, 50]])
    recall = OpenWorldRecall(GroundTruth(content, names(SEEN)))
    empty = recall.result()
    assert empty["unseen"]["AR@100"] == empty["unseen"]["AUC"] == empty["unseen"]["AP"] == 0
    assert math.isnan(empty["unseen"]["ARs@100"])
    recall.update(0, np.zeros((0, 4)), [])
    recall.update([], [], [])
    assert recall.result().to_dict().keys() == empty.to_dict().keys()
    assert recall.result()["unseen"] == pytest.approx(empty["unseen"], nan_ok=True)
    assert recall.result()["all"]["AR@1"] == 0 and "0 detections" in str(recall.result())


def test_images_without_detections_count():
    """Images on which nothing was detected would drop out, and recall would be too high."""
    content, results = one_image([[10, 10, 50, 50]], [[10, 10, 50, 50]])
    content["images"].append({"id": 7, "width": 300, "height": 300})
    content["annotations"].append({**content["annotations"][0], "id": 9, "image_id": 7})
    assert score(content, results).result()["unseen"]["AR@10"] == 0.5


def test_crowd_takes_the_first_candidates():
    """A seen object whose first candidates go to a crowd would free no detection."""
    dets = [[0, 0, 10, 8], [0, 0, 10, 8], [0, 0, 10, 10], [100, 100, 50, 50]]
    content, results = one_image([[0, 0, 10, 10], [0, 0, 10, 8], [100, 100, 50, 50]], dets)
    content["annotations"][0]["category_id"] = 1
    content["annotations"][1]["iscrowd"] = 1
    result = score(content, results, ks=(2, 3)).result()
    assert result["unseen"]["AR@2"] == 0 and result["unseen"]["AR@3"] == 1


def test_tensors_and_corners():
    """Boxes from a model, tensors as XYXY, would have to be converted by the user."""
    content, results = one_image([[10, 10, 50, 50]], [[10, 10, 50, 45]])
    recall = OpenWorldRecall(GroundTruth(content, names(SEEN)))
    recall.update(0, torch.tensor([[10.0, 10, 60, 55]], requires_grad=True), torch.tensor([0.5]))
    assert recall.result()["unseen"] == pytest.approx(
        score(content, results).result()["unseen"], nan_ok=True
    )


def test_other_thresholds():
    """Reporting recall at one IoU would change which detections are free, which is fixed at .50."""
    rng = np.random.default_rng(6)
    for _ in range(20):
        content, results = random_case(rng)
        full = score(content, results, ks=KS).result()
        for chosen in ([0.5], [0.75], [0.6, 0.9]):
            at = np.isin(np.round(IOU_THRESHOLDS, 2), chosen)
            thresholds = np.array(IOU_THRESHOLDS)[at]
            some = score(content, results, ks=KS, iou_thresholds=thresholds).result()
            np.testing.assert_array_equal(some.recall(3), full.recall(3)[at])


def test_auc():
    """AUC would not be the one of the published tables."""
    assert auc([0, 18.0, 26.5, 29.6, 33.4, 39.0, 41.5, 45.0]) == pytest.approx(24.847, abs=5e-4)
    assert auc([5.0, 18.0, 26.5, 29.6, 33.4, 39.0, 41.5, 45.0]) == pytest.approx(24.847, abs=5e-4)


def test_matching_is_by_image_id():
    """Results in another order than the ground truth would be matched to wrong images."""
    rng = np.random.default_rng(7)
    content, results = random_case(rng, num_images=10)
    expected = score(content, results).result().to_dict()
    by_image = sorted(results, key=lambda entry: -entry["image_id"])
    rng.shuffle(content["images"])
    assert score(content, by_image).result().to_dict() == expected


def test_per_category_and_bootstrap():
    """A user would improve the wrong class, or get intervals that do not contain the value."""
    rng = np.random.default_rng(8)
    content, results = random_case(rng, num_images=60)
    result = score(content, results, ks=KS, max_dets=100).result()
    table = result.per_category()
    assert list(table) == ["c3", "c4"]
    total = sum(row["gts"] * row["AR@3"] for row in table.values()) / sum(
        r["gts"] for r in table.values()
    )
    assert total == pytest.approx(result["unseen"]["AR@3"])
    intervals = result.bootstrap(200, seed=3)
    assert intervals == result.bootstrap(200, seed=3) != result.bootstrap(200, seed=4)
    for group in GROUPS:
        for name, (low, high) in intervals[group].items():
            value = result[group][name]
            assert math.isnan(value) or low <= value <= high, (group, name)
    low, high = intervals["unseen"]["AR@3"]
    assert 0 < high - low < 0.5
    for bad in ({"samples": 0}, {"seed": -1}, {"level": 95}):
        with pytest.raises(InputError, match=f"{next(iter(bad))} is "):
            result.bootstrap(**bad)


def test_to_json(tmp_path):
    """Numbers would be lost or rounded on the way through the file, or NaN make it no JSON."""
    content, results = random_case(np.random.default_rng(9))
    content["annotations"] = [a for a in content["annotations"] if a["category_id"] not in SEEN]
    result = score(content, results).result()
    result.to_json(tmp_path / "out.json")
    (entry,) = json.loads((tmp_path / "out.json").read_text())["results"]
    assert entry["seen"]["AR@10"] is None
    assert entry["unseen"]["AR@10"] == result["unseen"]["AR@10"]
    assert entry["protocol"] == "xclass" and entry["num_images"] == 3
    assert [p.name for p in tmp_path.iterdir()] == ["out.json"]


def test_plot(tmp_path):
    """No picture, or one that is left half written."""
    content, results = random_case(np.random.default_rng(10))
    result = score(content, results).result()
    result.plot(tmp_path / "ar.png")
    assert (tmp_path / "ar.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(InputError, match="ar.nonsense: its ending has to be one of"):
        result.plot(tmp_path / "ar.nonsense")
    with pytest.raises(InputError, match="ar.png: cannot be written"):
        result.plot(tmp_path / "none" / "ar.png")
    assert [p.name for p in tmp_path.iterdir()] == ["ar.png"]


def test_warning_when_detections_run_out():
    """A user who kept 100 detections would take AR@100 of the budget rule for that of the paper."""
    dets = [[10, 10, 50, 50]] + [[100, 100, 5 + i, 5] for i in range(99)]
    content, results = one_image([[10, 10, 50, 50]], dets, category=1)
    # The one image with the most detections says nothing, however few images there are.
    assert not score(content, results, ks=(10, 100)).result().warnings
    for field in ("images", "annotations"):
        content[field] += [{**entry, "id": 1, "image_id": 1} for entry in content[field]]
    results += [{**entry, "image_id": 1} for entry in results]
    (warning,) = score(content, results, ks=(10, 100)).result().warnings
    assert "100 detections" in warning and "99 of them" in warning and "AR@100 may" in warning
    assert not score(content, results, ks=(10, 50)).result().warnings
    assert not score(content, results, ks=(10, 100), protocol="filtered").result().warnings
    # Where the protocol's own limit cuts, there is nothing for the user to keep more of.
    assert not score(content, results, ks=(10, 100), max_dets=100).result().warnings
    assert not score(*one_image([[10, 10, 50, 50]], dets[:1]), ks=(1, 10)).result().warnings


def test_warning_for_images_without_detections():
    """Recall of a detector that was run on a part of the images would be taken for its own."""
    content, results = one_image([[10, 10, 50, 50]], [[10, 10, 50, 50]])
    content["images"] += [{**content["images"][0], "id": i} for i in (1, 2)]
    (warning,) = score(content, results, ks=(10,)).result().warnings
    assert "2 of 3 images have no detection" in warning
    results += [{**entry, "image_id": i} for i in (1, 2) for entry in results]
    assert not score(content, results, ks=(10,)).result().warnings


def test_warning_for_rounded_scores():
    """The order of the file, not the detector, would decide what is within the budget."""
    dets = [[100, 100, 5 + i, 5] for i in range(50)]
    content, results = one_image([[10, 10, 50, 50]], dets, np.linspace(1, 0, 50).round(1))
    assert "rounded" in " ".join(score(content, results, ks=(10,)).result().warnings)
    content, results = one_image([[10, 10, 50, 50]], dets)
    assert not score(content, results, ks=(10,)).result().warnings


@pytest.mark.parametrize(
    "change, message",
    [
        ({"image_ids": [0, 5]}, "entry 1: image_id 5 is not in"),
        ({"image_ids": [0.0, 0.0]}, "integers"),
        ({"boxes": [[0, 0, 1, 1], [0, np.nan, 1, 1]]}, "entry 1: box .* not finite"),
        ({"boxes": [[0, 0, np.inf, 1], [0, 0, 1, 1]]}, "entry 0: box .* not finite"),
        ({"scores": [0.5, np.nan]}, "entry 1: score nan is not finite"),
        ({"boxes": [[0, 0, 1, 1], [5, 5, 4, 9]]}, "entry 1: .* negative size"),
        ({"boxes": [[0, 0, 1, 1]]}, "boxes have shape"),
        ({"scores": [[0.5, 0.4]]}, "scores have shape"),
        ({"scores": [0.5, None]}, "score: expected numbers"),
        ({"boxes": [["a"] * 4] * 2}, "box: expected numbers"),
        ({"image_ids": [0, 0, 0]}, "image_ids have shape"),
        ({"box_format": "XYXY"}, "box_format 'XYXY' is neither"),
    ],
)
def test_bad_detections(change, message):
    """Bad input would give numbers, or a traceback that does not name the entry."""
    content, _ = one_image([[10, 10, 50, 50]])
    recall = OpenWorldRecall(GroundTruth(content, names(SEEN)))
    good = {"image_ids": [0, 0], "boxes": [[0, 0, 1, 1], [5, 5, 9, 9]], "scores": [0.5, 0.4]}
    with pytest.raises(InputError, match=message):
        recall.update(**{**good, **change})
    recall.update(**good)  # nothing was added before
    with pytest.raises(InputError, match="image 0 has had"):
        recall.update(**good)


@pytest.mark.parametrize("mask", [None, [], {"size": [300, 300]}, [["a", 1]]])
def test_ground_truth_without_mask(mask):
    """Mask evaluation of a ground truth that has boxes only would end in a traceback."""
    content, _ = one_image([[10, 10, 20, 20]])
    content["annotations"][0]["segmentation"] = mask
    with pytest.raises(InputError, match="annotation with id 0"):
        _ = GroundTruth(content, [], "gt.json").masks


def test_mask_of_another_size():
    """Masks of a resized image would silently overlap with nothing."""
    content, _ = one_image([[10, 10, 20, 20]])
    content["annotations"][0]["segmentation"] = [[10, 10, 30, 10, 30, 30, 10, 30]]
    recall = OpenWorldRecall(GroundTruth(content, []), iou_type="mask")
    mask = mask_utils.encode(np.zeros((150, 300), np.uint8, order="F"))
    with pytest.raises(InputError, match=r"entry 0: .* size \[150.0, 300.0\].* \[300.0, 300.0\]"):
        recall.update(0, None, [0.9], masks=[mask])
    with pytest.raises(InputError, match="1 masks"):
        recall.update(0, None, [0.9])


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"protocol": "paper"}, "protocol"),
        ({"ks": (10, 2000)}, "max_dets"),
        ({"ks": (0, 10)}, "between 1"),
        ({"ks": ()}, "between 1"),
        ({"iou_type": "bbox"}, "iou_type"),
        ({"iou_thresholds": [0.5, 1.1]}, "iou_thresholds"),
        ({"iou_thresholds": []}, "iou_thresholds"),
    ],
)
def test_bad_settings(settings, message):
    """A mistyped setting would be taken for another one."""
    content, _ = one_image([[10, 10, 50, 50]])
    with pytest.raises(InputError, match=message):
        OpenWorldRecall(GroundTruth(content, names(SEEN)), **settings)


def test_ground_truth_without_area():
    """Recall by size would be of boxes where masks are meant, without a word, or of nonsense."""
    content, _ = one_image([[10, 10, 50, 50]])
    annotation = content["annotations"][0]
    for area in (math.nan, -1, "9", [9]):
        annotation["area"] = area
        with pytest.raises(InputError, match=r"annotations\[0\]: area .* leave it out"):
            GroundTruth(content, names(SEEN), "gt.json")
    del annotation["area"]
    triangle = [[10, 10, 60, 10, 10, 60]]
    for segmentation, area in ((None, 2500), ([[]], 2500), (triangle, 1250)):
        annotation["segmentation"] = segmentation
        gt = GroundTruth(content, names(SEEN), "gt.json")
        assert gt.areas[0] == pytest.approx(area, rel=0.05)
        (warning,) = [x for x in OpenWorldRecall(gt).result().warnings if "`area`" in x]
        assert warning.startswith(f"1 of {len(gt.areas)} objects have no `area`")
    assert "area" not in annotation  # it is the caller's


def test_half_precision_tensors():
    """Detections of a model under autocast, or on a GPU, would have to be converted by its user."""
    import torch

    content, _ = one_image([[10, 10, 50, 50]])
    recall = OpenWorldRecall(GroundTruth(content, names(SEEN)), ks=(10,))
    boxes = torch.tensor([[10, 10, 60, 60]], dtype=torch.bfloat16)
    recall.update(0, boxes, torch.tensor([0.5], dtype=torch.bfloat16))
    result = recall.result()
    assert result["all"]["AR@10"] == 1
    with pytest.raises(InputError, match="group 'novel'"):
        result.ar(10, "novel")
