"""Training from Python: what is asked for is checked here, before anything starts."""

import contextlib
import datetime
import math
import os
import signal
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torchvision.models import WeightsEnum

from oln_d2.checks import (
    FRACTION,
    NOT_NEGATIVE,
    POSITIVE,
    POSITIVE_INT,
    InputError,
    Limit,
    check_limits,
    interrupted,
    needs,
    one_of,
)
from oln_d2.data.coco import load_coco
from oln_d2.data.lookup import plural
from oln_d2.data.splits import seen_names
from oln_d2.evaluation.ground_truth import GroundTruth
from oln_d2.evaluation.result import OpenWorldResult
from oln_d2.files import StrPath, lock_folder, make_folder
from oln_d2.precision import computes_bfloat16, processor, usable_dtype
from oln_d2.standalone.build import DEFAULTS, build_detector
from oln_d2.standalone.checkpoint import (
    load_checkpoint,
    load_parameters,
    read_own_checkpoint,
    save_checkpoint,
)
from oln_d2.standalone.data import (
    CocoImages,
    CocoSource,
    Loader,
    TrainingBatches,
    View,
    aspect_groups,
)


def train(
    train_json: StrPath,
    images: StrPath,
    split: str | list[str],
    output: StrPath,
    *,
    more_data: Sequence[tuple[StrPath, StrPath, StrPath | Sequence[str]]] = (),
    data_weights: Sequence[float] | None = None,
    pseudo_weight: float = 1.0,
    val_json: StrPath | None = None,
    val_images: StrPath | None = None,
    config: dict[str, Any] | None = None,
    weights: StrPath | None = None,
    weights_backbone: WeightsEnum | str | None = None,
    epochs: float = 8.0,
    batch_size: int = 16,
    accumulate: int = 1,
    lr: float | None = None,
    warmup: int = 500,
    schedule: str = "step",
    clip: float | None = None,
    ema: float | None = None,
    scale_jitter: tuple[float, float] | None = None,
    group_by_aspect: bool = True,
    precision: str = "float32",
    channels_last: bool = False,
    amp: bool = False,
    device: str | None = None,
    devices: int = 1,
    num_nodes: int = 1,
    workers: int = 2,
    checkpoint_every: int = 500,
    evaluate_every: int | None = None,
    patience: int | None = None,
    loggers: Sequence[str] = ("csv",),
    seed: int = 0,
    resume: bool = False,
) -> OpenWorldResult | None:
    """
    Train a detector and evaluate it. Several processes, which `torchrun`, a cluster's scheduler or
    `devices` starts, train together.

    Writes to `output`: `checkpoint.pth`, from which a run is resumed; `model_final.pth`, for
    :func:`load_detector` or Detectron2's MODEL.WEIGHTS; the logs; where validation data is given,
    `coco_instances_results.json` and `open_world_results.json`; and with `evaluate_every` also
    `model_best.pth`, the checkpoint of the highest AR@100 of unseen objects.

    Args:
        train_json, images: annotations in COCO format, and the folder of their images.
        split: the seen categories, see :func:`oln_d2.data.splits.seen_names`.
        output: a folder.
        more_data: further data sets to train on, each (annotations, folder, seen categories). What
            one annotates the others may lack: so if these categories differ, no negatives are
            sampled (`objectness_negatives` of an OLN, see :class:`OLNBox`) unless `config` says so.
        data_weights: how often images of each data set are drawn, in proportion to each other;
            default: each image equally often.
        pseudo_weight: how much an annotation counts in the losses that an audit added without a
            review (`oln-d2 audit --accept-above`); others count 1. Only OLN looks at it.
        val_json, val_images: data to evaluate on, with all categories; what counts as seen are the
            categories of all training data together.
        config: arguments of :func:`build_detector`, plain values. Those that are not given are as
            `weights` say, if they do.
        weights: a checkpoint to start from.
        weights_backbone: weights of the backbone to start from, see :func:`build_detector`.
        epochs: how often each image is seen.
        batch_size: images of an iteration, of all processes together.
        accumulate: parts that a batch is computed in, one after another, for less memory.
        lr: default 0.02 for 16 images, in proportion to the batch size.
        warmup: iterations in which the rate rises linearly.
        schedule: "step", as in the paper, or "cosine", see :func:`lr_factor`.
        clip: largest norm of the gradients; default: any.
        ema: decay of a moving average of the weights, which is what is evaluated and kept.
        scale_jitter: least and greatest factor of an image's size, drawn for each; what then goes
            beyond the image's own size is cut off.
        group_by_aspect: images of similar shape share batches.
        precision: "float32"; "bfloat16" or "float16" mixed with it, where the device computes that;
            or "auto": bfloat16 where it does, else float32.
        channels_last: the order in memory that convolutions may be faster in.
        amp: the same as precision "float16".
        device: default "cuda" if there is one, else "cpu".
        devices: processes on this machine, each with a device of its own (or a share of the CPU).
        num_nodes: machines, where a scheduler, as SLURM, starts this on each.
        workers: processes that load images, for each training process.
        checkpoint_every: iterations.
        evaluate_every: iterations; default: at the end only.
        patience: evaluations without a better one after which training ends early.
        loggers: some of "csv", "tensorboard", "wandb" and "mlflow".
        seed: for weights, order, flips, scales and samples. On a CPU the same seed gives the same
            model, resumed or not.
        resume: go on from `checkpoint.pth` if there is one; other weights are then not read.

    Returns:
        of the evaluation; None without, and on all processes but the first.

    Raises:
        InputError: arguments or files that cannot be used, before training starts; an image that
            cannot, when its turn comes.
        ImportError: the extra `train` is not installed.
        FloatingPointError: training has diverged. What was saved before is kept.
    """
    with needs("training", "train"):
        from oln_d2.standalone.training import LOGGERS, Evaluation, Training, make_trainer

    if "LOCAL_WORLD_SIZE" in os.environ:  # of torchrun
        devices = int(os.environ["LOCAL_WORLD_SIZE"])
        num_nodes = int(os.environ["WORLD_SIZE"]) // devices
    path = os.path.join(output, "checkpoint.pth")
    resumed = os.path.exists(path)
    if resumed and not resume:
        raise InputError(
            f"{path}: exists; resume the run (--resume) or choose another output folder"
        )
    config = {n: tuple(v) if isinstance(v, list) else v for n, v in (config or {}).items()}
    if weights is not None:
        if weights_backbone is not None:
            raise InputError("weights hold those of the backbone, too; leave out weights_backbone")
        # A model that goes on is built as it was, unless something else is asked for.
        config = {**read_own_checkpoint(path if resumed else weights).get("config", {}), **config}
    if resumed:
        weights = weights_backbone = None
    architecture = config.get("architecture", "oln_box")
    elsewhere = "another one here; OLN-Mask is trained with train_net.py"
    check_limits(
        pseudo_weight=(pseudo_weight, POSITIVE),
        epochs=(epochs, POSITIVE),
        batch_size=(batch_size, POSITIVE_INT),
        accumulate=(accumulate, POSITIVE_INT),
        lr=(lr, NOT_NEGATIVE),
        warmup=(warmup, NOT_NEGATIVE),
        schedule=(schedule, one_of("step", "cosine")),
        clip=(clip, POSITIVE),
        ema=(ema, FRACTION),
        scale_jitter=(scale_jitter, Limit(_is_range, "two numbers above 0, ascending")),
        precision=(precision, one_of("float32", "auto", "bfloat16", "float16")),
        devices=(devices, POSITIVE_INT),
        num_nodes=(num_nodes, POSITIVE_INT),
        workers=(workers, NOT_NEGATIVE),
        checkpoint_every=(checkpoint_every, POSITIVE_INT),
        evaluate_every=(evaluate_every, POSITIVE_INT),
        patience=(patience, POSITIVE_INT),
        seed=(seed, Limit(lambda seed: 0 <= seed < 2**64, "0 or more, below 2**64")),
        architecture=(architecture, Limit(lambda name: name != "oln_mask", elsewhere)),
    )
    check_limits(architecture=(architecture, one_of(*DEFAULTS)))
    for name, values in (("data_weights", data_weights), ("more_data", more_data)):
        if isinstance(values, str) or not isinstance(values, Sequence | None):
            raise InputError(f"{name} is {values!r}; it has to be a list")
    for source in more_data:
        if isinstance(source, str) or len(source) != 3:
            raise InputError(f"more_data: {source!r} is not [annotations, folder, seen categories]")
    for weight in data_weights or ():
        check_limits(data_weights=(weight, POSITIVE))
    if data_weights and len(data_weights) != 1 + len(more_data):
        raise InputError(
            f"data_weights are {len(data_weights)} for {1 + len(more_data)} data sets; give one "
            "for each"
        )
    for name in loggers:
        check_limits(loggers=(name, one_of(*LOGGERS)))
    shares = devices * num_nodes * accumulate
    multiple = f"a multiple of {shares}, the processes times the parts of a batch"
    check_limits(batch_size=(batch_size, Limit(lambda size: size % shares == 0, multiple)))
    lr = 0.02 * batch_size / 16 if lr is None else lr
    where = usable_device(device, devices)
    if amp:
        if where.type != "cuda" or precision not in ("float32", "float16"):
            raise InputError(
                f"amp is precision float16 on a GPU; here precision is {precision} and the device "
                f"{where}; leave amp out"
            )
        precision = "float16"
    if precision == "auto":
        precision = "bfloat16" if computes_bfloat16(where) else "float32"
    usable_dtype(precision, where, "precision")
    if config.get("norm") == "BN" and devices * num_nodes > 1:
        raise InputError("norm is BN, which learns in one process only; use FrozenBN, or GN")
    if (val_json is None) != (val_images is None):
        raise InputError("val_json and val_images go together; give both or neither")
    if val_json is None and (evaluate_every or patience):
        raise InputError("evaluate_every and patience need val_json and val_images; give them")
    if patience and not evaluate_every:
        raise InputError("patience counts evaluations; give evaluate_every, too")

    sources = [
        CocoSource(train_json, images, split),
        *(CocoSource(*source) for source in more_data),
    ]
    seen_of = [seen_names(source.seen) for source in sources]
    if len(set(map(frozenset, seen_of))) > 1 and "objectness_negatives" in DEFAULTS[architecture]:
        config.setdefault("objectness_negatives", False)

    max_size = {**DEFAULTS[architecture], **config}["max_size"]
    if pseudo_weight != 1 and not architecture.startswith("oln"):
        raise InputError(
            f"pseudo_weight is {pseudo_weight}, but only OLN's losses look at it, not those of "
            f"{architecture}; leave it out"
        )
    dataset = CocoImages(sources, max_size, training=True, pseudo_weight=pseudo_weight)
    iterations = max(round(epochs * len(dataset) / batch_size), 1)
    torch.manual_seed(seed)
    try:
        model = build_detector(**config, weights_backbone=weights_backbone)
    except InputError as error:
        if weights is None:
            raise
        raise InputError(f"{error} (with the settings of {weights})") from None
    if weights is not None:
        load_checkpoint(model, weights)
    model.train()
    if channels_last:
        model = model.to(memory_format=torch.channels_last)
    # What a resumed run has to share with the run that it continues, to become the same.
    settings = {
        "seen": sorted({name for names in seen_of for name in names}),
        "digest of the training data": dataset.digest(),
        **model.config,
        "number of processes": devices * num_nodes,
        **dict(epochs=epochs, iterations=iterations, batch_size=batch_size, accumulate=accumulate),
        **dict(lr=lr, warmup=warmup, schedule=schedule, clip=clip, ema=ema, seed=seed),
        **dict(data_weights=data_weights and list(data_weights), group_by_aspect=group_by_aspect),
        **dict(scale_jitter=scale_jitter and list(scale_jitter)),
        **dict(precision=precision, channels_last=channels_last),
        **dict(evaluate_every=evaluate_every, patience=patience),
    }
    content = _read_run(path, settings) if resumed else {}
    start = content.get("global_step", 0)
    evaluation = val_dataset = None
    if val_json is not None and val_images is not None:
        # Read now, so that mistakes in it show before the training; once, since the content is
        # shared with the data set while `ground_truth` is held.
        seen = _seen_in(val_json, settings["seen"]) if more_data else split
        ground_truth = GroundTruth.load(val_json, seen)
        val_dataset = CocoImages([CocoSource(val_json, val_images, seen)], max_size, training=False)
        if len(val_dataset) < devices * num_nodes:
            raise InputError(
                f"{val_json}: has {len(val_dataset)} images for {devices * num_nodes} processes; "
                "use fewer, or more images"
            )
        evaluation = Evaluation(val_dataset, ground_truth, output)
    trainer = make_trainer(
        settings,
        output,
        evaluation,
        checkpoint_every,
        loggers,
        start,
        _machine(where, devices, num_nodes),
    )
    rank, world_size = trainer.global_rank, trainer.world_size
    sampler = TrainingBatches(
        dataset.lengths,
        batch_size // accumulate,
        range(start * accumulate, iterations * accumulate),
        seed,
        min_sizes=model.transform.min_size,
        weights=data_weights,
        zooms=scale_jitter,
        groups=aspect_groups(dataset.sizes) if group_by_aspect else None,
        rank=rank,
        world_size=world_size,
    )
    loading = {"num_workers": workers, "pin_memory": where.type == "cuda"}
    batches = Loader(dataset, iterations * accumulate, batch_sampler=sampler, **loading)
    if trainer.is_global_zero:
        make_folder(output)
    with lock_folder(output) if trainer.is_global_zero else contextlib.nullcontext():
        if trainer.is_global_zero:
            begin = f"resumed after {start}" if resumed else "from the start"
            print(
                f"{plural(len(dataset), 'image')}, {iterations} iterations of {batch_size}, "
                f"{begin}, on {where}",
                flush=True,
            )
        training = Training(model, settings, path, start)
        tests = None
        if val_dataset is not None:
            own = range(rank, len(val_dataset), world_size)
            views = [View(index, model.transform.min_size[-1]) for index in own]
            tests = Loader(val_dataset, len(views), sampler=views, **loading)
        if start < iterations and not content.get("stopped"):
            meanwhile = tests if evaluate_every else None
            goes_on = {"ckpt_path": path, "weights_only": True} if resumed else {}
            try:
                _run(trainer, "fit", training, batches, meanwhile, **goes_on)
            except FloatingPointError as error:
                raise FloatingPointError(
                    f"{error}, in another output folder; {path}, if it is there, is good as "
                    "weights to start from"
                ) from None
        else:
            load_parameters(model, content["model"], path)
        if trainer.is_global_zero:
            final = os.path.join(output, "model_final.pth")
            save_checkpoint(model, final, settings=settings, processor=processor(where))
        if tests is None or evaluation is None:
            return None
        if evaluation.step != trainer.global_step:  # not just done
            _run(trainer, "validate", training, tests, verbose=False)
        return evaluation.result if trainer.is_global_zero else None


