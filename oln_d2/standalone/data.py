"""
Images and boxes in COCO's format, for training and evaluation: read, resized and turned by the
processes that load them.

Boxes are XYXY in absolute pixels.
"""

import os
import sys
import zlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision.transforms.functional import pil_to_tensor, to_tensor

from oln_d2.checks import InputError
from oln_d2.data.coco import PSEUDO, load_images
from oln_d2.data.images import as_stored_note, open_annotated, open_image, resized_shape
from oln_d2.files import StrPath

# An object of which less than this part is left where an image is cut is none any more: its box
# would be that of a sliver.
VISIBLE = 0.25
# Images are grouped by aspect within so many batches, so that their order stays random.
GROUPED = 32


def read_image(path: StrPath) -> Tensor:
    """
    Args:
        path: see :func:`oln_d2.data.images.open_image`; errors as well.

    Returns:
        (3, H, W), float, RGB, in [0, 1], upright.
    """
    return to_tensor(open_image(path))


class CocoSource(NamedTuple):
    """One data set: annotations in COCO format, the folder of their images, the seen categories."""

    json_file: StrPath
    image_root: StrPath
    seen: StrPath | Sequence[str]


class View(NamedTuple):
    """An image as a model is shown it."""

    index: int
    min_size: int  # see `oln_d2.data.images.resized_shape`
    flip: bool = False
    zoom: float = 1.0  # on top of that; what then goes beyond the resized image is cut off
    across: float = 0.0  # where, in [0, 1]: 0 keeps the left side, 1 the right
    down: float = 0.0


