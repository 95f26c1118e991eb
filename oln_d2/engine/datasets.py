"""Open-world data sets in COCO format, registered with Detectron2. See docs/datasets.md."""

import logging
import os
import re
from collections.abc import Sequence
from typing import Any

import detectron2.utils.comm as comm
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog, get_detection_dataset_dicts
from detectron2.data.samplers import RepeatFactorTrainingSampler
from detectron2.structures import BoxMode
from detectron2.utils.file_io import PathManager

from oln_d2.checks import InputError
from oln_d2.data.coco import load_coco, load_images, read_mask
from oln_d2.data.splits import seen_names
from oln_d2.data.vocabularies import LVIS_TO_COCO
from oln_d2.files import StrPath

logger = logging.getLogger(__name__)


def load_open_world_coco(
    json_file: StrPath, image_root: StrPath, seen: StrPath | Sequence[str], training: bool
) -> list[dict[str, Any]]:
    """
    Arguments and errors as of :func:`oln_d2.data.coco.load_images`, errors also as of
    :func:`oln_d2.data.coco.read_mask`.

    Returns:
        Detectron2's standard dataset dicts. Every `category_id` is 0, "object". An annotation has a
        `segmentation` if the file has one for it: polygons or compressed RLE; without any polygon
        of 3 points or more it is an empty list.
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


def select_masks(records: list[dict[str, Any]], mask_format: str) -> list[dict[str, Any]]:
    """
    Keep the annotations usable for masks (`MODEL.MASK_ON`): those that are no crowds and have a
    polygon of 3 points or more, or RLE. How many others there were is logged.

    Args:
        records: Detectron2's standard dataset dicts. Changed in place.
        mask_format: `INPUT.MASK_FORMAT`, "polygon" or "bitmask".

    Returns:
        the records that still have an annotation.

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


def check_training_sets(cfg: CfgNode) -> None:
    """
    Check that the data sets of DATASETS.TRAIN, which are registered, go together, as far as their
    classes are known before they are read.

    Raises:
        InputError: none; DATASETS.TRAIN_WEIGHTS that do not fit; different classes; or seen
            categories of one that are not those of another, and an OLN that would take their
            objects for background there.
    """
    names, weights = cfg.DATASETS.TRAIN, cfg.DATASETS.TRAIN_WEIGHTS
    if not names:
        raise InputError("DATASETS.TRAIN is empty; name one data set or more")
    numbers = all(isinstance(w, (int, float)) and 0 < w < float("inf") for w in weights)
    if weights and (len(weights) != len(names) or not numbers):
        raise InputError(
            f"DATASETS.TRAIN_WEIGHTS is {weights}; give a number above 0 for each data set of "
            f"DATASETS.TRAIN, which has {len(names)}, or [] for none"
        )
    if weights and cfg.DATALOADER.SAMPLER_TRAIN != "TrainingSampler":
        raise InputError(
            f"DATASETS.TRAIN_WEIGHTS does not go with DATALOADER.SAMPLER_TRAIN "
            f"{cfg.DATALOADER.SAMPLER_TRAIN}; leave out one of them"
        )
    _check_categories(cfg, [name for name in names if _classes(name)])


def _check_categories(cfg, names):
    """The part of :func:`check_training_sets` that needs the classes of the data sets."""
    first = names[0] if names else None
    for name in names:
        if _classes(name) != _classes(first):
            raise InputError(
                f"DATASETS.TRAIN: {first} and {name} have different classes; train on open-world "
                "data sets alone, such as those of DATASETS.OWN, or on others alone"
            )
    others = [name for name in names if _seen(name) != _seen(first)]
    if not others:
        return
    oln, has_rois = cfg.MODEL.OLN, cfg.MODEL.META_ARCHITECTURE != "ProposalNetwork"
    learns_background = {
        "MODEL.OLN.OBJECTNESS_NEGATIVES False": oln.OBJECTNESS_NEGATIVES,
        "MODEL.OLN.BOX_SCORE_NEGATIVES False": has_rois and oln.BOX_SCORE_NEGATIVES,
        "MODEL.OLN.RPN_CLS_LOSS_WEIGHT 0": oln.RPN_CLS_LOSS_WEIGHT > 0,
        "MODEL.OLN.BOX_CLS_LOSS_WEIGHT 0": has_rois and oln.BOX_CLS_LOSS_WEIGHT > 0,
    }
    remedies = [remedy for remedy, learns in learns_background.items() if learns]
    is_oln = cfg.MODEL.PROPOSAL_GENERATOR.NAME == "OLNRPN" and (
        not has_rois or cfg.MODEL.ROI_HEADS.NAME == "OLNROIHeads"
    )
    problem = (
        f"DATASETS.TRAIN: {first} and {others[0]} have different seen categories, so objects that "
        "only one of them annotates are taken for background in the other"
    )
    if is_oln and remedies:
        raise InputError(f"{problem}; set {' '.join(remedies)}")
    if not is_oln:
        logger.warning(f"{problem}, as a detector that classifies has to; OLN need not")


