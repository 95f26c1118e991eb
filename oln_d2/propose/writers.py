"""
The files that proposals are written to, in the forms that other tools read; docs/propose.md says
how. A writer gets what it depends on, a :class:`Target`, and the proposals for each image.
"""

import csv
import os
import pickle
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple
from urllib.parse import quote

import msgspec
import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as mask_utils

from oln_d2.boxes import to_xywh
from oln_d2.checks import InputError
from oln_d2.data.coco import load_coco
from oln_d2.data.lookup import image_name
from oln_d2.evaluation.coco_results import write_results
from oln_d2.files import StrPath, make_folder, write_file, write_whole
from oln_d2.results import Proposals
from oln_d2.scores import SCORES

CATEGORIES = [{"id": 1, "name": "object", "supercategory": ""}]
LEAST = 1e-6  # scores are taken to be at least so far from 0 and 1: logits have to be finite


class Target(NamedTuple):
    """Where proposals go, and for which images."""

    folder: str
    ids: Mapping[str, int]  # ids of the images, by name
    gt: StrPath | None = None  # the COCO file that the ids come from
    root: str = ""  # the folder that names are relative to
    model: str = ""  # the identity of what proposed

    def path(self, name: str) -> str:
        return os.path.join(self.folder, name)

    def entry(self, found: Proposals) -> dict[str, Any]:
        """The entry of `images` of a COCO file."""
        height, width = found.size
        name = found.name
        return {"id": self.ids[name], "file_name": name, "height": height, "width": width}

    def write_images(self, images: list[dict[str, Any]]) -> None:
        content = {"images": images, "annotations": [], "categories": CATEGORIES}
        self.write_json("images.json", content)

    def write_json(self, name: str, content: Any) -> None:
        write_file(self.path(name), msgspec.json.encode(content))

    def write_pickle(self, name: str, content: Any) -> None:
        # As NumPy 1 names its modules, which NumPy 2 also reads: in this protocol by lines of text.
        data = pickle.dumps(content, protocol=3)
        data = data.replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")
        write_file(self.path(name), data)


def write_coco(target: Target, proposals: Iterable[Proposals]) -> None:
    """`results.json`, COCO's results format, and `images.json`, the images and their ids."""
    images: list[dict[str, Any]] = []

    def rows():
        for found in proposals:
            images.append(target.entry(found))
            rles = found.masks.rles if found.masks is not None else None
            boxes = to_xywh(found.boxes)
            yield target.ids[found.name], boxes, found.scores, rles, found.qualities()

    write_results(target.path("results.json"), rows())
    target.write_images(images)


def write_csv(target: Target, proposals: Iterable[Proposals]) -> None:
    """`proposals.csv`: a line a box, corners in pixels."""
    fields = [score.field for score in SCORES]
    with (
        write_whole(target.path("proposals.csv")) as temporary,
        open(temporary, "w", newline="", encoding="utf-8") as f,
    ):
        writer = csv.writer(f)
        writer.writerow(["file_name", "x1", "y1", "x2", "y2", "score", *fields])
        for found in proposals:
            qualities = found.qualities()
            blank = np.full(len(found), "")
            columns = [found.scores, *(qualities.get(field, blank) for field in fields)]
            for box, *numbers in zip(
                found.boxes.tolist(), *(column.tolist() for column in columns), strict=True
            ):
                writer.writerow([found.name, *box, *numbers])


def write_yolo(target: Target, proposals: Iterable[Proposals]) -> None:
    """`labels/`: a text file an image, `0 x y width height score` in fractions of its size."""
    make_folder(target.path("labels"))
    for found in proposals:
        height, width = found.size
        boxes = to_xywh(found.boxes)
        boxes[:, :2] += boxes[:, 2:] / 2
        rows = np.hstack([boxes / [width, height, width, height], found.scores[:, None]])
        lines = ["0 " + " ".join(f"{v:.6g}" for v in row) for row in rows.tolist()]
        path = target.path(os.path.join("labels", label_name(found.name)))
        os.makedirs(os.path.dirname(path), exist_ok=True)
        write_file(path, "".join(f"{line}\n" for line in lines))


def label_name(name: str) -> str:
    """YOLO's text file has the name of its image, but for the ending."""
    return os.path.splitext(name)[0] + ".txt"


def write_detectron2(target: Target, proposals: Iterable[Proposals]) -> None:
    """`detectron2.pkl` for DATASETS.PROPOSAL_FILES_TRAIN and _TEST, and `images.json`."""
    rows = _data_set(target, proposals)[1]
    scores = [row[:, 4].clip(LEAST, 1 - LEAST) for row in rows.values()]
    content = {
        "ids": list(rows),
        "boxes": [row[:, :4] for row in rows.values()],
        "objectness_logits": [np.log(score / (1 - score)) for score in scores],
        "bbox_mode": 0,  # BoxMode.XYXY_ABS
    }
    target.write_pickle("detectron2.pkl", content)


def write_mmdet2(target: Target, proposals: Iterable[Proposals]) -> None:
    """`mmdet2.pkl`: (N, 5) for each image in the order of the data set; and `images.json`."""
    rows = _data_set(target, proposals)[1]
    target.write_pickle("mmdet2.pkl", list(rows.values()))


