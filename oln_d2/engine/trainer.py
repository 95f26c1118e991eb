"""OLN's additions to Detectron2's trainer and checkpointer, for `train_net.py`."""

import contextlib
import difflib
import functools
import glob
import json
import logging
import os
import time
import weakref
from collections.abc import Callable, Iterator
from http.client import HTTPException
from typing import Any

import detectron2.utils.comm as comm
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode
from detectron2.data import (
    DatasetCatalog,
    DatasetMapper,
    MetadataCatalog,
    build_detection_test_loader,
)
from detectron2.engine import AMPTrainer, DefaultTrainer, hooks
from detectron2.evaluation import COCOEvaluator, DatasetEvaluator
from detectron2.modeling.poolers import ROIPooler
from PIL import EpsImagePlugin
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader

from oln_d2.checks import InputError, interrupted, is_full, list_losses
from oln_d2.data.coco import load_coco
from oln_d2.data.images import open_annotated
from oln_d2.engine.batches import (
    SeededBatches,
    build_loader,
    build_training_mapper,
    check_jitter,
)
from oln_d2.engine.datasets import (
    check_training_sets,
    load_test_set,
    load_training_sets,
    register_own,
)
from oln_d2.engine.evaluator import OpenWorldEvaluator, SeenCOCOEvaluator
from oln_d2.files import read_json, write_file
from oln_d2.modeling.rpn import DIVERGED
from oln_d2.precision import usable_dtype
from oln_d2.standalone.checkpoint import (
    another_model,
    read_checkpoint,
    read_own_checkpoint,
    write_checkpoint,
)
from oln_d2.standalone.data import mix_seed
from oln_d2.standalone.schedule import moving_average

logger = logging.getLogger(__name__)


def _has_sentence(error):
    """Whether one sentence tells a user of an error."""
    full = isinstance(error, OSError) and is_full(error)
    return full or isinstance(error, (InputError, FloatingPointError)) or interrupted(error)


def _in_float32(pooler, args):
    """In half precision, ROIAlign would round the boxes as well, by up to pixels."""
    features, *rest = args
    return [feature.float() for feature in features], *rest


def _freeze(model, name):
    """See MODEL.FROZEN in `oln_d2.config`."""
    try:
        part = model.get_submodule(name)
    except AttributeError:
        parts = ", ".join(own for own, _ in model.named_children())
        raise InputError(
            f"MODEL.FROZEN: the model has no part {name}; its largest are {parts}"
        ) from None
    part.requires_grad_(False)
    # The trainer puts all of the model into training mode, where batch norms would adapt.
    part.register_forward_pre_hook(lambda module, _: module.eval() and None)


@contextlib.contextmanager
def no_model_of_config() -> Iterator[None]:
    """Raises InputError where Detectron2 cannot build a model in its body: by the config."""
    try:
        yield
    except (InputError, ImportError):
        raise
    except (AssertionError, AttributeError, LookupError, TypeError, ValueError) as error:
        first = str(error).strip().partition("\n")[0]
        raise InputError(
            f"the config describes no model ({type(error).__name__}: {first}); compare its MODEL "
            "with that of a recipe in configs/"
        ) from error


class BestCheckpointer(hooks.BestCheckpointer):
    """
    Detectron2's hook forgets the best metric when a run is resumed and then overwrites the best
    checkpoint with a worse one. This one keeps the metric in a file beside the checkpoint.
    """

    @property
    def _record(self):
        return os.path.join(self._checkpointer.save_dir, f"{self._file_prefix}.json")

    def before_train(self):
        if not os.path.isfile(self._record):
            return
        if self.trainer.start_iter == 0:  # of another run in the same folder
            os.remove(self._record)
            return
        record = read_json(self._record, dict)
        if record.get("metric") == self._val_metric:
            self.best_metric, self.best_iter = record["value"], record["iteration"]

    def _update_best(self, val, iteration):
        updated = super()._update_best(val, iteration)
        if updated:
            record = {"metric": self._val_metric, "value": float(val), "iteration": iteration}
            write_file(self._record, json.dumps(record))
        return updated


class EMA(hooks.HookBase):
    """
    Keeps the moving average of a model's weights and buffers.

    Args:
        model: what is trained, not wrapped for several processes.
        decay: see SOLVER.EMA_DECAY in `oln_d2.config`.

    Attributes:
        average (nn.Module): the average. Checkpoints hold it as the model, and the model as this
            hook's state.
    """

    def __init__(self, model: nn.Module, decay: float):
        self._model = model
        self._averaged = AveragedModel(model, multi_avg_fn=moving_average(decay), use_buffers=True)
        self.average = self._averaged.module

    def before_train(self):
        if self._averaged.n_averaged == 0:  # it got the weights to start from
            self._model.load_state_dict(self.average.state_dict())

    def after_step(self):
        self._averaged.update_parameters(self._model)

    def state_dict(self):
        return {"model": self._model.state_dict(), "steps": self._averaged.n_averaged}

    def load_state_dict(self, state):
        self._model.load_state_dict(state["model"])
        self._averaged.n_averaged.copy_(state["steps"])


