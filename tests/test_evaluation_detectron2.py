"""Detectron2's evaluator around the open-world recall."""

import json
import math

import numpy as np
import pytest

pytest.importorskip("detectron2", reason="needs Detectron2")

import torch
from detectron2.config import get_cfg
from detectron2.data import MetadataCatalog
from detectron2.evaluation import print_csv_format, verify_results
from detectron2.structures import Boxes, Instances
from detectron2.utils import comm

from oln_d2.checks import InputError
from oln_d2.engine.evaluator import OpenWorldEvaluator
from oln_d2.evaluation import GroundTruth, OpenWorldRecall, read_results

SIZE = (100, 120)
NUM_IMAGES = 5


def square(box):
    x, y, w, h = box
    return [[x, y, x + w, y, x + w, y + h, x, y + h]]


@pytest.fixture
def dataset(tmp_path, request):
    """Name of a data set with masks; image 0 has no gt; and its COCO content."""
    rng = np.random.default_rng(0)
    annotations = []
    for image in range(1, NUM_IMAGES):
        for box in np.hstack([rng.integers(0, 60, (4, 2)), rng.integers(10, 40, (4, 2))]).tolist():
            annotations.append(
                {
                    "id": len(annotations),
                    "image_id": image,
                    "category_id": len(annotations) % 2 + 1,
                    "bbox": box,
                    "area": box[2] * box[3],
                    "iscrowd": 0,
                    "segmentation": square(box),
                }
            )
    content = {
        "images": [{"id": i, "height": SIZE[0], "width": SIZE[1]} for i in range(NUM_IMAGES)],
        "annotations": annotations,
        "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
    }
    path = tmp_path / "gt.json"
    path.write_text(json.dumps(content))
    name = f"open_world_test_{request.node.name}"
    MetadataCatalog.get(name).set(json_file=str(path), seen_names=("cat",))
    yield name, content
    MetadataCatalog.remove(name)


def make_instances(boxes, scores, masks=False):
    """Instances with jittered boxes XYXY."""
    instances = Instances(SIZE)
    instances.pred_boxes = Boxes(torch.as_tensor(boxes, dtype=torch.float32).reshape(-1, 4))
    instances.scores = torch.as_tensor(scores, dtype=torch.float32)
    if masks:
        instances.pred_masks = torch.zeros((len(scores), *SIZE), dtype=torch.bool)
        for mask, box in zip(
            instances.pred_masks, instances.pred_boxes.tensor.round().int().tolist()
        ):
            mask[box[1] : box[3], box[0] : box[2]] = True
    return instances


def detections(content, image, rng):
    boxes = [a["bbox"] for a in content["annotations"] if a["image_id"] == image]
    boxes = np.array(boxes * 2, float).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    boxes += rng.normal(0, 1.5, boxes.shape)
    return boxes.clip(0, 119), rng.random(len(boxes))


def run(evaluator, content, masks=False, images=range(NUM_IMAGES), seed=1):
    for image in images:
        boxes, scores = detections(content, image, np.random.default_rng(seed + image))
        outputs = [{"instances": make_instances(boxes, scores, masks)}]
        evaluator.process([{"image_id": image}], outputs)


def test_same_as_scoring_the_file(dataset, tmp_path):
    """`--eval-only` and `oln_d2 evaluate` on its results file would give different numbers."""
    name, content = dataset
    evaluator = OpenWorldEvaluator(name, tmp_path / "out", protocols=("xclass", "filtered"))
    run(evaluator, content, masks=True)
    results = evaluator.evaluate()
    assert set(results) == {
        f"{kind}_{group}{suffix}"
        for kind in ("box", "mask")
        for group in ("unseen", "seen", "all")
        for suffix in ("", "_filtered")
    }
    gt = GroundTruth.load(tmp_path / "gt.json", "cat")
    read = read_results(tmp_path / "out/coco_instances_results.json", gt, masks=True)
    report = json.loads((tmp_path / "out/open_world_results.json").read_text())["results"]
    for entry in report:
        recall = OpenWorldRecall(gt, entry["protocol"], iou_type=entry["iou_type"])
        recall.update(*read[:3], masks=read.masks, box_format="xywh")
        suffix = "_filtered" if entry["protocol"] == "filtered" else ""
        for group in ("unseen", "seen", "all"):
            task = results[f"{entry['iou_type']}_{group}{suffix}"]
            expected = {k: 100 * v for k, v in recall.result()[group].items()}
            assert task == pytest.approx(expected, abs=0, rel=0, nan_ok=True)
            stored = {k: math.nan if v is None else 100 * v for k, v in entry[group].items()}
            assert task == pytest.approx(stored, abs=0, rel=0, nan_ok=True)
    assert 0 < results["box_unseen"]["AR@10"] < 100
    assert not list((tmp_path / "out").glob("*.tmp"))


