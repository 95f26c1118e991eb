"""The exported model on onnxruntime beside other small detectors: images a second, and recall."""

import os
import statistics
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from PIL import Image
from tabulate import tabulate

from oln_d2 import evaluation, weights
from oln_d2.benchmark.measure import ratio, take_turns
from oln_d2.boxes import to_xywh
from oln_d2.checks import POSITIVE_INT, InputError, check_limits, needs
from oln_d2.data.coco import load_coco
from oln_d2.data.images import open_image
from oln_d2.evaluation.coco_results import write_results
from oln_d2.files import StrPath
from oln_d2.propose.onnx import OnnxProposer

OUTPUTS = 100  # boxes of an image


class TensorFlowDetector:
    """
    An ONNX file with the input and outputs of TensorFlow's detection models: RGB (1, H, W, 3),
    uint8, to boxes, classes, scores and their number.

    Args:
        path: such as `object_detection_mobile_object_localizer_v1_1_default_1.onnx` of
            https://github.com/Kazuhito00/Mobile-Object-Localizer-Sample.
        threads: of onnxruntime.

    Raises:
        InputError: another file.
    """
