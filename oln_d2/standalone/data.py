"""Images and boxes in COCO's format, for training and evaluation."""

import os
import sys
import zlib

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision.transforms.functional import hflip, to_tensor

from oln_d2.checks import InputError
from oln_d2.data.coco import load_images
from oln_d2.data.images import as_stored_note, open_annotated, open_image
from oln_d2.files import StrPath


def read_image(path: StrPath) -> Tensor:
    """
    Args:
        path: see :func:`oln_d2.data.images.open_image`; errors as well.

    Returns:
        (3, H, W), float, RGB, in [0, 1], upright.
    """
    return to_tensor(open_image(path))


class CocoImages(Dataset):
    """
    The images of a COCO file. An index is (int, bool): which image, and whether it is flipped.

    Args:
        json_file, image_root, seen, training: see :func:`oln_d2.data.coco.load_images`.

    Raises:
        InputError: see there.
    """

    def __init__(self, json_file, image_root, seen, training):
        records = load_images(json_file, image_root, seen, training)
        self.json_file = json_file
        self.image_root = image_root
        self.image_ids = [record["id"] for record in records]
        self.file_names = [record["file_name"] for record in records]
        # As arrays, or each worker of the loader would in time copy all of these small objects.
        self.sizes = np.array([(record["height"], record["width"]) for record in records])
        self.noted = torch.zeros(1).share_memory_()  # by one of the processes that load images
        self.boxes = [
            np.array([a["bbox"] for a in record["annotations"]], np.float32).reshape(-1, 4)
            for record in records
        ]

    def __len__(self):
        return len(self.file_names)

    def __getitem__(self, index):
        """
        Returns:
            (Tensor, dict[str, Tensor]): the image, (3, H, W), float, RGB, in [0, 1], in the frame
            of its annotations, see :meth:`oln_d2.data.images.Page.of_size`; and `boxes` (G, 4),
            XYXY, clipped to the image, those without area left out, with `labels` (G,), all 1,
            "object".

        Raises:
            InputError: the image is broken, or not as large as the annotations say.
        """
        index, flip = index
        path = os.path.join(self.image_root, self.file_names[index])
        height, width = self.sizes[index].tolist()
        picture, as_stored = open_annotated(path, (height, width), self.json_file)
        if as_stored and not self.noted:
            self.noted += 1
            print(as_stored_note(path, self.json_file), file=sys.stderr, flush=True)
        image = to_tensor(picture)
        boxes = torch.from_numpy(self.boxes[index].copy())
        boxes[:, 2:] += boxes[:, :2]
        boxes[:, 0::2].clamp_(0, width)
        boxes[:, 1::2].clamp_(0, height)
        if flip:
            image = hflip(image)
            boxes = torch.stack(
                [width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]], dim=1
            )
        boxes = boxes[(boxes[:, 2:] > boxes[:, :2]).all(dim=1)]
        return image, {"boxes": boxes, "labels": torch.ones(len(boxes), dtype=torch.int64)}

    def digest(self):
        """A number that differs where the images or the boxes do."""
        ret = 0
        for name, boxes in zip(self.file_names, self.boxes):
            ret = zlib.crc32(boxes.tobytes(), zlib.crc32(name.encode(), ret))
        return ret


class _WithErrors(Dataset):
    """Has an InputError as the item where the data set raises it."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __getitem__(self, index):
        try:
            return self.dataset[index]
        except InputError as error:
            return error


def load(dataset, workers, **kwargs):
    """
    Yields the items of each batch of a `DataLoader`; see there for the arguments. Raises the data
    set's InputError as it is: torch would put a worker's traceback into its message.
    """
    for batch in DataLoader(_WithErrors(dataset), num_workers=workers, collate_fn=list, **kwargs):
        for item in batch:
            if isinstance(item, InputError):
                raise item
        yield batch


def mix_seed(*numbers):
    """One seed of several numbers, each 0 or more; torch uses the lower 32 bits of a seed only."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


class TrainingBatches(Sampler):
    """
    Yields for each iteration the indices of this process's part of the batch. Which image comes
    when, and whether it is flipped, follows from the seed and the iteration alone, so that a
    resumed run sees what an uninterrupted one would.

    Args:
        num_images, seed (int): 0 or more.
        batch_size (int): images of an iteration, of all processes together.
        iterations (range): which ones to go through.
        rank, world_size (int): this process, and how many there are.
    """

    def __init__(self, num_images, batch_size, iterations, seed, rank=0, world_size=1):
        self.num_images = num_images
        self.batch_size = batch_size
        self.iterations = iterations
        self.seed = seed
        self.rank = rank
        self.world_size = world_size

    def __len__(self):
        return len(self.iterations)

    def __iter__(self):
        own = self.batch_size // self.world_size
        current = None
        for iteration in self.iterations:
            begin = iteration * self.batch_size + self.rank * own
            batch = []
            for position in range(begin, begin + own):
                epoch, place = divmod(position, self.num_images)
                if epoch != current:
                    current = epoch
                    generator = torch.Generator().manual_seed(mix_seed(self.seed, 0, epoch))
                    order = torch.randperm(self.num_images, generator=generator).tolist()
                    flips = (torch.rand(self.num_images, generator=generator) < 0.5).tolist()
                batch.append((order[place], flips[place]))
            yield batch
