"""Time of a training step, by number format and order in memory."""

import statistics
import time
from typing import Any

from tabulate import tabulate
from tqdm import tqdm

from oln_d2.checks import POSITIVE_INT, SEED, check_limits, needs


def benchmark_training(
    model: dict[str, Any], batch_size: int = 8, steps: int = 5, device: str = "cpu", seed: int = 0
) -> None:
    """
    Print a table: seconds an image of training steps, forwards, backwards and the optimizer's, of
    noise with 5 objects an image. The rows take turns, so that other work on the machine slows all
    of them.

    Args:
        model: arguments of :func:`oln_d2.standalone.build_detector`.
        batch_size: images of a step.
        steps: of which the median is taken, after one that is not counted.
        device: where.
        seed: of the weights, images and objects.

    Raises:
        InputError: an argument that cannot be used.
        ImportError: PyTorch is missing.
    """
    check_limits(
        batch_size=(batch_size, POSITIVE_INT), steps=(steps, POSITIVE_INT), seed=(seed, SEED)
    )
    with needs("benchmark training", "torch"):
        import torch

        from oln_d2.precision import computes_bfloat16, processor
        from oln_d2.standalone import build_detector
        from oln_d2.standalone.models import training_losses
        from oln_d2.standalone.trainer import usable_device

    device = str(usable_device(device))
    formats = ["float32", "bfloat16"] if computes_bfloat16(device) else ["float32"]
    orders = {"contiguous": torch.contiguous_format, "channels last": torch.channels_last}
    variants = []
    for name in formats:
        for order, memory_format in orders.items():
            torch.manual_seed(seed)
            net = build_detector(**model).train().to(device, memory_format=memory_format)
            learning = [p for p in net.parameters() if p.requires_grad]
            optimizer = torch.optim.SGD(learning, lr=1e-5, momentum=0.9)
            variants.append(([name, order], net, optimizer, []))
    height, width = net.transform.min_size[-1], net.transform.max_size
    sides = torch.tensor([width, height, width, height])
    pixels = torch.randint(0, 256, (batch_size, 3, height, width), dtype=torch.uint8)
    corners = torch.rand(batch_size, 5, 2) * 0.6
    boxes = torch.cat([corners, corners + 0.1 + 0.3 * torch.rand(batch_size, 5, 2)], dim=2) * sides
    labels = torch.ones(5, dtype=torch.int64, device=device)
    targets = [{"boxes": b.to(device), "labels": labels} for b in boxes]

    for _ in tqdm(range(steps + 1), desc="steps"):
        for (name, _), net, optimizer, seconds in variants:
            begin = time.perf_counter()
            half = name == "bfloat16"
            with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=half):
                losses = training_losses(net, list(pixels.to(device)), targets)
            optimizer.zero_grad()
            sum(losses.values()).backward()
            optimizer.step()
            sum(losses.values()).item()  # waits for a GPU
            seconds.append((time.perf_counter() - begin) / batch_size)
    medians = [statistics.median(seconds[1:]) for *_, seconds in variants]
    rows = [
        [*names, f"{median:.3f}", f"{medians[0] / median:.2f}"]
        for (names, *_), median in zip(variants, medians)
    ]
    print(
        f"{batch_size} images of {height} x {width} a step, {torch.get_num_threads()} threads, "
        f"{processor(device)}"
    )
    header = ["format", "order", "seconds an image", "times as fast"]
    print(tabulate(rows, header, disable_numparse=True))
    if len(formats) == 1:
        print(f"{device} does not compute bfloat16.")
