"""
A small open-world data set: shapes on textured ground. Known objects are plain; novel ones have the
same outlines, sizes, colours and textures but carry a bullseye mark. Training annotations are of
known objects only, so that a classifier learns to call the novel ones background.
"""

import json
import math
import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from oln_d2.checks import InputError
from oln_d2.files import StrPath

SIZE = 256  # of an image, in pixels
OUTLINES = ("ellipse", "rectangle", "triangle", "star")
KNOWN = OUTLINES
NOVEL = tuple(f"{name} with bullseye" for name in OUTLINES)
CATEGORIES = [{"id": i, "name": name} for i, name in enumerate(KNOWN + NOVEL, 1)]
NUM_KNOWN = (1, 2)  # of an image, least and most
NUM_NOVEL = (2, 4)
SIDES = (36, 100)  # of an object before it is turned, in pixels
MAX_OVERLAP = 0.1  # of two boxes, of the smaller one's area
SUPERSAMPLING = 3


def make_dataset(
    folder: StrPath, seed: int, num_train: int = 200, num_test: int = 100, control: bool = False
) -> None:
    """
    Write `train.json`, `test.json` and the images they name, all of it or nothing.

    Args:
        folder: made anew; left alone if it is there.
        seed: the same seed gives the same data.
        num_train, num_test: numbers of images.
        control: leave the novel objects out of the training images.

    Raises:
        InputError: the folder is there and holds something else.
    """
    folder = Path(folder)
    if folder.exists():
        if not (folder / "test.json").is_file():
            raise InputError(f"{folder}: exists and is no data set of this command; remove it")
        return
    temporary = folder.with_name(folder.name + ".tmp")
    for part, num_images in (("train", num_train), ("test", num_test)):
        (temporary / part).mkdir(parents=True, exist_ok=True)
        content = {"images": [], "annotations": [], "categories": CATEGORIES}
        for index in range(num_images):
            rng = np.random.default_rng([seed, part == "test", index])
            image, objects = draw_image(rng, with_novel=part == "test" or not control)
            name = f"{index:06d}.png"
            Image.fromarray(image).save(temporary / part / name)
            content["images"].append(
                {"id": index, "file_name": name, "height": SIZE, "width": SIZE}
            )
            for category, box, area in objects:
                if part == "test" or category <= len(KNOWN):
                    annotation = {"id": len(content["annotations"]) + 1, "image_id": index}
                    annotation |= {"category_id": category, "bbox": box, "area": area, "iscrowd": 0}
                    content["annotations"].append(annotation)
        (temporary / f"{part}.json").write_text(json.dumps(content))
    os.replace(temporary, folder)


def draw_image(
    rng: np.random.Generator, with_novel: bool = True
) -> tuple[NDArray[np.uint8], list[tuple[int, list[float], float]]]:
    """
    Args:
        rng: draws everything at random.
        with_novel: False leaves out the novel objects.

    Returns:
        the image (SIZE, SIZE, 3), RGB; and category id, box as XYWH and area in pixels of each
        object.
    """
    image = _texture(rng, rng.uniform(60, 200, 3), 30, SIZE, SIZE)
    num_known = rng.integers(NUM_KNOWN[0], NUM_KNOWN[1] + 1)
    num_novel = rng.integers(NUM_NOVEL[0], NUM_NOVEL[1] + 1) if with_novel else 0
    marks = [False] * num_known + [True] * num_novel
    objects = []
    for mark in rng.permutation(marks):
        for _ in range(50):  # tries to find a free place
            outline = rng.integers(len(OUTLINES))
            width, height = np.exp(rng.uniform(*np.log(SIDES), 2))
            height = np.clip(height, width / 2, width * 2)
            points = _outline(OUTLINES[outline], width, height, rng.uniform(0, 2 * math.pi))
            low, high = points.min(0), points.max(0)
            centre = rng.uniform(2 - low, SIZE - 2 - high)
            x, y, w, h = *(low + centre), *(high - low)
            if all(_overlap((x, y, w, h), other[1]) <= MAX_OVERLAP for other in objects):
                break
        else:
            continue
        x0, y0 = int(x), int(y)
        x1, y1 = min(math.ceil(x + w) + 1, SIZE), min(math.ceil(y + h) + 1, SIZE)
        centre = centre - [x0, y0]
        cover = _draw_polygon(points + centre, y1 - y0, x1 - x0)
        surface = _texture(rng, rng.uniform(0, 255, 3), 25, y1 - y0, x1 - x0)
        if mark:
            yy, xx = np.mgrid[: y1 - y0, : x1 - x0] + 0.5
            radius = np.hypot(xx - centre[0], yy - centre[1])
            ring = 0.09 * min(width, height)
            dark = (radius / ring).astype(int) % 2 == 0
            surface[radius < 3 * ring] = 235
            surface[dark & (radius < 3 * ring)] = 20
        part = image[y0:y1, x0:x1]
        part += (surface - part) * cover[..., None]
        category = 1 + int(outline) + (len(KNOWN) if mark else 0)
        box = [round(float(value), 2) for value in (x, y, w, h)]
        objects.append((category, box, round(float(cover.sum()), 1)))
    noise = rng.normal(0, 6, image.shape)
    return (image + noise).clip(0, 255).astype(np.uint8), objects


