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

For models trained on data with gaps (`oln-d2 audit --cross-fit`), the same of any data set:

    python tools/audit_study.py train.json --write-given given.json --seed 0
    oln-d2 audit given.json --images train/ --cross-fit 2 --seed 0 --output oln
    python tools/audit_study.py train.json --seed 0 oln faster_rcnn --objectlab faster_rcnn

`given.json` lacks all objects of half of the categories, and 30 % of the others at random; the two
are counted apart. Such an output folder stands for its results files. `--objectlab`: the same
results, as cleanlab's ObjectLab finds overlooked objects by them (pip install cleanlab).
"""

import argparse
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
from pycocotools import mask as mask_utils

from oln_d2.auditing.candidates import INSIDE, Candidates, find_candidates
from oln_d2.auditing.estimate import Hidden, hide_from_training
from oln_d2.boxes import to_xyxy
from oln_d2.data.coco import load_coco
from oln_d2.data.splits import SPLITS
from oln_d2.evaluation.coco_results import convert_entries
from oln_d2.evaluation.ground_truth import GroundTruth
from oln_d2.evaluation.result import draw_images, interval
from oln_d2.files import write_file

PER_IMAGE = 1, 3, 10
OF_ITS_IMAGE = 1, 10, 30, 100
DRAWS = 1000
OVERLOOKED = 0.95, 0.5, 0.1  # ObjectLab's own threshold, and lower ones


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


def hidden_categories(content):
    """The objects of categories that VOC lacks."""
    seen = {c["id"] for c in content["categories"] if c["name"] in SPLITS["voc"]}
    kept = [a for a in content["annotations"] if a["category_id"] in seen or a.get("iscrowd")]
    hidden = [a for a in content["annotations"] if a["category_id"] not in seen]
    return {"": Hidden(kept, [a for a in hidden if not a.get("iscrowd")])}


class Shown(NamedTuple):
    """Counts of each of I images."""

    found: dict  # (I,) by IoU and number of candidates: hidden objects that they show
    totals: np.ndarray  # (I,), hidden objects
    candidates: dict  # by number of candidates: how many there are, less where the list ends


def count_shown(candidates, hidden, content):
    """Of the first candidates, at each of `PER_IMAGE`: :class:`Shown`."""
    hidden = by_image(hidden)
    place = {image["id"]: i for i, image in enumerate(content["images"])}
    of_image = np.array([place[image] for image in candidates.image_ids.tolist()], int)
    number = len(place)
    found = {}
    for iou in (0.5, 0.1):
        shown = hits(candidates, hidden, iou)
        for n in PER_IMAGE:
            first = slice(n * number)
            found[iou, n] = np.bincount(of_image[first], shown[first], number)
    totals = np.array([len(hidden.get(image["id"], ())) for image in content["images"]])
    listed = {n: min(n * number, len(of_image)) for n in PER_IMAGE}
    return Shown(found, totals, listed)


def overlooked(detections, kept, content, threshold):
    """What ObjectLab takes for overlooked, from this score on; class-agnostic, as the detector."""
    from cleanlab.object_detection.rank import compute_overlooked_box_scores

    own = by_image(a for a in kept if not a.get("iscrowd"))
    labels, predictions, boxes, ids = [], [], [], []
    for image in content["images"]:
        objects = np.array([a["bbox"] for a in own.get(image["id"], ())], float).reshape(-1, 4)
        of_image = detections.select(detections.image_ids == image["id"])
        found = np.hstack([to_xyxy(of_image.boxes), of_image.scores[:, None]])
        labels.append({"bboxes": to_xyxy(objects), "labels": np.zeros(len(objects), int)})
        predictions.append([found])  # of its one class
        boxes.append(of_image.boxes)
        ids.append(of_image.image_ids)
    scores = np.concatenate(
        compute_overlooked_box_scores(
            labels=labels, predictions=predictions, high_probability_threshold=threshold
        )
    )
    order = np.argsort(scores, kind="stable")
    order = order[np.isfinite(scores[order])]
    boxes, ids, ranks = np.concatenate(boxes)[order], np.concatenate(ids)[order], -scores[order]
    nothing = np.zeros(len(order))
    return Candidates(ids, boxes, ranks, ranks, nothing, nothing)


def read(path, truth):
    """A results file, or what a cross-fit proposed on all of its parts."""
    path = Path(path)
    files = [path]
    if path.is_dir():
        files = sorted(path.glob("cross_fit/part_*/proposals/results.json"))
    entries = [entry for file in files for entry in json.loads(file.read_text())]
    return convert_entries(entries, truth)


def missed_of_image(detections, content, missed, inside):
    """The place of each object among the candidates of its image; infinite if none shows it."""
    candidates = find_candidates(detections, by_image(content["annotations"]), inside=inside)
    ret = []
    for image, own in by_image(missed).items():
        of_image = candidates.select(candidates.image_ids == image)
        shown = np.flatnonzero(hits(of_image, {image: own}, 0.5))
        ret += [*shown.tolist(), *[np.inf] * (len(own) - len(shown))]
    return np.array(ret)


def table(measured, last, draws):
    """Of all lists by name, :class:`Shown`."""

    def share(counts, totals):
        return 100 * (draws @ counts.astype(np.float32)) / (draws @ totals.astype(np.float32))

    print("| | candidates an image | found (%) | interval | lead | of the candidates (%) |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name, shown in measured.items():
        for n in PER_IMAGE:
            found, loose = shown.found[0.5, n], shown.found[0.1, n]
            drawn = share(found, shown.totals)
            lead = drawn - share(measured[last].found[0.5, n], shown.totals)
            low, high = interval(drawn, 0.95)
            text = "{:+.1f} to {:+.1f}".format(*interval(lead, 0.95)) if name != last else ""
            total, listed = shown.totals.sum(), max(shown.candidates[n], 1)
            print(
                f"| {name} | {n} | {100 * found.sum() / total:.1f} "
                f"({100 * loose.sum() / total:.1f}) | {low:.1f} to {high:.1f} | {text} | "
                f"{100 * found.sum() / listed:.1f} ({100 * loose.sum() / listed:.1f}) |"
            )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("gt")
    parser.add_argument("results", nargs="*")
    parser.add_argument("--missed", metavar="GT")
    parser.add_argument("--inside", type=float, default=INSIDE)
    parser.add_argument("--seed", type=int, help="of what is hidden; without: all that VOC lacks")
    parser.add_argument("--write-given", metavar="FILE")
    parser.add_argument("--objectlab", metavar="RESULTS")
    args = parser.parse_intermixed_args()
    content = load_coco(args.gt)
    groups = hidden_categories(content)
    if args.seed is not None:
        groups = hide_from_training(content, args.seed)
    if args.write_given:
        kept = sorted(next(iter(groups.values())).kept, key=lambda a: a["id"])
        write_file(args.write_given, json.dumps({**content, "annotations": kept}))
        return
    truth = GroundTruth(content, "voc", args.gt)
    detections = {Path(path).stem: read(path, truth) for path in args.results}
    last = list(detections)[-1]
    detections["chance"] = convert_entries(chance(content, 0), truth)
    draws = draw_images(len(content["images"]), DRAWS, 0)
    for group, hidden in groups.items():
        kept = by_image(hidden.kept)
        lists = {n: find_candidates(d, kept, inside=args.inside) for n, d in detections.items()}
        if args.objectlab:
            found = read(args.objectlab, truth)
            for least in OVERLOOKED:
                lists[f"ObjectLab, from {least}"] = overlooked(found, hidden.kept, content, least)
        print(f"\n{len(hidden.objects)} objects {group}\n")
        table({n: count_shown(c, hidden.objects, content) for n, c in lists.items()}, last, draws)
    if args.missed:
        missed = json.loads(Path(args.missed).read_text())["annotations"]
        print(f"\n| of {len(missed)} objects | {' | '.join(map(str, OF_ITS_IMAGE))} |")
        print("| --- |" + " --- |" * len(OF_ITS_IMAGE))
        for name, found in detections.items():
            places = missed_of_image(found, content, missed, args.inside)
            print(f"| {name} | {' | '.join(str((places < n).sum()) for n in OF_ITS_IMAGE)} |")


if __name__ == "__main__":
    main()
