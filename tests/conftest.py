"""
Shared fixtures. Tests that need Detectron2 ask for `d2_cfg`, or import it with `importorskip`.
"""

import importlib.util
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from oln_d2.data.splits import SPLITS

ROOT = Path(__file__).parents[1]
GOLDEN = Path(__file__).parent / "data" / "golden"
CONFIGS = ROOT / "configs"
NEEDS_DETECTRON2 = pytest.mark.skipif(
    importlib.util.find_spec("detectron2") is None, reason="Detectron2 is not installed"
)


def pytest_configure(config):
    # What is compared here was made on a CPU; and processes would want a GPU each.
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
    # The models of most tests are so small that threads wait for one another, all the more on a
    # busy machine.
    torch.set_num_threads(1)


def pytest_terminal_summary(terminalreporter):
    if importlib.util.find_spec("detectron2") is None:
        terminalreporter.write_line(
            "Detectron2 is not installed: the tests that need it were skipped; -rs lists them."
        )


@pytest.fixture
def first_n(monkeypatch):
    """Random samples take the first n candidates, as they did when the golden values were made."""
    randperm = torch.arange
    monkeypatch.setattr(
        torch, "randperm", lambda n, **kwargs: randperm(n, device=kwargs.get("device"))
    )


def make_coco(root, num_train=6, num_val=5, seed=0):
    """
    A small data set in Detectron2's layout: rectangles on noise, in turn "person" (seen in all
    splits), "dog" (seen in voc) and "zebra" (unseen). The last train image holds zebras only, the
    last val image nothing; one person of each file is a crowd.
    """
    rng = np.random.RandomState(seed)
    names = [*SPLITS["voc"], "zebra", "pizza"]
    categories = [{"id": i + 1, "name": name} for i, name in enumerate(names)]
    ids = {category["name"]: category["id"] for category in categories}
    for part, count in (("train", num_train), ("val", num_val)):
        folder = Path(root, "coco", f"{part}2017")
        folder.mkdir(parents=True)
        images, annotations = [], []
        for image_id in range(1, count + 1):
            height, width = int(rng.randint(90, 120)), int(rng.randint(110, 140))
            pixels = rng.randint(0, 60, (height, width, 3))
            for k in range(0 if (part, image_id) == ("val", count) else 3):
                x, y = rng.randint(0, width - 50), rng.randint(0, height - 50)
                w, h = rng.randint(20, 50, 2)
                pixels[y : y + h, x : x + w] = rng.randint(100, 255, 3)
                name = ["person", "dog", "zebra"][k]
                if (part, image_id) == ("train", count):
                    name = "zebra"
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": image_id,
                        "category_id": ids[name],
                        "bbox": [int(x), int(y), int(w), int(h)],
                        "area": int(w * h),
                        "segmentation": [
                            [int(v) for v in (x, y, x + w, y, x + w, y + h, x, y + h)]
                        ],
                        "iscrowd": int(image_id == 2 and name == "person"),
                    }
                )
            file_name = f"{image_id:012d}.jpg"
            Image.fromarray(pixels.astype(np.uint8)).save(folder / file_name)
            images.append(
                {"id": image_id, "file_name": file_name, "height": height, "width": width}
            )
        content = {"images": images, "annotations": annotations, "categories": categories}
        json_file = Path(root, "coco", "annotations", f"instances_{part}2017.json")
        json_file.parent.mkdir(exist_ok=True)
        json_file.write_text(json.dumps(content))
    return Path(root)


def load_golden(name):
    """The arrays of a golden file as tensors."""
    with np.load(GOLDEN / f"{name}.npz") as file:
        return {key: torch.from_numpy(file[key]) for key in file.files}


def close(actual, expected, rtol=1e-5, atol=1e-6):
    """Equal to float32 accuracy."""
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)


# The public code orders distances top, bottom, left, right; we left, top, right, bottom.
LTRB_OF_TBLR = [2, 0, 3, 1]
