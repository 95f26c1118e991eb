"""The formats of `oln-d2 propose`, each read by its tool, or as that tool reads it."""

import json
import os
import pickle

import numpy as np
import pytest
import torch
from conftest import NEEDS_DETECTRON2, make_coco
from pycocotools import mask as mask_utils
from pycocotools.coco import COCO
from test_propose import noise, photos, propose, weights  # noqa: F401

from oln_d2.commands.propose import FORMATS
from oln_d2.propose.writers import FILES, WRITERS, Target
from oln_d2.results import Proposals

FOUND = [
    Proposals([[10, 20, 40, 80], [0, 0, 5, 5]], [1.0, 0.0], size=(90, 120), name="a b.jpg"),
    Proposals([], [], size=(60, 50), name="more/c.jpg"),
]
IDS = {"a b.jpg": 7, "more/c.jpg": 3}


def write(format, folder, **more):
    WRITERS[format](Target(str(folder), IDS, **more), iter(FOUND))
    return folder / FILES[format][0]


def unpickle(path):
    """What a pickle holds, which may need no package but NumPy of any version."""
    data = path.read_bytes()
    assert b"numpy._core" not in data  # NumPy 1 does not have it
    return pickle.loads(data)


@pytest.fixture
def data_set(tmp_path):
    """A COCO file that has other ids, another order and an image more."""
    images = [
        {"id": 9, "file_name": "more/d.jpg", "height": 60, "width": 50},
        {"id": 3, "file_name": "more/c.jpg", "height": 60, "width": 50},
        {"id": 7, "file_name": "a b.jpg", "height": 90, "width": 120},
    ]
    path = tmp_path / "gt.json"
    path.write_text(
        json.dumps({"images": images, "annotations": [], "categories": [{"id": 1, "name": "a"}]})
    )
    return path


def test_formats_are_listed():
    """A format that the help does not name is not found, and one that is not there fails late."""
    assert list(FORMATS) == list(WRITERS) == list(FILES)
    for name, files in FILES.items():
        assert all(file in FORMATS[name] for file in files)


@NEEDS_DETECTRON2
def test_detectron2_trains_on_proposals(weights, tmp_path):  # noqa: F811
    """Fast R-CNN must be trained on the file, by the ids of the annotations and on good boxes."""
    from detectron2.config import get_cfg
    from detectron2.data import DatasetCatalog, build_detection_train_loader
    from detectron2.data.build import get_detection_dataset_dicts
    from detectron2.data.datasets import register_coco_instances
    from detectron2.modeling import build_model
    from detectron2.utils.events import EventStorage

    root = make_coco(tmp_path) / "coco"
    gt, images = root / "annotations/instances_train2017.json", root / "train2017"
    (images / "000000000003.jpg").rename(images / "elsewhere.jpg")  # not proposed on
    arguments = [images, "--gt", gt, "--weights", weights, "--device", "cpu", "--top-k", 20]
    assert propose(*arguments, "--format", "detectron2", "--output", tmp_path / "out") == 0
    (images / "elsewhere.jpg").rename(images / "000000000003.jpg")
    assert propose(*arguments, "--output", tmp_path / "plain") == 0
    entries = json.loads((tmp_path / "plain/results.json").read_text())

    path = tmp_path / "out/detectron2.pkl"
    content = unpickle(path)
    assert [len(boxes) for boxes in content["boxes"]] == [20, 20, 0, 20, 20, 20]
    register_coco_instances("formats", {}, str(gt), str(images))
    try:
        cfg = get_cfg()
        cfg.merge_from_list(
            ["MODEL.DEVICE", "cpu", "MODEL.LOAD_PROPOSALS", True, "MODEL.WEIGHTS", ""]
            + ["MODEL.META_ARCHITECTURE", "GeneralizedRCNN", "MODEL.RESNETS.DEPTH", 18]
            + ["MODEL.RESNETS.RES2_OUT_CHANNELS", 64, "MODEL.ROI_HEADS.NUM_CLASSES", 22]
            + ["MODEL.PROPOSAL_GENERATOR.NAME", "PrecomputedProposals", "DATALOADER.NUM_WORKERS", 0]
            + ["DATASETS.TRAIN", ("formats",), "DATASETS.PROPOSAL_FILES_TRAIN", (str(path),)]
            + ["INPUT.MIN_SIZE_TRAIN", (96,), "SOLVER.IMS_PER_BATCH", 5]
        )
        records = get_detection_dataset_dicts(["formats"], False, proposal_files=[str(path)])
        for record in records:
            own = [entry for entry in entries if entry["image_id"] == record["image_id"]]
            boxes = np.array([entry["bbox"] for entry in own])
            boxes[:, 2:] += boxes[:, :2]
            if record["image_id"] == 3:
                assert len(record["proposal_boxes"]) == 0
                continue
            np.testing.assert_allclose(record["proposal_boxes"], boxes, atol=1e-3)
            scores = 1 / (1 + np.exp(-record["proposal_objectness_logits"]))
            np.testing.assert_allclose(scores, [entry["score"] for entry in own], atol=1e-5)
        batch = next(iter(build_detection_train_loader(cfg)))
        with EventStorage():
            losses = build_model(cfg)(batch)
        assert all(torch.isfinite(loss) for loss in losses.values()) and losses
    finally:
        DatasetCatalog.remove("formats")


