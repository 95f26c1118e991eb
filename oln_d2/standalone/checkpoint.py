"""
Checkpoints that both runtimes read. On disk parameters have Detectron2's names, whichever runtime
wrote them; each ignores what else the other one keeps in the file.
"""

import contextlib
import os
import pickle
import re
from typing import Any

import numpy as np
import torch
from torch import nn

from oln_d2.checks import InputError
from oln_d2.files import StrPath, write_whole
from oln_d2.standalone.names import detectron2_name, is_public

# Of other versions of Detectron2 or of other norms; no parameters.
IGNORED = ("pixel_mean", "pixel_std", "num_batches_tracked")


def read_checkpoint(path: StrPath) -> dict[str, Any]:
    """
    Read a file without executing code that may be in it.

    Args:
        path: a checkpoint of Detectron2, of this runtime or of mmdet, or a bare state dict, as
            `torch.save` writes them.

    Returns:
        its content, with the parameters under "model".

    Raises:
        InputError: no such file, not a checkpoint, or one that holds more than tensors and plain
            values.
    """
    try:
        with _numpy_scalars_allowed():
            content = torch.load(os.path.expanduser(path), map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(
            f"{path}: no such file; give a checkpoint, e.g. output/model_final.pth"
        ) from None
    except (pickle.UnpicklingError, EOFError, RuntimeError, OSError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        if "TorchScript" in str(error):
            raise _is_script(path) from None
        held = re.search(r"GLOBAL ([\w.]*\w)", str(error))  # torch says so after much else
        if held:
            reason = f"it holds {held[1]}"
        raise InputError(
            f"{path}: cannot be loaded as tensors and plain values alone ({reason}); pickled code "
            "is not executed. Where you trust the file, load it yourself and torch.save its state "
            "dict"
        ) from None
    if isinstance(content, torch.jit.ScriptModule):  # older versions of torch load it
        raise _is_script(path)
    if not isinstance(content, dict):
        raise InputError(
            f"{path}: holds a {type(content).__name__}, not a checkpoint (a dict of tensors)"
        )
    if isinstance(content.get("state_dict"), dict):
        content = {"model": content["state_dict"]}
    if not isinstance(content.get("model"), dict):
        content = {"model": content}
    if not any(isinstance(value, torch.Tensor) for value in content["model"].values()):
        raise InputError(
            f"{path}: holds no tensors; give a checkpoint that Detectron2 or `train` wrote"
        )
    return content


def _is_script(path):
    return InputError(
        f"{path}: is TorchScript, as `export` writes it, which torch.jit.load runs; give the "
        "checkpoint that it was made of, or to `propose` an .onnx"
    )


def _numpy_scalars_allowed():
    """
    numpy's scalars are plain values, too; mmdet may keep the seed as one. PyTorch older than 2.6
    has no way to allow them under the names of both numpy 1 and numpy 2, and refuses such files.
    """
    if torch.torch_version.TorchVersion(torch.__version__) < (2, 6):
        return contextlib.nullcontext()
    scalar = np.int64(0).__reduce__()[0]
    names = ("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar")
    dtypes = {
        type(np.dtype(code)) for code in np.typecodes["AllInteger"] + np.typecodes["Float"] + "?"
    }
    return torch.serialization.safe_globals(
        [*((scalar, name) for name in names), np.dtype, *dtypes]
    )


def load_checkpoint(model: nn.Module, path: StrPath) -> None:
    """
    Load the weights of an OLN-Box that either runtime has trained.

    Args:
        model: of :func:`build_detector`, changed in place.
        path: the file, see :func:`read_checkpoint`. A Detectron2 checkpoint does not hold the
            settings without parameters (anchor sizes, image size, numbers of proposals, NMS): build
            the model with those of its config file.

    Raises:
        InputError: see :func:`read_checkpoint`; or the checkpoint of another model. Nothing is
            loaded.
    """
    load_parameters(model, read_own_checkpoint(path)["model"], path)


def read_own_checkpoint(path: StrPath) -> dict[str, Any]:
    """:func:`read_checkpoint` that refuses files of the authors' code with an InputError."""
    content = read_checkpoint(path)
    if is_public(content["model"]):
        raise InputError(
            f"{path}: has the names of the authors' code; convert it first: python -m oln_d2 "
            f"convert {path} oln_box_d2.pth"
        )
    return content


def load_parameters(model: nn.Module, parameters: dict[str, Any], path: StrPath) -> None:
    """:func:`load_checkpoint` from what is read already; `path` is named in errors."""
    own = model.state_dict()
    names = {name: detectron2_name(name) for name in own}
    problems = []
    for name, tensor in own.items():
        found = parameters.get(names[name])
        if found is None:
            problems.append(f"{names[name]} is missing")
        elif found.shape != tensor.shape:
            problems.append(
                f"{names[name]} has shape {list(found.shape)} instead of {list(tensor.shape)}"
            )
    known = set(names.values())
    problems += [
        f"{name} is not in this model"
        for name in parameters
        if name not in known and not name.endswith(IGNORED)
    ]
    if problems:
        more = f", and {len(problems) - 1} more such differences" if len(problems) > 1 else ""
        raise InputError(
            f"{path}: the checkpoint of another model: {problems[0]}{more}. Build the model with "
            "the depth, norm, FPN channels and head of the training"
        )
    model.load_state_dict({name: parameters[names[name]] for name in own})


def save_checkpoint(model: nn.Module, path: StrPath, **more: Any) -> None:
    """
    Write a checkpoint for both runtimes; all of it or nothing.

    Args:
        model: of :func:`build_detector`.
        path: Detectron2 takes it as MODEL.WEIGHTS.
        more: plain values and tensors to write beside the parameters.

    Raises:
        InputError: it cannot be written there.
    """
    parameters = {detectron2_name(name): tensor for name, tensor in model.state_dict().items()}
    # To an open file, whose errors say what is wrong, unlike torch's.
    with write_whole(path) as temporary, open(temporary, "wb") as file:
        try:
            torch.save({"model": parameters, "config": model.config, **more}, file)
        except RuntimeError as error:  # older versions of torch say something else after that
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise
