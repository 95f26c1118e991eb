"""Detectors with classes: on OLN's proposals, on those of files, and their test by COCO's AP."""

import json
import logging

import pytest
from conftest import CONFIGS, NEEDS_DETECTRON2, make_coco

from oln_d2.checks import InputError

pytestmark = NEEDS_DETECTRON2
TINY = (
    "INPUT.MIN_SIZE_TRAIN (96,) INPUT.MIN_SIZE_TEST 96 SOLVER.IMS_PER_BATCH 2 SOLVER.STEPS () "
    "MODEL.RPN.PRE_NMS_TOPK_TRAIN 50 MODEL.RPN.PRE_NMS_TOPK_TEST 50 MODEL.FPN.OUT_CHANNELS 32 "
    "SOLVER.MAX_ITER 3 TEST.EVAL_PERIOD 0 SEED 1 DATALOADER.NUM_WORKERS 0"
).split()
NAMES = ["dog", "person"]  # not in the order of the file


@pytest.fixture
def data(tmp_path):
    """Rows of DATASETS.OWN, and what uses them; forgotten after the test."""
    from detectron2.data import DatasetCatalog, MetadataCatalog

    root = make_coco(tmp_path / "data") / "coco"
    rows = [
        [
            f"own_{part}",
            str(root / f"annotations/instances_{part}2017.json"),
            str(root / f"{part}2017"),
            NAMES,
        ]
        for part in ("train", "val")
    ]
    loggers = [logging.getLogger(name) for name in ("detectron2", "fvcore", "oln_d2")]
    before = [(logger, logger.propagate, logger.handlers[:]) for logger in loggers]
    yield rows
    for logger, propagate, handlers in before:  # trainings set them up
        logger.propagate, logger.handlers[:] = propagate, handlers
    for name, *_ in rows:
        if name in DatasetCatalog.list():
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)


def options(rows, output, *more):
    own = ["DATASETS.OWN", str(rows), "DATASETS.TRAIN", "('own_train',)"]
    own += ["DATASETS.TEST", "('own_val',)", "OUTPUT_DIR", str(output)]
    return [*own, *TINY, *map(str, more)]


def train(recipe, rows, output, *more):
    from detectron2.engine import default_argument_parser

    from oln_d2.train_net import main

    line = ["--config-file", str(CONFIGS / "cpu" / recipe), *options(rows, output, *more)]
    main(default_argument_parser().parse_args(line))
    lines = (output / "metrics.json").read_text().splitlines()
    return {k: v for line in lines for k, v in json.loads(line).items()}


def test_classes_of_own_data(data, tmp_path):
    """A class is the place of a name in `seen`, whatever the file's ids; other objects are none."""
    from detectron2.data import DatasetCatalog, MetadataCatalog

    from oln_d2.engine.datasets import register_own
    from oln_d2.model_zoo import get_config

    cfg = get_config("cpu/oln_faster_rcnn_R_18_FPN_GN.yaml")
    cfg.merge_from_list(options(data, tmp_path, "DATASETS.CLASSES", "True"))
    register_own(cfg)
    content = json.loads(open(data[1][1]).read())
    names = {c["id"]: c["name"] for c in content["categories"]}
    expected = {
        image["id"]: sorted(
            NAMES.index(names[a["category_id"]])
            for a in content["annotations"]
            if a["image_id"] == image["id"] and names[a["category_id"]] in NAMES
        )
        for image in content["images"]
    }
    records = DatasetCatalog.get("own_val")
    found = {r["image_id"]: sorted(a["category_id"] for a in r["annotations"]) for r in records}
    assert found == expected and {0, 1} <= {c for row in found.values() for c in row}
    assert MetadataCatalog.get("own_val").thing_classes == NAMES


