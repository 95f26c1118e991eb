"""
Training on COCO-format data, on one or several processes. Model, losses, data and evaluation are
ours; the loop and all around it is PyTorch Lightning's.
"""

import logging
import math
import os
import signal
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
import torch.distributed as dist
from pytorch_lightning import callbacks, loggers
from pytorch_lightning.plugins.io import TorchCheckpointIO
from torch import nn

from oln_d2.checks import InputError, list_losses
from oln_d2.evaluation.coco_results import write_results
from oln_d2.evaluation.ground_truth import GroundTruth
from oln_d2.evaluation.open_world import OpenWorldRecall
from oln_d2.evaluation.result import GROUPS, OpenWorldResult
from oln_d2.files import StrPath
from oln_d2.precision import processor
from oln_d2.scores import SCORES
from oln_d2.standalone.checkpoint import write_checkpoint
from oln_d2.standalone.data import CocoImages, mix_seed
from oln_d2.standalone.models import DIVERGED, detect, training_losses
from oln_d2.standalone.names import detectron2_name
from oln_d2.standalone.schedule import lr_factor, moving_average

METRIC = "AR@100 {}"  # of a group of objects
MOMENTUM = 0.9
WEIGHT_DECAY = 1e-4


class Training(pl.LightningModule):
    """
    What a step of training, its optimizer, an evaluation and a checkpoint are.

    Args:
        model: made by :func:`build_detector`.
        settings: what a resumed run has to share with the run that it continues; of them are used
            `iterations`, `lr`, `warmup`, `schedule` and `seed`.
        path: of the checkpoint that is written, and maybe resumed from.
        start: iterations done before.
    """

    def __init__(self, model: nn.Module, settings: dict[str, Any], path: str, start: int):
        super().__init__()
        self.model = model
        self.settings = settings
        self.path = path
        self.start = start

    def setup(self, stage: str) -> None:
        if self.trainer.world_size > 1:
            starts = [None] * self.trainer.world_size
            dist.all_gather_object(starts, self.start)
            if len(set(starts)) > 1:
                raise InputError(
                    f"{self.path}: is not the same file for all processes, which would start at "
                    f"iterations {starts}; put the output folder where all nodes share it"
                )

    def configure_optimizers(self) -> Any:
        """Norms do not decay, as in Detectron2."""
        kinds = nn.GroupNorm, nn.BatchNorm2d, nn.LayerNorm
        norms = {p for m in self.modules() if isinstance(m, kinds) for p in m.parameters()}
        learning = [p for p in self.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in learning if p not in norms], "weight_decay": WEIGHT_DECAY},
            {"params": [p for p in learning if p in norms], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.SGD(groups, lr=self.settings["lr"], momentum=MOMENTUM)
        shape = [self.settings[name] for name in ("iterations", "warmup", "schedule")]
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: lr_factor(i, *shape))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        # Samples follow from the iteration, not from what was drawn before a resume.
        torch.manual_seed(mix_seed(self.settings["seed"], 1 + self.global_rank, batch_idx))

    def training_step(self, batch: list[Any], batch_idx: int) -> torch.Tensor:
        try:
            losses = training_losses(self.model, *zip(*batch))
            # One transfer: each `.item()` synchronises.
            values = torch.stack([value.detach() for value in losses.values()]).tolist()
            found = dict(zip(losses, values))
            if not math.isfinite(sum(values)):
                raise FloatingPointError(
                    f"the losses are NaN or infinite ({list_losses(found)}): {DIVERGED}"
                )
        except FloatingPointError as error:
            names = ", ".join(target["name"] for _, target in batch)
            raise FloatingPointError(
                f"At iteration {self.global_step}, on {names}, {error}"
            ) from None
        self.log_dict(found, prog_bar=True, batch_size=len(batch))
        return sum(losses.values())

    def validation_step(self, batch: list[Any], batch_idx: int) -> Any:
        [(pixels, target)] = batch
        with torch.autocast(self.device.type, enabled=False):  # as it is used later
            (found,) = detect(self.model, [pixels], [tuple(target["size"].tolist())])
        return found

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        state = checkpoint.pop("state_dict")
        if not all(value.isfinite().all() for value in state.values()):
            where = f"Weights are NaN or infinite after iteration {self.global_step - 1}"
            raise FloatingPointError(f"{where}: {DIVERGED}")
        checkpoint["model"] = {detectron2_name(n[len("model.") :]): v for n, v in state.items()}
        checkpoint.update(config=self.model.config, settings=self.settings)
        checkpoint.update(processor=processor(self.device), stopped=self.trainer.should_stop)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        names = self.model.state_dict()
        own = {f"model.{name}": checkpoint["model"][detectron2_name(name)] for name in names}
        checkpoint["state_dict"] = own


