"""
What an audit finds, on annotations that it is not shown:

    python tools/audit_study.py instances_val.json ours.json other.json --missed missed_val.json

`ours.json` and `other.json` are results files of class-agnostic detectors on all images. Candidates
are made as `oln-d2 audit` makes them, from the annotations of VOC's 20 categories alone; objects of
the others are those that were forgotten. The table has, of the first 1, 3 and 10 candidates an
image, the share of these objects that they show, by an IoU of 0.5, and how many of the candidates
do; in parentheses the same by 0.1. Intervals are of 95 %, over images; a difference, to the last
file, is paired. "Chance" draws boxes of other images in random order. `--missed`: objects that all
annotations together lack; how many of them are among the first candidates of their images, all
annotations given.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from pycocotools import mask as mask_utils

from oln_d2.auditing.candidates import INSIDE, find_candidates
from oln_d2.data.coco import load_coco
from oln_d2.data.splits import SPLITS
from oln_d2.evaluation.coco_results import convert_entries, read_results
from oln_d2.evaluation.ground_truth import GroundTruth
from oln_d2.evaluation.result import draw_images, interval

PER_IMAGE = 1, 3, 10
OF_ITS_IMAGE = 1, 10, 30, 100
DRAWS = 1000


def by_image(annotations):
    ret = {}
    for annotation in annotations:
        ret.setdefault(annotation["image_id"], []).append(annotation)
    return ret


def hits(candidates, hidden, iou):
    """Whether each candidate shows a hidden object that none before it shows."""
    ret = np.zeros(len(candidates.scores), bool)
    left = {image: np.array([a["bbox"] for a in own], float) for image, own in hidden.items()}
    for i, image in enumerate(candidates.image_ids.tolist()):
        boxes = left.get(image)
        if boxes is None or not len(boxes):
            continue
        overlap = mask_utils.iou(candidates.boxes[i : i + 1], boxes, [0] * len(boxes))[0]
        if overlap.max() >= iou:
            ret[i] = True
            left[image] = np.delete(boxes, overlap.argmax(), axis=0)
    return ret


def chance(content, seed):
    """Results like those of a detector that knows what boxes look like, but not where they are."""
    rng = np.random.default_rng(seed)
    shapes = []
    sizes = {image["id"]: (image["width"], image["height"]) for image in content["images"]}
    for a in content["annotations"]:
        shapes.append(np.array(a["bbox"]) / (sizes[a["image_id"]] * 2))
    entries = []
    for image, size in sizes.items():
        for shape in rng.choice(shapes, 100):
            box = (shape * (size * 2)).tolist()
            entries.append({"image_id": image, "bbox": box, "score": float(rng.random())})
    return entries


def forgotten(detections, content, inside):
    """
    Of the first candidates, at each of `PER_IMAGE`: found, (images,) counts by IoU 0.5 and 0.1.
    """
    seen = {c["id"] for c in content["categories"] if c["name"] in SPLITS["voc"]}
    kept = [a for a in content["annotations"] if a["category_id"] in seen or a.get("iscrowd")]
    hidden = [a for a in content["annotations"] if a["category_id"] not in seen]
    hidden = by_image(a for a in hidden if not a.get("iscrowd"))
    candidates = find_candidates(detections, by_image(kept), inside=inside)
    place = {image["id"]: i for i, image in enumerate(content["images"])}
    of_image = np.array([place[image] for image in candidates.image_ids.tolist()])
    number = len(place)
    ret = {}
    for iou in (0.5, 0.1):
        shown = hits(candidates, hidden, iou)
        for n in PER_IMAGE:
            first = slice(n * number)
            ret[iou, n] = np.bincount(of_image[first], shown[first], number)
    totals = np.array([len(hidden.get(image["id"], ())) for image in content["images"]])
    return ret, totals


def missed_of_image(detections, content, missed, inside):
    """The place of each object among the candidates of its image; infinite if none shows it."""
    candidates = find_candidates(detections, by_image(content["annotations"]), inside=inside)
    ret = []
    for image, own in by_image(missed).items():
        of_image = candidates.select(candidates.image_ids == image)
        shown = np.flatnonzero(hits(of_image, {image: own}, 0.5))
        ret += [*shown.tolist(), *[np.inf] * (len(own) - len(shown))]
    return np.array(ret)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("gt")
    parser.add_argument("results", nargs="+")
    parser.add_argument("--missed", metavar="GT")
    parser.add_argument("--inside", type=float, default=INSIDE)
    args = parser.parse_args()
    content = load_coco(args.gt)
    truth = GroundTruth(content, "voc", args.gt)
    detections = {Path(path).stem: read_results(path, truth) for path in args.results}
    detections["chance"] = convert_entries(chance(content, 0), truth)
    draws = draw_images(len(content["images"]), DRAWS, 0)
    measured = {name: forgotten(d, content, args.inside) for name, d in detections.items()}
    last = Path(args.results[-1]).stem

    def share(counts, totals):
        return 100 * (draws @ counts.astype(np.float32)) / (draws @ totals.astype(np.float32))

    images = len(content["images"])
    print("| | candidates an image | found (%) | interval | lead | of the candidates (%) |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name, (counts, totals) in measured.items():
        for n in PER_IMAGE:
            found, loose = counts[0.5, n], counts[0.1, n]
            drawn = share(found, totals)
            lead = drawn - share(measured[last][0][0.5, n], totals)
            low, high = interval(drawn, 0.95)
            text = "{:+.1f} to {:+.1f}".format(*interval(lead, 0.95)) if name != last else ""
            total = totals.sum()
            print(
                f"| {name} | {n} | {100 * found.sum() / total:.1f} "
                f"({100 * loose.sum() / total:.1f}) | {low:.1f} to {high:.1f} | {text} | "
                f"{100 * found.sum() / n / images:.1f} ({100 * loose.sum() / n / images:.1f}) |"
            )
    if args.missed:
        missed = json.loads(Path(args.missed).read_text())["annotations"]
        print(f"\n| of {len(missed)} objects | {' | '.join(map(str, OF_ITS_IMAGE))} |")
        print("| --- |" + " --- |" * len(OF_ITS_IMAGE))
        for name, found in detections.items():
            places = missed_of_image(found, content, missed, args.inside)
            print(f"| {name} | {' | '.join(str((places < n).sum()) for n in OF_ITS_IMAGE)} |")


if __name__ == "__main__":
    main()
