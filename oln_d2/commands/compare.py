"""
Compares detectors by the objects that they find, and writes a page, `index.html`, that shows who
finds more, where, and in which images; beside it its figures and all numbers, `comparison.json`.
What is compared are results files, and recipes, which are trained first.
"""

import argparse
from typing import Any

from oln_d2.checks import InputError
from oln_d2.commands.arguments import add_seen, add_training, pick, print_failures

HELP = "which of several detectors finds more, on a page: numbers, intervals, images"
GOES_ON = "the same command goes on"
EXAMPLES = """\
examples:
  oln-d2 compare instances_val2017.json oln.json rpn.json --split voc --images val2017/ \\
      --output report/
  oln-d2 compare gt.json */results.json --seen cat,dog --output report/
  oln-d2 compare val.json other.json oln.yaml cpu/faster_rcnn_1_anchor_R_18_FPN_GN.yaml \\
      --split voc --images val/ --train-json train.json --train-images train/ --seeds 0 1 \\
      --output report/

A results file is in COCO's format, as for `evaluate`. Keep 100 boxes of an image at least.
A recipe is a YAML file of `train_net.py`, or its name in the model zoo, or one of `train`. Its runs
are in OUTPUT/runs/NAME/seed_0 and so on. The same command again skips what is trained, resumes what
was interrupted, and tries again what failed.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("gt", metavar="GT", help="ground truth in COCO format, with `area`")
    parser.add_argument(
        "results", metavar="RESULTS|RECIPE", nargs="+", help="detections in COCO format; .yaml"
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="where the page goes")
    add_seen(parser, required=True)
    parser.add_argument(
        "--images", metavar="DIR", help="where the images are; to show them, and for recipes"
    )
    parser.add_argument(
        "--num-images",
        type=int,
        default=50,
        metavar="N",
        help="images shown, those where the detectors differ most (default %(default)s)",
    )
    parser.add_argument(
        "--protocol",
        choices=["xclass", "filtered"],
        default="xclass",
        help="as of `evaluate`",
    )
    parser.add_argument("--iou", choices=["box", "mask"], default="box", help="what overlaps")
    parser.add_argument(
        "--bootstrap",
        type=int,
        default=1000,
        metavar="N",
        help="draws of images for the 95 %% intervals (default %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of these draws, default 0")
    training = parser.add_argument_group("recipes")
    training.add_argument(
        "--train-json",
        metavar="FILE",
        help="annotations that all recipes train on (default: what each recipe names)",
    )
    training.add_argument("--train-images", metavar="DIR", help="the folder of their images")
    training.add_argument(
        "--seeds",
        type=int,
        nargs="+",
        default=[0],
        metavar="N",
        help="each recipe is trained with each; one row, with their spread (default 0)",
    )
    add_training(training, "all recipes of train_net.py")


def run(args: argparse.Namespace) -> int:
    from oln_d2.pages.comparison import compare, name_files

    seen = args.split or args.seen
    recipes = [file for file in args.results if file.endswith((".yaml", ".yml"))]
    results: Any = args.results
    failures: list[str] = []
    costs = {}
    if recipes:
        results, failures = name_files([file for file in results if file not in recipes])
        from oln_d2.recipes import train_recipes

        if args.images is None:
            raise InputError("--images is missing; recipes have to propose on the images of GT")
        trained, failed = train_recipes(
            recipes,
            args.gt,
            args.images,
            f"{args.output}/runs",
            seen=seen,
            **pick(args, "train_json train_images seeds num_gpus opts device"),
        )
        failures += failed
        for one in trained:
            name = one.name if one.name not in results else f"{one.name} (recipe)"
            results[name] = one.results
            costs[name] = {"parameters": one.parameters, "milliseconds": one.milliseconds}
        if not results:
            raise InputError(failures[0])
    elif args.train_json or args.train_images or args.opts:
        raise InputError(
            "--train-json, --train-images and --opts are for recipes; give one (.yaml)"
        )
    comparison = compare(
        args.gt,
        results,
        args.output,
        seen=seen,
        iou_type=args.iou,
        samples=args.bootstrap,
        costs=costs,
        **pick(args, "protocol images num_images seed"),
    )
    print(comparison)
    print(f"Open {comparison.page}")
    failures += comparison.failures
    print_failures("Left out:", failures)
    return 1 if failures else 0
