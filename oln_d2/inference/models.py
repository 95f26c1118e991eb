"""A trained detector of any runtime as a function from images to proposals."""

import hashlib
import os

import numpy as np
import torch
from PIL import Image
from torchvision.transforms.functional import to_tensor

from oln_d2 import model_zoo
from oln_d2.errors import InputError, require_detectron2
from oln_d2.evaluation.coco_results import QUALITY_FIELDS


class StandaloneModel:
    """
    A checkpoint that tells how its model is built, on torch and torchvision.

    Args:
        weights (str): see :func:`oln_d2.standalone.load_detector`.
        device (str): "cpu" or "cuda".

    Attributes:
        identity (str): differs where the proposals may.
        max_detections (int): that the model keeps of an image.
    """

    def __init__(self, weights, device):
        from oln_d2.standalone import load_detector

        self.identity = _digest(weights)
        self.device = device
        self.model = load_detector(weights).to(device)
        self.max_detections = self.model.roi_heads.detections_per_img

    def input_shape(self, height, width):
        """
        Height and width of what the model sees of an image of this size, padding included. Only
        images of the same make a batch: more padding would change features near the border.
        """
        from oln_d2.standalone.detector import resized_shape

        transform = self.model.transform
        shape = resized_shape(height, width, transform.min_size[-1], transform.max_size)
        return _padded(shape, transform.size_divisible)

    @torch.no_grad()
    def __call__(self, images):
        """
        Args:
            images (list[PIL.Image.Image]): RGB, of the same `input_shape`.

        Returns:
            list[dict]: for each, arrays, best first: `boxes` (D, 4), XYXY in pixels of the image;
            `scores` (D,); and, if the model has them, `objectness`, `box_score` and `mask_score`
            (D,), `masks` (list of D COCO RLE).
        """
        found = self.model([to_tensor(image).to(self.device) for image in images])
        names = {"boxes": "boxes", "scores": "scores", **QUALITY_FIELDS}
        ret = []
        for fields in found:
            ret.append({names[key]: fields[key].cpu().numpy() for key in names if key in fields})
            if "masks" in fields:
                ret[-1]["masks"] = fields["masks"].rles
        return ret


class ExportedModel(StandaloneModel):
    """A file that `python -m oln_d2 export` wrote as ONNX."""

    def __init__(self, weights, device):
        from oln_d2.standalone.export import OnnxDetector

        self.identity = _digest(weights)
        self.device = "cpu"  # of the images that it is given
        self.model = OnnxDetector(weights, device=device)
        self.max_detections = self.model.max_detections


class Detectron2Model:
    """
    A model of Detectron2: a recipe of this package, or any detector or proposal network.

    Args:
        config_file (str): its file, or a recipe's name of the model zoo.
        weights (str)
        device (str): "cpu" or "cuda".
    """

    def __init__(self, config_file, weights, device):
        require_detectron2("--config-file")
        from detectron2.modeling import build_model

        import oln_d2.modeling  # noqa: F401  registers the components
        from oln_d2.train_net import load_config
        from oln_d2.training import StrictCheckpointer

        cfg = load_config(config_file, ["MODEL.DEVICE", device, "MODEL.WEIGHTS", weights])
        self.input = cfg.INPUT
        self.max_detections = cfg.TEST.DETECTIONS_PER_IMAGE
        if cfg.MODEL.META_ARCHITECTURE == "ProposalNetwork":
            self.max_detections = cfg.MODEL.RPN.POST_NMS_TOPK_TEST
        self.model = build_model(cfg).eval()
        StrictCheckpointer(self.model).load(weights)
        cfg.defrost()
        cfg.MODEL.DEVICE = cfg.MODEL.WEIGHTS = cfg.OUTPUT_DIR = ""
        settings = hashlib.sha256(cfg.dump().encode()).hexdigest()
        self.identity = f"{_digest(weights)} {settings}"

    def _resized(self, height, width):
        from oln_d2.standalone.detector import resized_shape

        if self.input.MIN_SIZE_TEST == 0:  # Detectron2's word for "as it is"
            return height, width
        # Detectron2's own would make very thin images 0 pixels wide.
        return resized_shape(height, width, self.input.MIN_SIZE_TEST, self.input.MAX_SIZE_TEST)

    def input_shape(self, height, width):
        """See :class:`StandaloneModel`."""
        backbone = getattr(self.model, "backbone", None)  # other projects' models may have none
        divisor = getattr(backbone, "size_divisibility", 0)
        return _padded(self._resized(height, width), max(divisor, 1))

    @torch.no_grad()
    def __call__(self, images):
        """See :class:`StandaloneModel`."""
        from oln_d2.evaluation.detectron2_evaluator import read_output

        inputs = []
        for image in images:
            size = self._resized(image.height, image.width)[::-1]
            pixels = np.asarray(image.resize(size, Image.Resampling.BILINEAR), np.float32)
            if self.input.FORMAT == "BGR":
                pixels = pixels[:, :, ::-1]
            tensor = torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))
            inputs.append({"image": tensor, "height": image.height, "width": image.width})
        found = []
        for output in self.model(inputs):
            boxes, scores, masks, qualities = read_output(output)
            found.append({"boxes": boxes, "scores": scores, **qualities})
            if masks is not None:
                found[-1]["masks"] = masks
        return found


def load_model(weights, config_file, device):
    """
    Args:
        weights (str or None): a checkpoint; a .onnx; None: those of the model zoo.
        config_file (str or None): of Detectron2's model; without, `weights` has to tell how its
            model is built.
        device (str): "auto", "cpu" or "cuda".

    Returns:
        a model, see above.

    Raises:
        InputError: files that cannot be read, do not fit each other, or no such device.
        ImportError: Detectron2 or onnxruntime is needed and missing.
    """
    if weights is None:
        if config_file is None:
            raise InputError(
                "--weights is missing; give a checkpoint, or a recipe with --config-file"
            )
        weights = model_zoo.get_checkpoint_url(config_file)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
        if weights.endswith(".onnx"):
            device = "cpu"
    elif device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: PyTorch finds no CUDA device here; use --device cpu")
    if "://" not in weights and not os.path.isfile(weights):
        raise InputError(f"--weights {weights}: no such file")
    if weights.endswith(".onnx"):
        if config_file:
            raise InputError(f"{weights}: tells how it is run; leave out --config-file")
        return ExportedModel(weights, device)
    if config_file:
        return Detectron2Model(config_file, weights, device)
    return StandaloneModel(weights, device)


def _digest(path):
    if "://" in path:  # of the model zoo, where an address stays what it is
        return path
    hasher = hashlib.sha256()
    with open(path, "rb") as f:
        while piece := f.read(2**20):
            hasher.update(piece)
    return hasher.hexdigest()


def _padded(shape, divisor):
    return tuple(-(-side // divisor) * divisor for side in shape)
