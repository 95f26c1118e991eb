"""OLN's additions to Detectron2's trainer and checkpointer, for `train_net.py`."""

import functools
import json
import logging
import os
import urllib.error
from typing import Any

import detectron2.utils.comm as comm
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode
from detectron2.data import (
    DatasetCatalog,
    MetadataCatalog,
    build_detection_train_loader,
    get_detection_dataset_dicts,
)
from detectron2.engine import DefaultTrainer, hooks
from detectron2.evaluation import COCOEvaluator, DatasetEvaluator
from torch import nn
from torch.utils.data import DataLoader

from oln_d2.checks import InputError
from oln_d2.engine.datasets import select_masks
from oln_d2.engine.evaluator import OpenWorldEvaluator
from oln_d2.files import read_json, write_whole

logger = logging.getLogger(__name__)


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
        record = read_json(self._record)
        if record["metric"] == self._val_metric:
            self.best_metric, self.best_iter = record["value"], record["iteration"]

    def _update_best(self, val, iteration):
        updated = super()._update_best(val, iteration)
        if updated:
            record = {"metric": self._val_metric, "value": float(val), "iteration": iteration}
            with write_whole(self._record) as temporary, open(temporary, "w") as f:
                json.dump(record, f)
        return updated


class StrictCheckpointer(DetectionCheckpointer):
    """Refuses a checkpoint that does not hold every parameter of the model, in its shape."""

    def load(self, path: str, checkpointables: list[str] | None = None) -> dict[str, Any]:
        """
        Args:
            path, checkpointables: see :class:`DetectionCheckpointer`.

        Raises:
            InputError: no path, no such file, or the checkpoint of another model.
        """
        if not path:
            raise InputError(
                "MODEL.WEIGHTS is empty; give the checkpoint to evaluate, e.g. MODEL.WEIGHTS "
                "output/model_final.pth"
            )
        if "://" not in path and not os.path.isfile(path):
            raise InputError(f"{path}: no such file; a checkpoint is expected there")
        self._path = path
        return super().load(path, checkpointables)

    def _load_model(self, checkpoint):
        incompatible = super()._load_model(checkpoint)
        shapes = {key: (found, expected) for key, found, expected in incompatible.incorrect_shapes}
        problems = [
            f"{key} has shape {list(found)} instead of {list(expected)}"
            for key, (found, expected) in shapes.items()
        ]
        problems += [f"{key} is missing" for key in incompatible.missing_keys if key not in shapes]
        if problems:
            raise InputError(
                f"{self._path}: the checkpoint of another model: {problems[0]} ({len(problems)} "
                "such differences in all). Use the config file that it was trained with"
            )
        return incompatible


