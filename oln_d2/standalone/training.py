"""
Plain training on COCO-format data, on one or several processes; for more use Detectron2's trainer.
"""

import contextlib
import math
import os
from collections import deque
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torchvision.models import WeightsEnum
from tqdm import tqdm

from oln_d2.checks import NOT_NEGATIVE, POSITIVE, POSITIVE_INT, InputError, Limit, check_limits
from oln_d2.data.splits import seen_names
from oln_d2.evaluation.coco_results import write_results
from oln_d2.evaluation.ground_truth import GroundTruth
from oln_d2.evaluation.open_world import OpenWorldRecall
from oln_d2.evaluation.result import OpenWorldResult
from oln_d2.files import StrPath, lock_folder, make_folder
from oln_d2.scores import SCORES
from oln_d2.standalone.build import DEFAULTS, build_detector
from oln_d2.standalone.checkpoint import (
    load_checkpoint,
    load_parameters,
    read_own_checkpoint,
    save_checkpoint,
)
from oln_d2.standalone.data import CocoImages, TrainingBatches, load, mix_seed
from oln_d2.standalone.models import DIVERGED

MOMENTUM = 0.9
WEIGHT_DECAY = 1e-4
WARMUP_FACTOR = 0.001
# The rate is divided by 10 after these parts of the run: after 6 and 7 of the paper's 8 epochs.
STEPS = (6 / 8, 7 / 8)
SHOWN = 20  # losses on the progress bar are averages over so many iterations


