"""Inference of OLN-Box beside that of a Faster R-CNN of the same size."""

from collections.abc import Sequence
from typing import Any

from tabulate import tabulate

from oln_d2.benchmark.measure import median, ratio, take_turns
from oln_d2.checks import POSITIVE_INT, SEED, InputError, check_limits, needs
from oln_d2.files import StrPath


def benchmark_infer(
    model: dict[str, Any] | None = None,
    recipes: tuple[str, str] | None = None,
    *,
    photos: StrPath | None = None,
    proposals: Sequence[int] = (1000, 500, 300),
    compiled: bool = False,
    repeats: int = 5,
    device: str = "cpu",
    seed: int = 0,
) -> None:
    """
    Print a table: seconds an image, how they divide, the ratio to Faster R-CNN's, RoIs and memory,
    of all proposals, as the public setting has them, and of fewer. Images are resized before and
    pass one by one.

    Args:
        model: arguments of :func:`oln_d2.standalone.build_detector`; None: the shipped model.
        recipes: instead of these, two of Detectron2, ours first.
        photos: a folder; None: the examples in the repository.
        proposals: so many of them, near copies left out first.
        compiled: also with backbone and pyramid by `torch.compile`, which needs a C++ compiler; not
            with `recipes`.
        repeats: of which the median is taken.
        device: where.
        seed: of weights.

    Raises:
        InputError: an argument that cannot be used.
        ImportError: PyTorch or Detectron2 is missing.
    """
    check_limits(repeats=(repeats, POSITIVE_INT), seed=(seed, SEED))
    for number in proposals:
        check_limits(proposals=(number, POSITIVE_INT))
    if compiled and recipes is not None:
        raise InputError("only the models of this package are compiled; leave out compiled")
    with needs("benchmark infer", "torch"):
        import torch

        from oln_d2.benchmark import detectors
        from oln_d2.precision import processor
        from oln_d2.standalone.trainer import usable_device

    device = str(usable_device(device))
    images = detectors.read_photographs(photos)
    torch.manual_seed(seed)
    if recipes is None:
        subjects = detectors.standalone(model, images, 1, device, proposals, compiled)
    else:
        subjects = detectors.detectron2(recipes, images, 1, device, proposals)
    measured = take_turns([subject.infer for subject in subjects], repeats)
    stages = detectors.BACKBONE, detectors.FIRST, detectors.ROIS, detectors.REST
    rows = []
    for subject, found in zip(subjects, measured):
        seconds = median(found, "seconds")
        shares = [f"{100 * median(found, stage) / seconds:.1f}" for stage in stages]
        theirs = ratio(found, measured[-1]) if found is not measured[-1] else ""
        rois = f"{subject.rois / len(images):.0f}"
        memory = f"{median(found, 'memory') / 2**20:.0f}"
        rows.append([subject.name, f"{seconds:.3f}", theirs, rois, *shares, memory])
    height, width = subjects[0].sides
    print(
        f"{len(images)} images of {height} x {width} pixels at most, one by one, median of "
        f"{repeats} turns, {torch.get_num_threads()} threads, {processor(device)}"
    )
    shares = [f"{stage} (%)" for stage in stages]
    headers = ["", "seconds an image", "ratio", "RoIs", *shares, "memory (MiB)"]
    print(tabulate(rows, headers, disable_numparse=True))
