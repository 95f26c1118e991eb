"""
The shipped recipes by name, and the weights trained with them; as Detectron2's `model_zoo`.

`zoo.json` lists them, one entry each:

    recipe (str): the file, relative to `configs/`
    group (str): under which `MODEL_ZOO.md` shows it
    what (str): what it is, in a few words
    weights (dict, optional): "url" and "sha256" of the trained weights
    measured (dict, optional): metrics of these weights, by name
    published (dict, optional): metrics, by name, of another's weights; and "whose" they are

Metrics are percent, on COCO val2017, unseen objects, protocol xclass.
"""

import difflib
import json
from pathlib import Path

from oln_d2.errors import InputError, require_detectron2

__all__ = ["get", "get_checkpoint_url", "get_config", "get_config_file"]

PUBLIC = "oln_box_public_R_50_FPN.yaml"  # the recipe of the authors' weights


def rows():
    """
    Returns:
        list[dict]: the entries of `zoo.json`, in its order.
    """
    return json.loads(Path(__file__).with_name("zoo.json").read_text(encoding="utf-8"))


def get_config_file(config_path):
    """
    Args:
        config_path (str): a recipe's name relative to `configs/`, e.g. "oln_box_R_50_FPN.yaml" or
            "cpu/oln_box_R_18_FPN_GN.yaml".

    Returns:
        str: the path of the file.

    Raises:
        InputError: no recipe has this name.
    """
    # In the repository the recipes are beside the package, once installed inside it.
    package = Path(__file__).parents[1]
    configs = package / "configs" if (package / "configs").is_dir() else package.parent / "configs"
    path = configs / config_path
    if not path.is_file():
        raise _unknown(config_path)
    return str(path)


def get_checkpoint_url(config_path):
    """
    Args:
        config_path (str): see :func:`get_config_file`.

    Returns:
        str: where the weights trained with this recipe are.

    Raises:
        InputError: no recipe has this name, or nobody offers weights for it.
    """
    row = next((row for row in rows() if row["recipe"] == config_path), None)
    if row is None:
        raise _unknown(config_path)
    if not row.get("weights"):
        convert = (
            "fetch the authors' OLN-Box (its link is in the README of "
            "https://github.com/mcahny/object_localization_network), run python -m oln_d2 convert "
            f"oln_box_public.pth oln_box_d2.pth and use {PUBLIC} with MODEL.WEIGHTS oln_box_d2.pth"
        )
        train = f"train it with python train_net.py --config-file configs/{config_path}"
        remedy = convert if config_path == PUBLIC else f"{train}; or {convert}"
        raise InputError(f"{config_path}: nobody offers weights of it ready to use; {remedy}")
    return row["weights"]["url"]


def _unknown(config_path):
    names = [row["recipe"] for row in rows()]
    near = difflib.get_close_matches(config_path, names, n=3, cutoff=0.3)
    return InputError(f"{config_path}: no such recipe; near it: {', '.join(near) or names[0]}")


def get_config(config_path, trained=False):
    """
    Args:
        config_path (str): see :func:`get_config_file`.
        trained (bool): whether MODEL.WEIGHTS is the trained weights, or what the recipe has there:
            for most, ImageNet weights of the backbone.

    Returns:
        CfgNode: the recipe, with OLN's keys.

    Raises:
        InputError: see :func:`get_config_file` and, if `trained`, :func:`get_checkpoint_url`.
    """
    from oln_d2.config import add_oln_config

    require_detectron2("oln_d2.model_zoo.get_config")
    from detectron2.config import get_cfg

    cfg = get_cfg()
    add_oln_config(cfg)
    cfg.merge_from_file(get_config_file(config_path))
    if trained:
        cfg.MODEL.WEIGHTS = get_checkpoint_url(config_path)
    return cfg


def get(config_path, trained=False, device=None):
    """
    Args:
        config_path (str): see :func:`get_config_file`.
        trained (bool): whether the model has the trained weights, or random ones. (Not
            those of the recipe's MODEL.WEIGHTS, ImageNet's; `DetectionCheckpointer` loads them.)
        device (str, optional): instead of the recipe's; where there is no CUDA, "cpu".

    Returns:
        nn.Module: the model, in training mode.

    Raises:
        InputError: see :func:`get_config`; or the weights do not fit.
    """
    cfg = get_config(config_path, trained)
    import torch
    from detectron2.modeling import build_model

    import oln_d2.modeling  # noqa: F401  registers the components
    from oln_d2.training import StrictCheckpointer

    if device is None and not torch.cuda.is_available():
        device = "cpu"
    if device is not None:
        cfg.MODEL.DEVICE = device
    model = build_model(cfg)
    if trained:
        StrictCheckpointer(model).load(cfg.MODEL.WEIGHTS)
    return model