def train(
    train_json: StrPath,
    images: StrPath,
    split: str | list[str],
    output: StrPath,
    *,
    val_json: StrPath | None = None,
    val_images: StrPath | None = None,
    config: dict[str, Any] | None = None,
    weights: StrPath | None = None,
    weights_backbone: WeightsEnum | str | None = None,
    epochs: float = 8.0,
    batch_size: int = 16,
    lr: float | None = None,
    warmup: int = 500,
    amp: bool = False,
    device: str | None = None,
    workers: int = 2,
    checkpoint_every: int = 500,
    seed: int = 0,
    resume: bool = False,
) -> OpenWorldResult | None:
    """
    Train a detector and evaluate it. Under `torchrun` all its processes train together.

    Writes to `output`: `checkpoint.pth`, from which a run is resumed; `model_final.pth`, for
    :func:`load_detector` or Detectron2's MODEL.WEIGHTS; and, where validation data is given,
    `coco_instances_results.json` and `open_world_results.json`.

    Args:
        train_json, images: annotations in COCO format, and the folder of their images.
        split: the seen categories, see :func:`oln_d2.data.splits.seen_names`.
        output: a folder.
        val_json, val_images: data to evaluate on, with all categories.
        config: arguments of :func:`build_detector`, plain values.
        weights: a checkpoint to start from.
        weights_backbone: weights of the ResNet to start from.
        epochs: how often each image is seen.
        batch_size: images of an iteration, of all processes together.
        lr: default 0.02 for 16 images, in proportion to the batch size.
        warmup: iterations in which the rate rises linearly.
        amp: half precision, on a GPU.
        device: default "cuda" if there is one, else "cpu".
        workers: processes that load images, for each training process.
        checkpoint_every: iterations.
        seed: for weights, order, flips, scales and samples. On a CPU the same seed gives the same
            model, resumed or not.
        resume: go on from `checkpoint.pth` if there is one; other weights are then not read.

    Returns:
        of the evaluation; None without, and on all processes but the first.

    Raises:
        InputError: arguments or files that cannot be used, before training starts; an image that
            cannot, when its turn comes.
        FloatingPointError: training has diverged. What was saved before is kept.
    """
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    lr = 0.02 * batch_size / 16 if lr is None else lr
    architecture = (config or {}).get("architecture", "oln_box")
    multiple = f"a multiple of {world_size}, the number of processes"
    elsewhere = "another one here; OLN-Mask is trained with train_net.py"
    check_limits(
        epochs=(epochs, POSITIVE),
        batch_size=(batch_size, POSITIVE_INT),
        lr=(lr, NOT_NEGATIVE),
        warmup=(warmup, NOT_NEGATIVE),
        workers=(workers, NOT_NEGATIVE),
        checkpoint_every=(checkpoint_every, POSITIVE_INT),
        seed=(seed, Limit(lambda seed: 0 <= seed < 2**64, "0 or more, below 2**64")),
        architecture=(architecture, Limit(lambda name: name != "oln_mask", elsewhere)),
    )
    check_limits(batch_size=(batch_size, Limit(lambda size: size % world_size == 0, multiple)))
    device = _usable_device(device, world_size)
    if amp and device.type != "cuda":
        raise InputError(f"amp needs a GPU, but the device is {device}; leave it out")
    if (val_json is None) != (val_images is None):
        raise InputError("val_json and val_images go together; give both or neither")

    path = os.path.join(output, "checkpoint.pth")
    resumed = os.path.exists(path)
    if resumed and not resume:
        raise InputError(
            f"{path}: exists; resume the run (--resume) or choose another output folder"
        )
    if resumed:
        weights = weights_backbone = None
    dataset = CocoImages(train_json, images, split, training=True)
    # Read now, so that mistakes in it show before the training; once, since the content is shared
    # with the data set while `ground_truth` is held.
    ground_truth = GroundTruth.load(val_json, split) if val_json else None
    val_dataset = CocoImages(val_json, val_images, split, training=False) if val_json else None
    iterations = max(round(epochs * len(dataset) / batch_size), 1)

    torch.manual_seed(seed)
    model = build_detector(**(config or {}), weights_backbone=weights_backbone)
    if weights is not None:
        load_checkpoint(model, weights)
    model = model.to(device).train()
    optimizer = torch.optim.SGD(_parameter_groups(model), lr=lr, momentum=MOMENTUM)
    scaler = torch.amp.GradScaler(device.type, enabled=amp)
    # What a resumed run has to share with the run that it continues, to become the same.
    data = {"seen": sorted(seen_names(split)), "digest of the training data": dataset.digest()}
    settings = {**data, **model.config, "number of processes": world_size}
    settings.update(epochs=epochs, batch_size=batch_size, lr=lr, warmup=warmup, amp=amp, seed=seed)
    start = _restore(path, settings, model, optimizer, scaler) if resumed else 0
    if rank == 0:
        make_folder(output)
    with lock_folder(output) if rank == 0 else contextlib.nullcontext():
        if world_size > 1:
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
            starts = [None] * world_size
            dist.all_gather_object(starts, start)
            if len(set(starts)) > 1:
                raise InputError(
                    f"{path}: is not the same file for all processes, which would start at "
                    f"iterations {starts}; put the output folder where all nodes share it"
                )
        try:
            if rank == 0:
                begin = f"resumed after {start}" if resumed else "from the start"
                print(
                    f"{len(dataset)} images, {iterations} iterations of {batch_size}, {begin}, on "
                    f"{device}",
                    flush=True,
                )
            sampler = TrainingBatches(
                len(dataset), batch_size, range(start, iterations), seed, rank, world_size
            )
            loader = load(
                dataset,
                workers,
                batch_sampler=sampler,
                pin_memory=device.type == "cuda",
            )
            wrapped = model if world_size == 1 else nn.parallel.DistributedDataParallel(model)
            recent = deque(maxlen=SHOWN)
            bar = tqdm(
                loader, initial=start, total=iterations, disable=rank > 0, mininterval=1, unit="it"
            )
            for iteration, items in enumerate(bar, start):
                # Samples and scales follow from the iteration, not from what was drawn before a
                # resume.
                torch.manual_seed(mix_seed(seed, 1 + rank, iteration))
                for group in optimizer.param_groups:
                    group["lr"] = lr * _lr_factor(iteration, iterations, warmup)
                batch = [image.to(device, non_blocking=True) for image, _ in items]
                targets = [{key: value.to(device) for key, value in t.items()} for _, t in items]
                with torch.autocast(device.type, torch.float16, enabled=amp):
                    losses = wrapped(batch, targets)
                loss = sum(losses.values())
                # One transfer: each `.item()` synchronises.
                values = torch.stack([value.detach() for value in losses.values()]).tolist()
                if not math.isfinite(sum(values)):
                    raise FloatingPointError(
                        f"The loss is {sum(values)} at iteration {iteration}: {DIVERGED}"
                    )
                optimizer.zero_grad()
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()
                recent.append(values)
                means = np.mean(recent, axis=0)
                bar.set_postfix({n: f"{x:.3f}" for n, x in zip(losses, means)}, refresh=False)
                done = iteration + 1
                if rank == 0 and (done % checkpoint_every == 0 or done == iterations):
                    if not all(parameter.isfinite().all() for parameter in model.parameters()):
                        raise FloatingPointError(
                            f"Weights are NaN or infinite after iteration {iteration}: {DIVERGED}"
                        )
                    state = {"optimizer": optimizer.state_dict(), "scaler": scaler.state_dict()}
                    save_checkpoint(model, path, iteration=done, settings=settings, **state)
            if rank == 0:
                save_checkpoint(model, os.path.join(output, "model_final.pth"))
        except FloatingPointError as error:
            raise FloatingPointError(
                f"{error}, in another output folder; {path}, if it is there, is good as weights to "
                "start from"
            ) from None
        result = None
        if val_dataset is not None:
            result = evaluate_detector(model, val_dataset, ground_truth, output, workers)
        if (
            world_size > 1
        ):  # not after an error of one process: it might wait for the others for ever
            dist.destroy_process_group()
        return result


