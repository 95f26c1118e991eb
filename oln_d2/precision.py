"""Half precision: which type a device computes with."""

import platform
import re

import torch

from oln_d2.checks import InputError


def computes_bfloat16(device: torch.device | str) -> bool:
    """
    Args:
        device: one that is there.

    Returns:
        whether it has instructions for bfloat16. A CPU without them emulates it, slower than
        float32.
    """
    kind = torch.device(device).type
    if kind == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if kind != "cpu":
        return False
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return re.search(r"\b(amx_bf16|avx512_bf16)\b", file.read()) is not None
    except OSError:  # no Linux
        return False


def processor(device: torch.device | str) -> str:
    """The name of what computes there; another one rounds otherwise."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.split(":")[1].strip() for line in file if "model name" in line)
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def usable_dtype(
    name: str, device: torch.device | str, setting: str = "dtype"
) -> torch.dtype | None:
    """
    Args:
        name: "float32" or "", "bfloat16" or "float16".
        device: one that is there.
        setting: what the user calls `name`, for the error.

    Returns:
        the type for `torch.autocast`; None where there is none.

    Raises:
        InputError: another name, or a type that the device does not compute with.
    """
    dtypes = {"": None, "float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in dtypes:
        raise InputError(f"{setting} is {name!r}; use bfloat16, float16 or float32")
    if name == "float16" and torch.device(device).type == "cpu":
        raise InputError(f"{setting} is float16, which needs a GPU; use bfloat16 or float32")
    if name == "bfloat16" and not computes_bfloat16(device):
        remedy = "float32" if torch.device(device).type == "cpu" else "float16 or float32"
        raise InputError(
            f"{setting} is bfloat16, which {device} does not compute with (a CPU needs the flag "
            f"avx512_bf16 or amx_bf16 in /proc/cpuinfo); use {remedy}"
        )
    return dtypes[name]