def _machine(device: torch.device, devices: int, num_nodes: int) -> dict[str, Any]:
    """Arguments of Lightning's `Trainer`."""
    from pytorch_lightning.strategies import DDPStrategy

    machine: dict[str, Any] = {
        "accelerator": {"cuda": "gpu"}.get(device.type, device.type),
        "devices": devices if device.index is None else [device.index],
        "num_nodes": num_nodes,
    }
    if devices * num_nodes > 1:
        machine["strategy"] = DDPStrategy(
            # What is gathered of an evaluation goes by way of the CPU, and may take its time.
            process_group_backend="cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
            timeout=datetime.timedelta(hours=2),
            broadcast_buffers=False,  # those of frozen norms do not change
        )
    return machine


def _run(trainer: Any, work: str, *args: Any, **kwargs: Any) -> None:
    """
    `trainer.fit` or `trainer.validate`. Ctrl-C and SIGTERM both are a KeyboardInterrupt, and no
    process that was started here outlives an error.
    """
    handler = signal.getsignal(signal.SIGINT)
    try:
        with warnings.catch_warnings():
            # Of loaders that cannot be resumed (ours starts where it has to), few workers, folders.
            warnings.filterwarnings("ignore", module=r"(pytorch_lightning|lightning_fabric)\.")
            getattr(trainer, work)(*args, **kwargs)
    except BaseException as error:
        signal.signal(signal.SIGINT, handler)  # Lightning leaves it ignored
        if hasattr(trainer.strategy.launcher, "kill"):  # it has started processes
            trainer.strategy.launcher.kill(signal.SIGKILL)
        if interrupted(error):
            raise KeyboardInterrupt from None
        raise


