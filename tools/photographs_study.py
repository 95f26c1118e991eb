"""
A study on photographs: when does OLN pay?

    python tools/photographs_study.py OUTPUT --voc voc.json voc/ --coco coco.json coco/ \\
        --test instances_val.json val/ --weights-backbone efficientnet-lite0-57934424.pth

trains OLN-Box, OLN-Box whose second score learns from negatives, too, and a class-agnostic Faster
R-CNN of the same size, all alike, with boxes of VOC's 20 categories: on photographs in which little
else is unannotated (`--voc`) and on COCO's, in which much is (`--coco`). Then it writes what both
stages of each find on `--test`, and compares. What is done is skipped, what was interrupted goes
on; `--jobs` run at a time, each in one thread.
"""

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

RECIPE = Path(__file__).parents[1] / "configs/standalone/general.yaml"
# What differs from the recipe; None leaves a setting out.
MODELS = {
    "oln": {"box_score_negatives": False},
    "oln_negatives": {},
    "faster_rcnn": {
        "architecture": "faster_rcnn",
        "rpn_post_nms_top_n_test": 1000,
        **dict.fromkeys(
            "ltrb_init rpn_feature_norm objectness_negatives box_score_negatives "
            "rpn_pre_nms_top_n_train rpn_pre_nms_top_n_test".split()
        ),
    },
}
MIN_SIZE = 320  # one size for all; training and test


def train(run, args):
    """Train one, unless that is done."""
    import yaml

    kind, data, seed = run
    folder = args.output / f"{data}_{kind}_{seed}"
    if (folder / "model_final.pth").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    recipe = yaml.safe_load(RECIPE.read_text())
    model = {**recipe["model"], "min_size": MIN_SIZE, **MODELS[kind]}
    recipe["model"] = {name: value for name, value in model.items() if value is not None}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    json_file, images = getattr(args, data)
    command = [sys.executable, "-W", "ignore", "-m", "oln_d2", "train"]
    options = {
        "config": folder / "recipe.yaml",
        "train-json": json_file,
        "images": images,
        "split": "voc",
        "epochs": args.epochs,
        "seed": seed,
        "weights-backbone": args.weights_backbone,
        "workers": 0,
        "output": folder,
    }
    for name, value in options.items():
        command += [f"--{name}", str(value)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    with open(folder / "log.txt", "a") as log:
        subprocess.run([*command, "--resume"], check=True, stdout=log, stderr=log, env=environment)
    return folder


def find(folder, args):
    """What both stages of a model find, as results files."""
    import torch
    from torchvision.models.detection.rpn import concat_box_prediction_layers
    from tqdm import tqdm

    from oln_d2.data.coco import load_coco
    from oln_d2.evaluation.coco_results import write_results
    from oln_d2.standalone import load_detector
    from oln_d2.standalone.data import read_image

    names = [f"{folder.name}.json", f"{folder.name}_first_stage.json"]
    paths = [args.output / name for name in names]
    if all(path.exists() for path in paths):
        return paths
    model = load_detector(folder / "model_final.pth")
    is_oln = model.config["architecture"] == "oln_box"
    gt, images = args.test
    rows = [], []
    with torch.no_grad():
        for entry in tqdm(load_coco(gt)["images"], desc=folder.name, disable=None):
            image = read_image(os.path.join(images, entry["file_name"]))
            size = tuple(image.shape[-2:])
            resized, _ = model.transform([image])
            features = model.backbone(resized.tensors)
            if is_oln:
                (first,), _ = model.rpn(resized, features)
                proposals, first_scores = [first], first["objectness"]
            else:
                logits, deltas = model.rpn.head(list(features.values()))
                counts = [level[0].numel() for level in logits]
                anchors = model.rpn.anchor_generator(resized, list(features.values()))
                logits, deltas = concat_box_prediction_layers(logits, deltas)
                boxes = model.rpn.box_coder.decode(deltas, anchors).view(1, -1, 4)
                boxes, scores = model.rpn.filter_proposals(
                    boxes, logits, resized.image_sizes, counts
                )
                first, proposals, first_scores = {"boxes": boxes[0]}, boxes, scores[0]
            found, _ = model.roi_heads(features, proposals, resized.image_sizes)
            stages = [found[0], {"boxes": first["boxes"], "scores": first_scores}]
            stages = [{"boxes": stage["boxes"], "scores": stage["scores"]} for stage in stages]
            for own, stage in zip(rows, stages):
                (stage,) = model.transform.postprocess([stage], resized.image_sizes, [size])
                boxes = stage["boxes"].double().numpy()
                boxes[:, 2:] -= boxes[:, :2]
                own.append((entry["id"], boxes, stage["scores"].double().numpy(), None, {}))
    for path, own in zip(paths, rows):
        write_results(path, own)
    return paths


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", type=Path)
    for option in ("--voc", "--coco", "--test"):
        parser.add_argument(option, nargs=2, metavar=("GT", "IMAGES"), required=option == "--test")
    parser.add_argument("--weights-backbone", required=True, metavar="FILE")
    parser.add_argument("--epochs", type=float, default=1)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--others", nargs="*", default=[], help="more results files to compare")
    args = parser.parse_args()
    data = [name for name in ("voc", "coco") if getattr(args, name)]
    # Seed by seed, so that whole comparisons are there early.
    runs = [(kind, name, seed) for seed, name, kind in product(args.seeds, data, args.models)]
    with ThreadPoolExecutor(args.jobs) as pool:
        folders = list(pool.map(lambda run: train(run, args), runs))
        parts = list(pool.map(lambda folder: find(folder, args), folders))
    files = [str(path) for part in parts for path in part] + args.others
    command = [sys.executable, "-m", "oln_d2", "compare", args.test[0], *files, "--split", "voc"]
    subprocess.run([*command, "--output", str(args.output / "report")], check=True)
    print(json.dumps(files, indent=1))


if __name__ == "__main__":
    main()
