"""Time and memory of functions: each in a process of its own, or in turn in this one."""

import contextlib
import multiprocessing
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from oln_d2.checks import InputError


def require_unix() -> None:
    """Raises InputError where the system cannot fork or count the memory of a process."""
    try:
        import resource
    except ImportError:
        raise InputError(
            "the benchmark forks processes and measures their memory; run it on Linux or macOS"
        ) from None
    del resource


def measure(function: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[Any, float, int]:
    """(returned value, seconds, bytes of memory used on top), in a process of its own."""
    import resource

    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    unit = 1 if sys.platform == "darwin" else 1024

    def work() -> None:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        start = time.perf_counter()
        result = function(*args, **kwargs)
        seconds = time.perf_counter() - start
        more = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        sender.send((result, seconds, unit * more))

    process = context.Process(target=work)
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        raise InputError(
            f"{function.__name__} ended without a result: not enough memory?"
        ) from None
    finally:
        process.join()


def take_turns(
    runs: Sequence[Callable[[], dict[str, float]]], repeats: int
) -> list[list[dict[str, float]]]:
    """
    What each of `runs` returns, `repeats` times. They take turns, so that other work on the machine
    slows all of them; the first time of each is not counted.
    """
    found: list[list[dict[str, float]]] = [[] for _ in runs]
    for _ in tqdm(range(repeats + 1), desc="turns", disable=None):
        for run, own in zip(runs, found):
            own.append(run())
    return [own[1:] for own in found]


def median(values: Sequence[dict[str, float]], name: str) -> float:
    return statistics.median(value[name] for value in values)


def ratio(ours: Sequence[dict[str, float]], theirs: Sequence[dict[str, float]]) -> str:
    """Of the seconds of the same turns: "0.90 (0.88 to 0.93)", the median, the least, the most."""
    ratios = [a["seconds"] / b["seconds"] for a, b in zip(ours, theirs)]
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


@contextlib.contextmanager
def peak_memory(found: dict[str, float], device: str = "cpu") -> Iterator[None]:
    """
    Puts into `found` the "memory" that is used at most in its body beyond what was used before, in
    bytes: of a GPU, or, on Linux, of this process; NaN elsewhere.
    """
    if device != "cpu":
        import torch

        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        yield
        found["memory"] = torch.cuda.max_memory_allocated() - before
        return
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before = _peak()
    except OSError:
        yield
        found["memory"] = float("nan")
        return
    yield
    found["memory"] = _peak() - before


def _peak() -> int:
    status = Path("/proc/self/status").read_text()
    (kilobytes,) = re.findall(r"VmHWM:\s+(\d+)", status)
    return 1024 * int(kilobytes)