def evaluate_detector(model, dataset, ground_truth, output=None, workers=0):
    """
    Args:
        model (nn.Module): the detector.
        dataset (CocoImages): all images of `ground_truth`; several processes share them.
        ground_truth (GroundTruth): annotations of all categories.
        output (str, optional): folder for the detections and the metrics.
        workers (int): processes that load images.

    Returns:
        OpenWorldResult: by the protocol "xclass"; None on all processes but the first.
    """
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    own = range(rank, len(dataset), world_size)
    detections = {}
    for index, found in zip(
        tqdm(own, desc="evaluation", disable=rank > 0, mininterval=1),
        _detections(model, dataset, own, workers),
    ):
        detections[dataset.image_ids[index]] = found
    if world_size > 1:
        gathered = [None] * world_size if rank == 0 else None
        dist.gather_object(detections, gathered)
        if rank > 0:
            return None
        detections = {image: d for part in gathered for image, d in part.items()}
    recall = OpenWorldRecall(ground_truth)
    for image, (boxes, scores, *_) in detections.items():
        recall.update(image, boxes, scores, box_format="xywh")
    result = recall.result()
    if output:
        write_results(
            os.path.join(output, "coco_instances_results.json"),
            ((image, *detections[image]) for image in sorted(detections)),
        )
        result.to_json(os.path.join(output, "open_world_results.json"))
    return result


@torch.no_grad()
def _detections(model, dataset, indices, workers):
    """Yields of each image what :func:`write_results` takes after its id, without masks."""
    model.eval()
    device = next(model.parameters()).device
    sampler = [(i, False) for i in indices]
    for [(image, _)] in load(dataset, workers, sampler=sampler):
        (found,) = model([image.to(device)])
        boxes = found["boxes"].double().cpu().numpy()
        yield (
            np.hstack([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]]),
            found["scores"].double().cpu().numpy(),
            None,
            {s.field: found[s.attribute].cpu().numpy() for s in SCORES if s.attribute in found},
        )


def _usable_device(device, world_size):
    name = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        if device.type == "cuda" and world_size > 1:
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        raise InputError(
            f"device {name} cannot be used ({str(error).splitlines()[0]}); use cpu, or cuda with "
            "one process for each GPU"
        ) from None
    return device


def _parameter_groups(model):
    """Norms do not decay, as in Detectron2."""
    norms = {
        parameter
        for module in model.modules()
        if isinstance(module, (nn.GroupNorm, nn.BatchNorm2d))
        for parameter in module.parameters()
    }
    learning = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in learning if p not in norms], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in learning if p in norms], "weight_decay": 0.0},
    ]


def _lr_factor(iteration, iterations, warmup):
    factor = 0.1 ** sum(iteration >= step * iterations for step in STEPS)
    if iteration < warmup:
        factor *= WARMUP_FACTOR + (1 - WARMUP_FACTOR) * iteration / warmup
    return factor


def _restore(path, settings, model, optimizer, scaler):
    """Continue from a checkpoint; returns the next iteration."""
    content = read_own_checkpoint(path)
    if "settings" not in content:
        raise InputError(
            f"{path}: is no checkpoint to resume from; give it as weights to start from"
        )
    saved = content["settings"]
    defaults = DEFAULTS.get(saved.get("architecture"), {})  # older files hold what was given only
    for name in {**settings, **saved}:
        old, new = saved.get(name, defaults.get(name)), settings.get(name)
        if old != new:
            raise InputError(
                f"{path}: was trained with {name} {old}, not {new}; resume with the same settings, "
                "or choose another output folder"
            )
    load_parameters(model, content["model"], path)
    optimizer.load_state_dict(content["optimizer"])
    scaler.load_state_dict(content["scaler"])
    return content["iteration"]
