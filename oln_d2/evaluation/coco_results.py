"""Results files in COCO's format, also huge ones: read to arrays in pieces, written image by image."""

import os

import msgspec
import numpy as np


def write_results(path, detections):
    """
    Write a COCO results file in which every detection is of category 1; all of it or nothing.

    Args:
        path (str)
        detections (iterable): for each image: image id, boxes (d, 4) as XYWH, scores (d,), and its masks
            (list of d RLE) or None. Numbers are written in full, so that reading gives the same again.
    """
    encoder = msgspec.json.Encoder()
    temporary = f"{path}.tmp"
    with open(temporary, "wb") as f:
        separator = b"[\n"
        for image, boxes, scores, masks in detections:
            entries = [
                {"image_id": image, "category_id": 1, "bbox": box, "score": score}
                for box, score in zip(boxes.tolist(), scores.tolist())
            ]
            for entry, mask in zip(entries, masks or ()):
                counts = mask["counts"]
                counts = counts.decode() if isinstance(counts, bytes) else counts
                entry["segmentation"] = {"size": mask["size"], "counts": counts}
            for entry in entries:
                f.write(separator)
                f.write(encoder.encode(entry))
                separator = b",\n"
        f.write(b"\n]\n" if separator == b",\n" else b"[]\n")
    os.replace(temporary, path)
