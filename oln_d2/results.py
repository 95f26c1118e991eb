"""
What every proposer returns: boxes, scores and masks of one image.

Shapes: D detections of an image of H x W pixels. Boxes are XYXY in absolute pixels of that image.
"""

import io
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image
from pycocotools import mask as mask_utils

from oln_d2 import drawing
from oln_d2.boxes import nms, to_xywh
from oln_d2.checks import FRACTION, POSITIVE_INT, InputError, check_limits, needs
from oln_d2.data.images import open_image
from oln_d2.scores import SCORES

Floats = NDArray[np.float64]


class RLEMasks:
    """
    D masks of an image, kept as COCO RLE. To index it with an int or to iterate over it gives bool
    arrays (H, W), `numpy.asarray` all of them as one array; a slice, and indices or bools in a
    list, array or tensor select.

    Args:
        rles: D masks as pycocotools encodes them.
        height, width: the image's.
    """

    def __init__(self, rles: list[dict[str, Any]], height: int, width: int):
        self.rles = rles
        self.height, self.width = height, width

    @property
    def shape(self) -> tuple[int, int, int]:
        return len(self.rles), self.height, self.width

    def __len__(self) -> int:
        return len(self.rles)

    def __getitem__(self, item: Any) -> Any:
        item = item.cpu().numpy() if hasattr(item, "cpu") else item  # a tensor
        index = np.arange(len(self))[item]
        if np.ndim(index) == 0:
            return mask_utils.decode(self.rles[index]) > 0
        return RLEMasks([self.rles[i] for i in index], self.height, self.width)

    def __iter__(self) -> Iterator[NDArray[np.bool_]]:
        return (self[i] for i in range(len(self)))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        masks = np.zeros(self.shape, bool)
        for i, mask in enumerate(self):
            masks[i] = mask
        return masks if dtype is None else masks.astype(dtype)

    def to(self, *args: Any, **kwargs: Any) -> "RLEMasks":
        """Itself: it lies in main memory whatever the device."""
        return self

    @staticmethod
    def cat(parts: "Sequence[RLEMasks]") -> "RLEMasks":
        """The masks of several parts of the same image."""
        rles = [rle for part in parts for rle in part.rles]
        return RLEMasks(rles, parts[0].height, parts[0].width)

    def __repr__(self) -> str:
        return f"RLEMasks({len(self)} masks of {self.height} x {self.width} pixels)"


