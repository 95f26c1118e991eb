"""The quickstart's models with Detectron2's trainer and the CPU recipes."""

import logging
import math
from pathlib import Path

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils.env import seed_all_rng
from detectron2.utils.logger import setup_logger

from oln_d2.data.coco import load_coco
from oln_d2.engine.datasets import register_open_world_coco
from oln_d2.engine.trainer import Trainer
from oln_d2.model_zoo import get_config
from oln_d2.quickstart.synthetic import KNOWN
from oln_d2.standalone.schedule import STEPS

RECIPES = {
    "oln_box": "cpu/oln_box_R_10_FPN_GN.yaml",
    "faster_rcnn": "cpu/faster_rcnn_1_anchor_R_10_FPN_GN.yaml",
}


def _is_progress(record):
    """Losses, ETA and warnings, of all that Detectron2 logs."""
    return record.name == "detectron2.utils.events" or record.levelno >= logging.WARNING


def train_and_detect(model: str, data: Path, folder: Path, seed: int, epochs: float) -> Path:
    """See :func:`oln_d2.quickstart.standalone_engine.train_and_detect`."""
    for part in ("train", "test"):
        name = f"quickstart_{part}"
        if name in DatasetCatalog.list():  # of another run in the same process
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)
        json_file, image_root = str(data / f"{part}.json"), str(data / part)
        register_open_world_coco(name, json_file, image_root, list(KNOWN), training=part == "train")

    cfg = get_config(RECIPES[model])
    num_images = len(load_coco(data / "train.json")["images"])
    iterations = max(round(epochs * num_images / cfg.SOLVER.IMS_PER_BATCH), 1)
    steps = {math.ceil(iterations * step) for step in STEPS} - {iterations}
    cfg.merge_from_list(
        ["DATASETS.TRAIN", ("quickstart_train",), "DATASETS.TEST", ("quickstart_test",)]
        + ["OUTPUT_DIR", str(folder), "SEED", seed, "SOLVER.MAX_ITER", iterations]
        + ["SOLVER.STEPS", tuple(sorted(steps))]
        + ["TEST.OPEN_WORLD_PROTOCOLS", ["xclass"]]
    )
    for handler in setup_logger().handlers:
        handler.addFilter(_is_progress)
    seed_all_rng(seed)  # the weights to start from; all else follows from SEED
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=True)
    trainer.train()  # and detects in the end
    return folder / "inference" / "quickstart_test" / "coco_instances_results.json"