class Trainer(DefaultTrainer):
    """
    :class:`DefaultTrainer` that evaluates open-world data sets, keeps the checkpoint with the
    highest AR@100 of unseen objects as `model_best.pth`, and logs how many epochs the schedule
    makes.
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
        # All evaluations of the run use those that were checked: the data is read once.
        self.test = functools.partial(self.test, evaluators=self.check_data(cfg))
        super().__init__(cfg)

    @classmethod
    def check_data(cls, cfg: CfgNode) -> list[DatasetEvaluator]:
        """
        Returns:
            the evaluators of the test data, for :meth:`test`.

        Raises:
            InputError: a data set that is not registered, or test data that cannot be used.
        """
        for name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST):
            if name not in DatasetCatalog.list():
                ours = [
                    x
                    for x in DatasetCatalog.list()
                    if "seen_names" in MetadataCatalog.get(x).as_dict()
                ]
                raise InputError(
                    f"DATASETS: no data set is registered as {name!r}; register it with "
                    f"oln_d2.register_open_world_coco, or use one of {', '.join(ours)}"
                )
            json_file = MetadataCatalog.get(name).get("json_file", "")
            if json_file and "://" not in json_file and not os.path.isfile(json_file):
                raise InputError(
                    f"{json_file}: no such file; the data set {name} is expected there. The "
                    "environment variable DETECTRON2_DATASETS names the folder of all data sets"
                )
        evaluators = [cls.build_evaluator(cfg, name) for name in cfg.DATASETS.TEST]
        if comm.get_local_rank() == 0:
            for name in cfg.DATASETS.TEST:
                DatasetCatalog.get(name)
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
            InputError: a data set that is neither an open-world one nor in COCO format.
        """
        output_folder = output_folder or os.path.join(cfg.OUTPUT_DIR, "inference", dataset_name)
        evaluator_type = MetadataCatalog.get(dataset_name).get("evaluator_type")
        if evaluator_type == "open_world_coco":
            return OpenWorldEvaluator(
                dataset_name, output_folder, protocols=cfg.TEST.OPEN_WORLD_PROTOCOLS
            )
        if evaluator_type == "coco":
            return COCOEvaluator(dataset_name, output_dir=output_folder)
        raise InputError(
            f"DATASETS.TEST: {dataset_name} has evaluator_type {evaluator_type!r}; register it "
            "with oln_d2.register_open_world_coco"
        )

    def build_hooks(self) -> list[hooks.HookBase]:
        ret = super().build_hooks()
        cfg = self.cfg
        task = "box_unseen" if "xclass" in cfg.TEST.OPEN_WORLD_PROTOCOLS else "box_unseen_filtered"
        metric = f"{task}/AR@100"
        if len(cfg.DATASETS.TEST) > 1:
            # The trainer then puts the data set's name before each metric.
            metric = f"{cfg.DATASETS.TEST[0]}/{metric}"
        if comm.is_main_process() and cfg.TEST.EVAL_PERIOD > 0:
            # After the evaluation, before the writer.
            ret.insert(-1, BestCheckpointer(cfg.TEST.EVAL_PERIOD, self.checkpointer, metric))
        return ret

    def resume_or_load(self, resume: bool = True) -> None:
        """
        See :class:`DefaultTrainer`.

        Raises:
            InputError: a checkpoint that is not there, that is of another model, or that only some
                of the processes find.
        """
        path = self.cfg.MODEL.WEIGHTS
        if resume and self.checkpointer.has_checkpoint():
            StrictCheckpointer(self._trainer.model).load(self.checkpointer.get_checkpoint_file())
        elif path and "://" not in path and not os.path.isfile(path):
            raise InputError(f"{path}: no such file; MODEL.WEIGHTS is a file, a URL or empty")
        try:
            super().resume_or_load(resume)
        except urllib.error.URLError as error:
            raise InputError(
                f"MODEL.WEIGHTS {path}: cannot be fetched ({error.reason}); fetch it elsewhere and "
                'give the file, or MODEL.WEIGHTS "" to start from none'
            ) from None
        starts = comm.all_gather(self.start_iter)
        if len(set(starts)) > 1:
            raise InputError(
                f"{self.cfg.OUTPUT_DIR}: is not the same folder for all processes, which would "
                f"start at iterations {starts}; put OUTPUT_DIR where all machines share it"
            )

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> DataLoader:
        dataset = get_detection_dataset_dicts(
            cfg.DATASETS.TRAIN,
            filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS,
            proposal_files=cfg.DATASETS.PROPOSAL_FILES_TRAIN if cfg.MODEL.LOAD_PROPOSALS else None,
        )
        if cfg.MODEL.MASK_ON:
            dataset = select_masks(dataset, cfg.INPUT.MASK_FORMAT)
        else:  # the mapper would drop them; not to be kept in memory
            for record in dataset:
                for annotation in record.get("annotations", ()):
                    annotation.pop("segmentation", None)
        epochs = cfg.SOLVER.MAX_ITER * cfg.SOLVER.IMS_PER_BATCH / len(dataset)
        logger.info(
            f"{len(dataset)} training images, {cfg.SOLVER.IMS_PER_BATCH} a batch: "
            f"{cfg.SOLVER.MAX_ITER} iterations are {epochs:.2f} epochs"
        )
        return build_detection_train_loader(cfg, dataset=dataset)