class CocoImages(Dataset):
    """
    The images of one or several COCO files. An index is a :class:`View`.

    Args:
        sources: see :func:`oln_d2.data.coco.load_images`, as `training`.
        max_size: limit of the longer side, in pixels.
        pseudo_weight: how much an annotation counts that nobody has looked at, see
            :data:`oln_d2.data.coco.PSEUDO`; others count 1.

    Raises:
        InputError: see there.
    """

    def __init__(
        self,
        sources: Sequence[CocoSource],
        max_size: int,
        training: bool,
        pseudo_weight: float = 1.0,
    ):
        found = [load_images(*source, training) for source in sources]
        records = [record for part in found for record in part]
        self.sources = list(sources)
        self.max_size = max_size
        self.lengths = [len(part) for part in found]
        self.source_of = np.repeat(np.arange(len(found)), self.lengths)
        self.image_ids = [record["id"] for record in records]
        # As arrays, or each worker of the loader would in time copy all of these small objects.
        self.sizes = np.array([(record["height"], record["width"]) for record in records])
        names = [os.fsencode(record["file_name"]) for record in records]
        self.names = np.frombuffer(b"".join(names), np.uint8)
        self.name_ends = np.cumsum([len(name) for name in names])
        self.noted = torch.zeros(1).share_memory_()  # by one of the processes that load images
        annotations = [a for record in records for a in record["annotations"]]
        self.boxes = np.array([a["bbox"] for a in annotations], np.float32).reshape(-1, 4)  # XYWH
        self.weights = None
        if pseudo_weight != 1:
            pseudo = np.array([a.get("source") == PSEUDO for a in annotations], bool)
            self.weights = np.where(pseudo, pseudo_weight, 1).astype(np.float32)
        self.box_ends = np.cumsum([len(record["annotations"]) for record in records])

    def _annotated(self, index):
        """The file name of an image, as the file has it, and which of the boxes are its."""
        name, own = (
            slice(ends[index - 1] if index else 0, ends[index])
            for ends in (self.name_ends, self.box_ends)
        )
        return os.fsdecode(self.names[name].tobytes()), own

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, view: View) -> tuple[Tensor, dict[str, Tensor]]:
        """
        Returns:
            the image, (3, H, W), uint8, RGB, in the frame of its annotations, see
            :meth:`oln_d2.data.images.Page.of_size`; its `boxes` (G, 4), clipped to it, those
            without area or out of sight left out, with `labels` (G,), all 1, "object"; its `size`
            (2,), height and width in the file; and its path, `name`. Where objects count
            differently, also their `weights` (G,).

        Raises:
            InputError: the image is broken, or not as large as the annotations say.
        """
        json_file, image_root, _ = self.sources[self.source_of[view.index]]
        name, own = self._annotated(view.index)
        path = os.path.join(image_root, name)
        height, width = self.sizes[view.index].tolist()
        picture, as_stored = open_annotated(path, (height, width), json_file)
        if as_stored and not self.noted:
            self.noted += 1
            print(as_stored_note(path, json_file), file=sys.stderr, flush=True)
        boxes = torch.from_numpy(self.boxes[own].copy())
        kept = torch.arange(len(boxes))  # which of them are left
        boxes[:, 2:] += boxes[:, :2]
        boxes[:, 0::2].clamp_(0, width)
        boxes[:, 1::2].clamp_(0, height)
        if view.flip:
            picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            boxes = torch.stack(
                [width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]], dim=1
            )
        boxes, kept = _select(boxes, kept, (boxes[:, 2:] > boxes[:, :2]).all(dim=1))
        new = resized_shape(height, width, view.min_size, self.max_size)
        part = None
        if view.zoom != 1:
            zoomed = [max(round(side * view.zoom), 1) for side in new]
            scale = boxes.new_tensor([zoomed[1] / width, zoomed[0] / height]).repeat(2)
            new = tuple(min(sides) for sides in zip(new, zoomed))
            # In pixels of the zoomed image, then of the stored one.
            left, top = view.across * (zoomed[1] - new[1]), view.down * (zoomed[0] - new[0])
            part = left, top, left + new[1], top + new[0]
            part = tuple(v / s for v, s in zip(part, scale.tolist()))
            part = (*part[:2], min(part[2], width), min(part[3], height))
            boxes = boxes * scale - boxes.new_tensor([left, top]).repeat(2)
            areas = (boxes[:, 2:] - boxes[:, :2]).prod(dim=1)
            boxes[:, 0::2].clamp_(0, new[1])
            boxes[:, 1::2].clamp_(0, new[0])
            left = (boxes[:, 2:] - boxes[:, :2]).prod(dim=1)
            boxes, kept = _select(boxes, kept, left >= VISIBLE * areas)
        elif new != (height, width):
            boxes = boxes * boxes.new_tensor([new[1] / width, new[0] / height]).repeat(2)
        if new != (height, width) or part:
            picture = picture.resize(new[::-1], Image.Resampling.BILINEAR, box=part)
        # Rounding may take the area, too.
        boxes, kept = _select(boxes, kept, (boxes[:, 2:] > boxes[:, :2]).all(dim=1))
        target = {
            "boxes": boxes,
            "labels": torch.ones(len(boxes), dtype=torch.int64),
            "size": torch.tensor([height, width]),
            "name": path,
        }
        if self.weights is not None:
            target["weights"] = torch.from_numpy(self.weights[own])[kept]
        return pil_to_tensor(picture), target

    def digest(self) -> int:
        """A number that differs where the images or the boxes do."""
        ret = 0
        for index in range(len(self)):
            name, own = self._annotated(index)
            ret = zlib.crc32(self.boxes[own].tobytes(), zlib.crc32(os.fsencode(name), ret))
        return ret if self.weights is None else zlib.crc32(self.weights.tobytes(), ret)


def _select(boxes, kept, which):
    return boxes[which], kept[which]


class _WithErrors(Dataset):
    """Has an InputError as the item where the data set raises it."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __getitem__(self, index):
        try:
            return self.dataset[index]
        except InputError as error:
            return error


class Loader:
    """
    Yields the items of each batch of a `DataLoader`; see there for the arguments. Raises the data
    set's InputError as it is: torch would put a worker's traceback into its message.

    Args:
        length: what `len()` says; with those batches that were loaded before a resume.
    """

    def __init__(self, dataset: Dataset, length: int, **kwargs):
        self.loader = DataLoader(_WithErrors(dataset), collate_fn=list, **kwargs)
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[list]:
        for batch in self.loader:
            for item in batch:
                if isinstance(item, InputError):
                    raise item
            yield batch


def mix_seed(*numbers):
    """One seed of several numbers, each 0 or more; torch uses the lower 32 bits of a seed only."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