class AutocastTrainer(AMPTrainer):
    """
    :class:`AMPTrainer`, which needs CUDA, on any device; also in float32, with `precision` None.
    It names the images that make the losses NaN or infinite.
    """

    def run_step(self):
        start = time.perf_counter()
        data = next(self._data_loader_iter)
        data_time = time.perf_counter() - start
        device = next(self.model.parameters()).device.type
        try:
            with torch.autocast(device, self.precision, enabled=self.precision is not None):
                losses = self.model(data)
            self.optimizer.zero_grad()
            self.grad_scaler.scale(sum(losses.values())).backward()
            self.after_backward()
            # One transfer: each `.item()` makes a GPU wait.
            values = torch.stack([loss.detach() for loss in losses.values()]).cpu()
            values = dict(zip(losses, values))
            if not sum(values.values()).isfinite():
                raise FloatingPointError(
                    f"the losses are NaN or infinite ({list_losses(values)}): {DIVERGED}"
                )
        except FloatingPointError as error:
            names = ", ".join(str(image.get("file_name")) for image in data)
            raise FloatingPointError(f"At iteration {self.iter}, on {names}, {error}") from None
        self._write_metrics(values, data_time)
        self.grad_scaler.step(self.optimizer)
        self.grad_scaler.update()

    def load_state_dict(self, state_dict):
        # A run in another precision has none.
        scaler = state_dict.get("grad_scaler") or self.grad_scaler.state_dict()
        super().load_state_dict({**state_dict, "grad_scaler": scaler})


class SafeCheckpointer(DetectionCheckpointer):
    """
    Reads files without executing code that may be in them, and says what is wrong with one; those
    of Caffe2 and pycls as :class:`DetectionCheckpointer` does. Writes files whole or not at all.
    """

    def save(self, name: str, **kwargs: Any) -> None:
        """
        Raises:
            InputError: the file cannot be written.
            FloatingPointError: weights are NaN or infinite.
        """
        if not self.save_to_disk:
            return
        if not all(value.isfinite().all() for value in self.model.state_dict().values()):
            raise FloatingPointError(
                f"Weights are NaN or infinite, {name} is not written: {DIVERGED}"
            )
        content = {key: value.state_dict() for key, value in self.checkpointables.items()}
        path = os.path.join(self.save_dir, f"{name}.pth")
        logger.info(f"Saving checkpoint to {path}")
        write_checkpoint(path, self.model.state_dict(), **content, **kwargs)
        self.tag_last_checkpoint(os.path.basename(path))

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        write_file(os.path.join(self.save_dir, "last_checkpoint"), last_filename_basename)

    def load(self, path: str, checkpointables: list[str] | None = None) -> dict[str, Any]:
        """
        Raises:
            InputError: no such file, an address out of reach, or see :func:`read_checkpoint`.
        """
        self._path = path
        try:
            local = path and self.path_manager.get_local_path(path.partition("?")[0])
        except (OSError, HTTPException, ValueError) as error:
            raise InputError(
                f"{path}: cannot be fetched ({error}); fetch it elsewhere and give the file, or to "
                'train MODEL.WEIGHTS "" to start from none'
            ) from None
        if path and not os.path.isfile(local):
            raise InputError(f"{path}: no such file; MODEL.WEIGHTS is a file, a URL or empty")
        return super().load(path, checkpointables)

    def _load_file(self, filename):
        if not filename.endswith((".pkl", ".pyth")):
            return super()._load_file(filename)
        content = read_own_checkpoint(filename)
        if filename.endswith(".pyth"):
            content.update(__author__="pycls", matching_heuristics=True)
        elif not any("." in name for name in content["model"]):
            parameters = content["model"].items()
            content["model"] = {n: value for n, value in parameters if not n.endswith("_momentum")}
            content.update(__author__="Caffe2", matching_heuristics=True)
        return content

    def _torch_load(self, f):
        return read_own_checkpoint(f)

    def last_whole_file(self) -> str:
        """
        Returns:
            the checkpoint to resume from: the one that `last_checkpoint` names or, where that
            cannot be read, the newest that can, which is then named there.

        Raises:
            InputError: none can be read.
        """
        problem = None
        try:
            named = self.get_checkpoint_file()
        except ValueError:  # of bytes that are no text
            named = os.path.join(self.save_dir, "last_checkpoint")
        others = sorted(glob.glob(os.path.join(glob.escape(self.save_dir), "model_[0-9]*.pth")))
        for path in dict.fromkeys([named, *reversed(others)]):
            try:
                read_checkpoint(path)
            except InputError as error:
                problem = problem or error
                continue
            if problem:
                logger.warning(f"{problem}. The run goes on from {path}, the newest readable one")
                if comm.is_main_process():
                    self.tag_last_checkpoint(os.path.basename(path))
            return path
        raise InputError(
            f"{problem}; no other checkpoint there can be read; start without --resume"
        )