def test_ap_is_of_the_seen_categories(data, tmp_path):
    """Categories that a detector never saw must not lower its AP, and classes not be mixed up."""
    import torch
    from detectron2.structures import Boxes, Instances

    from oln_d2.engine.datasets import register_open_world_coco
    from oln_d2.engine.evaluator import SeenCOCOEvaluator

    register_open_world_coco(*data[1], classes=True)
    content = json.loads(open(data[1][1]).read())
    names = {c["id"]: c["name"] for c in content["categories"]}
    assert {names[a["category_id"]] for a in content["annotations"]} > set(NAMES)
    ap = {}
    for turned in (False, True):
        evaluator = SeenCOCOEvaluator("own_val", str(tmp_path / "out"), distributed=False)
        evaluator.reset()
        for image in content["images"]:
            own = [
                a
                for a in content["annotations"]
                if a["image_id"] == image["id"] and names[a["category_id"]] in NAMES
            ]
            boxes = torch.tensor([a["bbox"] for a in own]).reshape(-1, 4)
            boxes[:, 2:] += boxes[:, :2]
            classes = [NAMES.index(names[a["category_id"]]) for a in own]
            instances = Instances((image["height"], image["width"]), pred_boxes=Boxes(boxes))
            instances.pred_classes = torch.tensor(classes).long() ^ int(turned)
            instances.scores = torch.ones(len(own))
            evaluator.process([{"image_id": image["id"]}], [{"instances": instances}])
        ap[turned] = evaluator.evaluate()["bbox"]
    assert ap[False]["AP"] == pytest.approx(100) and ap[True]["AP"] < 20
    assert ap[False].keys() >= {"AP-dog", "AP-person"} and "AP-zebra" not in ap[False]


def test_oln_as_the_first_stage(data, tmp_path):
    """One model learns both, and is tested by AP; what reaches its heads are OLN's boxes."""
    import torch
    from detectron2.modeling import build_model

    from oln_d2.model_zoo import get_config

    more = ["MODEL.ROI_HEADS.NUM_CLASSES", 2, "DATASETS.CLASSES", True]
    metrics = train("oln_faster_rcnn_R_18_FPN_GN.yaml", data, tmp_path / "out", *more)
    losses = {name for name in metrics if name.startswith("loss_")}
    assert losses == {
        *("loss_rpn_obj", "loss_rpn_loc", "loss_oln_box_score", "loss_oln_box_reg"),
        *("loss_cls", "loss_box_reg"),
    }
    assert "bbox/AP" in metrics and "bbox/AP-dog" in metrics

    cfg = get_config("cpu/oln_faster_rcnn_R_18_FPN_GN.yaml")
    cfg.merge_from_list([*TINY, "MODEL.OLN.NUM_PROPOSALS", "[7, 5]"])
    model = build_model(cfg).eval()
    generator = model.proposal_generator
    images = model.preprocess_image([{"image": torch.rand(3, 96, 128) * 255}])
    with torch.no_grad():
        features = model.backbone(images.tensor)
        (found,), losses = generator(images, features)
        first, _ = generator.rpn(images, features)
        (second,), _ = generator.roi_heads(images, features, first)
    assert not losses and len(found) == 5
    torch.testing.assert_close(found.proposal_boxes.tensor, second.pred_boxes.tensor[:5])
    torch.testing.assert_close(found.objectness_logits.sigmoid(), second.scores[:5])


def test_number_of_classes_is_checked(data, tmp_path):
    """A detector of fewer classes than the data would fail at some object, hours later."""
    more = ["MODEL.ROI_HEADS.NUM_CLASSES", 1, "DATASETS.CLASSES", True]
    with pytest.raises(InputError, match="has 2 classes and the model 1; set .*NUM_CLASSES 2"):
        train("oln_faster_rcnn_R_18_FPN_GN.yaml", data, tmp_path / "out", *more)


def test_fast_rcnn_on_files_of_proposals(data, tmp_path):
    """Fast R-CNN must train and be tested on the files that `propose` writes."""
    from oln_d2.cli import main

    files = []
    for name, gt, images, _ in data:
        out = tmp_path / name
        command = ["propose", images, "--gt", gt, "--format", "detectron2", "--output", str(out)]
        assert main(command) == 0
        files.append(str(out / "detectron2.pkl"))
    given = [f"DATASETS.PROPOSAL_FILES_{part}" for part in ("TRAIN", "TEST")]
    more = [x for key, file in zip(given, files) for x in (key, f"('{file}',)")]
    metrics = train("fast_rcnn_R_18_FPN_GN.yaml", data, tmp_path / "out", *more)
    assert {"loss_cls", "loss_box_reg", "box_unseen/AR@100"} <= metrics.keys()
