"""
The files that proposals are written to. A writer gets the output folder, the proposals for each
image and, by name, the images' ids.
"""

import csv
import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from oln_d2.boxes import to_xywh
from oln_d2.evaluation.coco_results import write_results
from oln_d2.files import write_whole
from oln_d2.results import Proposals
from oln_d2.scores import SCORES


def write_coco(output: str, proposals: Iterable[Proposals], ids: Mapping[str, int]) -> None:
    """`results.json`, COCO's results format, and `images.json`, the images and their ids."""
    images: list[dict[str, Any]] = []

    def rows():
        for found in proposals:
            height, width = found.size
            image = {"id": ids[found.name], "file_name": found.name}
            images.append({**image, "height": height, "width": width})
            rles = found.masks.rles if found.masks is not None else None
            boxes = to_xywh(found.boxes)
            yield ids[found.name], boxes, found.scores, rles, found.qualities()

    write_results(os.path.join(output, "results.json"), rows())
    categories = [{"id": 1, "name": "object"}]
    content = {"images": images, "annotations": [], "categories": categories}
    with write_whole(os.path.join(output, "images.json")) as temporary:
        Path(temporary).write_text(json.dumps(content), encoding="utf-8")


def write_csv(output: str, proposals: Iterable[Proposals], ids: Mapping[str, int]) -> None:
    """`proposals.csv`: a line a box, corners in pixels."""
    path = os.path.join(output, "proposals.csv")
    fields = [score.field for score in SCORES]
    with (
        write_whole(path) as temporary,
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


def write_yolo(output: str, proposals: Iterable[Proposals], ids: Mapping[str, int]) -> None:
    """`labels/`: a text file an image, `0 x y width height score` in fractions of its size."""
    for found in proposals:
        height, width = found.size
        boxes = to_xywh(found.boxes)
        boxes[:, :2] += boxes[:, 2:] / 2
        rows = np.hstack([boxes / [width, height, width, height], found.scores[:, None]])
        path = os.path.join(output, "labels", label_name(found.name))
        with write_whole(path) as temporary:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            lines = ["0 " + " ".join(f"{v:.6g}" for v in row) for row in rows.tolist()]
            Path(temporary).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def label_name(name: str) -> str:
    """YOLO's text file has the name of its image, but for the ending."""
    return os.path.splitext(name)[0] + ".txt"


WRITERS: dict[str, Callable[[str, Iterable[Proposals], Mapping[str, int]], None]] = {
    "coco": write_coco,
    "csv": write_csv,
    "yolo": write_yolo,
}
