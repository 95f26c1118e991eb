"""
Measures memory and time of `oln-d2 evaluate` and `oln-d2 compare` on results files as large as
those of Objects365's validation set, which it makes and removes again:

    python tools/large_evaluation.py --folder /tmp

80,000 images with 300 detections each, of which two files take 4.3 GB; 1.2 million objects of 365
categories; simulated, in a fixed way. Linux only, as it reads the largest resident set.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import msgspec
import numpy as np
from tabulate import tabulate
from tqdm import tqdm

from oln_d2.benchmark.evaluator import simulate_detections
from oln_d2.evaluation import GroundTruth

CATEGORIES = [f"category {i:03d}" for i in range(365)]
SEEN = CATEGORIES[::12]  # 31, as many as the split objects365_v2_voc has
AT_ONCE = 1000  # images


def make_ground_truth(path, num_images, num_objects):
    rng = np.random.default_rng(0)
    sizes = rng.integers(300, 1000, (num_images, 2))
    images = [
        {"id": i + 1, "file_name": f"{i + 1:08d}.jpg", "width": width, "height": height}
        for i, (width, height) in enumerate(sizes.tolist())
    ]
    at = np.sort(rng.integers(num_images, size=num_objects))
    sides = np.exp(rng.uniform(np.log(8), np.log(sizes[at])))
    corners = rng.random((num_objects, 2)) * (sizes[at] - sides)
    boxes = np.hstack([corners, sides]).round(2)
    categories = rng.integers(len(CATEGORIES), size=num_objects) + 1
    annotations = [
        {"id": i + 1, "image_id": image + 1, "category_id": category, "iscrowd": 0}
        | {"bbox": box, "area": round(box[2] * box[3], 2)}
        for i, (image, category, box) in enumerate(
            zip(at.tolist(), categories.tolist(), boxes.tolist(), strict=True)
        )
    ]
    named = [{"id": i + 1, "name": name} for i, name in enumerate(CATEGORIES)]
    content = {"images": images, "annotations": annotations, "categories": named}
    path.write_bytes(msgspec.json.encode(content))


def make_results(path, gt, dets, seed):
    with open(path, "wb") as f:
        for begin in tqdm(range(0, len(gt.image_ids), AT_ONCE), desc=path.name, disable=None):
            images = np.arange(begin, min(begin + AT_ONCE, len(gt.image_ids)))
            ids, boxes, scores = simulate_detections(gt, images, dets, seed=seed + begin)
            rows = zip(ids.tolist(), boxes.round(2).tolist(), scores.round(6).tolist(), strict=True)
            entries = [
                {"image_id": i, "category_id": 1, "bbox": box, "score": score}
                for i, box, score in rows
            ]
            f.write(b",\n" if begin else b"[")
            f.write(msgspec.json.encode(entries)[1:-1])
        f.write(b"]")


def measure(*command):
    """Seconds, and the largest resident set in MB, of a command of oln-d2."""
    begin = time.monotonic()
    process = subprocess.Popen([sys.executable, "-m", "oln_d2", *map(str, command)])
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"oln-d2 {command[0]} failed")
    return time.monotonic() - begin, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024 / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().partition(":\n")[0])
    parser.add_argument("--folder", default=None, help="where 5 GB are free; default: /tmp")
    parser.add_argument("--images", type=int, default=80_000)
    parser.add_argument("--detections", type=int, default=300, help="of each image")
    parser.add_argument("--objects", type=int, default=1_200_000)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        gt, *results = (Path(folder, f"{name}.json") for name in ("gt", "a", "b"))
        make_ground_truth(gt, args.images, args.objects)
        truth = GroundTruth.load(gt, SEEN)
        for seed, path in enumerate(results):
            make_results(path, truth, args.detections, seed * args.images)
        sizes = ", ".join(
            f"{path.name} {path.stat().st_size / 1e9:.2f} GB" for path in (gt, *results)
        )
        print(f"{args.images} images, {args.objects} objects; {sizes}", flush=True)
        seen = ["--seen", ",".join(SEEN)]
        rows = []
        for name, *command in (
            ("evaluate", "evaluate", gt, results[0]),
            ("compare", "compare", gt, *results, "--output", Path(folder, "page")),
        ):
            wall, cpu, memory = measure(*command, *seen)
            rows.append([name, f"{wall:.0f}", f"{cpu:.0f}", f"{memory:.0f}"])
        headers = ["", "seconds", "of a CPU", "largest resident set, MB"]
        print(tabulate(rows, headers, disable_numparse=True, colalign=["left"] + ["right"] * 3))


if __name__ == "__main__":
    main()
