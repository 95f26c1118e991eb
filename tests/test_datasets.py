"""Category splits and open-world data sets."""

import copy
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import NEEDS_DETECTRON2, ROOT, make_coco
from PIL import Image
from pycocotools import mask as mask_utils

from oln_d2.checks import InputError
from oln_d2.data import coco as coco_module
from oln_d2.data.coco import load_coco, load_images, read_mask
from oln_d2.data.splits import SPLITS, seen_names, split_category_ids
from oln_d2.data.vocabularies import COCO_NAMES, counterparts
from oln_d2.evaluation import GroundTruth


@pytest.fixture
def coco(tmp_path):
    return make_coco(tmp_path)


def paths(root, part):
    return str(root / f"coco/annotations/instances_{part}2017.json"), str(root / f"coco/{part}2017")


def test_splits_are_the_papers():
    """20 seen categories of PASCAL VOC, under COCO's names; any other list gives other numbers."""
    assert len(set(SPLITS["voc"])) == 20
    assert {"tv", "couch", "airplane", "motorcycle", "dining table", "potted plant"} < set(
        SPLITS["voc"]
    )
    assert SPLITS["person"] == ("person",)


def test_seen_names_from_split_list_string_and_file(tmp_path):
    """All the ways in which a user may name the seen categories."""
    file = tmp_path / "seen.txt"
    file.write_text("dog\n\n zebra \ndog\n")
    assert seen_names("person") == ("person",)
    assert seen_names(["dog", "cat", "dog"]) == ("dog", "cat")
    assert seen_names("dog, cat") == ("dog", "cat")
    assert len(seen_names(",".join(f"category {i}" for i in range(365)))) == 365
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
    with pytest.raises(InputError, match="gt.json.*'dogg'.*'cat', 'cow', 'dog'"):
        split_category_ids(categories, ["dogg"], "gt.json")


@NEEDS_DETECTRON2
def test_training_sees_only_seen_objects(coco):
    """Unseen or crowd annotations in training would make every published comparison meaningless."""
    from oln_d2.engine.datasets import load_open_world_coco

    records = load_open_world_coco(*paths(coco, "train"), "voc", training=True)
    assert [r["image_id"] for r in records] == [1, 2, 3, 4, 5]  # the sixth holds zebras only
    counts = [len(r["annotations"]) for r in records]
    assert counts == [2, 1, 2, 2, 2]  # person and dog; the second image's person is a crowd
    assert all(a["category_id"] == 0 for r in records for a in r["annotations"])

    records = load_open_world_coco(*paths(coco, "train"), ["zebra"], training=True)
    assert [len(r["annotations"]) for r in records] == [1, 1, 1, 1, 1, 3]


@NEEDS_DETECTRON2
def test_testing_sees_everything(coco):
    """
    Recall is defined on all images, those without unseen objects and those without any as well.
    """
    from oln_d2.engine.datasets import load_open_world_coco

    records = load_open_world_coco(*paths(coco, "val"), "voc", training=False)
    assert [len(r["annotations"]) for r in records] == [3, 3, 3, 3, 0]


@NEEDS_DETECTRON2
def test_fields_that_boxes_do_not_need(coco):
    """Annotations without id, or with polygons of no use, are common in people's own data."""
    from oln_d2.engine.datasets import load_open_world_coco

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
    from oln_d2.engine.datasets import load_open_world_coco

    json_file, image_root = paths(coco, "train")
    content = json.loads(open(json_file).read())
    content["images"][0]["height"] = 31
    open(json_file, "w").write(json.dumps(content))
    records = load_open_world_coco(json_file, image_root, "voc", training=True)
    assert [r["image_id"] for r in records] == [2, 3, 4, 5]


@NEEDS_DETECTRON2
def test_bad_data_sets_are_named(coco, tmp_path):
    """Each must stop the run before training starts, naming file, field and remedy."""
    from oln_d2.engine.datasets import load_open_world_coco

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
    with pytest.raises(InputError, match="1 of 6 images .* are missing, .*000000000003.jpg"):
        load_open_world_coco(json_file, image_root, "voc", training=True)


@NEEDS_DETECTRON2
def test_registration(coco, monkeypatch):
    """
    Names for DATASETS.TRAIN and DATASETS.TEST; again is harmless; another under a name is not.
    """
    from detectron2.data import DatasetCatalog, MetadataCatalog

    from oln_d2 import register_datasets, register_open_world_coco

    register_datasets()
    for split in ("voc", "person", "coco"):
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
        DatasetCatalog.remove("tiny")
        MetadataCatalog.remove("tiny")
        monkeypatch.setenv("HOME", str(coco))
        below = [f"~{path.removeprefix(str(coco))}" for path in (json_file, image_root)]
        register_open_world_coco("tiny", *below, seen=["dog"], training=True)
        assert os.path.isfile(DatasetCatalog.get("tiny")[0]["file_name"])
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
        (
            lambda c: c["annotations"][4].update(bbox=[1, 2, 3]),
            r"annotations\[4\].*bbox \[1, 2, 3\]",
        ),
        (lambda c: c["annotations"][4].update(bbox=[1, 2, -3, 4]), r"annotations\[4\].*bbox"),
        (
            lambda c: c["annotations"][4].update(bbox=[1, 2, float("nan"), 4]),
            r"annotations\[4\].*bbox",
        ),
        (lambda c: c["categories"][0].pop("name"), "id 1, has no 'name'"),
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


def test_annotations_that_are_no_xywh_in_pixels():
    """All that is measured against corners or fractions would be wrong, without a word."""
    image = {"id": 1, "file_name": "a.jpg", "width": 100, "height": 80}
    content = {"images": [image], "categories": [{"id": 1, "name": "mug"}]}

    def read(boxes):
        rows = [{"image_id": 1, "category_id": 1, "bbox": box} for box in boxes]
        return coco_module.check_coco("gt.json", {**content, "annotations": rows})

    corners = [[40 + i, 30, 80 + i, 70] for i in range(12)]
    with pytest.raises(InputError, match=r"gt.json: annotations\[0\]: bbox \[40.0, .*corners"):
        read(corners)
    with pytest.raises(InputError, match=r"annotations\[0\]: bbox .* fractions of the image size"):
        read([[0.1, 0.2, 0.3, 0.4]] * 12)
    assert len(read([[x, y, 20, 20] for x, y, *_ in corners])["annotations"]) == 12
    assert len(read([*[[90, 70, 30, 30]] * 12, [60, 50, 30, 20]])["annotations"]) == 13


def test_values_are_read_as_tools_write_them(tmp_path):
    """An object would become a crowd, or an image vanish, by the type of a number."""
    content = {
        "images": [{"id": "1", "file_name": "a.jpg", "width": 96.0, "height": "64.0"}],
        "categories": [{"id": 2.0, "name": "mug"}],
        "annotations": [
            {"image_id": 1.0, "category_id": "2", "bbox": [1, 2, 3, 4], "iscrowd": value}
            for value in (0, None, False, "0", 0.0, "0.0", 1, True, "1", 1.0)
        ],
    }
    given = copy.deepcopy(content)
    path = tmp_path / "gt.json"
    path.write_text(json.dumps(content))
    for clean in (load_coco(path), coco_module.check_coco("gt", content)):
        image = {"id": 1, "file_name": "a.jpg", "width": 96, "height": 64}
        assert clean["images"] == [image] and clean["categories"] == [{"id": 2, "name": "mug"}]
        assert [a["iscrowd"] for a in clean["annotations"]] == [0] * 6 + [1] * 4
        for annotation in clean["annotations"]:
            values = annotation["image_id"], annotation["category_id"], annotation["iscrowd"]
            assert values[:2] == (1, 2) and all(type(value) is int for value in values)
    assert content == given
    assert GroundTruth(content, ["mug"]).crowd.sum() == 4
    for field, entry, values in (
        ("iscrowd", content["annotations"][3], ("", "no", 2, [], 0.5, "-1")),
        ("width", content["images"][0], (-1, "wide", 96.5, True, [96], "-3")),
        ("id", content["categories"][0], (None, "2a", True, 1.5, float("inf"))),
    ):
        good = entry[field]
        for entry[field] in values:
            message = rf"gt: \w+\[[03]\]: {field} {re.escape(repr(entry[field]))} is n"
            with pytest.raises(InputError, match=message):
                coco_module.check_coco("gt", content)
        entry[field] = good


