"""
Recall against time of the shipped model, by test size and by the number of proposals that go
through its second stage:

    python tools/recall_time.py instances_val.json val/ OUTPUT [--others FILE.json=SECONDS ...]

prints a table and writes OUTPUT/recall_time.svg. Seconds are those of one thread, per image, with
reading and resizing. What is done is not done again.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # read on import

import argparse
import json
import time
from pathlib import Path

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot
from tabulate import tabulate

import oln_d2
from oln_d2 import weights
from oln_d2.data.coco import load_coco
from oln_d2.evaluation.coco_results import write_results
from oln_d2.propose.onnx import OnnxProposer

SIZES = 256, 320, 416, 512, 640
PROPOSALS = 100, 200, 500, None  # None: all
USUAL = 320, None
KS = 10, 30, 100, 300, 1000


def measure(size, proposals, gt, images, output):
    """AR in percent of unseen and seen objects at `KS`, and seconds for an image."""
    digest = weights.card()["sha256"]["onnx"][:8]
    path = output / f"{digest}_{size}_{proposals or 'all'}.json"
    if not path.exists():
        proposer = OnnxProposer(weights.find(".onnx"), max_proposals=proposals)
        proposer.look_closer(size)
        entries = load_coco(gt)["images"]
        paths = [os.path.join(images, entry["file_name"]) for entry in entries]
        rows = []
        begin = time.process_time()
        for entry, found in zip(entries, proposer(paths, top_k=1000)):
            boxes = found.boxes.copy()
            boxes[:, 2:] -= boxes[:, :2]
            rows.append((entry["id"], boxes, found.scores, None, {}))
        seconds = (time.process_time() - begin) / len(rows)
        results = output / f"results_{path.stem}.json"
        write_results(results, rows)
        path.write_text(json.dumps({**recall(gt, results), "seconds": seconds}))
    return json.loads(path.read_text())


def recall(gt, results):
    found = oln_d2.evaluate(gt, results, seen="voc")
    return {g: [100 * found.ar(k, g) for k in KS] for g in ("unseen", "seen")}


def main() -> None:
    parser = argparse.ArgumentParser(description="Recall against time of the shipped model.")
    parser.add_argument("gt")
    parser.add_argument("images")
    parser.add_argument("output", type=Path)
    parser.add_argument("--others", nargs="*", default=[], metavar="FILE=SECONDS")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    chosen = [(size, None) for size in SIZES] + [(USUAL[0], n) for n in PROPOSALS if n]
    measured = {
        f"{size} px, {n or 'all'} proposals": measure(size, n, args.gt, args.images, args.output)
        for size, n in chosen
    }
    for other in args.others:
        path, seconds = other.split("=")
        measured[Path(path).stem] = {**recall(args.gt, path), "seconds": float(seconds)}
    head = ["", "seconds", *(f"AR@{k}" for k in KS)]
    table = [
        [name, f"{one['seconds']:.3f}"]
        + [f"{u:.1f} / {s:.1f}" for u, s in zip(one["unseen"], one["seen"])]
        for name, one in measured.items()
    ]
    print(tabulate(table, head, tablefmt="github"))
    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), sharex=True)
    for axis, k in zip(axes, (10, 100)):
        for name, one in measured.items():
            value = one["unseen"][KS.index(k)]
            axis.plot(one["seconds"], value, "o")
            axis.annotate(name, (one["seconds"], value), fontsize=7)
        axis.set(xscale="log", xlabel="seconds an image", ylabel=f"AR@{k} of the 60 categories, %")
    figure.tight_layout()
    figure.savefig(args.output / "recall_time.svg")


if __name__ == "__main__":
    main()
