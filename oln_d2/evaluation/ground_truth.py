"""
Ground truth as arrays.

Shapes: I images, G ground truths (gts) of the whole data set.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pycocotools import mask as mask_utils

from oln_d2.checks import InputError
from oln_d2.data.coco import load_coco
from oln_d2.data.splits import split_category_ids
from oln_d2.files import StrPath


class GroundTruth:
    """
    The objects of a data set, and which of them are of seen categories. Not to be changed once
    made.

    The G gts are ordered by image id, then category id, then their order in the file: the order in
    which pycocotools visits them, which decides exact ties.

    Attributes:
        source (str): where the gts came from; named in errors.
        image_ids (I,): ascending. All of them take part, also those without a gt.
        image_sizes (I, 2): height, width in pixels; NaN where the file has none.
        starts (I + 1,): the gts of image i are starts[i]:starts[i + 1].
        boxes (G, 4): XYWH, absolute pixels, as in the file.
        areas (G,): the annotation's `area` in pixels (in COCO the mask's, not the box's).
        crowd (G,), seen (G,): bool.
        category_ids (G,)
        category_names (dict[int, str]): of all categories, by id.
        seen_names (tuple[str]): names of the seen categories.
    """

    def __init__(
        self,
        content: dict[str, Any],
        seen: StrPath | Sequence[str],
        source: StrPath = "ground truth",
    ):
        """
        Args:
            content: a COCO ground truth, as :func:`oln_d2.data.coco.load_coco` returns it. It is
                kept, so that loading the file again costs nothing, and not changed.
            seen: a split's name or category names, see :func:`oln_d2.data.splits.seen_names`. May
                be empty.
            source: named in errors.

        Raises:
            InputError: an unknown category, or an annotation without a usable `area`.
        """
        self._content = content
        self.source = str(source)
        seen_ids, _ = split_category_ids(content["categories"], seen, source)
        self.category_names = {c["id"]: c["name"] for c in content["categories"]}
        self.seen_names = tuple(self.category_names[i] for i in seen_ids)

        images = sorted(content["images"], key=lambda image: image["id"])
        self.image_ids = np.array([image["id"] for image in images], np.int64)
        sides = [[image.get(side) or np.nan for side in ("height", "width")] for image in images]
        self.image_sizes = np.array(sides, float)
        annotations = content["annotations"]
        for index, annotation in enumerate(annotations):
            area = annotation.get("area")
            if not isinstance(area, (int, float)) or not 0 <= area < np.inf:
                raise InputError(
                    f"{source}: annotations[{index}]: area {area!r} is not a finite number >= 0; "
                    "recall by object size needs it"
                )
        image = self.index_images([a["image_id"] for a in annotations])
        category = np.array([a["category_id"] for a in annotations], np.int64)
        order = np.lexsort((category, image))
        self.category_ids = category[order]
        self.starts = np.searchsorted(image[order], np.arange(len(images) + 1))
        self.boxes = np.array([a["bbox"] for a in annotations], float).reshape(-1, 4)[order]
        self.areas = np.array([a["area"] for a in annotations], float)[order]
        self.crowd = np.array([bool(a.get("iscrowd")) for a in annotations], bool)[order]
        self.seen = np.isin(self.category_ids, seen_ids)
        self._annotations = [annotations[i] for i in order]

    @classmethod
    def load(cls, path: StrPath, seen: StrPath | Sequence[str]) -> "GroundTruth":
        """Read a COCO ground truth JSON; arguments and errors as in `__init__` and `load_coco`."""
        return cls(load_coco(path), seen, path)

    @property
    def images(self) -> NDArray[np.int64]:
        """(G,): the index of the image that each gt is in."""
        return np.repeat(np.arange(len(self.image_ids)), np.diff(self.starts))

    def index_images(self, image_ids: ArrayLike) -> NDArray[np.int64]:
        """
        Args:
            image_ids (N,): image ids.

        Returns:
            (N,): their index in `image_ids`.

        Raises:
            InputError: names the first id that is not in the ground truth, and its place.
        """
        image_ids = np.asarray(image_ids)
        if image_ids.size and image_ids.dtype.kind not in "iu":
            raise InputError(f"image ids have to be integers, not {image_ids.dtype}")
        # One look-up for each run of the same id: detections mostly come image by image.
        begins = np.flatnonzero(image_ids[1:] != image_ids[:-1]) + 1
        begins = np.append(0, begins) if len(image_ids) else begins
        ids = image_ids[begins]
        index = np.minimum(np.searchsorted(self.image_ids, ids), len(self.image_ids) - 1)
        unknown = np.flatnonzero(self.image_ids[index] != ids)
        if len(unknown):
            raise InputError(
                f"entry {begins[unknown[0]]}: image_id {ids[unknown[0]]} is not in {self.source}; "
                "are the detections those of another data set?"
            )
        return np.repeat(index, np.diff(begins, append=len(image_ids)))

    @property
    def has_masks(self) -> bool:
        """Whether every annotation has a mask."""
        return all(annotation.get("segmentation") for annotation in self._annotations)

    @cached_property
    def masks(self) -> list[dict[str, Any]]:
        """The G masks as COCO RLE. Raises InputError where an annotation has none."""
        masks = []
        for annotation, image in zip(self._annotations, self.images):
            mask = annotation.get("segmentation")
            try:
                if isinstance(mask, list) or isinstance(mask["counts"], list):
                    height, width = map(int, self.image_sizes[image])
                    mask = mask_utils.frPyObjects(mask, height, width)
                    mask = mask_utils.merge(mask) if isinstance(mask, list) else mask
                mask_utils.area(mask)
            except Exception as error:  # pycocotools raises no narrower one
                raise InputError(
                    f"{self.source}: the annotation with id {annotation.get('id')} has no usable "
                    f"'segmentation' ({error}); without masks only boxes can be scored"
                ) from None
            masks.append(mask)
        return masks