class Evaluation(callbacks.Callback):
    """
    Scores what a model finds on all processes, by the protocol "xclass".

    Args:
        dataset: all images of `ground_truth`, which has annotations of all categories.
        output: the folder for the detections and the metrics.

    Attributes:
        metric: what `patience` and the best model go by.
    """

    def __init__(self, dataset: CocoImages, ground_truth: GroundTruth, output: StrPath):
        self.dataset = dataset
        self.ground_truth = ground_truth
        self.output = output
        self.found: dict[int, Any] = {}
        self.metric = METRIC.format("seen" if ground_truth.seen.all() else "unseen")
        self.result: OpenWorldResult | None = None  # of the main process
        self.step = -1  # at which it was

    def on_validation_batch_end(
        self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        index = trainer.global_rank + batch_idx * trainer.world_size
        boxes = outputs["boxes"].double().cpu().numpy()
        self.found[self.dataset.image_ids[index]] = (  # as `write_results` takes it
            np.hstack([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]]),
            outputs["scores"].double().cpu().numpy(),
            None,
            {s.field: outputs[s.attribute].cpu().numpy() for s in SCORES if s.attribute in outputs},
        )

    def on_validation_epoch_end(self, trainer: pl.Trainer, module: Any) -> None:
        found, self.found, self.step = self.found, {}, trainer.global_step
        if trainer.world_size > 1:
            parts: Any = [None] * trainer.world_size if trainer.is_global_zero else None
            dist.gather_object(found, parts)
            found = {image: value for part in parts or () for image, value in part.items()}
        values = []
        if trainer.is_global_zero:
            recall = OpenWorldRecall(self.ground_truth)
            for image, (boxes, scores, *_) in found.items():
                recall.update(image, boxes, scores, box_format="xywh")
            self.result = recall.result()
            values = [self.result.ar(100, group) for group in GROUPS]
            rows = ((image, *found[image]) for image in sorted(found))
            write_results(os.path.join(self.output, "coco_instances_results.json"), rows)
            self.result.to_json(os.path.join(self.output, "open_world_results.json"))
        for group, value in zip(GROUPS, trainer.strategy.broadcast(values)):
            module.log(METRIC.format(group), value)


class Checkpoint(callbacks.Checkpoint):
    """
    Writes `checkpoint.pth` after every so many iterations and the last; where an evaluation is due
    then, after that, so that a resumed run counts it, too.
    """

    def __init__(self, path: str, every: int, evaluate_every: int | None):
        self.path = path
        self.every = every
        self.evaluate_every = evaluate_every

    def _save(self, trainer, evaluated):
        step = trainer.global_step
        is_due = step % self.every == 0 or step == trainer.max_steps or trainer.should_stop
        is_evaluated = bool(self.evaluate_every) and step % self.evaluate_every == 0
        if is_due and is_evaluated == evaluated:
            trainer.save_checkpoint(self.path)

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if (args[-1] + 1) % trainer.accumulate_grad_batches == 0:
            self._save(trainer, evaluated=False)

    def on_validation_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.state.fn == "fit":
            self._save(trainer, evaluated=True)


class Best(callbacks.ModelCheckpoint):
    """`model_best.pth`, also if the output folder has been moved between two runs."""

    FILE_EXTENSION = ".pth"

    def __init__(self, output: str, metric: str):
        super().__init__(output, "model_best", metric, mode="max", enable_version_counter=False)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        path = os.path.join(str(self.dirpath), "model_best.pth")
        state = {**state_dict, "dirpath": self.dirpath}
        if scores := list(state["best_k_models"].values()):  # one
            state.update(best_model_path=path, kth_best_model_path=path)
            state["best_k_models"] = dict(zip([path], scores))
        super().load_state_dict(state)
        # Lightning forgets it; a resumed training then leaves another checkpoint than an unbroken.
        self.current_score = state_dict["current_score"]