class Proposals:
    """
    The proposals for one image, best first. They show themselves in a notebook.

        found = next(proposer("street.jpg"))
        found.boxes, found.scores
        found.top(5).draw().save("street_boxes.jpg")

    Attributes:
        boxes (D, 4): float64.
        scores (D,): in [0, 1]. For OLN the geometric mean of the following scores; less for near
            copies where the model says so (`Proposer.copy_factor`).
        objectness, box_scores, mask_scores (D,): centerness, predicted IoU of the box and of the
            mask, each in [0, 1]; None where the model has no such score.
        masks (RLEMasks): D masks; None where the model has none.
        size (int, int): height and width of the image.
        name (str): the image's; "" if it was not read from a file.
        likely_score (float): in [0, 1]; of the boxes with at least this score, half show an object.
            0 where nobody has measured that for the model.
    """

    def __init__(
        self,
        boxes: ArrayLike,
        scores: ArrayLike,
        *,
        size: tuple[int, int],
        name: str = "",
        image: Image.Image | str | os.PathLike[str] | None = None,
        objectness: ArrayLike | None = None,
        box_scores: ArrayLike | None = None,
        mask_scores: ArrayLike | None = None,
        masks: RLEMasks | list[dict[str, Any]] | None = None,
        likely_score: float = 0.0,
    ):
        """
        Args:
            image: RGB, or the file that it is read from when it is needed; without, the methods
                that show the image fail.
            masks: also as a list of D COCO RLE.
            Others: see above, in any order.

        Raises:
            InputError: the shapes do not fit each other.
        """
        self.size, self.name, self._image = size, name, image
        self.likely_score = likely_score
        self.scores = _floats(scores)
        self.boxes = _floats(boxes)
        if self.boxes.ndim == 1:  # one box, or none
            self.boxes = self.boxes.reshape(-1, 4)
        self.objectness = _optional(objectness)
        self.box_scores = _optional(box_scores)
        self.mask_scores = _optional(mask_scores)
        self.masks = RLEMasks(masks, *size) if isinstance(masks, list) else masks
        for field, value in self._fields().items():
            if len(value) != len(self.scores):
                raise InputError(f"{field} has {len(value)} entries, scores {len(self.scores)}")
        if self.boxes.shape != (len(self.scores), 4):
            raise InputError(f"boxes have shape {self.boxes.shape}, not (D, 4)")
        if (np.diff(self.scores) > 0).any():
            self._select(np.argsort(-self.scores, kind="stable"))

    @property
    def image(self) -> Image.Image:
        """The image, RGB. Raises InputError where it is not known or cannot be read any more."""
        if self._image is None:
            raise InputError(f"{self.name or 'these proposals'}: the image is not known")
        return self._image if isinstance(self._image, Image.Image) else open_image(self._image)

    def on(self, image: Image.Image) -> "Proposals":
        """The same, with their image."""
        ret = self[:]
        ret._image = image
        return ret

    def qualities(self) -> dict[str, Floats]:
        """The scores beside `scores` that there are, (D,) each, as results files name them."""
        values = {score.field: getattr(self, score.attribute) for score in SCORES}
        return {field: value for field, value in values.items() if value is not None}

    def _fields(self) -> dict[str, Any]:
        names = ("boxes", "scores", "masks", *(score.attribute for score in SCORES))
        values = {name: getattr(self, name) for name in names}
        return {name: value for name, value in values.items() if value is not None}

    def _select(self, index: Any) -> None:
        for field, value in self._fields().items():
            setattr(self, field, value[index])

    def __len__(self) -> int:
        return len(self.scores)

    def __getitem__(self, item: Any) -> "Proposals":
        """Some of them: by a slice, a number, or an array of indices or bools."""
        index = np.atleast_1d(np.arange(len(self))[item])
        fields = {name: value[index] for name, value in self._fields().items()}
        ret = Proposals(**fields, size=self.size, name=self.name, image=self._image)
        ret.likely_score = self.likely_score
        return ret

    def top(self, k: int) -> "Proposals":
        """The k best."""
        check_limits(k=(k, POSITIVE_INT))
        return self[:k]

    def nms(self, iou: float) -> "Proposals":
        """Those that do not overlap a better one by an IoU of more than `iou`, in [0, 1]."""
        check_limits(iou=(iou, FRACTION))
        return self[nms(self.boxes, iou)]

    def likely(self) -> "Proposals":
        """
        Those to look at: with `likely_score` or more, and the best one in any case, without near
        copies, boxes that overlap a better one by an IoU above 0.5.
        """
        return self[drawing.choose(self.boxes, self.scores, len(self), self.likely_score)]

    def draw(self, top: int = drawing.TOP, objects: "drawing.Objects | None" = None) -> Image.Image:
        """
        Args:
            top: how many are drawn at most, the best of :meth:`likely`.
            objects: the ground truth, drawn as well.

        Returns:
            the image with boxes and masks coloured by score, and a legend; its longer side has 960
            to 1600 pixels.

        Raises:
            InputError: the image is not known, or cannot be read any more.
        """
        check_limits(top=(top, POSITIVE_INT))
        masks = self.masks.rles if self.masks is not None else None
        more = self.qualities(), masks, objects, top, self.likely_score
        return drawing.draw_proposals(self.image, self.boxes, self.scores, *more)

    def crops(self) -> list[Image.Image]:
        """
        Returns:
            D images, what lies in each box, one pixel wide and high at least.

        Raises:
            InputError: see :meth:`draw`.
        """
        image = self.image
        limit = np.array(image.size) - 1
        low = np.floor(self.boxes[:, :2]).clip(0, limit)
        high = np.ceil(self.boxes[:, 2:]).clip(low + 1, limit + 1)
        return [image.crop(tuple(box)) for box in np.hstack([low, high]).astype(int).tolist()]

    def to_coco(self, image_id: int, category_id: int = 1) -> list[dict[str, Any]]:
        """
        Returns:
            D entries of COCO's results format, as `propose` writes them: `bbox` is [x, y, width,
            height], masks are compressed RLE.
        """
        rles = self.masks.rles if self.masks is not None else None
        boxes = to_xywh(self.boxes)
        return coco_entries(image_id, boxes, self.scores, rles, self.qualities(), category_id)

    def to_supervision(self) -> Any:
        """
        Returns:
            supervision.Detections: with masks (D, H, W) where there are any, and the scores of
            which `confidence` is made in `data`. All are of class 0.

        Raises:
            ImportError: the package `supervision` is missing.
        """
        with needs("to_supervision", "supervision"):
            import supervision
        return supervision.Detections(
            xyxy=self.boxes.astype(np.float32),
            confidence=self.scores.astype(np.float32),
            class_id=np.zeros(len(self), int),
            mask=np.asarray(self.masks) if self.masks is not None else None,
            data=self.qualities(),
        )

    def __repr__(self) -> str:
        height, width = self.size
        range_ = f", scores {self.scores[-1]:.3f} to {self.scores[0]:.3f}" if len(self) else ""
        return f"Proposals({len(self)} for {self.name or 'an image'} of {width} x {height}{range_})"

    def _repr_jpeg_(self) -> bytes | None:
        if self._image is None:
            return None
        data = io.BytesIO()
        self.draw().save(data, "JPEG", quality=85)
        return data.getvalue()


def _floats(values: ArrayLike) -> Floats:
    return np.array(values, np.float64)


def _optional(values: ArrayLike | None) -> Floats | None:
    return None if values is None else _floats(values)


def coco_entries(
    image_id: int,
    boxes: Floats,
    scores: NDArray[Any],
    masks: Sequence[Mapping[str, Any]] | None,
    more: Mapping[str, NDArray[Any]],
    category_id: int = 1,
) -> list[dict[str, Any]]:
    """
    The form of an entry of a results file.

    Args:
        boxes (D, 4): XYWH.
        scores (D,)
        masks: D COCO RLE, if there are any.
        more: further fields by name, each (D,).

    Returns:
        D entries of plain values, numbers in full.
    """
    entries: list[dict[str, Any]] = [
        {"image_id": image_id, "category_id": category_id, "bbox": box, "score": score}
        for box, score in zip(boxes.tolist(), scores.tolist(), strict=True)
    ]
    if masks is not None:
        for entry, mask in zip(entries, masks, strict=True):
            counts = mask["counts"]
            counts = counts.decode() if isinstance(counts, bytes) else counts
            entry["segmentation"] = {"size": list(mask["size"]), "counts": counts}
    for name, values in more.items():
        for entry, value in zip(entries, values.tolist(), strict=True):
            entry[name] = value
    return entries
