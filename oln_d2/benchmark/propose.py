"""How much of its time `propose` spends in the model."""

import os
import tempfile
import time
from collections.abc import Sequence

from tabulate import tabulate

from oln_d2.benchmark.measure import require_unix
from oln_d2.checks import InputError
from oln_d2.data.lookup import plural
from oln_d2.files import StrPath
from oln_d2.loading import load
from oln_d2.propose import propose_files
from oln_d2.propose.inputs import find_sources, read_frames


def benchmark_propose(
    inputs: Sequence[str],
    weights: StrPath | None = None,
    batch_size: int = 4,
    device: str = "cpu",
) -> None:
    """
    Print a table: seconds an image of :func:`propose_files`, of the model in it, and of reading and
    resizing alone; and the memory of the process at half of the images and at the end.

    Args:
        inputs, batch_size: see :func:`propose_files`.
        weights, device: see :func:`oln_d2.load`.

    Raises:
        InputError: an argument or a file that cannot be used, no image, or Windows.
    """
    require_unix()
    import resource

    proposer = load(weights, device=device)
    sources = find_sources(inputs)[1]
    begin, images = time.perf_counter(), 0
    for source in sources:
        for _, image, _ in read_frames(source):
            if not isinstance(image, InputError):
                photo = proposer.prepare(image)
                images += 1
    if not images:
        raise InputError(f"{', '.join(inputs)}: there is no image that can be read")
    reading = time.perf_counter() - begin
    proposer.propose([photo], 100, 0.0, None)  # warms up

    detect, seen, in_model, peaks = proposer.detect, 0, 0.0, []

    def timed(pixels, sizes):
        nonlocal seen, in_model
        begin = time.perf_counter()
        ret = detect(pixels, sizes)
        in_model += time.perf_counter() - begin
        seen += len(pixels)
        if seen >= images / 2:
            peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
        return ret

    proposer.detect = timed  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as output:
        begin = time.perf_counter()
        propose_files(proposer, inputs, output, batch_size=batch_size)
        seconds = time.perf_counter() - begin
    rows = [
        ["propose", f"{seconds / images:.3f}", ""],
        ["of it in the model", f"{in_model / images:.3f}", f"{100 * in_model / seconds:.0f} %"],
        ["reading and resizing alone", f"{reading / images:.3f}", ""],
    ]
    print(f"{plural(images, 'image')}, {os.cpu_count()} cores")
    print(tabulate(rows, ["", "seconds an image", "share"], disable_numparse=True))
    unit = 2**20 if os.uname().sysname == "Darwin" else 2**10
    half, end = (peak / unit for peak in (peaks[0], peaks[-1]))
    print(f"At most {half:.0f} MiB in the first half of the images, {end:.0f} MiB in all.")
