"""
Measures trained weights and writes what it finds into their card, `NAME.json`:

    python tools/measure_weights.py NAME --test instances_val.json val/ --held held.json held/

recall on `--test` (coco_small, which `tools/coco_small.py` makes), which share of the boxes above a
score are objects on `--held`, photographs with the same categories as trained on, the score from
which a box is more likely an object than not, the time for an image in one thread, and the digests
of the files. It starts from a card that has the rest.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # the time of one thread; read on import

import argparse
import json
import time
from pathlib import Path

import numpy as np
from pycocotools import mask as mask_utils

import oln_d2
from oln_d2 import weights
from oln_d2.boxes import nms, to_xywh
from oln_d2.data.coco import load_coco
from oln_d2.files import file_digest, read_json, write_file
from oln_d2.propose import propose_files

KS = 1, 10, 30, 100, 300, 1000
SIZES = "all", "small", "medium", "large"
SCORES = 0.3, 0.5, 0.7
IOU = 0.5  # from which a box shows an object
MOST = 1000  # boxes of an image that recall is measured with


def recall(proposer, gt, images, output):
    """AR@k in percent, by group and size, and seconds for an image."""
    begin = time.process_time()
    done = propose_files(proposer, [images], output, gt=gt, top_k=MOST)
    seconds = (time.process_time() - begin) / done.new if done.new == len(done.names) else None
    result = oln_d2.evaluate(gt, os.path.join(output, "results.json"), seen="voc")
    found = {}
    for group in ("unseen", "seen", "all"):
        for size in SIZES:
            name = f"{group}, {size}" if size else group
            found[name] = {
                f"AR@{k}": round(100 * result.ar(k, group, size or "all"), 2) for k in KS
            }
    return found, seconds


def precision(proposer, gt, images):
    """Scores of all boxes without copies, and whether each shows an object."""
    content = load_coco(gt)
    boxes_of = {image["id"]: [] for image in content["images"]}
    for annotation in content["annotations"]:
        if not annotation.get("iscrowd"):
            boxes_of[annotation["image_id"]].append(annotation["bbox"])
    scores, right = [], []
    paths = [os.path.join(images, image["file_name"]) for image in content["images"]]
    for image, found in zip(content["images"], proposer(paths)):
        found = found[nms(found.boxes, IOU)]
        objects = np.array(boxes_of[image["id"]], float).reshape(-1, 4)
        free = np.ones(len(objects), bool)
        iou = np.zeros((len(found), 0))
        if len(found) and len(objects):
            iou = mask_utils.iou(to_xywh(found.boxes), objects, [0] * len(objects))
        for row, score in zip(iou, found.scores):
            row = np.where(free, row, 0)
            is_right = row.max(initial=0) >= IOU
            if is_right:
                free[row.argmax()] = False  # each object is found once
            scores.append(score)
            right.append(is_right)
    return np.array(scores), np.array(right)


def likely_score(scores, right):
    """The least score, in hundredths, such that half of the boxes from it on show an object."""
    for score in np.arange(5, 100) / 100:
        above = scores >= score
        if above.any() and right[above].mean() >= 0.5:
            return float(score)
    raise SystemExit("no score of these weights tells objects from the rest")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().partition(":")[0])
    parser.add_argument("name")
    for option in ("--test", "--held"):
        parser.add_argument(option, nargs=2, metavar=("GT", "IMAGES"), required=True)
    parser.add_argument("--output", default="output/measure_weights")
    args = parser.parse_args()
    folder = next(f for f in (weights.PACKAGE, weights.REPOSITORY) if any(f.glob(f"{args.name}.*")))
    path = folder / f"{args.name}.json"
    card = read_json(path)
    files = [f for f in sorted(folder.glob(f"{args.name}.*")) if f.suffix != ".json"]
    card["sha256"] = {f.suffix[1:]: file_digest(f) for f in files}
    proposer = oln_d2.load(files[0], device="cpu")  # .onnx before .safetensors
    measured = card["measured"] = {}
    measured["recall"], seconds = recall(proposer, *args.test, os.path.join(args.output, args.name))
    if seconds:
        measured["seconds an image"] = round(seconds, 3)
    scores, right = precision(proposer, *args.held)
    measured["share of objects above a score"] = {
        str(s): round(float(right[scores >= s].mean()), 3) if (scores >= s).any() else None
        for s in SCORES
    }
    card["likely_score"] = likely_score(scores, right)
    write_file(path, json.dumps(card, indent=2) + "\n")
    print(Path(path).read_text())


if __name__ == "__main__":
    main()
