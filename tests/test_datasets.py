"""Category splits and open-world data sets."""

import json

import pytest
from conftest import NEEDS_DETECTRON2, make_coco

from oln_d2.data.coco import load_coco
from oln_d2.data.splits import SPLITS, seen_names, split_category_ids
from oln_d2.errors import InputError


@pytest.fixture
def coco(tmp_path):
    return make_coco(tmp_path)


def paths(root, part):
    return str(root / f"coco/annotations/instances_{part}2017.json"), str(root / f"coco/{part}2017")


def test_splits_are_the_papers():
    """20 seen categories of PASCAL VOC, under COCO's names; any other list gives other numbers."""
    assert len(set(SPLITS["voc"])) == 20
    assert {"tv", "couch", "airplane", "motorcycle", "dining table", "potted plant"} < set(SPLITS["voc"])
    assert SPLITS["person"] == ("person",)


def test_seen_names_from_split_list_string_and_file(tmp_path):
    """All the ways in which a user may name the seen categories."""
    file = tmp_path / "seen.txt"
    file.write_text("dog\n\n zebra \ndog\n")
    assert seen_names("person") == ("person",)
    assert seen_names(["dog", "cat", "dog"]) == ("dog", "cat")
    assert seen_names("dog, cat") == ("dog", "cat")
    assert seen_names(str(file)) == seen_names(file) == ("dog", "zebra")
    with pytest.raises(InputError, match="gone.txt: no such file"):
        seen_names(str(tmp_path / "gone.txt"))
    file.write_bytes("\ufeffdog\n".encode())
    assert seen_names(str(file)) == ("dog",)
    file.write_bytes("caf\u00e9".encode("latin-1"))
    with pytest.raises(InputError, match="seen.txt: cannot be read as UTF-8"):
        seen_names(str(file))
    with pytest.raises(InputError, match="names no category"):
        seen_names(" , ")


def test_unknown_category_is_named():
    """A misspelt category must not silently count as unseen."""
    categories = [{"id": 3, "name": "dog"}, {"id": 1, "name": "cat"}, {"id": 2, "name": "cow"}]
    assert split_category_ids(categories, ["cow", "dog"], "gt.json") == ([2, 3], [1])
    with pytest.raises(InputError, match="gt.json.*'dogg'.*cat, cow, dog"):
        split_category_ids(categories, ["dogg"], "gt.json")


@NEEDS_DETECTRON2
def test_training_sees_only_seen_objects(coco):
    """Unseen or crowd annotations in training would make every published comparison meaningless."""
    from oln_d2.data.datasets import load_open_world_coco

    records = load_open_world_coco(*paths(coco, "train"), "voc", training=True)
    assert [r["image_id"] for r in records] == [1, 2, 3, 4, 5]  # the sixth holds zebras only
    counts = [len(r["annotations"]) for r in records]
    assert counts == [2, 1, 2, 2, 2]  # person and dog; the second image's person is a crowd
    assert all(a["category_id"] == 0 for r in records for a in r["annotations"])

    records = load_open_world_coco(*paths(coco, "train"), ["zebra"], training=True)
    assert [len(r["annotations"]) for r in records] == [1, 1, 1, 1, 1, 3]


@NEEDS_DETECTRON2
def test_testing_sees_everything(coco):
    """Recall is defined on all images, those without unseen objects and those without any as well."""
    from oln_d2.data.datasets import load_open_world_coco

    records = load_open_world_coco(*paths(coco, "val"), "voc", training=False)
    assert [len(r["annotations"]) for r in records] == [3, 3, 3, 3, 0]


@NEEDS_DETECTRON2
def test_fields_that_boxes_do_not_need(coco):
    """Annotations without id, or with polygons of no use, are common in people's own data."""
    from oln_d2.data.datasets import load_open_world_coco

    json_file, image_root = paths(coco, "train")
    content = json.loads(open(json_file).read())
    for annotation in content["annotations"]:
        del annotation["id"], annotation["iscrowd"]
        annotation.update(segmentation=[[]], ignore=1)
    open(json_file, "w").write(json.dumps(content))
    records = load_open_world_coco(json_file, image_root, "voc", training=True)
    assert [len(r["annotations"]) for r in records] == [2, 2, 2, 2, 2]


