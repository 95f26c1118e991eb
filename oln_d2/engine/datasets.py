"""Open-world data sets in COCO format, registered with Detectron2. See docs/datasets.md."""

import logging
import os
import re
from collections.abc import Sequence
from typing import Any

import detectron2.utils.comm as comm
import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog, get_detection_dataset_dicts
from detectron2.data.samplers import RepeatFactorTrainingSampler
from detectron2.structures import BoxMode
from detectron2.utils.file_io import PathManager

from oln_d2.checks import POSITIVE, InputError, check_limits
from oln_d2.data.coco import PSEUDO, load_coco, load_images, read_mask
from oln_d2.data.splits import seen_names, split_category_ids
from oln_d2.data.vocabularies import LVIS_TO_COCO
from oln_d2.files import StrPath
from oln_d2.pickles import load_plain, not_plain

logger = logging.getLogger(__name__)


def load_open_world_coco(
    json_file: StrPath,
    image_root: StrPath,
    seen: StrPath | Sequence[str],
    training: bool,
    classes: bool = False,
) -> list[dict[str, Any]]:
    """
    Args:
        classes: whether an object's class is its seen category, by its place in `seen`, and what is
            not of one is left out, instead of one class for all.

    Other arguments and errors as of :func:`oln_d2.data.coco.load_images`, errors also as of
    :func:`oln_d2.data.coco.read_mask`.

    Returns:
        Detectron2's standard dataset dicts. Without `classes` every `category_id` is 0, "object".
        An annotation has a
        `segmentation` if the file has one for it: polygons or compressed RLE; without any polygon
        of 3 points or more it is an empty list. It is `pseudo` if nobody has looked at it, see
        :data:`oln_d2.data.coco.PSEUDO`.
    """
    records = []
    class_of = class_ids(json_file, seen) if classes else {}
    for image in load_images(json_file, image_root, seen, training):
        record = {
            "file_name": os.path.join(image_root, image["file_name"]),
            "height": image["height"],
            "width": image["width"],
            "image_id": image["id"],
            "annotations": [],
        }
        for annotation in image["annotations"]:
            if classes and annotation["category_id"] not in class_of:
                continue
            record["annotations"].append(
                {
                    "bbox": annotation["bbox"],
                    "bbox_mode": BoxMode.XYWH_ABS,
                    "category_id": class_of.get(annotation["category_id"], 0),
                    "iscrowd": annotation.get("iscrowd", 0),
                }
            )
            if annotation.get("source") == PSEUDO:
                record["annotations"][-1]["pseudo"] = True
            mask = read_mask(annotation, image, json_file)
            if mask is not None:
                record["annotations"][-1]["segmentation"] = mask
        records.append(record)
    return records


def class_ids(json_file: StrPath, seen: StrPath | Sequence[str]) -> dict[int, int]:
    """
    Returns:
        the place in `seen` of each seen category, by its id in a COCO file.

    Raises:
        InputError: see :func:`oln_d2.data.splits.split_category_ids`.
    """
    categories = load_coco(json_file)["categories"]
    return {
        category: place
        for place, name in enumerate(seen_names(seen))
        for category in split_category_ids(categories, [name], json_file)[0]
    }


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


def proposal_files(cfg: CfgNode, part: str) -> dict[str, str]:
    """
    The files of precomputed proposals by data set, for `part` "TRAIN" or "TEST"; none without
    MODEL.LOAD_PROPOSALS. Raises InputError where there is not one for each data set.
    """
    if not cfg.MODEL.LOAD_PROPOSALS:
        return {}
    names, files = cfg.DATASETS[part], cfg.DATASETS[f"PROPOSAL_FILES_{part}"]
    if len(names) != len(files):
        raise InputError(
            f"DATASETS.PROPOSAL_FILES_{part} names {len(files)} files for the {len(names)} data "
            f"sets of DATASETS.{part}; give one for each, or set MODEL.LOAD_PROPOSALS False"
        )
    return dict(zip(names, files))