class TrainingBatches(Sampler):
    """
    Yields for each iteration the views of this process's part of the batch. All of it follows from
    the seed and the iteration alone, so that a resumed run sees what an uninterrupted one would.

    Args:
        lengths: images of each data set, one after another.
        batch_size: images of an iteration, of all processes together.
        iterations: which ones to go through, up to the last of the run.
        seed: 0 or more.
        min_sizes: one is drawn for each view.
        weights: how often images of each data set are drawn, in proportion to each other; None: as
            many as there are, so that each image is drawn once an epoch.
        zooms: the least and the greatest `zoom`, drawn evenly; None: no zoom.
        groups: a number for each image; those with the same share batches, as far as they can;
            None: no groups.
        rank, world_size: this process, and how many there are.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        batch_size: int,
        iterations: range,
        seed: int,
        *,
        min_sizes: Sequence[int],
        weights: Sequence[float] | None = None,
        zooms: tuple[float, float] | None = None,
        groups: np.ndarray | None = None,
        rank: int = 0,
        world_size: int = 1,
    ):
        self.lengths = list(lengths)
        self.num_images = sum(lengths)
        self.batch_size = batch_size
        self.iterations = iterations
        self.seed = seed
        self.min_sizes = list(min_sizes)
        self.weights = weights
        self.zooms = zooms
        self.groups = groups if groups is not None and len(set(groups)) > 1 else None
        self.own = batch_size // world_size
        self.first = rank * self.own
        self._epoch: tuple[int, list[np.ndarray]] = -1, []  # columns of its views
        self._chunk: tuple[int, list[View]] = -1, []

    def __len__(self) -> int:
        return len(self.iterations)

    def __iter__(self) -> Iterator[list[View]]:
        for iteration in self.iterations:
            batch = self._batch(iteration)
            yield batch[self.first : self.first + self.own]

    def _batch(self, iteration):
        size = self.batch_size
        if self.groups is None:
            return [self._view(iteration * size + i) for i in range(size)]
        chunk, place = divmod(iteration, GROUPED)
        number = min(GROUPED, self.iterations.stop - chunk * GROUPED)  # of its batches
        if chunk != self._chunk[0]:
            begin = chunk * GROUPED * size
            views = [self._view(begin + i) for i in range(number * size)]
            views.sort(key=lambda view: self.groups[view.index])
            self._chunk = chunk, views
        order = np.random.default_rng(mix_seed(self.seed, 0, 0, chunk)).permutation(number)
        return self._chunk[1][order[place] * size :][:size]

    def _view(self, position):
        epoch, place = divmod(position, self.num_images)
        if epoch != self._epoch[0]:
            self._epoch = epoch, self._draw(epoch)
        index, size, *rest = (column[place].item() for column in self._epoch[1])
        return View(index, self.min_sizes[size], *rest)

    def _draw(self, epoch):
        """The views of an epoch, in columns; of the size its place in `min_sizes`."""
        generator, number = _generator(self.seed, 0, epoch), self.num_images
        order = torch.randperm(number, generator=generator)
        if self.weights is not None:
            order = self._weighted(epoch)[order]
        flips = torch.rand(number, generator=generator) < 0.5
        sizes = torch.randint(len(self.min_sizes), (number,), generator=generator)
        zooms, across, down = torch.rand(3, number, generator=generator)
        low, high = self.zooms or (1.0, 1.0)
        columns = order, sizes, flips, low + (high - low) * zooms, across, down
        return [column.numpy() for column in columns]

    def _weighted(self, epoch):
        """
        As many images as there are: of each data set its share, in an order of its own that goes on
        from epoch to epoch, so that all its images come before one comes again.
        """
        shares = np.cumsum(self.weights) / np.sum(self.weights) * self.num_images
        counts = np.diff(np.round(shares).astype(int), prepend=0).tolist()
        parts, first = [], 0
        for number, (length, count) in enumerate(zip(self.lengths, counts), 1):
            begin, end = epoch * count, (epoch + 1) * count
            for cycle in range(begin // length, -(-end // length)):
                order = torch.randperm(length, generator=_generator(self.seed, 0, number, cycle))
                parts.append(first + order[max(begin - cycle * length, 0) : end - cycle * length])
            first += length
        return torch.cat(parts)


def _generator(*numbers):
    return torch.Generator().manual_seed(mix_seed(*numbers))


def aspect_groups(sizes: np.ndarray) -> np.ndarray:
    """
    Args:
        sizes: (n, 2), heights and widths.

    Returns:
        (n,), from -2, higher than 5 : 3, by way of 0, about square, to 2, wider than 5 : 3: batches
        of one group need little padding, and make few shapes.
    """
    return np.clip(np.round(2 * np.log2(sizes[:, 1] / sizes[:, 0])), -2, 2).astype(int)
