"""Open-world data sets in COCO format, registered with Detectron2. See docs/datasets.md."""

import logging
import os

from oln_d2.data.coco import load_images, read_mask
from oln_d2.data.splits import seen_names
from oln_d2.errors import InputError, require_detectron2

require_detectron2("oln_d2.data.datasets")

from detectron2.data import DatasetCatalog, MetadataCatalog  # noqa: E402
from detectron2.structures import BoxMode  # noqa: E402

logger = logging.getLogger(__name__)


def load_open_world_coco(json_file, image_root, seen, training):
    """
    Arguments and errors as of :func:`oln_d2.data.coco.load_images`, errors also as of
    :func:`oln_d2.data.coco.read_mask`.

    Returns:
        list[dict]: Detectron2's standard dataset dicts. Every `category_id` is 0, "object". An
        annotation has a `segmentation` if the file has one for it: polygons or compressed RLE;
        without any polygon of 3 points or more it is an empty list.
    """
    records = []
    for image in load_images(json_file, image_root, seen, training):
        record = {
            "file_name": os.path.join(image_root, image["file_name"]),
            "height": image["height"],
            "width": image["width"],
            "image_id": image["id"],
            "annotations": [],
        }
        for annotation in image["annotations"]:
            record["annotations"].append(
                {
                    "bbox": annotation["bbox"],
                    "bbox_mode": BoxMode.XYWH_ABS,
                    "category_id": 0,
                    "iscrowd": annotation.get("iscrowd", 0),
                }
            )
            mask = read_mask(annotation, image, json_file)
            if mask is not None:
                record["annotations"][-1]["segmentation"] = mask
        records.append(record)
    return records


def select_masks(records, mask_format):
    """
    What of a data set a model with masks (`MODEL.MASK_ON`) can train on.

    Args:
        records (list[dict]): Detectron2's standard dataset dicts. Changed in place.
        mask_format (str): `INPUT.MASK_FORMAT`, "polygon" or "bitmask".

    Returns:
        list[dict]: the records without the annotations, crowds among them, that give no mask, and
        only those that still have one; the log tells how many had polygons of no use.

    Raises:
        InputError: an annotation without `segmentation`, RLE where polygons are asked for, or no
            mask at all.
    """
    left_out = 0
    for record in records:
        objects = [a for a in record["annotations"] if not a.get("iscrowd")]
        for annotation in objects:
            if "segmentation" not in annotation:
                raise InputError(
                    f"{record['file_name']}: MODEL.MASK_ON is True, but an annotation of it has "
                    "no 'segmentation'; train on data with masks, or set MODEL.MASK_ON False"
                )
            if isinstance(annotation["segmentation"], dict) and mask_format == "polygon":
                raise InputError(
                    f"{record['file_name']}: a mask of this image is RLE, and INPUT.MASK_FORMAT is "
                    "polygon; set INPUT.MASK_FORMAT bitmask, which takes polygons too"
                )
        record["annotations"] = [a for a in objects if a["segmentation"]]
        left_out += len(objects) - len(record["annotations"])
    if left_out:
        logger.warning(f"{left_out} annotations without a polygon of 3 points or more are ignored")
    kept = [record for record in records if record["annotations"]]
    if records and not kept:
        raise InputError(
            f"{records[0]['file_name']} and the other images: MODEL.MASK_ON is True, but no "
            "'segmentation' holds a mask; train on data with masks, or set MODEL.MASK_ON False"
        )
    return kept


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
    _register(name, json_file, image_root, seen_names(seen), training)


def _register(name, json_file, image_root, seen, training):
    metadata = {
        "json_file": str(json_file),
        "image_root": str(image_root),
        "seen_names": seen,
        "training": training,
        "evaluator_type": "open_world_coco",
        "thing_classes": ["object"],
    }
    if name in DatasetCatalog.list():
        known = MetadataCatalog.get(name).as_dict()
        if any(known.get(key) != value for key, value in metadata.items()):
            raise InputError(
                f"{name}: another data set is registered under this name; choose another"
            )
        return
    DatasetCatalog.register(
        name,
        lambda: load_open_world_coco(metadata["json_file"], metadata["image_root"], seen, training),
    )
    MetadataCatalog.get(name).set(**metadata)


# Name: (annotations, images, seen), in the folder DETECTRON2_DATASETS; those that end in "_train"
# are for training.
_DATASETS = {
    **{
        f"coco_2017_{split}_{part}": (
            f"coco/annotations/instances_{part}2017.json", f"coco/{part}2017", split
        )
        for split in ("voc", "person", "coco")
        for part in ("train", "val")
    },
    **{
        # Its val has images of train2017 as well as of val2017.
        f"lvis_v1_{split}_{part}": (f"lvis/lvis_v1_{part}.json", "coco", f"lvis_v1_{split}")
        for split in ("voc", "coco")
        for part in ("train", "val")
    },
    **{
        f"objects365_v2_{split}_val": (
            "objects365/annotations/zhiyuan_objv2_val.json", "objects365/val",
            f"objects365_v2_{split}",
        )
        for split in ("voc", "coco")
    },
    **{
        f"ade20k_{split}_val": (
            "ADEChallengeData2016/ade20k_instance_val.json",
            "ADEChallengeData2016/images/validation", f"ade20k_{split}",
        )
        for split in ("voc", "coco")
    },
    # Its objects have no categories.
    "uvo_frame_val": ("uvo/FrameSet/UVO_frame_val.json", "uvo/uvo_videos_sparse_frames", []),
    **{
        f"uvo_dense_{split}_val": (
            "uvo/VideoDenseSet/UVO_dense_val_frames.json", "uvo/uvo_videos_dense_frames", split
        )
        for split in ("voc", "coco")
    },
}  # fmt: skip


def _register_all():
    root = os.path.expanduser(os.getenv("DETECTRON2_DATASETS", "datasets"))
    for name, (json_file, image_root, seen) in _DATASETS.items():
        register_open_world_coco(
            name,
            os.path.join(root, json_file),
            os.path.join(root, image_root),
            seen,
            training=name.endswith("_train"),
        )
    # No official annotations in COCO's format, so no certain names: the user's own, in a file that
    # is read when the data set is used.
    folder = os.path.join(root, "epic_kitchens")
    _register(
        "epic_kitchens_val",
        os.path.join(folder, "annotations", "val.json"),
        os.path.join(folder, "images"),
        os.path.join(folder, "seen.txt"),
        training=False,
    )


_register_all()
