"""Open-world data sets in COCO format, registered with Detectron2."""

import os

from oln_d2.data.coco import load_images
from oln_d2.data.splits import SPLITS, seen_names
from oln_d2.errors import InputError, require_detectron2

require_detectron2("oln_d2.data.datasets")

from detectron2.data import DatasetCatalog, MetadataCatalog  # noqa: E402
from detectron2.structures import BoxMode  # noqa: E402


def load_open_world_coco(json_file, image_root, seen, training):
    """
    Arguments and errors as of :func:`oln_d2.data.coco.load_images`.

    Returns:
        list[dict]: Detectron2's standard dataset dicts. Every `category_id` is 0, "object".
    """
    return [
        {
            "file_name": os.path.join(image_root, image["file_name"]),
            "height": image["height"],
            "width": image["width"],
            "image_id": image["id"],
            "annotations": [
                {
                    "bbox": annotation["bbox"],
                    "bbox_mode": BoxMode.XYWH_ABS,
                    "category_id": 0,
                    "iscrowd": annotation.get("iscrowd", 0),
                }
                for annotation in image["annotations"]
            ],
        }
        for image in load_images(json_file, image_root, seen, training)
    ]


def register_open_world_coco(name, json_file, image_root, seen, training=False):
    """
    Register a data set with Detectron2. The files are read when it is first used. To register the
    same data set again is harmless.

    Args:
        name (str): the name for `DATASETS.TRAIN` or `DATASETS.TEST`.
        json_file, image_root, seen, training: see :func:`oln_d2.data.coco.load_images`.

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