def test_logits_are_finite(tmp_path):
    """A score of 1 must not become an infinite logit, from which a loss would be NaN."""
    content = unpickle(write("detectron2", tmp_path))
    assert content["ids"] == [7, 3] and content["bbox_mode"] == 0
    high, low = content["objectness_logits"][0]
    assert np.isfinite([high, low]).all() and high > 10 and low < -10


def test_mmdetection_2(data_set, tmp_path):
    """CustomDataset takes the entry of the image's place in the data set, (N, 5) each."""
    proposals = unpickle(write("mmdet2", tmp_path, gt=data_set))
    assert type(proposals) is list
    order = COCO(str(data_set)).getImgIds()  # as CocoDataset.load_annotations
    assert order == [9, 3, 7] and [len(boxes) for boxes in proposals] == [0, 0, 2]
    for boxes in proposals:  # LoadProposals
        assert boxes.dtype == np.float32 and boxes.shape[1] == 5
    assert proposals[2].tolist() == [[10, 20, 40, 80, 1], [0, 0, 5, 5, 0]]
    assert [len(boxes) for boxes in unpickle(write("mmdet2", tmp_path))] == [2, 0]
    images = json.loads((tmp_path / "images.json").read_text())["images"]
    assert [image["id"] for image in images] == [7, 3]  # the order without a data set


def test_mmdetection_3(data_set, tmp_path):
    """BaseDetDataset.load_proposals looks for the last two parts of each path of the data set."""
    content = unpickle(write("mmdet3", tmp_path, gt=data_set, root=str(tmp_path / "val")))
    images = json.loads(data_set.read_text())["images"]
    assert len(content) == len(images)
    for image in images:
        path = os.path.join("data/val", image["file_name"])  # img_prefix and file_name
        key = os.path.join(os.path.split(os.path.split(path)[0])[-1], os.path.split(path)[-1])
        found = content[key]
        assert found["bboxes"].astype(np.float32).shape == (len(found["scores"]), 4)
    content = json.loads(data_set.read_text())
    content["images"][0]["coco_url"] = "http://host/" + content["images"][0].pop("file_name")
    data_set.write_text(json.dumps(content))
    content = unpickle(write("mmdet3", tmp_path, gt=data_set, root=str(tmp_path / "val")))
    assert len(content["more/d.jpg"]["scores"]) == 0
    assert content["val/a b.jpg"]["bboxes"].tolist() == [[10, 20, 40, 80], [0, 0, 5, 5]]


def test_mmdetection_3_cannot_hold_equal_paths(weights, tmp_path, capsys):  # noqa: F811
    """One image's proposals would silently be taken for the other's."""
    for folder in "x/photos", "y/photos":
        (tmp_path / folder).mkdir(parents=True)
        noise(64, 64).save(tmp_path / folder / "1.png")
    arguments = [tmp_path / "x", tmp_path / "y", "--weights", weights, "--output", tmp_path / "out"]
    assert propose(*arguments, "--format", "mmdet3") == 2
    assert "two images are photos/1.png" in capsys.readouterr().err
    assert propose(*arguments, "--format", "mmdet2") == 0  # what was proposed is not lost


