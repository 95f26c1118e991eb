"""
Checkpoints that both runtimes read. On disk parameters have Detectron2's names, whichever runtime
wrote them; each ignores what else the other one keeps in the file.
"""

import json
import os
import re
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from oln_d2.checks import InputError, needs
from oln_d2.files import StrPath, write_whole
from oln_d2.pickles import NUMPY, load_plain, not_plain, read_head
from oln_d2.standalone.names import detectron2_name, is_public

# Of other versions of Detectron2 or of other norms; no parameters.
IGNORED = ("pixel_mean", "pixel_std", "num_batches_tracked")

_SAFETENSORS = re.compile(rb".{8}\{\"", re.DOTALL)  # how its files begin: a length, then JSON
_LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # how torch.save began before version 1.6
# Where the parameters are; the average (EMA) is taken where there is nothing else.
_HOMES = ("state_dict", "model", "model_state_dict", "model_state", "module", "blobs")
_AVERAGES = ("model_ema", "state_dict_ema", "ema_state_dict", "ema")
_WRAPPERS = ("module.", "_orig_mod.")  # of DistributedDataParallel and torch.compile


def read_checkpoint(path: StrPath) -> dict[str, Any]:
    """
    Read a file without executing code that may be in it.

    Args:
        path: a checkpoint of Detectron2 (also the `.pkl` of its model zoo), of this runtime or of
            mmdet, or a bare state dict; pickled or safetensors. Of a file that holds a model and
            its average (EMA) the model is taken.

    Returns:
        its content, with the parameters under "model", as tensors, and without the prefixes of
        DistributedDataParallel and torch.compile; and of a detector's own file "config".

    Raises:
        InputError: no such file, not a checkpoint, one that is not complete, one that holds more
            than tensors and plain values, or values that are not finite.
    """
    content = _read(os.path.expanduser(path), path)
    if isinstance(content, dict):
        content = dict(content)
    else:
        raise InputError(
            f"{path}: holds a {type(content).__name__}, not a checkpoint (a dict of tensors)"
        )
    for home in (*_HOMES, *_AVERAGES, None):
        found = content if home is None else content.get(home)
        parameters = _tensors(found) if isinstance(found, dict) else {}
        if parameters:
            break
    else:
        there = f"it has {', '.join(map(str, content))}" if content else "it is an empty dict"
        raise InputError(
            f"{path}: holds no tensors, neither at the top nor under {', '.join(_HOMES)}; "
            f"{there[:80]}; give a checkpoint that Detectron2 or `train` wrote"
        )
    for name, tensor in parameters.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise InputError(
                f"{path}: {name} holds NaN or infinite values, so its training has diverged or it "
                "is damaged; take an earlier checkpoint, or fetch it again"
            )
    rest = {} if home is None else {key: value for key, value in content.items() if key != home}
    config = rest.pop("config", None)
    if isinstance(config, dict) and all(isinstance(name, str) for name in config):
        rest["config"] = {n: value for n, value in config.items() if n != "weights_backbone"}
    return {**rest, "model": parameters}


def _read(file, path):
    """What is in `file`, which errors call `path`."""
    head = read_head(file, path)
    if _SAFETENSORS.match(head):
        return _read_safetensors(file, path)
    zipped = head.startswith(b"PK")
    if zipped:
        _check_archive(file, path)
    try:
        if not zipped and not head.startswith(_LEGACY):
            with open(file, "rb") as f:
                return load_plain(f)
        # numpy's scalars are plain values, too; mmdet may keep the seed as one.
        with torch.serialization.safe_globals([(made, name) for name, made in NUMPY.items()]):
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file makes all kinds
        remedy = (
            "Where it was made, write it again with nothing but tensors: "
            "torch.save(model.state_dict(), FILE)"
        )
        raise not_plain(path, error, remedy) from None


def _read_safetensors(file, path):
    with needs(path, "torch"):
        from safetensors import SafetensorError, safe_open
    try:
        with safe_open(file, framework="pt") as opened:
            parameters = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
            config = json.loads((opened.metadata() or {}).get("config", "null"))
    except (SafetensorError, ValueError, OSError, RecursionError):
        raise InputError(f"{path}: is damaged or not complete; fetch or write it again") from None
    if not isinstance(config, dict):  # of another program
        return {"model": parameters}
    # JSON has no tuples, and a config no lists.
    config = {key: tuple(v) if isinstance(v, list) else v for key, v in config.items()}
    return {"model": parameters, "config": config}