def test_what_is_left_out_of_training_is_said(coco, caplog):
    """Most of the objects could be missing from a training without a word."""
    json_file, image_root = paths(coco, "train")
    content = json.loads(open(json_file).read())
    content["images"][0]["height"] = 31
    open(json_file, "w").write(json.dumps(content))
    with caplog.at_level("INFO", "oln_d2"):
        load_images(json_file, image_root, "voc", training=True)
    assert caplog.messages == [
        f"{json_file}: 4 of 6 images and 7 of 18 objects are trained on; left out: 1 images below "
        "32 px a side, 1 images without an object to train on, 8 objects of categories that are "
        "not seen, 1 crowds, 2 objects in images that are too small"
    ]
    content["images"][0]["height"] = 0
    open(json_file, "w").write(json.dumps(content))
    with pytest.raises(InputError, match=r"images\[0\]: height is 0; write"):
        load_images(json_file, image_root, "voc", training=True)


def test_names_with_spaces_case_and_commas(tmp_path):
    """A category that is named as people see it would be unknown, or be another one."""
    names = ["mug ", "Formula 1", "cup", "Cup", "mug, blue"]
    categories = [{"id": i, "name": name} for i, name in enumerate(names)]
    for seen, ids in (
        ("mug", [0]),
        ("mug ", [0]),
        ([" MUG"], [0]),
        ("formula 1, Cup", [1, 3]),
        (["cup"], [2]),
    ):
        assert split_category_ids(categories, seen, "gt.json")[0] == ids
    with pytest.raises(InputError, match="'CUP' could be 'cup' or 'Cup'"):
        split_category_ids(categories, "CUP", "gt.json")
    with pytest.raises(InputError, match="'blue'.*'mug, blue'; names with a comma go into a text"):
        split_category_ids(categories, "mug, blue", "gt.json")
    file = tmp_path / "seen.txt"
    file.write_text("Mug, blue\n")
    assert split_category_ids(categories, file, "gt.json")[0] == [4]
    with pytest.raises(InputError, match="0', .* and 95 more") as error:
        split_category_ids(categories, [f"name {i}" for i in range(100)], "gt.json")
    assert len(str(error.value)) < 400


def test_ground_truth_is_parsed_once(coco, monkeypatch):
    """A run would read the same gigabyte for each of its parts, or not see that a file changed."""
    json_file, image_root = map(Path, paths(coco, "val"))
    reads = []
    read = coco_module.read_json
    monkeypatch.setattr(coco_module, "read_json", lambda path: reads.append(path) or read(path))
    gt = GroundTruth.load(json_file, "voc")
    text = json_file.read_text()
    link = coco / "link.json"
    link.symlink_to(json_file)
    images = load_images(str(link), image_root, "person", training=False)
    assert len(reads) == 1 and len(images) == len(gt.image_ids)
    content = load_coco(json_file)
    assert len(reads) == 1 and content == json.loads(text)  # also unchanged by its users

    changed = json.loads(text)
    changed["annotations"] = []
    json_file.write_text(json.dumps(changed))
    assert load_coco(json_file)["annotations"] == [] and len(reads) == 2
    json_file.write_text(text)
    del gt, images, content
    load_coco(json_file)
    load_coco(json_file)
    assert len(reads) == 4  # nobody held it


def test_counterparts_of_the_splits():
    """A category in the wrong group, in another vocabulary, gives numbers nobody can compare."""
    assert len(COCO_NAMES) == 80 and set(SPLITS["voc"]) < set(COCO_NAMES)
    for dataset, voc, coco in (("lvis_v1", 20, 79), ("objects365_v2", 31, 102), ("ade20k", 19, 38)):
        assert (len(SPLITS[f"{dataset}_voc"]), len(SPLITS[f"{dataset}_coco"])) == (voc, coco)
        assert set(SPLITS[f"{dataset}_voc"]) < set(SPLITS[f"{dataset}_coco"])
    assert counterparts("lvis_v1", ["car", "hot dog"]) == ("car_(automobile)",)
    assert counterparts("objects365_v2", ["tv", "person"]) == ("Moniter/TV", "Person")
    assert counterparts("ade20k", ["dog", "cat", "train"]) == ("animal",)
    assert "Table Tennis " in SPLITS["objects365_v2_coco"]


