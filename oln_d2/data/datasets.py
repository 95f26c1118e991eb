"""Open-world data sets in COCO format, registered with Detectron2."""

import os

from oln_d2.data.coco import check_images, load_coco, select_for_training
from oln_d2.data.splits import SPLITS, seen_names, split_category_ids
from oln_d2.errors import InputError, require_detectron2

require_detectron2("oln_d2.data.datasets")

from detectron2.data import DatasetCatalog, MetadataCatalog  # noqa: E402
from detectron2.data.datasets import load_coco_json  # noqa: E402


def load_open_world_coco(json_file, image_root, seen, training):
    """
    Args:
        json_file (str): annotations in COCO format.
        image_root (str): the folder that the `file_name`s start from.
        seen (str | list[str]): the seen categories, see :func:`oln_d2.data.splits.seen_names`.
        training (bool): True for what a model may see in training: annotations of seen categories
            that are no crowds, and only images at least 32 px a side that hold one. False for
            testing: every image with every annotation.

    Returns:
        list[dict]: Detectron2's standard dataset dicts. Every `category_id` is 0, "object".

    Raises:
        InputError: a file that is missing or broken, an unknown category name, images that are not
            there, or nothing left to train on.
    """
    content = load_coco(json_file)
    seen_ids, _ = split_category_ids(content["categories"], seen, json_file)
    check_images(json_file, image_root, content["images"])
    del content  # Detectron2 reads the file again; not twice in memory

    records = load_coco_json(json_file, image_root)
    if training:
        records = select_for_training(records, seen_ids, json_file)
    for record in records:
        for annotation in record["annotations"]:
            annotation["category_id"] = 0
    return records


def register_open_world_coco(name, json_file, image_root, seen, training=False):
    """
    Register a data set with Detectron2. The files are read when it is first used. To register the
    same data set again is harmless.

    Args:
        name (str): the name for `DATASETS.TRAIN` or `DATASETS.TEST`.
        json_file, image_root, seen, training: see :func:`load_open_world_coco`.

    Raises:
        InputError: `name` is taken by another data set, or `seen` names no category.
    """
    metadata = {
        "json_file": str(json_file),
        "image_root": str(image_root),
        "seen_names": seen_names(seen),
        "training": training,
        "evaluator_type": "open_world_coco",
        "thing_classes": ["object"],
    }
    if name in DatasetCatalog.list():
        known = MetadataCatalog.get(name).as_dict()
        if any(known.get(key) != value for key, value in metadata.items()):
            raise InputError(f"{name}: another data set is registered under this name; choose another")
        return
    DatasetCatalog.register(
        name,
        lambda: load_open_world_coco(
            metadata["json_file"], metadata["image_root"], metadata["seen_names"], training
        ),
    )
    MetadataCatalog.get(name).set(**metadata)


def _register_coco_2017():
    """coco_2017_{split}_train and coco_2017_{split}_val, in Detectron2's folder layout."""
    root = os.path.join(os.path.expanduser(os.getenv("DETECTRON2_DATASETS", "datasets")), "coco")
    for split in SPLITS:
        for part in ("train", "val"):
            register_open_world_coco(
                f"coco_2017_{split}_{part}",
                os.path.join(root, "annotations", f"instances_{part}2017.json"),
                os.path.join(root, f"{part}2017"),
                seen=split,
                training=part == "train",
            )


_register_coco_2017()