def _check_archive(file, path):
    """Raises InputError for a zip archive that is not what torch.save writes."""
    try:
        with zipfile.ZipFile(file) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError):  # its list is at the end
        raise InputError(
            f"{path}: is not complete (it ends early, after {os.path.getsize(file)} bytes); fetch "
            "or write it again"
        ) from None
    if any(name.endswith("/constants.pkl") for name in names):
        raise InputError(
            f"{path}: is TorchScript, as `export` once wrote it, for torch.jit.load; give the "
            "checkpoint that it was made of, or to `propose` an .onnx"
        )
    if not any(name.endswith("data.pkl") for name in names):
        raise InputError(f"{path}: is a zip archive; unpack it and give the checkpoint in it")


def _tensors(found):
    """
    Its tensors and arrays of numbers, the latter as tensors, without a wrapper's prefix. Those that
    are sparse, quantized, complex or without values are none of a model of ours.
    """
    parameters = {}
    for name, value in dict(found).items():  # a pickle may replace the methods of an OrderedDict
        if isinstance(value, np.ndarray) and value.dtype.kind in "fiub":
            value = torch.from_numpy(value)
        if not isinstance(value, torch.Tensor) or value.layout != torch.strided:
            continue
        if not (value.is_quantized or value.is_complex() or value.is_meta):
            parameters[str(name)] = value
    for prefix in _WRAPPERS:
        own = {n: value for n, value in parameters.items() if n != "n_averaged"}  # an average's
        if own and all(name.startswith(prefix) for name in own):
            parameters = {name[len(prefix) :]: value for name, value in own.items()}
    return parameters


def load_checkpoint(model: nn.Module, path: StrPath) -> None:
    """
    Load the weights of an OLN-Box that either runtime has trained.

    Args:
        model: made by :func:`build_detector`; changed in place.
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
    for ours, tensor in own.items():
        found = parameters.get(name := names[ours])
        if found is None:
            problems.append(f"{name} is missing")
        elif found.shape != tensor.shape:
            shapes = f"{list(found.shape)} instead of {list(tensor.shape)}"
            problems.append(f"{name} has shape {shapes}")
    known = set(names.values())
    problems += [
        f"{name} is not in this model"
        for name in parameters
        if name not in known and not name.endswith(IGNORED)
    ]
    if problems:
        remedy = "Build the model with the depth, norm, FPN channels and head of the training"
        raise another_model(path, problems, parameters, known, remedy)
    model.load_state_dict({name: parameters[names[name]] for name in own})


def another_model(
    path: StrPath, problems: list[str], found: Iterable[str], wanted: set[str], remedy: str
) -> InputError:
    """
    Args:
        path: the checkpoint.
        problems: how it differs from the model, one or more.
        found, wanted: names of the parameters of the checkpoint and of the model.
        remedy: a sentence without its full stop.
    """
    what = f"{problems[0]} ({len(problems)} differences in all)"
    if wanted.isdisjoint(found):
        begins = sorted({name.partition(".")[0] for name in found})
        what = f"none of its names is one of the model's, they begin with {', '.join(begins)[:100]}"
    return InputError(f"{path}: the checkpoint of another model: {what}. {remedy}")


def save_checkpoint(model: nn.Module, path: StrPath, **more: Any) -> None:
    """
    Write a checkpoint for both runtimes; all of it or nothing.

    Args:
        model: made by :func:`build_detector`.
        path: Detectron2 takes it as MODEL.WEIGHTS. A name that ends in .safetensors gives such a
            file, with `model.config` as JSON under "config" in its metadata.
        more: plain values and tensors to write beside the parameters, not into .safetensors.

    Raises:
        InputError: it cannot be written there.
        ImportError: safetensors is needed and missing.
    """
    parameters = {detectron2_name(name): tensor for name, tensor in model.state_dict().items()}
    write_checkpoint(path, parameters, config=model.config, **more)


def write_checkpoint(path: StrPath, parameters: dict[str, torch.Tensor], **more: Any) -> None:
    """:func:`save_checkpoint` of parameters under Detectron2's names; `more` may hold "config"."""
    if os.fspath(path).endswith(".safetensors"):
        content = _safetensors(path, parameters, **more)
        with write_whole(path) as temporary:
            Path(temporary).write_bytes(content)
        return
    with write_whole(path) as temporary, open(temporary, "wb") as file:
        # To an open file, whose errors say what is wrong, unlike torch's.
        try:
            torch.save({"model": parameters, **more}, file)
        except RuntimeError as error:  # older versions of torch say something else after that
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise


def _safetensors(path, parameters, config=None, **more):
    """The bytes of such a file."""
    if more:
        raise InputError(f"{path}: safetensors cannot hold {', '.join(more)}; name it .pth")
    with needs(path, "torch"):
        from safetensors.torch import save
    parameters = {name: tensor.contiguous() for name, tensor in parameters.items()}
    return save(parameters, {"config": json.dumps(config)})