@NEEDS_DETECTRON2
def test_names_are_those_of_coco_and_lvis():
    """A name that the official file lacks would stop everyone who evaluates on it."""
    from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES
    from detectron2.data.datasets.lvis_v1_categories import LVIS_CATEGORIES

    assert COCO_NAMES == tuple(c["name"] for c in COCO_CATEGORIES if c["isthing"])
    assert set(SPLITS["lvis_v1_coco"]) < {category["name"] for category in LVIS_CATEGORIES}


def test_unknown_category_of_a_large_vocabulary():
    """The error must be readable, though the data set has a thousand categories."""
    categories = [{"id": i, "name": f"name {i}"} for i in range(1000)]
    categories.append({"id": 1000, "name": "Chair"})
    with pytest.raises(InputError, match="'chiar'.*of its 1001 these are similar: 'Chair'$"):
        split_category_ids(categories, ["chiar"], "gt.json")


def as_file_name(name):
    return {"file_name": name}


def write_foreign(
    root, json_file, image_root, images, categories, annotation, image_entry=as_file_name
):
    """
    A data set in the form of its official file: two images of 60 x 80 with three objects each, of
    the first two and the last of the categories.

    Args:
        root, json_file, image_root (str): where it goes.
        images (list[str]): the files under `image_root`.
        categories (list[str]): their names.
        annotation (dict): further fields; a segmentation is "polygons" or "rle".
        image_entry (function): from a file's name to the fields that identify it.
    """
    content = {"images": [], "annotations": [], "categories": []}
    for i, name in enumerate(images, 1):
        path = Path(root, image_root, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((60, 80, 3), 40 * i, np.uint8)).save(path)
        content["images"].append({"id": i, "height": 60, "width": 80, **image_entry(name)})
        for k, category in enumerate((0, min(1, len(categories) - 1), len(categories) - 1)):
            x, y, w, h = 5 + 20 * k, 10, 15, 20 + 5 * k
            mask = np.zeros((60, 80), np.uint8, order="F")
            mask[y : y + h, x : x + w] = 1
            rle = mask_utils.encode(mask)
            segmentation = {
                "polygons": [[x, y, x + w, y, x + w, y + h, x, y + h]],
                "rle": {"size": [60, 80], "counts": rle["counts"].decode()},
            }
            content["annotations"].append(
                {
                    "id": len(content["annotations"]) + 1,
                    "image_id": i,
                    "category_id": category + 1,
                    "bbox": [x, y, w, h],
                    "area": w * h,
                    **{key: segmentation.get(value, value) for key, value in annotation.items()},
                }
            )
    for i, name in enumerate(categories, 1):
        content["categories"].append({"id": i, "name": name})
    path = Path(root, json_file)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def write_lvis(root, part):
    """LVIS has no file_name and no iscrowd; the images of its val lie in both folders of COCO."""
    write_foreign(
        root,
        f"lvis/lvis_v1_{part}.json",
        "coco",
        ["train2017/000000000009.jpg", "val2017/000000000139.jpg"],
        [*SPLITS["lvis_v1_coco"], "aerosol_can"],
        {"segmentation": "polygons"},
        lambda name: {
            "coco_url": f"http://images.cocodataset.org/{name}",
            "neg_category_ids": [3],
            "not_exhaustive_category_ids": [],
        },
    )


@pytest.fixture(scope="module")
def foreign(tmp_path_factory):
    """A DETECTRON2_DATASETS with all registered data sets that are not COCO, in their layouts."""
    root = tmp_path_factory.mktemp("foreign")
    write_lvis(root, "train")
    write_lvis(root, "val")
    write_foreign(
        root,
        "objects365/annotations/zhiyuan_objv2_val.json",
        "objects365/val",
        ["images/v1/patch8/objects365_v1_00420917.jpg", "images/v2/patch30/objects365_v2_014.jpg"],
        [*SPLITS["objects365_v2_coco"], "Sneakers"],
        {"iscrowd": 0, "isfake": 0, "isreflected": 0},
    )
    write_foreign(
        root,
        "ADEChallengeData2016/ade20k_instance_val.json",
        "ADEChallengeData2016/images/validation",
        ["ADE_val_00000001.jpg", "ADE_val_00000002.jpg"],
        [*SPLITS["ade20k_coco"], "lamp"],
        {"iscrowd": 0, "segmentation": "rle"},
    )
    write_foreign(
        root,
        "uvo/FrameSet/UVO_frame_val.json",
        "uvo/uvo_videos_sparse_frames",
        ["-1a2b/30.png", "zz9_x/60.png"],
        ["object"],
        {"iscrowd": 0, "segmentation": "rle"},
    )
    write_foreign(
        root,
        "uvo/VideoDenseSet/UVO_dense_val_frames.json",
        "uvo/uvo_videos_dense_frames",
        ["-1a2b/0.png", "zz9_x/1.png"],
        [*COCO_NAMES, "other"],
        {"iscrowd": 0, "segmentation": "rle"},
    )
    write_foreign(
        root,
        "epic_kitchens/annotations/val.json",
        "epic_kitchens/images",
        ["P01/P01_01/0000000001.jpg", "P02/P02_01/0000000031.jpg"],
        ["plate", "cup", "whisk"],
        {},
    )
    return root