def warn_of_trained_but_unseen(cfg: CfgNode) -> None:
    """
    Log what the data sets of DATASETS.TRAIN have seen together, where they are several, and which
    of these categories a data set of DATASETS.TEST counts as unseen.
    """
    seen = frozenset().union(*map(_seen, cfg.DATASETS.TRAIN))
    if len(cfg.DATASETS.TRAIN) > 1:
        logger.info(f"Seen by training are {len(seen)} categories: {', '.join(sorted(seen))}")
    for name in cfg.DATASETS.TEST:
        metadata = MetadataCatalog.get(name)
        if metadata.get("evaluator_type") == "open_world_coco":
            content = load_coco(PathManager.get_local_path(metadata.json_file))
            unseen = seen - _seen(name)
            there = {str(category["name"]) for category in content["categories"]}
            if wrong := sorted(category for category in there if _plain(category) in unseen):
                logger.warning(
                    f"DATASETS.TEST: {name} counts as unseen what training sees: "
                    f"{', '.join(wrong)}; add them to its seen categories"
                )


def load_training_sets(
    cfg: CfgNode,
) -> tuple[list[dict[str, Any]], RepeatFactorTrainingSampler | None]:
    """
    Returns:
        the records of all data sets of DATASETS.TRAIN, Detectron2's standard dataset dicts, with
        masks only for MODEL.MASK_ON; and what draws from them by DATASETS.TRAIN_WEIGHTS, if given.

    Raises:
        InputError: a data set without an object; see :func:`select_masks`; also for data sets whose
            classes are known only once they are read, as those of Detectron2's
            `register_coco_instances`, see :func:`check_training_sets`.
    """
    names, weights = cfg.DATASETS.TRAIN, cfg.DATASETS.TRAIN_WEIGHTS
    files = cfg.DATASETS.PROPOSAL_FILES_TRAIN if cfg.MODEL.LOAD_PROPOSALS else [None] * len(names)
    late, parts = not all(map(_classes, names)), []
    for name, file in zip(names, files, strict=True):
        try:
            records = get_detection_dataset_dicts(
                name,
                filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS,
                proposal_files=[file] if file else None,
            )
        except AssertionError as error:
            if not re.search("is empty|No valid data", str(error)):
                raise
            records = []
        if not any(not a.get("iscrowd") for r in records for a in r.get("annotations", ())):
            raise InputError(
                f"DATASETS.TRAIN: {name} holds no object to train on (crowds do not count); choose "
                "another data set, or other seen categories"
            )
        if cfg.MODEL.MASK_ON:
            records = select_masks(records, cfg.INPUT.MASK_FORMAT)
        else:  # the mapper would drop them; not to be kept in memory
            for record in records:
                for annotation in record.get("annotations", ()):
                    annotation.pop("segmentation", None)
        parts.append(records)
    if late:
        _check_categories(cfg, names)
    if comm.is_main_process():
        warn_of_trained_but_unseen(cfg)
    total = sum(map(len, parts))
    shares = [weight / sum(weights) for weight in weights] or [len(part) / total for part in parts]
    if len(names) > 1:
        for name, part, share in zip(names, parts, shares):
            logger.info(f"{name}: {len(part)} training images, {share:.1%} of those drawn")
    sampler = None
    if weights:
        # So that an epoch, in which each image comes as often, is as long as without weights.
        factors = [torch.full((len(p),), s * total / len(p)) for p, s in zip(parts, shares)]
        sampler = RepeatFactorTrainingSampler(torch.cat(factors), seed=cfg.SEED)
    return [record for part in parts for record in part], sampler


def _plain(name):
    """A category's name to compare, LVIS's spelt as COCO's."""
    folded = str(name).strip().casefold()
    return LVIS_TO_COCO.get(folded, folded)


def _classes(name):
    return tuple(MetadataCatalog.get(name).get("thing_classes", ()))


def _seen(name):
    """The names of a data set's seen categories; of one that is not open-world all of its names."""
    names = MetadataCatalog.get(name).get("seen_names", _classes(name))
    return frozenset(map(_plain, seen_names(names)))