class WholeFiles(TorchCheckpointIO):
    """A file is written whole or not at all."""

    def save_checkpoint(self, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
        rest = dict(checkpoint)
        write_checkpoint(path, rest.pop("model"), **rest)


class Terminable(callbacks.Callback):
    """
    SIGTERM, which SLURM and `kill` send, interrupts as Ctrl-C does. Lightning's own handler tells
    the other processes first, amid a step in which they wait for something else, and all hang.
    """

    def on_train_start(self, *args: Any) -> None:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, _interrupt)  # until Lightning restores what was there

    on_validation_start = on_train_start


def _interrupt(number: int, frame: Any) -> None:
    signal.signal(number, signal.SIG_IGN)  # a second one must not interrupt the tidying up
    raise KeyboardInterrupt


class Progress(callbacks.TQDMProgressBar):
    """One bar for the whole run, however many epochs that is."""

    def on_train_start(self, *args: Any) -> None:
        super().on_train_start(*args)
        bar = self.train_progress_bar  # Lightning sets it up at an epoch's start, after no resume
        bar.reset(self.trainer.num_training_batches)
        bar.initial = bar.n = self.trainer.fit_loop.epoch_loop.batch_progress.current.ready
        bar.set_description("training")

    def on_train_epoch_start(self, *args: Any) -> None:
        pass

    def get_metrics(self, *args: Any) -> dict[str, Any]:
        return {name: v for name, v in super().get_metrics(*args).items() if name != "v_num"}


LOGGERS = {
    "csv": lambda folder, start: loggers.CSVLogger(folder, "csv", start),
    "tensorboard": lambda folder, start: loggers.TensorBoardLogger(folder, "tensorboard", start),
    "wandb": lambda folder, start: loggers.WandbLogger(save_dir=folder, project="oln-d2"),
    "mlflow": lambda folder, start: loggers.MLFlowLogger("oln-d2", save_dir=f"{folder}/mlruns"),
}
PRECISIONS = {"float32": "32-true", "bfloat16": "bf16-mixed", "float16": "16-mixed"}


def make_trainer(
    settings: dict[str, Any],
    output: StrPath,
    evaluation: Evaluation | None,
    checkpoint_every: int,
    logger_names: Sequence[str],
    start: int,
    machine: dict[str, Any],
) -> pl.Trainer:
    """
    Args:
        settings: see :class:`Training`; of them are used `iterations`, `precision`, `accumulate`,
            `clip`, `ema`, `evaluate_every` and `patience`.
        start: iterations done before.
        machine: arguments of Lightning's `Trainer`: devices and how they work together.
        output, others: see :func:`oln_d2.standalone.train`.
    """
    output, parts = os.fspath(output), settings["accumulate"]
    evaluate_every = settings["evaluate_every"]
    hooks: list[Any] = [Terminable(), Progress(refresh_rate=10)]
    if settings["ema"]:
        # Not Lightning's `EMAWeightAveraging`, whose decay is fixed; and with a delayed start it
        # would evaluate the weights at the start.
        average = moving_average(settings["ema"])
        hooks.append(callbacks.WeightAveraging(multi_avg_fn=average))
    if evaluation is not None:
        hooks.append(evaluation)
        if patience := settings["patience"]:
            hooks.append(callbacks.EarlyStopping(evaluation.metric, patience=patience, mode="max"))
        if evaluate_every:
            hooks.append(Best(output, evaluation.metric))
    path = os.path.join(output, "checkpoint.pth")
    hooks.append(Checkpoint(path, checkpoint_every, evaluate_every))
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)  # what it found, and tips
    return pl.Trainer(
        precision=PRECISIONS[settings["precision"]],
        plugins=[WholeFiles()],
        callbacks=hooks,
        logger=[LOGGERS[name](output, f"from_{start}") for name in logger_names],
        log_every_n_steps=20,
        max_epochs=-1,
        max_steps=settings["iterations"],
        val_check_interval=evaluate_every * parts if evaluate_every else 1.0,
        check_val_every_n_epoch=None if evaluate_every else 1,
        num_sanity_val_steps=0,
        accumulate_grad_batches=parts,
        gradient_clip_val=settings["clip"],
        use_distributed_sampler=False,  # ours shares by itself
        enable_model_summary=False,
        default_root_dir=output,
        **machine,
    )