class StrictCheckpointer(SafeCheckpointer):
    """Refuses a checkpoint that does not hold every parameter of the model, in its shape."""

    def load(self, path: str, checkpointables: list[str] | None = None) -> dict[str, Any]:
        """
        Raises:
            InputError: as :class:`SafeCheckpointer`; also no path, or another model's checkpoint.
        """
        if not path:
            raise InputError(
                "MODEL.WEIGHTS is empty; give the checkpoint to evaluate, e.g. MODEL.WEIGHTS "
                "output/model_final.pth"
            )
        return super().load(path, checkpointables)

    def _load_model(self, checkpoint):
        found = list(checkpoint["model"])
        incompatible = super()._load_model(checkpoint)
        problems = {
            key: f"{key} has shape {list(shape)} instead of {list(expected)}"
            for key, shape, expected in incompatible.incorrect_shapes
        }
        for key in incompatible.missing_keys:
            problems.setdefault(key, f"{key} is missing")
        if problems:
            remedy = "Use the config file that it was trained with"
            own = set(self.model.state_dict())
            raise another_model(self._path, list(problems.values()), found, own, remedy)
        return incompatible


class BrokenImageError(InputError):
    """An InputError that torch can carry out of a data worker, inside a message of its own."""

    def __init__(self, message: str):
        super().__init__(message.strip().rpartition(f"{type(self).__name__}: ")[2])


class NamingMapper:
    """
    Names the image that a mapper of Detectron2 fails at.

    Args:
        mapper: turns dataset dicts into inputs, see :class:`DatasetMapper`.
    """

    def __init__(self, mapper: Callable[[dict[str, Any]], dict[str, Any]]):
        self.mapper = mapper

    def __call__(self, record: dict[str, Any]) -> dict[str, Any]:
        """
        Raises:
            BrokenImageError: the image is missing, broken or not as large as the record says.
        """
        EpsImagePlugin.gs_binary = False  # Detectron2's reader, too, runs no PostScript
        try:
            return self.mapper(record)
        except Exception as error:  # the readers of the formats raise all kinds
            path, size = record["file_name"], (record["height"], record["width"])
            try:
                _, is_stored = open_annotated(path, size, "its annotation file")
            except InputError as reason:
                raise BrokenImageError(str(reason)) from None
            if is_stored:
                raise BrokenImageError(
                    f"{path}: was annotated as it is stored, but Detectron2 turns it as its EXIF "
                    "says; remove the EXIF orientation from the file, or train with oln-d2 train"
                ) from None
            first = str(error).split("\n")[0]
            raise BrokenImageError(
                f"{path}: Detectron2 cannot use it ({type(error).__name__}: {first}); convert it, "
                "for instance to a new JPEG or PNG"
            ) from error