def test_detectron2_tools_take_the_results(dataset):
    """Detectron2 would hide metrics whose names it does not like, or fail on the results."""
    name, content = dataset
    evaluator = OpenWorldEvaluator(name, ks=(10, 100))
    run(evaluator, content)
    results = evaluator.evaluate()
    assert not any("-" in metric for task in results.values() for metric in task)
    print_csv_format(results)
    cfg = get_cfg()
    cfg.TEST.EXPECTED_RESULTS = [["box_unseen", "AR@10", results["box_unseen"]["AR@10"], 1e-9]]
    assert verify_results(cfg, results)


def test_proposals_keep_their_order(dataset):
    """Logits beyond 37 have the same sigmoid; the best proposals would be in random order."""
    name, content = dataset
    evaluator = OpenWorldEvaluator(name, ks=(1,))
    for image in range(NUM_IMAGES):
        gts = [a["bbox"] for a in content["annotations"] if a["image_id"] == image]
        boxes = torch.tensor(gts, dtype=torch.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        boxes = torch.cat([torch.tensor([[0.0, 0, 3, 3]] * 3), boxes])
        proposals = Instances(SIZE)
        proposals.proposal_boxes = Boxes(boxes)
        proposals.objectness_logits = torch.arange(len(boxes)) + 50.0
        evaluator.process([{"image_id": image}], [{"proposals": proposals}])
    # The last box of each image, of category dog, has the highest logit.
    assert evaluator.evaluate()["box_unseen"]["AR@1"] == pytest.approx(50)


def test_padded_images_count_once(dataset):
    """The sampler repeats images to fill the last batch on several GPUs; recall would be wrong."""
    name, content = dataset
    evaluator = OpenWorldEvaluator(name)
    run(evaluator, content)
    expected = evaluator.evaluate()
    run(evaluator, content, images=[1, 2], seed=50)
    assert_same(evaluator.evaluate(), expected)
    evaluator.reset()
    with pytest.raises(RuntimeError, match="5 of the 5 images"):
        evaluator.evaluate()


def test_several_processes(dataset, monkeypatch):
    """On several GPUs detections of other processes would be dropped, or their order matter."""
    name, content = dataset
    whole = OpenWorldEvaluator(name, distributed=False)
    run(whole, content)
    first, second = OpenWorldEvaluator(name), OpenWorldEvaluator(name)
    run(first, content, images=[4, 0, 2])
    run(second, content, images=[3, 1, 4])
    # Two real processes would need a port; what they exchange is all that matters here.
    monkeypatch.setattr(comm, "gather", lambda data, dst: [data, second._detections])
    assert_same(first.evaluate(), whole.evaluate())
    monkeypatch.setattr(comm, "is_main_process", lambda: False)
    assert second.evaluate() == {}


def assert_same(results, expected):
    assert results.keys() == expected.keys()
    for task in expected:
        assert results[task] == pytest.approx(expected[task], abs=0, rel=0, nan_ok=True)


def test_missing_images(dataset):
    """A run that lost images would report a recall that is too low, without a word."""
    name, content = dataset
    evaluator = OpenWorldEvaluator(name)
    run(evaluator, content, images=[0, 1, 4])
    with pytest.raises(RuntimeError, match="2 of the 5 images .* image 2"):
        evaluator.evaluate()


def test_no_detections_at_all(dataset, tmp_path):
    """An untrained model would crash at its first evaluation."""
    name, _ = dataset
    evaluator = OpenWorldEvaluator(name, tmp_path / "out")
    for image in range(NUM_IMAGES):
        evaluator.process(
            [{"image_id": image}], [{"instances": make_instances([], [], masks=True)}]
        )
    results = evaluator.evaluate()
    assert results["box_unseen"]["AR@100"] == results["mask_unseen"]["AUC"] == 0
    assert json.loads((tmp_path / "out/coco_instances_results.json").read_text()) == []


def test_nan_boxes_are_named(dataset):
    """A diverged model would report numbers."""
    name, content = dataset
    evaluator = OpenWorldEvaluator(name)
    run(evaluator, content, images=[0, 2, 3, 4])
    broken = make_instances([[0, 0, math.nan, 5]], [0.5])
    evaluator.process([{"image_id": 1}], [{"instances": broken}])
    with pytest.raises(InputError, match="not finite"):
        evaluator.evaluate()
