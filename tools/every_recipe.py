#!/usr/bin/env python3
"""
Shows that every recipe works on real images, made small enough for a CPU: 10 iterations, then 10
more resumed from the checkpoint, then the evaluation, all on ten images of coco_2017_voc_train.
Says nothing about how good any of them is. About six minutes on two cores.

    DETECTRON2_DATASETS=DIR python tools/every_recipe.py [RECIPE ...]
"""

import json
import shutil
import sys
from pathlib import Path

import torch
from detectron2.utils.env import seed_all_rng
from detectron2.utils.logger import setup_logger
from overfit import register_ten_images
from tabulate import tabulate

from oln_d2 import model_zoo
from oln_d2.engine.trainer import Trainer

CONFIGS = Path(__file__).parents[1] / "configs"
OUTPUT = Path("output/every_recipe")
TASKS = ["box_unseen", "box_seen", "box_all", "mask_all"]
SETTINGS = (
    "DATASETS.TRAIN ('ten_train',) DATASETS.TEST ('ten_test',) SEED 1 SOLVER.IMS_PER_BATCH 2 "
    "SOLVER.BASE_LR 0.005 SOLVER.STEPS () SOLVER.CHECKPOINT_PERIOD 10 TEST.EVAL_PERIOD 0 "
    "INPUT.MASK_FORMAT bitmask"
)


def run(recipe, iterations, resume):
    cfg = model_zoo.get_config(recipe)
    if "R_10" not in recipe:
        cfg.merge_from_file(str(CONFIGS / "cpu" / "Base-R18-GN.yaml"))
    cfg.merge_from_list(
        SETTINGS.split() + ["SOLVER.MAX_ITER", iterations, "OUTPUT_DIR", str(OUTPUT / recipe[:-5])]
    )
    Path(cfg.OUTPUT_DIR).mkdir(parents=True, exist_ok=True)
    seed_all_rng(cfg.SEED)
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=resume)
    trainer.train()
    return trainer.start_iter


def row(recipe):
    lines = (OUTPUT / recipe[:-5] / "metrics.json").read_text().splitlines()
    metrics = [json.loads(line) for line in lines]
    losses = [line["total_loss"] for line in metrics if "total_loss" in line]
    ar = [metrics[-1].get(f"{task}/AR@1000") for task in TASKS]
    return [recipe, losses[0], losses[-1], *ar]


def main(recipes):
    if not recipes:
        recipes = sorted(
            str(path.relative_to(CONFIGS))
            for path in CONFIGS.rglob("*.yaml")
            if not path.name.startswith("Base-")
            and path.parent.name not in ("cpu", "datasets", "small")
            and "standalone" not in path.parts
        )
    setup_logger(output=str(OUTPUT / "log.txt"))
    register_ten_images(OUTPUT)
    rows = []
    for recipe in recipes:
        shutil.rmtree(OUTPUT / recipe[:-5], ignore_errors=True)
        run(recipe, 10, resume=False)
        start = run(recipe, 20, resume=True)
        assert start == 10, f"{recipe}: resumed at {start}"
        rows.append(row(recipe))
        print(f"{len(rows)} of {len(recipes)}: {rows[-1]}", flush=True)
    headers = ["recipe", "first loss", "last loss", *(f"{task} AR@1000" for task in TASKS)]
    print(tabulate(rows, headers, tablefmt="github", floatfmt=".2f"))


if __name__ == "__main__":
    torch.set_num_threads(2)
    main(sys.argv[1:])
