"""
The shipped recipes by name, and the weights trained with them; as Detectron2's `model_zoo`.

`zoo.json` lists them, one entry each:

    recipe: the file, relative to `configs/`
    group: the heading of `MODEL_ZOO.md` that it is listed under
    what: a short description
    weights (optional): name of the trained weights, see `oln_d2.weights`
    measured (optional): metrics of these weights, by name
    published (optional): metrics, by name, of other people's weights; and "whose" they are

Metrics are percent, on COCO val2017, unseen objects, protocol xclass.
"""

import difflib
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from oln_d2 import weights
from oln_d2.checks import InputError, needs
from oln_d2.files import StrPath, make_folder, read_json

if TYPE_CHECKING:
    from detectron2.config import CfgNode
    from torch import nn

PUBLIC = "oln_box_public_R_50_FPN.yaml"  # the recipe of the authors' weights


def rows() -> list[dict[str, Any]]:
    """The entries of `zoo.json`, in its order."""
    return read_json(Path(__file__).with_name("zoo.json"))


def get_config_file(config_path: str) -> str:
    """
    Args:
        config_path: a recipe's name relative to `configs/`, e.g. "oln_box_R_50_FPN.yaml" or
            "cpu/oln_box_R_18_FPN_GN.yaml".

    Returns:
        the path of the file.

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


def find_config_file(config_file: StrPath) -> str:
    """The path of a config file or, by its name, of a recipe, see :func:`get_config_file`."""
    path = os.path.expanduser(config_file)
    return path if os.path.isfile(path) else get_config_file(path)


def get_checkpoint_url(config_path: str) -> str:
    """
    The weights trained with a recipe, see :func:`get_config_file`, for MODEL.WEIGHTS.

    Returns:
        a file that Detectron2's own checkpointers read, too; it is made of the `.safetensors` the
        first time, in `~/.cache/oln_d2` ($XDG_CACHE_HOME).

    Raises:
        InputError: no recipe has this name, it has no trained weights, or they cannot be used.
        ImportError: PyTorch or timm is needed and missing.
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
        raise InputError(f"{config_path}: has no trained weights yet; {remedy}")
    source = weights.find(".safetensors", row["weights"])
    digest = weights.card(row["weights"])["sha256"]["safetensors"]
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    path = os.path.join(cache, "oln_d2", f"{row['weights']}_{digest[:8]}.pth")
    if not os.path.isfile(path):
        with needs("a recipe", "timm"):
            from oln_d2.standalone.build import load_detector
            from oln_d2.standalone.checkpoint import save_checkpoint

        remedy = "set the environment variable XDG_CACHE_HOME to a folder that can"
        make_folder(os.path.dirname(path), remedy)
        save_checkpoint(load_detector(source), path)
    return path


def _unknown(config_path):
    names = [row["recipe"] for row in rows()]
    near = difflib.get_close_matches(config_path, names, n=3, cutoff=0.3)
    return InputError(f"{config_path}: no such recipe; near it: {', '.join(near) or names[0]}")


def load_config(config_file: StrPath, opts: Sequence[Any] = ()) -> "CfgNode":
    """
    Args:
        config_file: a config file, or a recipe's name, see :func:`get_config_file`.
        opts: KEY VALUE pairs that override it.

    Returns:
        the config, with OLN's keys.

    Raises:
        InputError: a file that cannot be read, or a key or value that does not exist.
        ImportError: Detectron2 is not installed.
    """
    with needs("a recipe", "detectron2"):
        from detectron2.config import get_cfg

    from oln_d2.config import add_oln_config

    path = find_config_file(config_file)
    cfg = get_cfg()
    add_oln_config(cfg)
    try:
        cfg.merge_from_file(path, allow_unsafe=False)
        cfg.merge_from_list(list(opts))
    except Exception as error:  # YAML and its readers raise all kinds
        reason = " ".join(str(error).split())
        if code := re.search(r"for the tag '\S*?(python/\S*)'", reason):
            raise InputError(
                f"{path}: holds code, !!{code[1]}, which is not executed; write the value itself "
                "there, as the config.yaml in the output folder of a training has it"
            ) from None
        if isinstance(error, RecursionError):
            reason = "it is nested too deeply, or its _BASE_ leads back to it"
        if isinstance(error, (AttributeError, TypeError)):
            reason = f"it holds no settings by name, such as `SOLVER: {{MAX_ITER: 100}}` ({reason})"
        raise InputError(f"{path}, or a KEY VALUE pair: {reason}") from None
    return cfg


def flatten(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values of a config, by their full names."""
    flat = {}
    for key, value in settings.items():
        nested = isinstance(value, Mapping)
        flat.update(flatten(value, f"{prefix}{key}.") if nested else {prefix + key: value})
    return flat


def get_config(config_path: str, trained: bool = False) -> "CfgNode":
    """
    The config of a recipe, see :func:`get_config_file` and :func:`load_config`; errors as well.

    Args:
        trained: MODEL.WEIGHTS are the trained weights, see :func:`get_checkpoint_url`, and not what
            the recipe has there: for most, ImageNet weights of the backbone.
    """
    opts = ["MODEL.WEIGHTS", get_checkpoint_url(config_path)] if trained else []
    return load_config(get_config_file(config_path), opts)


def get(config_path: str, trained: bool = False, device: str | None = None) -> "nn.Module":
    """
    The model of a recipe, in training mode; see :func:`get_config`, errors as well.

    Args:
        trained: whether the model has the trained weights, or random ones. (Not those of the
            recipe's MODEL.WEIGHTS, ImageNet's; `DetectionCheckpointer` loads them.)
        device: instead of the recipe's; where there is no CUDA, "cpu" is the default.
    """
    cfg = get_config(config_path, trained)
    import torch
    from detectron2.modeling import build_model

    from oln_d2.engine.trainer import StrictCheckpointer

    if device or not torch.cuda.is_available():
        cfg.MODEL.DEVICE = device or "cpu"
    model = build_model(cfg)
    if trained:
        StrictCheckpointer(model).load(cfg.MODEL.WEIGHTS)
    return model
