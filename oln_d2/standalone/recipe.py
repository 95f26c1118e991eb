"""Options of `oln-d2 train` from a YAML file."""

import contextlib
import difflib
import os
from inspect import signature
from typing import Any

from oln_d2.checks import InputError, needs
from oln_d2.files import StrPath
from oln_d2.standalone.trainer import train

# Of `build_detector`; the others belong to the key `model`.
MODEL = ("backbone", "depth", "min_size", "max_size")


def read_recipe(path: StrPath) -> dict[str, Any]:
    """
    Args:
        path: a YAML file of options of `oln-d2 train`.

    Returns:
        the options, by their names in Python, with the model's under "model".

    Raises:
        InputError: a file that cannot be read, or other options.
    """
    with needs("--config", "train"):
        import yaml
    try:
        with open(os.path.expanduser(path), encoding="utf-8") as file:
            content = yaml.safe_load(file)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"{path}: is no YAML ({' '.join(str(error).split())})") from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: holds no options by name, such as `epochs: 8`")
    options = {
        str(name).replace("-", "_"): value for name, value in content.items() if value is not None
    }
    for name in ("epochs", "lr", "clip", "ema"):  # to YAML 1e-3 is text
        with contextlib.suppress(KeyError, TypeError, ValueError):
            options[name] = float(options[name])
    if "split" in options and "seen" in options:
        raise InputError(f"{path}: has split and seen; both are the seen categories, give one")
    known = {*signature(train).parameters, *MODEL, "seen", "scratch", "model"} - {"config"}
    for name in options:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1) or ["model"]
            raise InputError(f"{path}: {name} is no option of train; near it: {near[0]}")
    model = options.get("model", {})
    if not isinstance(model, dict) or not all(isinstance(name, str) for name in model):
        raise InputError(f"{path}: model holds no settings by name, such as `depth: 18`")
    return options


def read_settings(path: StrPath) -> dict[str, Any]:
    """
    :func:`read_recipe` for runs whose data, output and processes are given elsewhere.

    Raises:
        InputError: as of that; or it names some of these.
    """
    options = read_recipe(path)
    elsewhere = "train_json images split seen more_data data_weights val_json val_images output"
    for name in f"{elsewhere} scratch resume device devices num_nodes".split():
        if name in options:
            raise InputError(f"{path}: {name} has no use here; leave it out")
    model = {n: options.pop(n) for n in MODEL if n in options}
    model = {**options.pop("model", {}), **model}
    return {**options, "model": model} if model else options
