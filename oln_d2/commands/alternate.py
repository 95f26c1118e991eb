"""
Trains the two stages of a recipe in turn, the four-step alternating training of the Faster R-CNN
paper: (1) the first stage and (2) the second, on its proposals, each from the recipe's weights; (3)
the first stage on the backbone of (2), which is frozen from here on, and (4) the second stage on
the proposals of (3). Both are then one model.
"""

import argparse

from oln_d2.commands.arguments import add_training, pick

HELP = "train the two stages of a recipe of Detectron2 in turn, instead of jointly"
GOES_ON = "the same command goes on"
EXAMPLES = """\
examples:
  oln-d2 alternate faster_rcnn_1_anchor_R_50_FPN.yaml --output output/alternating --num-gpus 8
  oln-d2 alternate oln_box_R_50_FPN.yaml --output output/oln --opts SOLVER.MAX_ITER 20000
  python train_net.py --config-file output/oln/config.yaml --eval-only

The same command again skips the steps that are done and resumes the one that was interrupted.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "recipe",
        metavar="RECIPE",
        help="a YAML file of `train_net.py`, or its name in MODEL_ZOO.md",
    )
    parser.add_argument(
        "--output", required=True, metavar="DIR", help="where the steps and the model go"
    )
    add_training(parser, "the recipe")


def run(args: argparse.Namespace) -> int:
    from oln_d2.alternating import train_alternating

    path = train_alternating(args.recipe, args.output, **pick(args, "num_gpus opts device"))
    print(f"The model of both stages is {path}. To evaluate it:")
    print(f"python train_net.py --config-file {path.with_name('config.yaml')} --eval-only")
    return 0
