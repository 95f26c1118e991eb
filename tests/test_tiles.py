"""Small objects in large photographs: `--min-size` and `--tiles`."""

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as mask_utils
from test_propose import noise, weights  # noqa: F401

import oln_d2
from oln_d2.checks import InputError
from oln_d2.propose.proposer import Proposer
from oln_d2.propose.tiles import make_tiles
from oln_d2.results import RLEMasks


class FindsColours(Proposer):
    """Finds the objects of which it sees 4 pixels or more, their inside; see `photo`."""

    identity, max_detections, min_size, max_size = "colours", 50, 128, 128

    def detect(self, pixels, sizes):
        ret = []
        for image, (height, width) in zip(pixels, sizes, strict=True):
            boxes, masks, areas = [], [], []
            inside = np.where(image[..., 1] == 255, image[..., 0], 0)
            for value in np.unique(inside[inside > 0]):
                y, x = np.nonzero(inside == value)
                if len(x) >= 4:
                    low, high = np.array([x.min(), y.min()]), np.array([x.max(), y.max()]) + 1
                    scale = np.array([width, height]) / inside.shape[::-1]
                    boxes.append([*low * scale, *high * scale])
                    areas.append(len(x))
                    mask = Image.fromarray((inside == value).astype(np.uint8))
                    mask = np.asarray(mask.resize((width, height), 0))
                    masks.append(mask_utils.encode(np.asfortranarray(mask)))
            scores = np.array(areas) / inside.size
            ret.append({"boxes": boxes, "scores": scores, "masks": RLEMasks(masks, height, width)})
        return ret


# A large photo: small objects, one on the border of tiles, and one larger than a tile.
OBJECTS = {110: (20, 30, 40, 60), 120: (500, 400, 520, 420), 130: (800, 20, 820, 40)}
LARGE = {200: (100, 450, 900, 700)}


def photo(objects, size=(1000, 760)):
    pixels = np.zeros((size[1], size[0], 3), np.uint8)
    for value, (x1, y1, x2, y2) in objects.items():
        pixels[y1:y2, x1:x2] = value, 255, 0
    return Image.fromarray(pixels)


def found_objects(found, tolerance=0):
    """The objects, by their value, that boxes are of, as often as they are found; -1: of none."""
    ret = []
    for box in found.boxes:
        near = [v for v, b in {**OBJECTS, **LARGE}.items() if np.abs(box - b).max() <= tolerance]
        ret.append(near[0] if near else -1)
    return sorted(ret)


def test_tiles_find_what_is_too_small_for_the_whole():
    """Small objects must be found where they are, and large ones stay whole, each once."""
    proposer, image = FindsColours(), photo({**OBJECTS, **LARGE})
    (before,) = proposer(image)
    assert found_objects(before, tolerance=15) == [200]
    proposer.look_closer(tiles=128)
    for batch_size in (1, 3):
        _, found = proposer([image] * 2, batch_size=batch_size)
        assert found_objects(found, tolerance=15) == [110, 120, 130, 200]
        assert found_objects(found)[-3:] == [110, 120, 130]
        for box, mask in zip(found.boxes.round().astype(int), found.masks, strict=True):
            x1, y1, x2, y2 = box
            assert mask.shape == (760, 1000) and mask[y1:y2, x1:x2].all()
            assert mask.sum() <= (x2 - x1) * (y2 - y1) + 40


def test_boxes_cut_by_a_border_are_dropped():
    """Half an object beside the whole one would be a wrong box with a good score."""
    proposer = FindsColours()
    proposer.look_closer(tiles=128)
    for x in range(0, 140, 7):  # across the borders of the tiles
        box = (x, 300, x + 20, 320)
        (found,) = proposer(photo({110: box}))
        assert found.boxes.tolist() == [list(box)]


@pytest.mark.parametrize("size", [(1000, 760), (128, 500), (129, 100), (127, 90), (3000, 20)])
def test_tiles_cover_the_image(size):
    """A strip that no tile sees would be searched by the whole image only."""
    whole, *tiles = make_tiles(*size, 128)
    assert whole == (0, 0, *size) and bool(tiles) == (max(size) > 128)
    seen = np.zeros(size[::-1], int)
    for x, y, width, height in tiles:
        assert width == min(128, size[0]) and height == min(128, size[1])
        seen[y : y + height, x : x + width] += 1
    assert not tiles or seen.min() > 0
    assert make_tiles(*size, None) == [whole]


def test_min_size_is_what_the_model_sees(weights):  # noqa: F811
    """The option must reach the model of each runtime, and keep the shape of the image."""
    proposer = oln_d2.load(weights, min_size=192)
    assert (proposer.min_size, proposer.max_size) == (192, 320)
    assert proposer.input_shape(noise(120, 90)) == (192, 256)
    plain, closer = oln_d2.load(weights), oln_d2.load(weights, tiles=64)
    image = noise(200, 150)
    (a,), (b,) = plain(image, top_k=1500), closer(image, top_k=1500)
    assert len(b) > 0 and (b.boxes[:, 2:] <= [200, 150]).all()
    assert a.boxes.tolist() != b.boxes.tolist()
    for arguments in ({"min_size": 8}, {"tiles": 0}):
        with pytest.raises(InputError, match="32 or more"):
            oln_d2.load(weights, **arguments)
    assert torch.is_grad_enabled()
