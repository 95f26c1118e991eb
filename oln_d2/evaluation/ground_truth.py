"""
Ground truth as arrays.

Shapes: I images, G ground truths (gts) of the whole data set.
"""

import os
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pycocotools import mask as mask_utils

from oln_d2.checks import InputError
from oln_d2.data.coco import check_coco, load_coco, to_int
from oln_d2.data.lookup import image_name
from oln_d2.data.rle import to_rle
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
        areas (G,): the annotation's `area` in pixels (in COCO the mask's, not the box's); where it
            has none, that of its mask, else that of its box.
        crowd (G,), seen (G,): bool.
        category_ids (G,)
        category_names (dict[int, str]): the names of all categories, by id.
        seen_names (tuple[str]): names of the seen categories.
        notes (list[str]): what to know before numbers are compared with others.
    """

    def __init__(
        self,
        content: dict[str, Any],
        seen: StrPath | Sequence[str],
        source: StrPath = "ground truth",
        keep: bool = True,
    ):
        """
        Args:
            content: a COCO ground truth; not changed.
            seen: a split's name or category names, see :func:`oln_d2.data.splits.seen_names`. May
                be empty.
            source: named in errors.
            keep: keep the content, so that to load a file again costs nothing, see
                :func:`oln_d2.data.coco.load_coco`. That takes ten times the memory of the arrays.

        Raises:
            InputError: an unknown category, an `area` that is not usable, or as of `load_coco`.
        """
        content = check_coco(source, content)
        self._content = content if keep else None
        self._images = content["images"]
        self.source = str(source)
        seen_ids, _ = split_category_ids(content["categories"], seen, source)
        self.category_names = {c["id"]: c["name"] for c in content["categories"]}
        self.seen_names = tuple(self.category_names[i] for i in seen_ids)

        images = sorted(content["images"], key=lambda image: image["id"])
        self.image_ids = np.array([image["id"] for image in images], np.int64)
        sides = [[image.get(side) or np.nan for side in ("height", "width")] for image in images]
        self.image_sizes = np.array(sides, float)
        annotations = content["annotations"]
        image = self.index_images([a["image_id"] for a in annotations])
        category = np.array([a["category_id"] for a in annotations], np.int64)
        order = np.lexsort((category, image))
        self.category_ids = category[order]
        self.starts = np.searchsorted(image[order], np.arange(len(images) + 1))
        self.boxes = np.array([a["bbox"] for a in annotations], float).reshape(-1, 4)[order]
        self.areas, self.notes = self._find_areas(annotations, image)
        self.areas = self.areas[order]
        self.crowd = np.array([bool(a.get("iscrowd")) for a in annotations], bool)[order]
        self.seen = np.isin(self.category_ids, seen_ids)
        # Id and mask of each annotation; of the first alone where none has a mask.
        any_mask = any(annotation.get("segmentation") for annotation in annotations)
        own = (annotations[i] for i in (order if any_mask else order[:1]))
        self._masks = [(a.get("id"), a.get("segmentation")) for a in own]

    def _find_areas(
        self, annotations: list[dict[str, Any]], image: NDArray[np.int64]
    ) -> tuple[NDArray[np.float64], list[str]]:
        areas = np.empty(len(annotations))
        without = 0
        for index, annotation in enumerate(annotations):
            area = annotation.get("area")
            if area is None:
                without += 1
                try:
                    mask = to_rle(annotation["segmentation"], *self.image_sizes[image[index]])
                    area = mask_utils.area(mask)
                except Exception:  # no mask, or none that can be used
                    area = annotation["bbox"][2] * annotation["bbox"][3]
            elif not isinstance(area, (int, float)) or not 0 <= area < 1e150:
                raise InputError(
                    f"{self.source}: annotations[{index}]: area {area!r} is not a finite number "
                    ">= 0; write the area in pixels, or leave it out and that of the mask or the "
                    "box is taken"
                )
            areas[index] = area
        if not without:
            return areas, []
        note = (
            f"{without} of {len(areas)} objects have no `area`: that of the mask is taken or, "
            "without one, of the box, so recall by size is not as COCO has it"
        )
        return areas, [note]

    @classmethod
    def load(cls, path: StrPath, seen: StrPath | Sequence[str], keep: bool = True) -> "GroundTruth":
        """Read a COCO ground truth JSON; arguments and errors as in `__init__` and `load_coco`."""
        return cls(load_coco(path), seen, path, keep)

    @property
    def images(self) -> NDArray[np.int64]:
        """(G,): the index of the image that each gt is in."""
        return np.repeat(np.arange(len(self.image_ids)), np.diff(self.starts))

    def index_images(self, image_ids: ArrayLike, first: int = 0) -> NDArray[np.int64]:
        """
        Args:
            image_ids (N,): image ids.
            first: the number of the first, by which errors count.

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
            entry = first + begins[unknown[0]]
            raise InputError(
                f"entry {entry}: image_id {ids[unknown[0]]} is not in {self.source}; are the "
                "detections those of another data set?"
            )
        return np.repeat(index, np.diff(begins, append=len(image_ids)))

    def find_image(self, written: int | float | str) -> int:
        """
        Args:
            written: what tools write for an image: its id, also as 3.0 or "3", or its `file_name`,
                with or without folders and ending.

        Returns:
            the id; one that the ground truth does not have only if `written` is a number.

        Raises:
            InputError: it means no image, or more than one.
        """
        number = to_int(written)
        if not isinstance(written, str):
            if number is None or abs(number) >= 2**63:
                raise InputError(f"image_id {written!r} is not an integer; write the image's id")
            return number
        name = written.replace("\\", "/").strip()
        named = self._ids_by_name.get(name) or self._ids_by_name.get(name.rpartition("/")[2], [])
        found = {*named, *([number] if number in self._ids else [])}
        if len(found) != 1:
            what = "could be several images" if found else "is neither id nor file name of an image"
            raise InputError(
                f"image_id {written!r} {what} of {self.source}; write the image's id, a number"
            )
        return found.pop()

    @cached_property
    def _ids(self) -> set[int]:
        return set(self.image_ids.tolist())

    @cached_property
    def _ids_by_name(self) -> dict[str, list[int]]:
        """The ids of the images that a file name may mean."""
        ret: dict[str, list[int]] = {}
        for image in self._images:
            name = image_name(image)
            if name:
                name = name.replace("\\", "/")
                base = name.rpartition("/")[2]
                for key in {name, base, os.path.splitext(name)[0], os.path.splitext(base)[0]}:
                    ret.setdefault(key, []).append(image["id"])
        return ret

    @property
    def has_masks(self) -> bool:
        """Whether every annotation has a mask."""
        return len(self._masks) == len(self.areas) and all(mask for _, mask in self._masks)

    @cached_property
    def masks(self) -> list[dict[str, Any]]:
        """The G masks as COCO RLE. Raises InputError where an annotation has none."""
        masks = []
        for (number, given), image in zip(self._masks, self.images):
            size = self.image_sizes[image]
            try:
                mask = to_rle(given, *size)
                if (mask["size"] != size)[np.isfinite(size)].any():
                    raise ValueError(f"size {mask['size']} is not the image's {size.tolist()}")
                masks.append(mask)
            except Exception as error:  # pycocotools raises no narrower one
                raise InputError(
                    f"{self.source}: the annotation with id {number} has no usable 'segmentation' "
                    f"({' '.join(str(error).split())}); without masks only boxes can be scored"
                ) from None
        return masks
