"""
What Google's Mobile Object Localizer finds, as a results file, and how much more another one does:

    python tools/mobile_object_localizer.py MODEL.onnx instances_val.json val/ out.json \\
        --against results.json

MODEL.onnx is `object_detection_mobile_object_localizer_v1_1_default_1.onnx` of
https://github.com/Kazuhito00/Mobile-Object-Localizer-Sample. Intervals are of 95 %, paired over
images; milliseconds those of one thread, without reading the image.
"""

import argparse
import os
import time

from tqdm import tqdm

import oln_d2
from oln_d2.benchmark.onnx import TensorFlowDetector
from oln_d2.data.coco import load_coco
from oln_d2.data.images import open_image
from oln_d2.evaluation.coco_results import write_results
from oln_d2.evaluation.result import GROUPS, draw_images, interval

KS = 1, 10, 30, 100


def find(model, gt, images):
    """Rows of :func:`write_results`, and milliseconds for an image."""
    detector = TensorFlowDetector(model, threads=1)
    rows, seconds = [], 0.0
    for entry in tqdm(load_coco(gt)["images"], unit="image"):
        image = open_image(os.path.join(images, entry["file_name"]))
        pixels = detector.prepare(image)
        begin = time.process_time()
        boxes, scores = detector.detect(pixels)
        seconds += time.process_time() - begin
        rows.append((entry["id"], boxes * [*image.size, *image.size], scores, None, {}))
    return rows, 1000 * seconds / len(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description="Google's Mobile Object Localizer, measured.")
    for name in ("model", "gt", "images", "output"):
        parser.add_argument(name)
    parser.add_argument("--against", metavar="RESULTS", required=True)
    args = parser.parse_args()
    rows, milliseconds = find(args.model, args.gt, args.images)
    write_results(args.output, rows)
    theirs, ours = (
        oln_d2.evaluate(args.gt, path, seen="voc") for path in (args.output, args.against)
    )
    print(theirs)
    print(f"{milliseconds:.1f} ms an image")
    draws = draw_images(len(rows), 2000, 0)
    for group in GROUPS:
        more = ours.ar_of_draws(draws, KS, group) - theirs.ar_of_draws(draws, KS, group)
        for k, values in zip(KS, more.T):
            low, high = interval(100 * values, 0.95)
            difference = 100 * (ours.ar(k, group) - theirs.ar(k, group))
            print(f"{group}, AR@{k}: {difference:+.1f} ({low:.1f} to {high:.1f})")


if __name__ == "__main__":
    main()
