"""
Which images train in which iteration, and how they are augmented. Both follow from the run's seed
and the iteration alone, so that a resumed run sees what an unbroken one would.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import detectron2.data.transforms as T
import detectron2.utils.comm as comm
import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetMapper, build_detection_train_loader
from detectron2.data.detection_utils import build_augmentation
from torch.utils.data import DataLoader, Dataset, Sampler

from oln_d2.checks import InputError
from oln_d2.data.rle import to_rle
from oln_d2.standalone.data import mix_seed


class SeededBatches(Sampler):
    """
    Yields for each iteration this process's part of the batch: pairs (index, seed of the image's
    augmentation).

    Args:
        indices: endless, for this process, the same each time it is gone through.
        size: images of this process's part of a batch.
        groups: a number for each image; only images with the same number make a batch.

    Attributes:
        start (int): the first iteration that is wanted. Changed before a resumed run.
        seed (int): the run's.
    """

    def __init__(self, indices: Iterable[int], size: int, groups: Sequence[int]):
        self.indices = indices
        self.size = size
        self.groups = groups
        self.start = self.seed = 0

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        batches = itertools.islice(self._batches(), self.start, None)
        for iteration, batch in enumerate(batches, self.start):
            numbers = self.seed, comm.get_rank(), iteration
            yield [(index, mix_seed(*numbers, place)) for place, index in enumerate(batch)]

    def _batches(self):
        batches: dict[int, list[int]] = {}
        for index in self.indices:
            batch = batches.setdefault(self.groups[index], [])
            batch.append(index)
            if len(batch) == self.size:
                yield batches.pop(self.groups[index])


class SeededImages(Dataset):
    """A data set of Detectron2 behind the pairs of :class:`SeededBatches`."""

    def __init__(self, images: Dataset):
        self.images = images

    def __getitem__(self, item: tuple[int, int]) -> Any:
        index, seed = item
        np.random.seed(seed)  # Detectron2's augmentations draw from it
        return self.images[index]


def build_loader(
    cfg: CfgNode,
    records: list[dict[str, Any]],
    mapper: Callable[[dict[str, Any]], dict[str, Any]],
    sampler: Sampler | None = None,
) -> DataLoader:
    """
    Args:
        records: Detectron2's standard dataset dicts.
        mapper: makes inputs of them, see :class:`DatasetMapper`.
        sampler: as of Detectron2; default DATALOADER.SAMPLER_TRAIN.

    Returns:
        endless, lists of inputs; its `batch_sampler` is a :class:`SeededBatches`.
    """
    kwargs = {} if sampler is None else {"sampler": sampler}
    built = build_detection_train_loader(
        cfg, dataset=records, mapper=mapper, aspect_ratio_grouping=False, **kwargs
    ).dataset
    grouped = cfg.DATALOADER.ASPECT_RATIO_GROUPING
    groups = [int(grouped and record["width"] > record["height"]) for record in records]
    size = cfg.SOLVER.IMS_PER_BATCH // comm.get_world_size()
    return DataLoader(
        SeededImages(built.dataset),
        batch_sampler=SeededBatches(built.sampler, size, groups),
        num_workers=cfg.DATALOADER.NUM_WORKERS,
        collate_fn=list,
        generator=torch.Generator(),  # or it would draw from the one of the training
    )


class ResizeScale(T.ResizeScale):
    """Detectron2's rounds the short side of a long image to 0."""

    def get_transform(self, image: np.ndarray) -> T.Transform:
        transform = super().get_transform(image)
        transform.new_h, transform.new_w = max(transform.new_h, 1), max(transform.new_w, 1)
        return transform


class TrainingMapper(DatasetMapper):
    """
    Adds `gt_weights` to the instances, (G,): `pseudo_weight` for what nobody has looked at, else 1;
    none where that is 1, too.
    """

    pseudo_weight = 1.0

    def _transform_annotations(self, dataset_dict, transforms, image_shape):
        if self.pseudo_weight == 1:
            super()._transform_annotations(dataset_dict, transforms, image_shape)
            return
        # Which annotations are left is seen by numbers in the place of their categories.
        annotations = [a for a in dataset_dict["annotations"] if not a.get("iscrowd")]
        dataset_dict["annotations"] = [
            {**annotation, "category_id": i} for i, annotation in enumerate(annotations)
        ]
        super()._transform_annotations(dataset_dict, transforms, image_shape)
        instances = dataset_dict["instances"]
        kept = [annotations[i] for i in instances.gt_classes.tolist()]
        instances.gt_classes = torch.tensor([a["category_id"] for a in kept], dtype=torch.int64)
        weights = [self.pseudo_weight if a.get("pseudo") else 1.0 for a in kept]
        instances.gt_weights = torch.tensor(weights)


class BitmaskMapper(TrainingMapper):
    """Makes bitmasks of polygons first, which Detectron2 crops with another package, shapely."""

    def __call__(self, record: dict[str, Any]) -> dict[str, Any]:
        size = record["height"], record["width"]
        annotations = [
            {**annotation, "segmentation": to_rle(annotation["segmentation"], *size)}
            for annotation in record["annotations"]
        ]
        return super().__call__({**record, "annotations": annotations})


def check_jitter(cfg: CfgNode) -> None:
    """
    Raises:
        InputError: an INPUT.SCALE_JITTER that is none, or with INPUT.CROP or masks as polygons.
    """
    jitter = cfg.INPUT.SCALE_JITTER
    if not jitter:
        return
    numbers = all(isinstance(scale, (int, float)) for scale in jitter)
    if len(jitter) != 2 or not numbers or not 0 < jitter[0] <= jitter[1] < np.inf:
        raise InputError(
            f"INPUT.SCALE_JITTER is {jitter}; use two ascending numbers above 0, such as "
            "[0.1, 2.0], or [] for none"
        )
    if cfg.INPUT.CROP.ENABLED:
        raise InputError("INPUT.SCALE_JITTER crops already; set INPUT.CROP.ENABLED False")
    if cfg.MODEL.MASK_ON and cfg.INPUT.MASK_FORMAT == "polygon":
        raise InputError(
            "INPUT.SCALE_JITTER cannot crop masks that are polygons; set INPUT.MASK_FORMAT bitmask"
        )


def build_training_mapper(cfg: CfgNode) -> TrainingMapper:
    """
    Returns:
        with INPUT.SCALE_JITTER in place of INPUT.MIN_SIZE_TRAIN, if it is set.

    Raises:
        InputError: see :func:`check_jitter`.
    """
    check_jitter(cfg)
    jitter, side = cfg.INPUT.SCALE_JITTER, cfg.INPUT.MAX_SIZE_TRAIN
    if not jitter:
        mapper = TrainingMapper(cfg, is_train=True)
    else:
        # Not padded: the model pads a batch, and knows then which part of it is the image.
        augmentations = [ResizeScale(*jitter, side, side), T.FixedSizeCrop((side, side), pad=False)]
        augmentations += build_augmentation(cfg, is_train=True)[1:]  # without its resizing
        kind = BitmaskMapper if cfg.MODEL.MASK_ON else TrainingMapper
        mapper = kind(
            cfg, is_train=True, augmentations=augmentations, recompute_boxes=cfg.MODEL.MASK_ON
        )
    mapper.pseudo_weight = cfg.DATASETS.PSEUDO_WEIGHT
    return mapper