def add_proposals(records: list[dict[str, Any]], path: str) -> None:
    """
    Give images their precomputed proposals as Detectron2 does, but without executing code that the
    file may hold.

    Args:
        records: Detectron2's standard dataset dicts; changed in place.
        path: a pickle of a dict as `propose --format detectron2` writes it: of images the `ids`,
            the `boxes`, (D, 4) each, and the `objectness_logits`, (D,); and `bbox_mode`, 0 for XYXY
            and 1 for XYWH, in absolute pixels.

    Raises:
        InputError: the file cannot be read, holds something else, or lacks an image.
    """
    remedy = "`oln-d2 propose --format detectron2` writes such a file"
    try:
        with PathManager.open(path, "rb") as file:
            found = load_plain(file)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error}); {remedy}") from None
    except Exception as error:  # a damaged file makes all kinds
        more = f"Where it was made, write it with nothing but arrays and plain values: {remedy}"
        raise not_plain(path, error, more) from None
    if not isinstance(found, dict):
        raise InputError(f"{path}: holds no dict of proposals; {remedy}")
    parts = []
    # Detectron's files have the other names.
    for name, other in ("ids", "indexes"), ("boxes", "boxes"), ("objectness_logits", "scores"):
        part = found.get(name, found.get(other))
        if not isinstance(part, (list, tuple, np.ndarray)) or getattr(part, "shape", None) == ():
            raise InputError(f"{path}: has no list {name!r} of the images; {remedy}")
        parts.append(part)
    numbers = list(map(len, parts))
    if len(set(numbers)) > 1:
        raise InputError(
            f"{path}: has {numbers[0]} ids, {numbers[1]} boxes and {numbers[2]} objectness_logits, "
            f"which have to be one of each for an image; {remedy}"
        )
    mode = found.get("bbox_mode", 0)
    if isinstance(mode, np.ndarray) or mode not in (0, 1):
        raise InputError(f"{path}: bbox_mode is {mode}, neither 0, XYXY, nor 1, XYWH; {remedy}")
    places = {str(image): place for place, image in enumerate(parts[0])}
    for record in records:
        place = places.get(str(record["image_id"]))
        if place is None:
            raise InputError(
                f"{path}: has no proposals for {record['file_name']}, image {record['image_id']}; "
                "propose with --gt and the annotations of the data set, so that each has an entry"
            )
        try:
            with np.errstate(over="ignore"):  # to infinity, see below
                boxes = np.asarray(parts[1][place], np.float32).reshape(-1, 4)
                logits = np.asarray(parts[2][place], np.float32).reshape(len(boxes))
        except (OverflowError, TypeError, ValueError):
            raise InputError(
                f"{path}: entry {place}: boxes and objectness_logits are not of the shapes (D, 4) "
                f"and (D,); {remedy}"
            ) from None
        if not (np.isfinite(boxes).all() and np.isfinite(logits).all()):
            raise InputError(f"{path}: entry {place}: a box or a logit is not finite; {remedy}")
        order = logits.argsort()[::-1]
        record["proposal_boxes"] = boxes[order]
        record["proposal_objectness_logits"] = logits[order]
        record["proposal_bbox_mode"] = BoxMode(mode)


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
    check_limits(**{"DATASETS.PSEUDO_WEIGHT": (cfg.DATASETS.PSEUDO_WEIGHT, POSITIVE)})
    generator, heads = cfg.MODEL.PROPOSAL_GENERATOR.NAME, cfg.MODEL.ROI_HEADS.NAME
    is_second = generator == "PrecomputedProposals" and heads == "OLNROIHeads"
    if cfg.DATASETS.PSEUDO_WEIGHT != 1 and generator != "OLNRPN" and not is_second:
        raise InputError(
            f"DATASETS.PSEUDO_WEIGHT is {cfg.DATASETS.PSEUDO_WEIGHT}, but only OLN's losses look "
            "at it; set it to 1"
        )
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
    proposal_files(cfg, "TRAIN")
    _check_categories(cfg, [name for name in names if _classes(name)])


def _check_categories(cfg, names):
    """The part of :func:`check_training_sets` that needs the classes of the data sets."""
    first = names[0] if names else None
    if cfg.MODEL.META_ARCHITECTURE != "ProposalNetwork" and first:
        heads = cfg.MODEL.get(cfg.MODEL.META_ARCHITECTURE.upper(), cfg.MODEL.ROI_HEADS)
        number = len(_classes(first))
        if number > heads.NUM_CLASSES:
            raise InputError(
                f"DATASETS.TRAIN: {first} has {number} classes and the model {heads.NUM_CLASSES}; "
                f"set MODEL.ROI_HEADS.NUM_CLASSES {number}"
            )
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
        InputError: a data set without an object; see :func:`select_masks` and
            :func:`add_proposals`; also for data sets whose
            classes are known only once they are read, as those of Detectron2's
            `register_coco_instances`, see :func:`check_training_sets`.
    """
    names, weights = cfg.DATASETS.TRAIN, cfg.DATASETS.TRAIN_WEIGHTS
    files = proposal_files(cfg, "TRAIN")
    late, parts = not all(map(_classes, names)), []
    for name in names:
        try:
            records = get_detection_dataset_dicts(
                name, filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS
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
        if name in files:
            add_proposals(records, files[name])
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


def load_test_set(cfg: CfgNode, name: str) -> list[dict[str, Any]]:
    """
    The records of a data set of DATASETS.TEST, Detectron2's standard dataset dicts, with their
    precomputed proposals for MODEL.LOAD_PROPOSALS. Raises InputError, see :func:`add_proposals`.
    """
    records = get_detection_dataset_dicts(name, filter_empty=False)
    files = proposal_files(cfg, "TEST")
    if name in files:
        add_proposals(records, files[name])
    return records


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
    classes: bool = False,
) -> None:
    """
    Register a data set with Detectron2. The files are read when it is first used. To register the
    same data set again is harmless.

    Args:
        name: the name for `DATASETS.TRAIN` or `DATASETS.TEST`.
        json_file, image_root, seen, training: see :func:`oln_d2.data.coco.load_images`.
        classes: see :func:`load_open_world_coco`.

    Raises:
        InputError: `name` is taken by another data set, or `seen` names no category.
    """
    metadata = _metadata(json_file, image_root, seen_names(seen), training, classes)
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
        register_open_world_coco(name, json_file, image_root, seen, training, cfg.DATASETS.CLASSES)


def _metadata(json_file, image_root, seen, training, classes=False):
    return {
        "json_file": os.path.expanduser(json_file),
        "image_root": os.path.expanduser(image_root),
        "seen_names": seen,
        "training": training,
        "evaluator_type": "seen_coco" if classes else "open_world_coco",
        "thing_classes": list(seen) if classes else ["object"],
    }


def _register(name, metadata):
    arguments = [metadata[key] for key in ("json_file", "image_root", "seen_names", "training")]
    arguments.append(metadata["evaluator_type"] == "seen_coco")
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
