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

import oln_d2
from oln_d2 import weights
from oln_d2.auditing.candidates import Candidates
from oln_d2.auditing.estimate import places
from oln_d2.boxes import nms, to_xywh
from oln_d2.data.coco import load_coco
from oln_d2.drawing import FOLD_IOU
from oln_d2.files import file_digest, read_json, write_file
from oln_d2.propose import propose_files

KS = 1, 10, 30, 100, 300, 1000
SIZES = "all", "small", "medium", "large"
SCORES = 0.3, 0.5, 0.7
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
    """Scores of all boxes without copies, and whether each shows an object, one each."""
    content = load_coco(gt)
    paths = [os.path.join(images, image["file_name"]) for image in content["images"]]
    ids, boxes, scores = [], [], []
    for image, found in zip(content["images"], proposer(paths)):
        found = found[nms(found.boxes, FOLD_IOU)]
        ids += [image["id"]] * len(found)
        boxes.append(to_xywh(found.boxes))
        scores.append(found.scores)
    scores = np.concatenate(scores)
    nothing = np.zeros(len(scores))
    candidates = Candidates(np.array(ids), np.vstack(boxes), scores, *[nothing] * 3)
    right = np.zeros(len(scores), bool)
    place = places(candidates, [a for a in content["annotations"] if not a.get("iscrowd")])
    right[place[np.isfinite(place)].astype(int)] = True
    return scores, right


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
    folders = [weights.PACKAGE, weights.REPOSITORY]
    path = next(f for folder in folders for f in folder.glob(f"{args.name}.json"))
    card = read_json(path)
    files = [f for f in sorted(path.parent.glob(f"{args.name}.*")) if f.suffix != ".json"]
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