class Trainer(DefaultTrainer):
    """
    :class:`DefaultTrainer` that evaluates open-world data sets, keeps the checkpoint with the
    highest AR@100 of unseen objects as `model_best.pth`, and logs how many epochs the schedule
    makes. All that is random in an iteration follows from the seed and the iteration: a resumed run
    becomes what an unbroken one would, on a CPU to the last bit.
    """

    def __init__(self, cfg: CfgNode):
        """
        Raises:
            InputError: settings or data that would stop the run later, also the test data.
        """
        if comm.get_world_size() > 1 and cfg.MODEL.DEVICE == "cpu":
            raise InputError(
                "MODEL.DEVICE is cpu: Detectron2 trains on several GPUs, but only on one CPU "
                "process; leave --num-gpus out (--eval-only takes it)"
            )
        amp = cfg.SOLVER.AMP
        key = "SOLVER.AMP.DTYPE" if amp.DTYPE else "SOLVER.AMP.DTYPE (by SOLVER.AMP.ENABLED)"
        name = amp.DTYPE or ("float16" if amp.ENABLED else "")
        dtype = usable_dtype(name, cfg.MODEL.DEVICE, key)
        if not 0 <= cfg.SOLVER.EMA_DECAY < 1:
            raise InputError(
                f"SOLVER.EMA_DECAY is {cfg.SOLVER.EMA_DECAY}; use a number from 0 to below 1"
            )
        if cfg.SOLVER.EMA_DECAY > 0 and cfg.TEST.PRECISE_BN.ENABLED:
            raise InputError(
                "TEST.PRECISE_BN does not reach the average that SOLVER.EMA_DECAY evaluates; set "
                "TEST.PRECISE_BN.ENABLED False or SOLVER.EMA_DECAY 0"
            )
        check_jitter(cfg)
        self.seed = cfg.SEED if cfg.SEED >= 0 else comm.shared_random_seed()
        # Detectron2 would log the traceback of what one sentence says.
        logging.getLogger("detectron2.engine.train_loop").addFilter(
            lambda record: not (record.exc_info and _has_sentence(record.exc_info[1]))
        )
        # All evaluations of the run use those that were checked: the data is read once.
        self.test = functools.partial(self.test, evaluators=self.check_data(cfg))
        super().__init__(cfg)
        scaler = torch.amp.GradScaler(enabled=dtype == torch.float16)
        self._trainer = AutocastTrainer(
            self.model, self.data_loader, self.optimizer, grad_scaler=scaler, precision=dtype
        )

    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        with no_model_of_config():
            model = super().build_model(cfg)
        for module in model.modules():
            if isinstance(module, ROIPooler):
                module.register_forward_pre_hook(_in_float32)
        for name in cfg.MODEL.FROZEN:
            _freeze(model, name)
        if cfg.MODEL.CHANNELS_LAST:
            model = model.to(memory_format=torch.channels_last)
        return model

    def run_step(self) -> None:
        torch.manual_seed(mix_seed(self.seed, comm.get_rank(), self.iter))
        super().run_step()

    def train(self) -> dict[str, Any]:
        """See :class:`DefaultTrainer`."""
        batches = getattr(self.data_loader, "batch_sampler", None)
        if isinstance(batches, SeededBatches):  # a subclass may build another loader
            batches.start, batches.seed = self.start_iter, self.seed
        return super().train()

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "seed": self.seed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.seed = state_dict.get("seed", self.seed)  # older files have none

    @classmethod
    def check_data(cls, cfg: CfgNode, training: bool = True) -> list[DatasetEvaluator]:
        """
        Args:
            training: whether the training data has to be there as well.

        Returns:
            the evaluators of the test data, for :meth:`test`.

        Raises:
            InputError: a data set that is not registered, training sets that do not go together,
                or test data that cannot be used.
        """
        register_own(cfg)
        for name in (*(cfg.DATASETS.TRAIN if training else ()), *cfg.DATASETS.TEST):
            if name not in DatasetCatalog.list():
                near = difflib.get_close_matches(name, DatasetCatalog.list(), cutoff=0.5)
                raise InputError(
                    f"DATASETS: no data set is registered as {name!r}; describe your own with "
                    f"DATASETS.OWN \"[['{name}', 'annotations.json', 'images/', 'seen']]\", or use "
                    f"one of ours such as {', '.join(near) or 'coco_2017_voc_train'}"
                )
            json_file = MetadataCatalog.get(name).get("json_file", "")
            if json_file and "://" not in json_file and not os.path.isfile(json_file):
                raise InputError(
                    f"{json_file}: no such file; the data set {name} is expected there. The "
                    "environment variable DETECTRON2_DATASETS names the folder of all data sets"
                )
        if training:
            check_training_sets(cfg)
        evaluators = [cls.build_evaluator(cfg, name) for name in cfg.DATASETS.TEST]
        if comm.get_local_rank() == 0:
            for name in cfg.DATASETS.TEST:
                load_test_set(cfg, name) if cfg.MODEL.LOAD_PROPOSALS else DatasetCatalog.get(name)
        return evaluators

    @classmethod
    def test(
        cls, cfg: CfgNode, model: nn.Module, evaluators: list[DatasetEvaluator] | None = None
    ) -> dict[str, Any]:
        """See :class:`DefaultTrainer`. `evaluators` do not keep the detections."""
        results = super().test(cfg, model, evaluators)
        for evaluator in evaluators or ():
            evaluator.reset()
        return results

    @classmethod
    def build_evaluator(
        cls, cfg: CfgNode, dataset_name: str, output_folder: str | None = None
    ) -> DatasetEvaluator:
        """
        Raises:
            InputError: a data set that is neither an open-world one nor in COCO format; or one in
                COCO format for a model without classes, whose AP would mean nothing.
        """
        output_folder = output_folder or os.path.join(cfg.OUTPUT_DIR, "inference", dataset_name)
        evaluator_type = MetadataCatalog.get(dataset_name).get("evaluator_type")
        if evaluator_type == "open_world_coco":
            return OpenWorldEvaluator(
                dataset_name, output_folder, protocols=cfg.TEST.OPEN_WORLD_PROTOCOLS
            )
        if evaluator_type == "seen_coco":
            return SeenCOCOEvaluator(dataset_name, output_dir=output_folder)
        if evaluator_type == "coco":
            categories = load_coco(MetadataCatalog.get(dataset_name).json_file)["categories"]
            heads = cfg.MODEL.get(cfg.MODEL.META_ARCHITECTURE.upper(), cfg.MODEL.ROI_HEADS)
            has_classes = cfg.MODEL.META_ARCHITECTURE != "ProposalNetwork"
            if has_classes and heads.NUM_CLASSES == 1 < len(categories):
                raise InputError(
                    f"DATASETS.TEST: {dataset_name} has {len(categories)} categories and the model "
                    f"one, object, which would be scored as {categories[0]['name']!r}; use an "
                    "open-world data set such as coco_2017_voc_val, or describe yours in "
                    "DATASETS.OWN"
                )
            return COCOEvaluator(dataset_name, output_dir=output_folder)
        raise InputError(
            f"DATASETS.TEST: {dataset_name} has evaluator_type {evaluator_type!r}; register it "
            "with oln_d2.register_open_world_coco"
        )

    def build_hooks(self) -> list[hooks.HookBase]:
        cfg, model = self.cfg, self.checkpointer.model  # not wrapped for several processes
        ema = None
        if cfg.SOLVER.EMA_DECAY > 0:
            ema, test = EMA(model, cfg.SOLVER.EMA_DECAY), self.test
            model = ema.average
            self.test = lambda cfg, _: test(cfg, model)
        # In time for the hooks, which keep it.
        self.checkpointer = SafeCheckpointer(
            model, self.cfg.OUTPUT_DIR, trainer=weakref.proxy(self)
        )
        ret = super().build_hooks()
        if ema is not None:
            ret.insert(0, ema)  # before the checkpointer
        task = "box_unseen" if "xclass" in cfg.TEST.OPEN_WORLD_PROTOCOLS else "box_unseen_filtered"
        metric = f"{task}/AR@100"
        kinds = [MetadataCatalog.get(name).get("evaluator_type") for name in cfg.DATASETS.TEST]
        if kinds and kinds[0] != "open_world_coco":
            metric = "bbox/AP"
        if len(cfg.DATASETS.TEST) > 1:
            # The trainer then puts the data set's name before each metric.
            metric = f"{cfg.DATASETS.TEST[0]}/{metric}"
        if comm.is_main_process() and cfg.TEST.EVAL_PERIOD > 0:
            # After the evaluation, before the writer.
            ret.insert(-1, BestCheckpointer(cfg.TEST.EVAL_PERIOD, self.checkpointer, metric))
        return ret

    def resume_or_load(self, resume: bool = True) -> None:
        """
        Raises:
            InputError: a checkpoint that is not there, that is of another model, or that only some
                of the processes find.
        """
        if resume and self.checkpointer.has_checkpoint():
            StrictCheckpointer(self._trainer.model).load(self.checkpointer.last_whole_file())
        comm.synchronize()  # the main process may have named another checkpoint as the last one
        super().resume_or_load(resume)
        starts = comm.all_gather(self.start_iter)
        if len(set(starts)) > 1:
            raise InputError(
                f"{self.cfg.OUTPUT_DIR}: is not the same folder for all processes, which would "
                f"start at iterations {starts}; put OUTPUT_DIR where all machines share it"
            )

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> DataLoader:
        records, sampler = load_training_sets(cfg)
        epochs = cfg.SOLVER.MAX_ITER * cfg.SOLVER.IMS_PER_BATCH / len(records)
        logger.info(
            f"{len(records)} training images, {cfg.SOLVER.IMS_PER_BATCH} a batch: "
            f"{cfg.SOLVER.MAX_ITER} iterations are {epochs:.2f} epochs"
        )
        return build_loader(cfg, records, NamingMapper(build_training_mapper(cfg)), sampler)

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> DataLoader:
        mapper = NamingMapper(DatasetMapper(cfg, is_train=False))
        return build_detection_test_loader(
            load_test_set(cfg, dataset_name), mapper=mapper, num_workers=cfg.DATALOADER.NUM_WORKERS
        )