@NEEDS_DETECTRON2
def test_small_images_do_not_train(coco):
    """As in the authors' code: images under 32 px a side are left out."""
    from oln_d2.data.datasets import load_open_world_coco

    json_file, image_root = paths(coco, "train")
    content = json.loads(open(json_file).read())
    content["images"][0]["height"] = 31
    open(json_file, "w").write(json.dumps(content))
    records = load_open_world_coco(json_file, image_root, "voc", training=True)
    assert [r["image_id"] for r in records] == [2, 3, 4, 5]


@NEEDS_DETECTRON2
def test_bad_data_sets_are_named(coco, tmp_path):
    """Each must stop the run before training starts, naming file, field and remedy."""
    from oln_d2.data.datasets import load_open_world_coco

    json_file, image_root = paths(coco, "train")
    for args, message in [
        ((tmp_path / "gone.json", image_root, "voc"), "gone.json: no such file"),
        ((json_file, tmp_path / "gone", "voc"), "gone: no such folder"),
        ((json_file, image_root, ["unicorn"]), "no category named 'unicorn'"),
        ((json_file, image_root, ["pizza"]), "nothing to train on"),
    ]:
        with pytest.raises(InputError, match=message):
            load_open_world_coco(*args, training=True)
    (coco / "coco/train2017/000000000003.jpg").unlink()
    with pytest.raises(InputError, match=r"000000000003.jpg: no such image.*images\[2\]"):
        load_open_world_coco(json_file, image_root, "voc", training=True)


@NEEDS_DETECTRON2
def test_registration(coco):
    """Names for DATASETS.TRAIN and DATASETS.TEST; again is harmless; another under a name is not."""
    from detectron2.data import DatasetCatalog, MetadataCatalog

    from oln_d2 import register_open_world_coco

    for split in SPLITS:
        for part in ("train", "val"):
            metadata = MetadataCatalog.get(f"coco_2017_{split}_{part}")
            assert metadata.json_file.endswith(f"coco/annotations/instances_{part}2017.json")
            assert metadata.seen_names == SPLITS[split] and metadata.training == (part == "train")

    json_file, image_root = paths(coco, "train")
    try:
        for _ in range(2):
            register_open_world_coco("tiny", json_file, image_root, seen=["dog"], training=True)
        assert len(DatasetCatalog.get("tiny")) == 5
        assert MetadataCatalog.get("tiny").thing_classes == ["object"]
        with pytest.raises(InputError, match="tiny: another data set"):
            register_open_world_coco("tiny", json_file, image_root, seen=["zebra"], training=True)
    finally:
        DatasetCatalog.remove("tiny")
        MetadataCatalog.remove("tiny")


def test_ground_truth_is_checked(coco):
    """Broken ground truth must be reported by file, entry and field, not by a traceback later."""
    json_file, _ = paths(coco, "val")
    good = load_coco(json_file)
    broken = [
        (lambda c: c.pop("categories"), "'categories' is missing"),
        (lambda c: c.update(images=[]), "'images' is empty"),
        (lambda c: c["images"][0].update(id=2**70), "more than 64 bits"),
        (lambda c: c["images"].append(c["images"][0]), r"images\[5\].*id 1 occurs twice"),
        (lambda c: c["annotations"][4].update(image_id=99), r"annotations\[4\].*image_id 99"),
        (lambda c: c["annotations"][4].update(category_id=99), r"annotations\[4\].*category_id 99"),
        (lambda c: c["annotations"][4].update(bbox=[1, 2, 3]), r"annotations\[4\].*bbox \[1, 2, 3\]"),
        (lambda c: c["annotations"][4].update(bbox=[1, 2, -3, 4]), r"annotations\[4\].*bbox"),
        (lambda c: c["annotations"][4].update(bbox=[1, 2, float("nan"), 4]), r"annotations\[4\].*bbox"),
        (lambda c: c["categories"][0].pop("name"), "id 1 has no 'name'"),
    ]
    for spoil, message in broken:
        content = json.loads(json.dumps(good))
        spoil(content)
        open(json_file, "w").write(json.dumps(content))
        with pytest.raises(InputError, match=message):
            load_coco(json_file)
    open(json_file, "w").write(json.dumps(good)[:-20])
    with pytest.raises(InputError, match="not complete, valid JSON"):
        load_coco(json_file)
    open(json_file, "w").write("[]")
    with pytest.raises(InputError, match="results file, not ground truth"):
        load_coco(json_file)
