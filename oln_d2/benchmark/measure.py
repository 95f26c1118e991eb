"""Time and memory of a function."""

import multiprocessing
import sys
import time
from collections.abc import Callable
from typing import Any

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
