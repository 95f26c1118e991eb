"""Picture of what two detectors propose on the same images."""

import os
from collections.abc import Mapping

import numpy as np

from oln_d2.boxes import to_xyxy
from oln_d2.data.images import open_image
from oln_d2.drawing import Objects, contact_sheet, draw_proposals, save_picture
from oln_d2.evaluation.coco_results import Detections
from oln_d2.evaluation.ground_truth import GroundTruth
from oln_d2.files import StrPath

TOP = 10


def draw_detectors(
    path: StrPath,
    image_root: StrPath,
    ground_truth: GroundTruth,
    detections: Mapping[str, Detections],
    num_images: int,
) -> None:
    """
    Write a picture: the first images of a data set in columns, the detectors in rows, each with its
    10 best boxes, the objects, and which novel objects these boxes find with an IoU of 0.5 or more.

    Args:
        path: where the picture goes.
        image_root: the folder of the images, named by their id.
        ground_truth: the objects of these images.
        detections: by the detector's name.
        num_images: how many images are shown.
    """
    pictures, titles = [], []
    for name, found in detections.items():
        for index in range(num_images):
            image_id = ground_truth.image_ids[index]
            own = np.flatnonzero(found.image_ids == image_id)
            top = own[np.argsort(-found.scores[own], kind="stable")[:TOP]]
            objects, boxes = Objects.of(ground_truth, index), to_xyxy(found.boxes[top])
            image = open_image(os.path.join(image_root, f"{image_id:06d}.png"))
            pictures.append(draw_proposals(image, boxes, found.scores[top], objects=objects))
            novel = objects.found_by(boxes)[~objects.seen]
            titles.append(f"{name}: {novel.sum()} of {len(novel)} novel")
    save_picture(contact_sheet(pictures, titles, columns=num_images), path)
