"""
Makes a small open-world data set, trains OLN-Box and a Faster R-CNN of the same size on it,
evaluates both on known and novel objects, and writes pictures. Interrupted, it goes on where it was
when the same command is given again.
"""

import argparse

from oln_d2.commands.arguments import pick

HELP = "train OLN and Faster R-CNN on a small synthetic data set and compare what they find"
GOES_ON = "the same command goes on"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--output", default="output/quickstart", metavar="DIR", help="default %(default)s"
    )
    parser.add_argument(
        "--engine",
        choices=["auto", "standalone", "detectron2"],
        default="auto",
        help="what trains; auto: Detectron2 if it is installed, otherwise torchvision alone",
    )
    parser.add_argument("--seed", type=int, default=0, help="of data and training, default 0")
    parser.add_argument(
        "--control", action="store_true", help="leave the novel objects out of the training images"
    )
    parser.add_argument(
        "--images", type=int, default=200, metavar="N", help="to train on, default %(default)s"
    )
    parser.add_argument(
        "--epochs", type=float, default=5.0, metavar="N", help="default %(default)s"
    )


def run(args: argparse.Namespace) -> None:
    from oln_d2.quickstart import quickstart

    quickstart(args.output, **pick(args, "engine seed control images epochs"))
