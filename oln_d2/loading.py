"""Which runtime runs a trained model: the file and the config file decide."""

import importlib.util
import os

from oln_d2 import weights as shipped
from oln_d2.checks import InputError, check_limits, needs, one_of
from oln_d2.files import StrPath
from oln_d2.model_zoo import get_checkpoint_url, load_config
from oln_d2.pickles import read_head
from oln_d2.propose import classic
from oln_d2.propose.proposer import Proposer


def load(
    weights: StrPath | None = None,
    config_file: StrPath | None = None,
    device: str = "auto",
    *,
    min_size: int | None = None,
    tiles: int | None = None,
    max_proposals: int | None = None,
) -> Proposer:
    """
    Make a proposer of a trained model; without arguments, of the one that this package ships.

        proposer = oln_d2.load()
        for found in proposer(["street.jpg", "more/"]):
            print(found.name, found.boxes, found.scores)

    Args:
        weights: an exported `.onnx`, which needs no PyTorch; a checkpoint of `oln-d2 train`,
            `quickstart` or `convert`; or, with `config_file`, one of Detectron2. Without: the
            trained weights of the recipe that `config_file` names, or the shipped ones, which need
            PyTorch on a GPU only. Without learning, to compare with: "selective_search",
            "edge_boxes", or OpenCV's `model.yml.gz` of edges, for edge boxes on these.
        config_file: Detectron2's; a file, or the name of a recipe of the model zoo.
        device: "cpu", "cuda" or "auto": CUDA where there is any.
        min_size, tiles: to find smaller objects, see :meth:`Proposer.look_closer`.
        max_proposals: to take less time, see :meth:`Proposer.limit_proposals`. For the shipped
            model, None is here and with `min_size` what its card says; 2000 are more than it has.

    Raises:
        InputError: files that cannot be read, do not fit each other, or no such device.
        ImportError: PyTorch or Detectron2 is needed and missing; it says how to install it.
    """
    check_limits(device=(device, one_of("auto", "cpu", "cuda")))
    proposer = _load(weights, config_file, device)
    card = shipped.card_of(proposer.identity)
    if card:
        min_size = card.get("min_size") if min_size is None else min_size
        max_proposals = card.get("max_proposals") if max_proposals is None else max_proposals
    proposer.look_closer(min_size, tiles)
    proposer.limit_proposals(max_proposals)
    if card:
        proposer.likely_score = card["likely_score"]
        proposer.copy_factor = card["copy_factor"]
    return proposer


def _load(weights, config_file, device):
    extra = "torch"
    if weights is None and config_file is None:
        extra = "timm"  # its backbone is one of timm
        weights = shipped.find(".safetensors" if _on_cuda(device) else ".onnx")
    elif weights is None:
        weights = get_checkpoint_url(os.fspath(config_file))
    weights = os.path.expanduser(weights)
    if weights in classic.NAMES or weights.endswith(classic.MODEL_ENDING):
        if config_file is not None or device == "cuda":
            raise InputError(f"{weights}: learns nothing; it has no config file and no device")
        if weights not in classic.NAMES and not os.path.isfile(weights):
            raise InputError(f"{weights}: no such file; give OpenCV's model of edges")
        return classic.ClassicProposer(weights)
    if "://" not in weights and not os.path.isfile(weights):
        what = "is a folder" if os.path.isdir(weights) else "no such file"
        raise InputError(f"{weights}: {what}; give a trained model as weights")
    if "://" in weights and config_file is None:
        raise InputError(f"{weights}: is an address; fetch the file and give that")
    if weights.endswith(".onnx"):
        if config_file is not None:
            raise InputError(f"{weights}: holds its own configuration; leave out the config file")
        from oln_d2.propose.onnx import OnnxProposer

        return OnnxProposer(weights, "cpu" if device == "auto" else device)
    if "://" not in weights:
        read_head(weights, weights)
    with needs(weights, extra):
        import torch
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("device cuda: PyTorch finds no CUDA device here; use cpu")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if config_file is not None:
        cfg = load_config(os.fspath(config_file), ["MODEL.DEVICE", device])
        from oln_d2.engine.proposer import Detectron2Proposer

        return Detectron2Proposer(cfg, weights)
    from oln_d2.standalone.proposer import StandaloneProposer

    return StandaloneProposer(weights, device)


def _on_cuda(device):
    """Whether PyTorch is to run on CUDA; it is imported only where the extra `timm` is there."""
    if device == "auto" and importlib.util.find_spec("timm") is not None:
        import torch

        return torch.cuda.is_available()
    return device == "cuda"