def _is_range(values: Sequence[float]) -> bool:
    return len(values) == 2 and 0 < values[0] <= values[1] < math.inf


def usable_device(name: str | None, devices: int = 1) -> torch.device:
    """
    Args:
        name: PyTorch's; None: "cuda" if there is one, else "cpu".
        devices: processes of this machine.

    Raises:
        InputError: it is not there, or there are not so many.
    """
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        own = int(os.environ.get("LOCAL_RANK", 0)) if devices > 1 and device.type == "cuda" else 0
        torch.zeros(1, device=torch.device("cuda", own) if own else device).item()
    except (RuntimeError, AssertionError) as error:
        raise InputError(
            f"device {name} cannot be used ({str(error).splitlines()[0]}); use cpu, or cuda with "
            "one process for each GPU"
        ) from None
    if device.index is not None and devices > 1:
        raise InputError(f"device is {name}, and devices {devices}; leave out one of them")
    if device.type == "cuda" and devices > torch.cuda.device_count():
        raise InputError(
            f"devices is {devices}, and PyTorch finds {torch.cuda.device_count()} GPUs here; give "
            "as many at most"
        )
    return device


def _seen_in(json_file: StrPath, names: Sequence[str]) -> list[str]:
    """Those of `names` that are categories of a COCO file."""
    there = {c["name"].strip().casefold() for c in load_coco(json_file)["categories"]}
    return [name for name in names if name.strip().casefold() in there]


def _read_run(path: StrPath, settings: dict[str, Any]) -> dict[str, Any]:
    """The checkpoint of a run that has these settings."""
    content = read_own_checkpoint(path)
    if "loops" not in content:
        raise InputError(
            f"{path}: is no checkpoint to resume from, or of an earlier version; give it as "
            "weights to start from"
        )
    saved = content["settings"]
    for name in {**settings, **saved}:
        old, new = saved.get(name), settings.get(name)
        if old != new:
            raise InputError(
                f"{path}: was trained with {name} {old}, not {new}; resume with the same settings, "
                "or choose another output folder"
            )
    return content
