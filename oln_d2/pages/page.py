"""
A page of images with boxes that can be switched, sorted and enlarged. It needs no network: beside
`index.html` lies the folder `index_files` with thumbnails, the boxes as data and the script.
"""

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import jinja2
import numpy as np
from PIL import Image

from oln_d2.checks import InputError
from oln_d2.data.images import open_image
from oln_d2.drawing import (
    FOLD_IOU,
    FOUND,
    FOUND_IOU,
    KNOWN,
    MISSED,
    TOP,
    Objects,
    save_picture,
    score_colors,
)
from oln_d2.files import StrPath, make_folder, write_file
from oln_d2.results import Proposals
from oln_d2.scores import SCORES

FILES = "index_files"
THUMBNAIL = 320  # longer side in pixels
MOST = 100  # proposals of an image that can be shown, if no more are shown at first
SHOWN_BY_BROWSERS = {".avif", ".bmp", ".gif", ".jpeg", ".jpg", ".png", ".webp"}


class Item(NamedTuple):
    """An image of a page."""

    name: str
    image: StrPath | Image.Image  # its file, to which the page refers; or RGB, as a video's frame
    found: Sequence[Proposals]  # what each detector found
    objects: Objects | None = None


def write_page(
    output: StrPath,
    items: Iterable[Item],
    *,
    detectors: Sequence[str] = ("",),
    number: int = TOP,
    score: float = 0.0,
    title: str = "Proposals",
    template: str = "page.html",
    **values: Any,
) -> list[str]:
    """
    Args:
        output: a folder, made if needed; the page is its `index.html`.
        items: the images, taken one by one. The page sorts them by name or, with several detectors,
            by how much these differ.
        detectors: names of those whose proposals each item has. Several are shown side by side.
        number: how many proposals of an image are shown at first.
        score: the least score of those.
        title: the page's.
        template: a file beside this one, `page.html` or one that extends it by the block `before`.
        values: for the template.

    Returns:
        why an image is not shown, a sentence each.

    Raises:
        InputError: a file cannot be written.
    """
    folder = os.path.join(output, FILES)
    make_folder(folder)
    images, failures = [], []
    low, high, most, has_objects = 1.0, 0.0, 1, False
    for item in items:
        try:
            image = item.image
            image = image if isinstance(image, Image.Image) else open_image(image)
        except InputError as error:
            failures.append(str(error))
            continue
        found = [proposals[: max(number, MOST)] for proposals in item.found]
        stem = f"{FILES}/{len(images) + 1:06d}"
        images.append(json.dumps(_data(item, image, found, stem, output), separators=(",", ":")))
        low = min([low, *(each.scores[-1] for each in found if len(each))])
        high = max([high, *(each.scores[0] for each in found if len(each))])
        most = max([most, *map(len, found)])
        has_objects |= item.objects is not None and len(item.objects.boxes) > 0
    colors = {"known": KNOWN, "found": FOUND, "missed": MISSED}
    about = {
        "detectors": list(detectors),
        "meanings": {score.letter: score.meaning for score in SCORES},
        "colors": ["rgb({},{},{})".format(*c) for c in score_colors(np.linspace(0, 1, 32), 0, 1)],
        "kinds": colors,
        "low": low,
        "high": max(low, high),
        "iou": {"found": FOUND_IOU, "fold": FOLD_IOU},
    }
    listed = ",\n".join(images)
    data = f"const about = {json.dumps(about)};\nconst images = [\n{listed}\n];\n"
    page = (
        templates()
        .get_template(template)
        .render(
            title=title,
            files=FILES,
            fold_iou=FOLD_IOU,
            number=min(number, most),
            score=score,
            most=most,
            has_objects=has_objects,
            detectors=detectors,
            colors=colors,
            **values,
        )
    )
    script = Path(__file__).with_name("page.js").read_text(encoding="utf-8")
    write_file(os.path.join(folder, "data.js"), data)
    write_file(os.path.join(folder, "page.js"), script)
    write_file(os.path.join(output, "index.html"), page)
    return failures


def templates() -> jinja2.Environment:
    """The templates beside this file."""
    loader = jinja2.PackageLoader("oln_d2.pages", ".")
    return jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True)


def _data(item, image, found, stem, output):
    """What the script knows of an image, whose files it writes; boxes are XYXY."""
    small = image.copy()
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    save_picture(small, os.path.join(output, f"{stem}.jpg"))
    full = full_size(
        image, None if isinstance(item.image, Image.Image) else item.image, stem, output
    )
    data = {"name": item.name, "size": image.size, "small": f"{stem}.jpg", "full": full}
    objects = item.objects
    if objects:
        boxes = objects.boxes.round(2).tolist()
        data["objects"] = [
            [*box, int(seen), name]
            for box, seen, name in zip(boxes, objects.seen, objects.names, strict=True)
        ]
    letters = {score.field: score.letter for score in SCORES}
    data["found"] = [
        {
            "boxes": each.boxes.round(2).tolist(),
            "scores": each.scores.round(4).tolist(),
            **{letters[field]: v.round(3).tolist() for field, v in each.qualities().items()},
        }
        for each in found
    ]
    return data


def full_size(image: Image.Image, path: StrPath | None, stem: str, output: StrPath) -> str:
    """
    Args:
        image: RGB.
        path: the file that it is, if any.
        stem: the beginning of the name of a copy, relative to `output`.
        output: the folder of a page.

    Returns:
        how the page refers to the image: to its file, or to a copy where browsers do not show it.
    """
    # "scan.tif/000002.jpg" is no file.
    if path and os.path.splitext(path)[1].lower() in SHOWN_BY_BROWSERS and os.path.isfile(path):
        return _url(path, output)
    save_picture(image, os.path.join(output, f"{stem}_full.jpg"))
    return f"{stem}_full.jpg"


def _url(path, folder):
    """As the page in `folder` refers to a file."""
    try:
        return quote(os.path.relpath(path, folder).replace(os.sep, "/"))
    except ValueError:  # on another drive of Windows
        return Path(path).absolute().as_uri()