def _texture(rng, colour, contrast, height, width):
    """
    (height, width, 3), float32: waves of a few random directions and lengths, and coarse spots.
    """
    y, x = np.mgrid[:height, :width].astype(np.float32)
    spots = rng.uniform(-contrast, contrast, (3, height // 16 + 2, width // 16 + 2))
    spots = [Image.fromarray(channel.astype(np.float32)) for channel in spots]
    spots = [channel.resize((width, height), Image.Resampling.BICUBIC) for channel in spots]
    ret = np.stack([np.asarray(channel) for channel in spots], axis=2) + colour.astype(np.float32)
    for _ in range(3):
        angle, length = rng.uniform(0, math.pi), np.exp(rng.uniform(math.log(5), math.log(60)))
        phase = (x * math.cos(angle) + y * math.sin(angle)) * (2 * math.pi / length)
        strength = rng.uniform(-contrast, contrast, 3).astype(np.float32)
        ret += np.sin(phase + rng.uniform(0, 6.28))[..., None] * strength
    return ret


def _outline(name, width, height, angle):
    """(P, 2): the corners of a shape around (0, 0), turned by an angle."""
    if name == "ellipse":
        t = np.linspace(0, 2 * math.pi, 48, endpoint=False)
        points = np.stack([np.cos(t), np.sin(t)], axis=1)
    elif name == "rectangle":
        points = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * 0.9
    elif name == "triangle":
        points = np.array([[0, -1.2], [1.1, 0.7], [-1.1, 0.7]])
    else:
        t = np.arange(12) * math.pi / 6
        radius = np.where(np.arange(12) % 2 == 0, 1.1, 0.65)
        points = np.stack([radius * np.cos(t), radius * np.sin(t)], axis=1)
    points = points * [width / 2, height / 2]
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    return points @ turn.T


def _draw_polygon(points, height, width):
    """(height, width), float32: how much of each pixel a polygon covers, in [0, 1]."""
    canvas = Image.new("L", (width * SUPERSAMPLING, height * SUPERSAMPLING))
    ImageDraw.Draw(canvas).polygon([tuple(p) for p in points * SUPERSAMPLING], fill=255)
    return np.asarray(canvas.reduce(SUPERSAMPLING), np.float32) / 255


def _overlap(box1, box2):
    """The share of the smaller of two XYWH boxes that lies in the other."""
    low = np.maximum(box1[:2], box2[:2])
    high = np.minimum(np.add(box1[:2], box1[2:]), np.add(box2[:2], box2[2:]))
    return np.prod(np.clip(high - low, 0, None)) / min(box1[2] * box1[3], box2[2] * box2[3])
