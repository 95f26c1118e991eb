"""
Makes `coco_small`, the 1000 photographs of COCO val2017 that the shipped models are measured on:

    python tools/coco_small.py instances_val2017.json val2017/ coco_small/

scales those of `coco_small_ids.txt`, and their boxes, down to 480 x 320 pixels at most and writes
coco_small/instances_val.json and coco_small/val/.
"""

import argparse
import os
from pathlib import Path

import msgspec
from tqdm import tqdm

from oln_d2.data.coco import load_coco
from oln_d2.data.images import open_image
from oln_d2.files import make_folder, write_file, write_whole

LONGER, SHORTER = 480, 320  # most pixels of the two sides
IDS = Path(__file__).with_name("coco_small_ids.txt")


def main() -> None:
    parser = argparse.ArgumentParser(description="Makes coco_small of COCO val2017.")
    parser.add_argument("annotations", help="instances_val2017.json")
    parser.add_argument("images", help="the folder val2017")
    parser.add_argument("output", help="a folder")
    args = parser.parse_args()
    ids = {int(word) for word in IDS.read_text().split()}
    coco = load_coco(args.annotations)
    images = [image for image in coco["images"] if image["id"] in ids]
    make_folder(os.path.join(args.output, "val"))
    scales, small = {}, []
    for image in tqdm(images, unit="image"):
        sides = image["width"], image["height"]
        scale = min(LONGER / max(sides), SHORTER / min(sides), 1)
        width, height = (round(scale * side) for side in sides)
        scales[image["id"]] = [width / sides[0], height / sides[1]] * 2
        name = f"{image['id']:012d}.webp"
        picture = open_image(os.path.join(args.images, image["file_name"])).resize((width, height))
        with write_whole(os.path.join(args.output, "val", name)) as temporary:
            picture.save(temporary, "WEBP", quality=90)
        small.append({"id": image["id"], "file_name": name, "width": width, "height": height})
    annotations = []
    for a in coco["annotations"]:
        if a["image_id"] in scales:
            box = [round(v * s, 2) for v, s in zip(a["bbox"], scales[a["image_id"]])]
            kept = {key: a[key] for key in ("id", "image_id", "category_id", "iscrowd")}
            annotations.append({**kept, "bbox": box, "area": round(box[2] * box[3], 2)})
    content = {"images": small, "annotations": annotations, "categories": coco["categories"]}
    write_file(os.path.join(args.output, "instances_val.json"), msgspec.json.encode(content))
    print(f"{len(small)} of {len(ids)} images, {len(annotations)} boxes in {args.output}")


if __name__ == "__main__":
    main()
