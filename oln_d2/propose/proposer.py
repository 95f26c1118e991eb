"""
What proposes, whatever runs the model.

Shapes: D detections of an image of H x W pixels, of which the model sees H' x W'. Boxes are XYXY in
absolute pixels of the image.
"""

import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from oln_d2.boxes import nms
from oln_d2.checks import FRACTION, POSITIVE_INT, InputError, Limit, check_limits
from oln_d2.data.images import resized_shape, to_image
from oln_d2.drawing import FOLD_IOU
from oln_d2.propose.inputs import find_sources, read_frames
from oln_d2.propose.tiles import Tile, make_tiles, merge
from oln_d2.results import Proposals

WAITING = 4  # batches of images that wait for others of their size


class Photo(NamedTuple):
    """An image as the model sees it."""

    name: str
    size: tuple[int, int]  # height and width of the image
    shape: tuple[int, int]  # see :meth:`Proposer.input_shape`
    parts: list[tuple[Tile, NDArray[np.uint8]]]  # the whole and its tiles, (H', W', 3), RGB
    image: Image.Image | str | None  # for the results to show


class Proposer(ABC):
    """
    A trained model as a function from images to proposals; :func:`oln_d2.load` makes one.

        for found in proposer("photos/"):
            found.top(10).draw().save(...)

    Attributes:
        identity (str): differs where the proposals may.
        max_detections (int): that the model keeps of an image.
        min_size, max_size (int): limits of the shorter and the longer side of an image as the model
            sees it, in pixels; with `min_size` None it sees the image as it is.
        size_divisor (int): the model pads both sides to a multiple of it.
        likely_score (float): see :class:`Proposals`.
        copy_factor (float): in [0, 1]; of the score of a box that overlaps a better one by an IoU
            above `FOLD_IOU`, so that it comes later. 1: they stay where they are.
        overrides (dict): what :meth:`look_closer` and :meth:`limit_proposals` were given.
    """

    identity: str
    max_detections: int
    min_size: int | None
    max_size: int
    size_divisor: int = 1
    likely_score: float = 0.0
    copy_factor: float = 1.0
    overrides: Mapping[str, int | None] = {"min_size": None, "tiles": None, "max_proposals": None}

    def __repr__(self) -> str:
        limits = {name: getattr(self, name) for name in ("min_size", "max_size", "max_detections")}
        given = {name: value for name, value in self.overrides.items() if value is not None}
        shown = ", ".join(f"{name}={value}" for name, value in {**limits, **given}.items())
        return f"{type(self).__name__}({shown})"

    def look_closer(self, min_size: int | None = None, tiles: int | None = None) -> None:
        """
        Find smaller objects, at the cost of time.

        Args:
            min_size: the shorter side of an image as the model sees it, in pixels; the limit of the
                longer one grows with it. None: as the model was built.
            tiles: side of the tiles that an image is also looked at by, in pixels of the image.

        Raises:
            InputError: a number below 32.
        """
        limit = Limit(lambda value: value >= 32, "32 or more")
        check_limits(min_size=(min_size, limit), tiles=(tiles, limit))
        self.overrides = {**self.overrides, "min_size": min_size, "tiles": tiles}
        if min_size is not None:
            if self.min_size is not None:
                self.max_size = round(self.max_size * min_size / self.min_size)
            self.min_size = min_size

    def limit_proposals(self, number: int | None = None) -> None:
        """
        Take less time and find a little less.

        Args:
            number: at most so many proposals of an image go through the second stage: the best that
                are no near copies of a better one, then the best of these. None: as the model was
                built.

        Raises:
            InputError: a number below 1, or a model that takes none.
        """
        check_limits(max_proposals=(number, POSITIVE_INT))
        if number is not None:
            self.keep_proposals(number)
        self.overrides = {**self.overrides, "max_proposals": number}

    def keep_proposals(self, number: int) -> None:
        """What :meth:`limit_proposals` does to the model."""
        raise InputError(
            f"max_proposals is {number}, but this model has no two stages; leave it out"
        )

    @abstractmethod
    def detect(
        self, pixels: list[NDArray[np.uint8]], sizes: list[tuple[int, int]]
    ) -> list[dict[str, Any]]:
        """
        Args:
            pixels: images (H', W', 3), RGB, resized, all of the same size once they are padded.
            sizes: height and width that each had before.

        Returns:
            for each image the arguments of :class:`Proposals` that depend on the model.
        """

    def __call__(
        self,
        images: Any,
        *,
        top_k: int = 100,
        score: float = 0.0,
        nms: float | None = None,
        batch_size: int = 4,
        every: int = 1,
    ) -> Iterator[Proposals]:
        """
        Args:
            images: one or many of: paths of images, folders (with all below them), globs and
                videos; PIL images; arrays (H, W, 3) and tensors (3, H, W), RGB, uint8 or float in
                [0, 1].
            top_k: at most so many of an image.
            score: only those with a higher score, in [0, 1].
            nms: drop boxes that overlap a better one by an IoU above this; None: the model's own
                NMS only.
            batch_size: images at once; only neighbours of one size share a batch, so the boxes do
                not depend on it.
            every: take one of so many frames of a video.

        Yields:
            the proposals for each image, in order. Those of a file read it again when the image is
            asked for, so that many can be kept.

        Raises:
            InputError: an argument that cannot be used, now; an image that cannot be read, when its
                turn comes.
        """
        check_selection(top_k, score, nms, batch_size, every)
        one = str, bytes, os.PathLike, Image.Image
        if isinstance(images, one) or getattr(images, "ndim", 4) < 4:
            images = [images]
        return self._propose(images, top_k, score, nms, batch_size, every)

    def _propose(self, images, top_k, score, nms, batch_size, every):
        batch: list[Photo] = []
        for image, name, path in _images(images, every):
            photo = self.prepare(image, name, path or image)
            if batch and batch[0].shape != photo.shape:
                yield from self.propose(batch, top_k, score, nms)
                batch = []
            batch.append(photo)
            if len(batch) == batch_size:
                yield from self.propose(batch, top_k, score, nms)
                batch = []
        yield from self.propose(batch, top_k, score, nms)

    def prepare(
        self, image: Image.Image, name: str = "", shown: Image.Image | str | None = None
    ) -> Photo:
        """
        Args:
            image: RGB.
            name: of the results.
            shown: what the results show: the image, or a file that it can be read from again.
        """
        width, height = image.size
        parts = []
        for tile in make_tiles(width, height, self.overrides["tiles"]):
            part = image.crop((tile.x, tile.y, tile.x + tile.width, tile.y + tile.height))
            resized = self._resized_shape(part.height, part.width)
            pixels = np.array(part.resize(resized[::-1], Image.Resampling.BILINEAR))
            parts.append((tile, pixels))
        return Photo(name, (height, width), self.input_shape(image), parts, shown)

    def propose(
        self, photos: list[Photo], top_k: int, score: float, nms: float | None
    ) -> list[Proposals]:
        """The proposals for a batch of images of the same `shape`; see :meth:`__call__`."""
        found: list[list[tuple[Tile, dict[str, Any]]]] = [[] for _ in photos]
        waiting: dict[tuple[int, int], list[tuple[int, Tile, NDArray[np.uint8]]]] = {}
        for number, photo in enumerate(photos):
            for tile, pixels in photo.parts:
                shape = self._padded(*pixels.shape[:2])
                waiting.setdefault(shape, []).append((number, tile, pixels))
        for group in waiting.values():
            for begin in range(0, len(group), len(photos)):
                numbers, tiles, images = zip(*group[begin : begin + len(photos)], strict=True)
                sizes = [(tile.height, tile.width) for tile in tiles]
                for number, tile, fields in zip(
                    numbers, tiles, self.detect(list(images), sizes), strict=True
                ):
                    found[number].append((tile, fields))
        ret = []
        for photo, parts_of in zip(photos, found, strict=True):
            height, width = photo.size
            fields = parts_of[0][1]
            if len(parts_of) > 1:
                fields = merge(parts_of, width, height, self.max_detections)
            if self.copy_factor < 1:
                fields = {**fields, "scores": self._without_copies(fields)}
            own = Proposals(
                **fields,
                size=photo.size,
                name=photo.name,
                image=photo.image,
                likely_score=self.likely_score,
            )
            own = own[own.scores > score]
            ret.append((own if nms is None else own.nms(nms)).top(top_k))
        return ret

    def _without_copies(self, fields):
        boxes, scores = (np.array(fields[name], float) for name in ("boxes", "scores"))
        order = np.argsort(-scores, kind="stable")
        factors = np.full(len(scores), self.copy_factor)
        factors[order[nms(boxes[order], FOLD_IOU)]] = 1
        return scores * factors

    def input_shape(self, image: Image.Image) -> tuple[int, int]:
        """
        Height and width of what the model sees of an image, padding included. Only images of the
        same make a batch: more padding would change features near the border.
        """
        return self._padded(*self._resized_shape(image.height, image.width))

    def _padded(self, height, width):
        divisor = self.size_divisor
        return -(-height // divisor) * divisor, -(-width // divisor) * divisor

    def _resized_shape(self, height, width):
        if self.min_size is None:
            return height, width
        return resized_shape(height, width, self.min_size, self.max_size)


class Batches:
    """
    Makes batches of images that come in any order of sizes: those that are not full wait.

    Args:
        batch_size: how many images a batch, of one shape, has at most.
    """

    def __init__(self, batch_size: int):
        self._batch_size = batch_size
        self._waiting: dict[tuple[int, int], list[tuple[Any, ...]]] = {}

    def add(self, photo: Photo, *more: Any) -> Iterator[list[tuple[Any, ...]]]:
        """Yields the batch, each image with what came with it, that is full or has to go."""
        waiting = self._waiting.setdefault(photo.shape, [])
        waiting.append((photo, *more))
        if len(waiting) == self._batch_size:
            yield self._waiting.pop(photo.shape)
        elif sum(map(len, self._waiting.values())) >= WAITING * self._batch_size:
            yield self._waiting.pop(max(self._waiting, key=lambda s: len(self._waiting[s])))

    def rest(self) -> Iterator[list[tuple[Any, ...]]]:
        """Yields the batches that wait."""
        while self._waiting:
            yield self._waiting.pop(next(iter(self._waiting)))


def check_selection(
    top_k: int, score: float, nms: float | None, batch_size: int, every: int
) -> None:
    """Raises InputError where an argument of :meth:`Proposer.__call__` cannot be used."""
    check_limits(
        top_k=(top_k, POSITIVE_INT),
        score=(score, FRACTION),
        nms=(nms, FRACTION),
        batch_size=(batch_size, POSITIVE_INT),
        every=(every, POSITIVE_INT),
    )


def _images(images: Iterable[Any], every: int) -> Iterator[tuple[Image.Image, str, str | None]]:
    """Images, RGB, their names, and the files that they can be read from again, if any."""
    for image in images:
        if not isinstance(image, (str, os.PathLike)):
            yield to_image(image), "", None
            continue
        _, sources = find_sources([os.fspath(image)])
        for source in sources:
            for name, frame, _ in read_frames(source, every):
                if isinstance(frame, Exception):
                    raise frame
                yield frame, name, source.path if name == source.name else None