# Of each data set: records, annotations, seen objects, masks, and what perfect boxes find.
LOAD = """
import json
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import Boxes, Instances
import torch
import oln_d2
from oln_d2 import OpenWorldEvaluator

oln_d2.register_datasets()
found = {}
for name in DatasetCatalog.list():
    if "seen_names" not in MetadataCatalog.get(name).as_dict() or name.startswith("coco_2017"):
        continue
    try:
        records = DatasetCatalog.get(name)
        evaluator = OpenWorldEvaluator(name, distributed=False)
    except oln_d2.InputError as error:
        found[name] = str(error)
        continue
    for record in [] if name.endswith("_train") else records:
        boxes = torch.tensor([a["bbox"] for a in record["annotations"]], dtype=torch.float)
        boxes[:, 2:] += boxes[:, :2]
        instances = Instances((60, 80), pred_boxes=Boxes(boxes), scores=torch.ones(len(boxes)))
        evaluator.process([record], [{"instances": instances}])
    seen = int(evaluator._gt.seen.sum())
    masks = {type(a.get("segmentation")).__name__ for r in records for a in r["annotations"]}
    found[name] = [len(records), sum(len(r["annotations"]) for r in records), seen, masks.pop()]
    if not name.endswith("_train"):
        results = evaluator.evaluate()
        found[name] += [results["box_unseen"]["AR@10"], results["box_all"]["AR@10"]]
print(json.dumps(found))
"""


@NEEDS_DETECTRON2
def test_registered_data_sets_in_their_layouts(foreign):
    """The documented layouts and the official files' forms must work as they are downloaded."""

    def load():
        environment = {**os.environ, "DETECTRON2_DATASETS": str(foreign), "OMP_NUM_THREADS": "1"}
        line = [sys.executable, "-W", "ignore", "-c", LOAD]
        process = subprocess.run(
            line, cwd=ROOT, env=environment, text=True, timeout=300, capture_output=True
        )
        assert process.returncode == 0, process.stderr
        return json.loads(process.stdout.splitlines()[-1])

    found = load()
    # Person and bicycle are seen, and the last category is not; with voc, likewise.
    for split in ("coco", "voc"):
        assert found[f"lvis_v1_{split}_train"] == [2, 4, 4, "list"]
        assert found[f"lvis_v1_{split}_val"] == [2, 6, 4, "list", 100, 100]
        assert found[f"objects365_v2_{split}_val"] == [2, 6, 4, "NoneType", 100, 100]
        assert found[f"ade20k_{split}_val"] == [2, 6, 4, "dict", 100, 100]
        assert found[f"uvo_dense_{split}_val"] == [2, 6, 4, "dict", 100, 100]
    assert found["uvo_frame_val"] == [2, 6, 0, "dict", 100, 100]
    assert "seen.txt: no such file; expected a text file" in found["epic_kitchens_val"]

    (foreign / "epic_kitchens/seen.txt").write_text("cup\n")
    assert load()["epic_kitchens_val"] == [2, 6, 2, "NoneType", 100, 100]