def write_mmdet3(target: Target, proposals: Iterable[Proposals]) -> None:
    """`mmdet3.pkl`: by folder/file of an image its `bboxes` and `scores`; and `images.json`."""
    images, rows = _data_set(target, proposals)
    root = os.path.abspath(target.root)
    paths = {number: os.path.join(root, name) for name, number in target.ids.items()}
    folder = os.path.dirname(next(iter(paths.values()), ""))  # where images that were left out are
    content: dict[str, Any] = {}
    for image in images:
        path = paths.get(image["id"]) or os.path.join(folder, image_name(image))
        key = os.path.join(*os.path.normpath(path).split(os.sep)[-2:])
        if key in content:
            raise InputError(
                f"format mmdet3: two images are {key}, and mmdetection knows no more of a path; "
                "rename a folder or a file, or use another format"
            )
        row = rows[image["id"]]
        content[key] = {"bboxes": row[:, :4], "scores": row[:, 4]}
    target.write_pickle("mmdet3.pkl", content)


def _data_set(
    target: Target, proposals: Iterable[Proposals]
) -> tuple[list[dict[str, Any]], dict[int, NDArray[np.float32]]]:
    """
    The images of a data set in its order, and by their ids (N, 5), XYXY and score: none of those
    that were not proposed on, as the tools expect every image. Writes `images.json`.
    """
    images, rows = [], {}
    for found in proposals:
        images.append(target.entry(found))
        row = np.hstack([found.boxes, found.scores[:, None]])
        rows[target.ids[found.name]] = row.astype(np.float32)
    target.write_images(images)
    if target.gt is not None:
        images = load_coco(target.gt)["images"]
    none = np.zeros((0, 5), np.float32)
    return images, {image["id"]: rows.get(image["id"], none) for image in images}


def write_labelstudio(target: Target, proposals: Iterable[Proposals]) -> None:
    """`labelstudio.json`: a task with predictions an image, in percent of its size."""
    tasks = []
    for found in proposals:
        scores = found.scores.tolist()
        rows = [("object", *row) for row in zip(to_xywh(found.boxes).tolist(), scores)]
        image = target.entry(found)
        tasks.append(labelstudio_task(image, rows, target.model, max(scores, default=0.0)))
    target.write_json("labelstudio.json", tasks)


def labelstudio_task(
    image: Mapping[str, Any],
    rows: Iterable[tuple[str, Sequence[float], float | None]],
    model: str,
    score: float,
) -> dict[str, Any]:
    """
    Args:
        image: an entry of `images` of a COCO file.
        rows: a label, a box (XYWH in pixels), and a score or None each.
        model: the identity of what proposed.
        score: of the image.

    Returns:
        a task of Label Studio with these boxes as a prediction.
    """
    width, height = image["width"], image["height"]
    result = []
    for number, (label, box, own) in enumerate(rows):
        x, y, w, h = (100 * v / side for v, side in zip(box, (width, height, width, height)))
        value = {"x": x, "y": y, "width": w, "height": h, "rotation": 0}
        region = {
            "id": f"{image['id']}_{number}",
            "type": "rectanglelabels",
            "from_name": "label",
            "to_name": "image",
            "original_width": width,
            "original_height": height,
            "image_rotation": 0,
            "value": {**value, "rectanglelabels": [label]},
        }
        result.append(region if own is None else {**region, "score": own})
    version = f"oln-d2 {model[:12]}".strip()
    return {
        "data": {"image": f"/data/local-files/?d={quote(image['file_name'])}"},
        "predictions": [{"model_version": version, "score": score, "result": result}],
    }


def write_cvat(target: Target, proposals: Iterable[Proposals]) -> None:
    """`cvat.json`: a COCO data set with the proposals as its annotations."""
    images, annotations = [], []
    for found in proposals:
        images.append(target.entry(found))
        for entry in found.to_coco(target.ids[found.name]):
            mask = entry.setdefault("segmentation", [])
            area = float(mask_utils.area(mask)) if mask else entry["bbox"][2] * entry["bbox"][3]
            entry |= {"id": len(annotations) + 1, "area": area, "iscrowd": 0}
            annotations.append(entry)
    target.write_json("cvat.json", cvat_content(images, annotations, CATEGORIES))


def cvat_content(
    images: list[dict[str, Any]],
    annotations: Iterable[dict[str, Any]],
    categories: list[dict[str, Any]],
) -> dict[str, Any]:
    """A COCO file of these parts as CVAT reads it: a score is an attribute."""
    rows = []
    for a in annotations:
        attributes = {"occluded": False, **({"score": a["score"]} if "score" in a else {})}
        rows.append({"segmentation": [], **a, "attributes": attributes})
    return {
        "licenses": [{"id": 0, "name": "", "url": ""}],
        "info": {"description": "Proposals of oln-d2"},
        "categories": categories,
        "images": images,
        "annotations": rows,
    }


WRITERS: dict[str, Callable[[Target, Iterable[Proposals]], None]] = {
    "coco": write_coco,
    "csv": write_csv,
    "yolo": write_yolo,
    "detectron2": write_detectron2,
    "mmdet2": write_mmdet2,
    "mmdet3": write_mmdet3,
    "labelstudio": write_labelstudio,
    "cvat": write_cvat,
}
# What each writes into the output folder.
FILES = {
    "coco": ("results.json", "images.json"),
    "csv": ("proposals.csv",),
    "yolo": ("labels",),
    "detectron2": ("detectron2.pkl", "images.json"),
    "mmdet2": ("mmdet2.pkl", "images.json"),
    "mmdet3": ("mmdet3.pkl", "images.json"),
    "labelstudio": ("labelstudio.json",),
    "cvat": ("cvat.json",),
}