def test_label_studio(tmp_path):
    """Boxes must lie where the model saw them, and each be found by its id, label and score."""
    content = json.loads(write("labelstudio", tmp_path, model="0123456789abcdef").read_text())
    empty = {"model_version": "oln-d2 0123456789ab", "score": 0.0, "result": []}
    url = "/data/local-files/?d="
    assert content[1] == {"data": {"image": f"{url}more/c.jpg"}, "predictions": [empty]}
    task = content[0]
    assert task["data"] == {"image": f"{url}a%20b.jpg"}
    (prediction,) = task["predictions"]
    assert prediction["score"] == 1.0
    first, second = prediction["result"]
    assert first["id"] != second["id"]
    # The example of https://labelstud.io/guide/predictions has these fields.
    value = first.pop("value")
    assert first | {"id": ""} == {
        "id": "", "type": "rectanglelabels", "from_name": "label", "to_name": "image",
        "original_width": 120, "original_height": 90, "image_rotation": 0, "score": 1.0,
    }  # fmt: skip
    assert value.pop("rectanglelabels") == ["object"]
    expected = {"x": 100 / 12, "y": 200 / 9, "width": 25, "height": 600 / 9, "rotation": 0}
    assert value == pytest.approx(expected)


def test_cvat(tmp_path):
    """COCO 1.0 as CVAT exports it, which pycocotools and supervision read as well."""
    path = write("cvat", tmp_path)
    coco = COCO(str(path))
    first, second = coco.loadAnns(coco.getAnnIds(imgIds=[7]))
    assert first["attributes"] == {"occluded": False, "score": 1.0}
    assert (first["bbox"], first["area"], first["segmentation"]) == ([10, 20, 30, 60], 1800, [])
    assert {first["id"], second["id"]} == {1, 2} and coco.loadCats(1)[0]["name"] == "object"
    assert coco.loadImgs([3])[0]["file_name"] == "more/c.jpg"
    sv = pytest.importorskip("supervision")
    for found in FOUND:
        (tmp_path / found.name).parent.mkdir(exist_ok=True)
        noise(*found.size[::-1]).save(tmp_path / found.name)
    read = sv.DetectionDataset.from_coco(str(tmp_path), str(path))
    boxes = {os.path.relpath(name, tmp_path): found.xyxy for name, _, found in read}
    assert boxes["a b.jpg"].tolist() == FOUND[0].boxes.tolist() and len(boxes["more/c.jpg"]) == 0


def test_cvat_masks(tmp_path):
    """Masks must not get lost on the way into an annotation tool."""
    mask = np.zeros((90, 120), np.uint8, order="F")
    mask[10:20, 30:35] = 1
    rle = mask_utils.encode(mask)
    found = Proposals([[30, 10, 35, 20]], [0.5], size=(90, 120), name="a.jpg", masks=[rle])
    WRITERS["cvat"](Target(str(tmp_path), {"a.jpg": 1}), [found])
    coco = COCO(str(tmp_path / "cvat.json"))
    (entry,) = coco.loadAnns([1])
    assert entry["area"] == 50 and (coco.annToMask(entry) == mask).all()


def test_coco_is_read_by_its_tools(weights, photos, tmp_path):  # noqa: F811
    """pycocotools loads the results on images.json; FiftyOne takes what has these fields."""
    assert propose(photos, "--weights", weights, "--output", tmp_path / "out") == 0
    coco = COCO(str(tmp_path / "out/images.json"))
    results = coco.loadRes(str(tmp_path / "out/results.json"))
    assert set(results.getImgIds()) == set(range(1, 7)) and len(results.getAnnIds()) > 30
    categories = coco.loadCats(coco.getCatIds())
    # By 1-based place of the name, as `add_coco_labels(..., categories=["object"])` counts.
    assert [(c["id"], c["name"]) for c in categories] == [(1, "object")]


@pytest.mark.parametrize("format", FORMATS)
def test_files_of_others_stay(format, weights, photos, tmp_path, capsys):  # noqa: F811
    """A user's results of the same name must not be replaced without a word."""
    path = tmp_path / "out" / FILES[format][0]
    path.parent.mkdir()
    path.write_text("mine")
    arguments = [photos, "--weights", weights, "--format", format, "--output", tmp_path / "out"]
    assert propose(*arguments) == 2
    assert f"error: {path}: is there" in capsys.readouterr().err and path.read_text() == "mine"
    path.unlink()
    assert propose(*arguments) == propose(*arguments) == 0