def register_open_world_coco(
    name: str,
    json_file: StrPath,
    image_root: StrPath,
    seen: StrPath | Sequence[str],
    training: bool = False,
) -> None:
    """
    Register a data set with Detectron2. The files are read when it is first used. To register the
    same data set again is harmless.

    Args:
        name: the name for `DATASETS.TRAIN` or `DATASETS.TEST`.
        json_file, image_root, seen, training: see :func:`oln_d2.data.coco.load_images`.

    Raises:
        InputError: `name` is taken by another data set, or `seen` names no category.
    """
    metadata = _metadata(json_file, image_root, seen_names(seen), training)
    if name not in DatasetCatalog.list():
        _register(name, metadata)
        return
    known = MetadataCatalog.get(name).as_dict()
    if any(known.get(key) != value for key, value in metadata.items()):
        raise InputError(f"{name}: another data set is registered under this name; choose another")


def register_own(cfg: CfgNode) -> None:
    """
    Register the data sets that DATASETS.OWN describes, see `oln_d2.config`: for training those that
    DATASETS.TRAIN names.

    Raises:
        InputError: a row that is none; or see :func:`register_open_world_coco`.
    """
    for row in cfg.DATASETS.get("OWN", ()):
        if not isinstance(row, (list, tuple)) or len(row) != 4 or not all(row[:3]):
            raise InputError(
                f"DATASETS.OWN: {row!r} is no row [name, annotations, images, seen], such as "
                "['my_train', 'train.json', 'train/', 'voc']"
            )
        name, json_file, image_root, seen = row
        training = name in cfg.DATASETS.TRAIN
        if training and name in cfg.DATASETS.TEST:
            raise InputError(
                f"DATASETS.OWN: {name} is in DATASETS.TRAIN and in DATASETS.TEST, but only seen "
                "objects train and all are tested; give it two rows with different names"
            )
        register_open_world_coco(name, json_file, image_root, seen, training)


def _metadata(json_file, image_root, seen, training):
    return {
        "json_file": os.path.expanduser(json_file),
        "image_root": os.path.expanduser(image_root),
        "seen_names": seen,
        "training": training,
        "evaluator_type": "open_world_coco",
        "thing_classes": ["object"],
    }


def _register(name, metadata):
    arguments = [metadata[key] for key in ("json_file", "image_root", "seen_names", "training")]
    DatasetCatalog.register(name, lambda: load_open_world_coco(*arguments))
    MetadataCatalog.get(name).set(**metadata)


# Name: (annotations, images, seen), in the folder DETECTRON2_DATASETS, {} being the split; those
# whose name ends in "_train" are for training.
_DATASETS: dict[str, tuple[str, str, str | list[str]]] = {
    "coco_2017_{}_train": ("coco/annotations/instances_train2017.json", "coco/train2017", "{}"),
    "coco_2017_{}_val": ("coco/annotations/instances_val2017.json", "coco/val2017", "{}"),
    "lvis_v1_{}_train": ("lvis/lvis_v1_train.json", "coco", "lvis_v1_{}"),
    # Has images of train2017 as well as of val2017.
    "lvis_v1_{}_val": ("lvis/lvis_v1_val.json", "coco", "lvis_v1_{}"),
    "objects365_v2_{}_val": (
        "objects365/annotations/zhiyuan_objv2_val.json",
        "objects365/val",
        "objects365_v2_{}",
    ),
    "ade20k_{}_val": (
        "ADEChallengeData2016/ade20k_instance_val.json",
        "ADEChallengeData2016/images/validation",
        "ade20k_{}",
    ),
    # Its objects have no categories.
    "uvo_frame_val": ("uvo/FrameSet/UVO_frame_val.json", "uvo/uvo_videos_sparse_frames", []),
    "uvo_dense_{}_val": (
        "uvo/VideoDenseSet/UVO_dense_val_frames.json",
        "uvo/uvo_videos_dense_frames",
        "{}",
    ),
    # No official annotations in COCO's format, so no certain names.
    "epic_kitchens_val": (
        "epic_kitchens/annotations/val.json",
        "epic_kitchens/images",
        "epic_kitchens/seen.txt",
    ),
}


def register_datasets() -> None:
    """
    Register the open-world data sets of docs/datasets.md with Detectron2, in the folder that the
    environment variable DETECTRON2_DATASETS names now (default: `datasets`). Names that are
    registered already stay as they are. The files are read when a data set is first used.
    """
    root = os.path.expanduser(os.getenv("DETECTRON2_DATASETS", "datasets"))
    for template, (json_file, image_root, seen) in _DATASETS.items():
        paths = os.path.join(root, json_file), os.path.join(root, image_root)
        for split in ("voc", "coco", "person") if template.startswith("coco") else ("voc", "coco"):
            name = template.format(split)
            if name in DatasetCatalog.list():
                continue
            # The user's own file of names is read when the data set is used.
            is_file = isinstance(seen, str) and seen.endswith(".txt")
            own = seen.format(split) if isinstance(seen, str) else seen
            names = os.path.join(root, str(own)) if is_file else seen_names(own)
            _register(name, _metadata(*paths, names, training=name.endswith("_train")))