@pytest.mark.parametrize(
    ("segmentation", "expected"),
    [
        (None, None),
        ([], []),
        ([[1, 1, 9, 1, 9, 9], [1, 1, 2, 2]], [[1, 1, 9, 1, 9, 9]]),
        ([[1, 1, 2, 2], [1, 1, 2, 2, 3, 3, 4]], []),
        ({"size": [4, 5], "counts": [3, 2, 15]}, {"size": [4, 5], "counts": b"32?"}),
        ([1, 1, 9, 1, 9, 9], InputError),
        ([[1, 1, 9, 1, 9, float("nan")]], InputError),
        ([["1", 1, 9, 1, 9, 9]], InputError),
        ({"size": [5, 4], "counts": [3, 2, 15]}, InputError),
        ({"size": [4, 5], "counts": [3, 2]}, InputError),
        ({"counts": [3, 2, 15]}, InputError),
        ("mask.png", InputError),
    ],
)
def test_masks_are_read_or_refused(segmentation, expected):
    """A mask that cannot be used must be named when it is loaded, not by a worker an hour later."""
    annotation = {"id": 7, "segmentation": segmentation}
    image = {"file_name": "a.jpg", "height": 4, "width": 5}
    if expected is InputError:
        message = "gt.json: the annotation with id 7 of a.jpg has a 'segmentation' that"
        with pytest.raises(InputError, match=message):
            read_mask(annotation, image, "gt.json")
    else:
        mask = read_mask(annotation, image, "gt.json")
        assert mask == expected
        if isinstance(mask, dict):
            assert mask_utils.decode(mask).T.ravel().tolist() == [0] * 3 + [1] * 2 + [0] * 15


@NEEDS_DETECTRON2
def test_masks_reach_the_model(tmp_path, caplog):
    """MODEL.MASK_ON must train on polygons and RLE, and what gives no mask be named beforehand."""
    from detectron2.config import get_cfg
    from detectron2.data import DatasetCatalog, MetadataCatalog

    from oln_d2 import add_oln_config, register_open_world_coco
    from oln_d2.engine.trainer import Trainer

    write_lvis(tmp_path, "train")
    json_file = tmp_path / "lvis/lvis_v1_train.json"
    content = json.loads(json_file.read_text())
    cfg = get_cfg()
    add_oln_config(cfg)
    cfg.DATASETS.TRAIN = ("masks",)
    cfg.MODEL.MASK_ON = True
    cfg.INPUT.MIN_SIZE_TRAIN = (60,)
    cfg.INPUT.RANDOM_FLIP = "none"
    cfg.DATALOADER.NUM_WORKERS = 0
    cfg.SOLVER.IMS_PER_BATCH = 2

    def batch():
        json_file.write_text(json.dumps(content))
        return [inputs["instances"] for inputs in next(iter(Trainer.build_train_loader(cfg)))]

    register_open_world_coco("masks", json_file, tmp_path / "coco", "lvis_v1_coco", training=True)
    try:
        for instances in batch():
            assert len(instances) == 2  # not the aerosol_can
            assert instances.gt_masks.area().tolist() == instances.gt_boxes.area().tolist()

        content["annotations"][0]["segmentation"] = [[1, 2, 3, 4]]
        assert sorted(len(instances) for instances in batch()) == [1, 2]
        assert "1 annotations without a polygon of 3 points or more" in caplog.text

        before = [annotation["segmentation"] for annotation in content["annotations"]]
        for annotation in content["annotations"]:  # as some tools write it for boxes
            annotation["segmentation"] = []
        with pytest.raises(InputError, match="no 'segmentation' holds a mask"):
            batch()
        for annotation, segmentation in zip(content["annotations"], before):
            annotation["segmentation"] = segmentation

        mask = np.zeros((60, 80), np.uint8, order="F")
        mask[10:30, 5:20] = 1
        rle = mask_utils.encode(mask)
        rle = {"size": [60, 80], "counts": rle["counts"].decode()}
        content["annotations"][0]["segmentation"] = rle
        with pytest.raises(InputError, match="000000000009.jpg: a mask.*INPUT.MASK_FORMAT bitmask"):
            batch()
        cfg.INPUT.MASK_FORMAT = "bitmask"
        for instances in batch():
            areas = instances.gt_masks.tensor.sum((1, 2))
            assert areas.tolist() == instances.gt_boxes.area().tolist()

        del content["annotations"][0]["segmentation"]
        with pytest.raises(InputError, match="000000000009.jpg: MODEL.MASK_ON.*set MODEL.MASK_ON"):
            batch()
        cfg.MODEL.MASK_ON = False
        for instances in batch():
            assert len(instances) == 2 and not instances.has("gt_masks")
    finally:
        DatasetCatalog.remove("masks")
        MetadataCatalog.remove("masks")
