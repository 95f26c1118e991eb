"""Training steps of OLN-Box beside those of a Faster R-CNN of the same size."""

from typing import Any

from tabulate import tabulate

from oln_d2.benchmark.measure import median, ratio, take_turns
from oln_d2.checks import POSITIVE_INT, SEED, check_limits, needs
from oln_d2.files import StrPath


def benchmark_train(
    model: dict[str, Any] | None,
    recipes: tuple[str, str] | None = None,
    *,
    photos: StrPath | None = None,
    every_format: bool = False,
    batch_size: int = 8,
    repeats: int = 5,
    device: str = "cpu",
    seed: int = 0,
) -> None:
    """
    Print a table: seconds an image of training steps, how they divide, the ratio to Faster R-CNN's
    and memory, on photographs with 5 objects each, anywhere.

    Args:
        model: arguments of :func:`oln_d2.standalone.build_detector`.
        recipes: instead of these, two of Detectron2, ours first.
        photos: a folder; None: the examples in the repository.
        every_format: with and without bfloat16 and channels last, where they can be computed.
        batch_size: images of a step.
        repeats: of which the median is taken.
        device: where.
        seed: of the weights and objects.

    Raises:
        InputError: an argument that cannot be used.
        ImportError: PyTorch or Detectron2 is missing.
    """
    check_limits(
        batch_size=(batch_size, POSITIVE_INT), repeats=(repeats, POSITIVE_INT), seed=(seed, SEED)
    )
    with needs("benchmark train", "torch"):
        import torch

        from oln_d2.benchmark import detectors
        from oln_d2.precision import computes_bfloat16, processor
        from oln_d2.standalone.trainer import usable_device

    device = str(usable_device(device))
    images = detectors.read_photographs(photos, batch_size)
    formats = ["float32"]
    if every_format and computes_bfloat16(device):
        formats.append("bfloat16")
    orders = {"contiguous": torch.contiguous_format}
    if every_format:
        orders["channels last"] = torch.channels_last
    names, runs = [], []
    for name in formats:
        for order, memory_format in orders.items():
            torch.manual_seed(seed)
            if recipes is None:
                pair = detectors.standalone(model, images, batch_size, device)
            else:
                pair = detectors.detectron2(recipes, images, batch_size, device)
            for detector, architecture in zip(pair, ("OLN-Box", "Faster R-CNN")):
                detector.model.to(memory_format=memory_format)
                names.append([architecture, name, order])
                runs.append(detector.train(torch.bfloat16 if name == "bfloat16" else None))
    measured = take_turns(runs, repeats)
    stages = detectors.FORWARD, detectors.ASSIGNMENT, detectors.BACKWARD, detectors.OPTIMIZER
    rows = []
    for i, (own, found) in enumerate(zip(names, measured)):
        seconds = median(found, "seconds")
        shares = [f"{100 * median(found, stage) / seconds:.1f}" for stage in stages]
        theirs = ratio(found, measured[i + 1]) if i % 2 == 0 else ""
        memory = f"{median(found, 'memory') / 2**20:.0f}"
        rows.append([*own, f"{seconds:.3f}", theirs, *shares, memory])
    height, width = pair[0].sides
    print(
        f"{batch_size} images of {height} x {width} pixels at most a step, median of {repeats} "
        f"turns, {torch.get_num_threads()} threads, {processor(device)}"
    )
    shares = [f"{stage} (%)" for stage in stages]
    headers = ["", "format", "order", "seconds an image", "ratio", *shares, "memory (MiB)"]
    print(tabulate(rows, headers, disable_numparse=True))
    if every_format and len(formats) == 1:
        print(f"{device} does not compute bfloat16.")
