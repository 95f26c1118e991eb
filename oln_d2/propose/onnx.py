"""OLN-Box that `oln-d2 export` wrote as ONNX, on onnxruntime; needs no PyTorch."""

import json
import os
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Else it reports to its maker what it runs, and keeps a number for that in the home folder.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
import onnxruntime

from oln_d2.checks import POSITIVE_INT, InputError, check_limits
from oln_d2.files import StrPath, check_output, file_digest
from oln_d2.propose.proposer import Proposer
from oln_d2.scores import BOX_SCORE, OBJECTNESS

INPUTS = ("image", "max_proposals", "max_detections")
OUTPUTS = ("boxes", "scores", OBJECTNESS.attribute, BOX_SCORE.attribute)
SETTINGS = "oln_d2"  # name of the file's metadata that says how images are resized
# Settings that not every file has, and what their lack means; see :class:`Proposer`.
SHARES = {"likely_score": 0.0, "copy_factor": 1.0}
FORMAT = 2  # of the file; 1, which does not say its number, has the first of `INPUTS` only
PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


def check_target(output: StrPath, source: StrPath) -> None:
    """Raises InputError if no ONNX file can be written there, of what is in `source`."""
    ending = os.path.splitext(output)[1]
    if ending == ".pt":
        raise InputError(
            f"{output}: TorchScript is no longer written, PyTorch has deprecated it; choose a name "
            "that ends in .onnx"
        )
    if ending != ".onnx":
        raise InputError(f"{output}: its ending has to be .onnx")
    check_output(output, [source])


def session_options(threads: int) -> onnxruntime.SessionOptions:
    """For an onnxruntime session with so many threads; 0: as many as it chooses."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors only
    options.intra_op_num_threads = threads
    # Threads that wait busily take the time of the one that reads the next images.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return options


class OnnxProposer(Proposer):
    """
    Args:
        path: the .onnx file.
        device: "cpu", or "cuda", for which onnxruntime-gpu has to be installed.
        max_proposals: at most so many proposals of an image go through the second stage: fewer
            take less time and find less. None: as the model was built.
        max_detections: at most so many boxes of an image. None: as the model was built.

    Raises:
        InputError: not such a file, the device is not there, or a number below 1.
    """

    def __init__(
        self,
        path: StrPath,
        device: str = "cpu",
        *,
        max_proposals: int | None = None,
        max_detections: int | None = None,
    ):
        limits = {"max_proposals": max_proposals, "max_detections": max_detections}
        check_limits(**{name: (value, POSITIVE_INT) for name, value in limits.items()})
        limits = {name: value for name, value in limits.items() if value is not None}
        path = os.fspath(path)
        if not os.path.isfile(path):
            raise InputError(f"{path}: no such file; give one that `oln-d2 export` wrote")
        if PROVIDERS.get(device) not in onnxruntime.get_available_providers():
            raise InputError(
                f"onnxruntime cannot run on the device {device!r} here; use cpu, or install "
                "onnxruntime-gpu for cuda"
            )
        threads = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]  # "4,2": by level
        options = session_options(int(threads) if threads.isdecimal() else 0)
        try:
            self.session = onnxruntime.InferenceSession(
                path, options, providers=[PROVIDERS[device]]
            )
        except Exception as error:  # its errors have no other common base
            reason = str(error).splitlines()[0]
            raise InputError(
                f"{path}: is no ONNX file that onnxruntime can run ({reason}); export it again"
            ) from None
        settings = self.session.get_modelmeta().custom_metadata_map.get(SETTINGS)
        if settings is None:
            raise InputError(
                f"{path}: does not say how images are to be resized; give a file that "
                "`oln-d2 export` wrote"
            )
        try:
            settings = dict(json.loads(settings))
            form = int(settings.get("format", 1))
        except (ValueError, TypeError, RecursionError) as error:
            raise InputError(
                f"{path}: what it says of itself cannot be read ({error}); export it again"
            ) from None
        if form > FORMAT:
            raise InputError(
                f"{path}: was written by a later version, in its format {form}, and this one reads "
                f"up to {FORMAT}; update oln_d2"
            )
        self.path, self.form = path, form
        if limits:
            self._require_limits(*limits)
        names = INPUTS[1:] if form > 1 else ()
        numbers = [settings.get(n) for n in ("min_size", "max_size", "max_detections", *names)]
        shares = {n: settings.get(n, default) for n, default in SHARES.items()}
        inputs, outputs = self.session.get_inputs(), self.session.get_outputs()
        if not (
            all(isinstance(value, (int, float)) and 0 <= value <= 1 for value in shares.values())
            and all(isinstance(value, (int, float)) and value >= 1 for value in numbers)
            and {graph.name for graph in inputs} == {INPUTS[0], *names}
            and {graph.name for graph in outputs} >= set(OUTPUTS)
        ):
            raise InputError(
                f"{path}: its graph or its settings are not those that `oln-d2 export` writes; "
                "export it again"
            )
        self.identity = " ".join([file_digest(path), *(f"{k}={v}" for k, v in limits.items())])
        settings |= limits
        self.settings = settings
        self.min_size, self.max_size = settings["min_size"], settings["max_size"]
        self.max_detections = settings["max_detections"]
        self.likely_score, self.copy_factor = shares.values()
        self.limits = {name: np.array(settings[name], np.int64) for name in names}

    def _require_limits(self, *names):
        if self.form == 1:
            raise InputError(
                f"{self.path}: was written by version 0.1, whose files have no "
                f"{' and '.join(names)}; export the checkpoint again"
            )

    def keep_proposals(self, number: int) -> None:
        """See :meth:`Proposer.limit_proposals`; here they may be more than the file says."""
        self._require_limits("max_proposals")
        self.limits["max_proposals"] = np.array(number, np.int64)

    def detect(
        self, pixels: list[NDArray[np.uint8]], sizes: list[tuple[int, int]]
    ) -> list[dict[str, Any]]:
        """See :meth:`Proposer.detect`. The images are run one by one."""
        return [self._detect(*image) for image in zip(pixels, sizes, strict=True)]

    def _detect(self, pixels, size):
        image = np.ascontiguousarray(pixels.transpose(2, 0, 1), np.float32)
        inputs = {"image": image, **self.limits}
        found = dict(zip(OUTPUTS, self.session.run(OUTPUTS, inputs), strict=True))
        height, width = size
        # In float32, as the other runtimes do it, so that the numbers are the same.
        scale = np.array([width / pixels.shape[1], height / pixels.shape[0]] * 2, np.float32)
        boxes = (found["boxes"] * scale).clip(0, np.array([width, height] * 2, np.float32))
        has_area = (boxes[:, 2:] > boxes[:, :2]).all(axis=1)
        return {name: value[has_area] for name, value in {**found, "boxes": boxes}.items()}
