"""
Data for a class-agnostic YOLO, which its own package trains, in an environment of its own:

    python tools/yolo.py train.json train/ val.json val/ yolo/ --split voc

writes `yolo/data.yaml` and, for each part, labels and links to the images, named by image id, so
that its results are of the images of `val.json`. What trains are the objects that OLN would train
on, all as one class, "object". docs/detectors.md has the commands that follow.
"""

import argparse
import json
import os
import sys

from tqdm import tqdm

from oln_d2.checks import InputError
from oln_d2.commands.arguments import add_seen
from oln_d2.data.coco import load_images
from oln_d2.files import make_folder, write_file


def write_part(json_file, folder, output, part, seen):
    """Labels, a line an object: class 0, centre x, centre y, width and height, in [0, 1]."""
    images = load_images(json_file, folder, seen, training=part == "train")
    for kind in ("images", "labels"):
        make_folder(os.path.join(output, kind, part))
    for image in tqdm(images, part, unit="image", disable=None):
        width, height = image["width"], image["height"]
        lines = []
        for annotation in image["annotations"]:
            if annotation.get("iscrowd"):
                continue
            x, y, w, h = annotation["bbox"]
            x1, y1, x2, y2 = max(x, 0), max(y, 0), min(x + w, width), min(y + h, height)
            row = (x1 + x2) / 2 / width, (y1 + y2) / 2 / height
            row = *row, (x2 - x1) / width, (y2 - y1) / height
            lines.append("0 " + " ".join(f"{value:.6f}" for value in row) + "\n")
        name = f"{image['id']:012d}"
        write_file(os.path.join(output, "labels", part, f"{name}.txt"), "".join(lines))
        path = os.path.abspath(os.path.join(folder, image["file_name"]))
        link = os.path.join(output, "images", part, name + os.path.splitext(path)[1].lower())
        os.symlink(path, link)


def run(args) -> None:
    seen = args.split or args.seen
    if os.path.exists(os.path.join(args.output, "images")):
        raise InputError(f"{args.output}: holds data already; choose another folder or remove it")
    write_part(args.val_json, args.val_images, args.output, "val", seen)
    write_part(args.train_json, args.train_images, args.output, "train", seen)
    content = {"path": os.path.abspath(args.output), "train": "images/train", "val": "images/val"}
    # JSON is YAML.
    write_file(os.path.join(args.output, "data.yaml"), json.dumps({**content, "names": ["object"]}))
    print(f"Train with {os.path.join(args.output, 'data.yaml')}, see docs/detectors.md")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name in ("train_json", "train_images", "val_json", "val_images", "output"):
        parser.add_argument(name)
    add_seen(parser, required=True)
    try:
        run(parser.parse_args())
    except InputError as error:
        sys.exit(f"yolo.py: {error}")


if __name__ == "__main__":
    main()
