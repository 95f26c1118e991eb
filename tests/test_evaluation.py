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

from oln_d2.errors import InputError
from oln_d2.evaluation import GroundTruth, OpenWorldRecall
from oln_d2.evaluation.open_world import AREA_RANGES, IOU_THRESHOLDS
from oln_d2.evaluation.reference import evaluate
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


def random_case(rng, num_images=3, max_gts=6, max_dets=12, first_id=0):
    """Boxes and scores on a coarse grid, so that equal IoUs and scores are the rule; some without area."""

    def boxes(n):
        size = rng.choice([0, 1, 2, 3, 4, 6, 10], (n, 2), p=[0.04, 0.16, 0.2, 0.2, 0.2, 0.1, 0.1])
        return np.hstack([rng.integers(0, 4, (n, 2)), size]) * float(rng.choice([8, 16, 0.1]))

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
                    "id": len(content["annotations"]) + first_id,
                    "image_id": image,
                    "category_id": int(rng.integers(1, 5)),
                    "bbox": box,
                    "area": float(rng.choice([box[2] * box[3], 900, 32**2, 96**2])),
                    "iscrowd": int(rng.random() < 0.15),
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
                np.testing.assert_allclose(precision[k][v, a], expected[1][a, :, i], rtol=0, atol=1e-12)


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_public_evaluator(path):
    """Numbers would not be those of the public OLN code, so not comparable with any paper."""
    case = json.loads(path.read_text())
    recall = score(case["gt"], case["dt"], case["seen"], ks=GOLDEN_KS)
    result = recall.result()
    if path.stem == "gt_id_zero":  # the public code never finds a gt whose id is 0
        assert result["unseen"]["AR@10"] == 1
        return
    expected = {k: math.nan if v == -1 else v for k, v in case["expected"].items() if k[:2] in ("AR", "AP")}
    assert recall._counts[0].sum(-1).tolist() == case["expected"]["npig"]
    ours = {re.sub("^AR([sml])", r"AR_\1", name): v for name, v in result["unseen"].items()}
    for k in GOLDEN_KS:
        for a, suffix in enumerate(("", "_s", "_m", "_l")):
            ours[f"AP{suffix}@{k}"] = recall.average_precision(k)[0, a].mean()
    assert set(expected) <= set(ours)
    for name, value in expected.items():
        assert ours[name] == pytest.approx(value, abs=1e-12, nan_ok=True), name
    if sum(case["expected"]["npig"]):  # the public code averages its -1 for "undefined" into the AUC
        assert result["unseen"]["AUC"] == pytest.approx(case["expected"]["AUC"], abs=1e-12)
    else:
        assert math.isnan(result["unseen"]["AUC"])


@pytest.mark.parametrize("seed", range(20))
def test_random_cases_against_pycocotools(seed):
    """In some rare case (crowd, tie, box without area, empty image) a number would be wrong."""
    rng = np.random.default_rng(seed)
    for _ in range(50):
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
    """Long chains of detections that take one another's objects would be resolved in a wrong order."""
    rng = np.random.default_rng(2)
    for _ in range(8):
        content, results = random_case(rng, num_images=2, max_gts=40, max_dets=150)
        recall = score(content, results, max_dets=100, ks=KS)
        assert_equal_to_pycocotools(content, results, recall)
