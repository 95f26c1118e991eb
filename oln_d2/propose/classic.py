"""Proposals without learning, to compare with: selective search and edge boxes, of OpenCV's."""

import ctypes
import os
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from oln_d2.checks import InputError, needs
from oln_d2.propose.proposer import Proposer

NAMES = "selective_search", "edge_boxes"
MODEL_ENDING = ".yml.gz"  # of OpenCV's model of edges
MAX_BOXES = 10_000  # of edge boxes
IDLE = 300  # seconds after which a process without work ends


class ClassicProposer(Proposer):
    """
    Each image in a process of its own, as many at once as there are cores, or images in a batch.

    Args:
        name: "selective_search": Uijlings et al., 2013, OpenCV's mode "fast", whose order is partly
            random; "edge_boxes": Zitnick & Dollár, 2014, on the gradients of the image; or OpenCV's
            model of edges, `model.yml.gz` of its repository opencv_extra, for edge boxes on these.

    Raises:
        InputError: the file is no such model.
        ImportError: the extra `classic` is not installed.
    """

    min_size = None  # the image as it is
    max_size = 100_000
    max_detections = MAX_BOXES

    def __init__(self, name: str):
        with needs(name, "classic"):
            import cv2
            import joblib  # noqa: F401
            from cv2 import ximgproc  # noqa: F401  not in each of OpenCV's packages
        self.name = name
        if name not in NAMES:
            try:
                cv2.ximgproc.createStructuredEdgeDetection(name)
            except cv2.error as error:
                raise InputError(f"{name}: is no model of edges of OpenCV's ({error})") from None
        self.identity = f"{name} of OpenCV {cv2.__version__}"

    def input_shape(self, image: Image.Image) -> tuple[int, int]:
        """The same for all: they share nothing, so any make a batch."""
        return 0, 0

    def detect(
        self, pixels: list[NDArray[np.uint8]], sizes: list[tuple[int, int]]
    ) -> list[dict[str, Any]]:
        from joblib import Parallel, delayed

        jobs = min(len(pixels), os.cpu_count() or 1)
        find = Parallel(jobs, idle_worker_timeout=IDLE) if jobs > 1 else _one_by_one
        found = find(delayed(find_boxes)(self.name, image) for image in pixels)
        ret = []
        for (boxes, scores), image, size in zip(found, pixels, sizes):
            scale = np.array(size[::-1]) / image.shape[1::-1]
            ret.append({"boxes": boxes * np.tile(scale, 2), "scores": scores})
        return ret


def _one_by_one(tasks: Iterable[Any]) -> list[Any]:
    return [function(*args, **kwargs) for function, args, kwargs in tasks]


def find_boxes(
    name: str, image: NDArray[np.uint8]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """
    Args:
        name: see :class:`ClassicProposer`.
        image: (H, W, 3), RGB.

    Returns:
        boxes, (D, 4), and scores, (D,), in (0, 1], descending. Those of selective search are those
        of places: 1, 1/2, 1/3, ...
    """
    import cv2

    cv2.setNumThreads(1)
    if name == "selective_search":
        search = cv2.ximgproc.segmentation.createSelectiveSearchSegmentation()
        search.setBaseImage(image[:, :, ::-1])
        search.switchToSelectiveSearchFast()
        if os.name == "posix":
            ctypes.CDLL(None).srand(0)  # it draws from C's `rand`
        boxes = np.asarray(search.process(), float).reshape(-1, 4)
        scores = 1 / np.arange(1, len(boxes) + 1)
    else:
        edges, directions = _edges(name, image)
        finder = cv2.ximgproc.createEdgeBoxes(maxBoxes=MAX_BOXES, minScore=0.01)
        boxes, scores = finder.getBoundingBoxes(edges, directions)
        boxes = np.asarray(boxes, float).reshape(-1, 4)
        scores = np.asarray(scores, float).ravel().clip(1e-6, 1)
    boxes[:, 2:] += boxes[:, :2]
    return boxes, scores


def _edges(name, image):
    """How strong the edge at each pixel is, in [0, 1], and the direction across it, (H, W)."""
    import cv2

    pixels = image.astype(np.float32) / 255
    if name not in NAMES:
        model = cv2.ximgproc.createStructuredEdgeDetection(name)
        edges = model.detectEdges(pixels)
        directions = model.computeOrientation(edges)
        return model.edgesNms(edges, directions), directions
    # Of the channel with the steepest gradient at each pixel.
    dx, dy = (cv2.Sobel(cv2.GaussianBlur(pixels, (0, 0), 1.5), -1, *d) for d in ((1, 0), (0, 1)))
    steep = np.hypot(dx, dy)
    best = steep.argmax(axis=2)[..., None]
    dx, dy, edges = (np.take_along_axis(v, best, axis=2)[..., 0] for v in (dx, dy, steep))
    # An edge is where the gradient is at its steepest across it.
    x, y = np.meshgrid(np.arange(edges.shape[1]), np.arange(edges.shape[0]))
    step = [(v / np.maximum(edges, 1e-9)) for v in (dx, dy)]
    for sign in (1, -1):
        there = cv2.remap(
            edges,
            (x + sign * step[0]).astype(np.float32),
            (y + sign * step[1]).astype(np.float32),
            cv2.INTER_LINEAR,
            borderMode=cv2.BORDER_REPLICATE,
        )
        edges = np.where(there > edges, 0, edges)
    edges /= max(float(edges.max()), 1e-9)
    return edges.astype(np.float32), np.arctan2(dy, dx).astype(np.float32) % np.pi
