"""
Trains recipes one after another, as train_net.py does, and collects the metrics of their last
evaluation in OUTPUT/results.md and results.json. A recipe that fails does not stop the others; the
exit code is then 1.
"""

import argparse

from oln_d2.commands.arguments import pick

HELP = "train recipes one after another with Detectron2 and collect their metrics in a table"
GOES_ON = "the same command goes on"
EXAMPLES = """\
examples:
  oln-d2 sweep oln_box_R_50_FPN.yaml ablations/{delta_coding,three_anchors}.yaml \\
      --output output/ablations --num-gpus 8 --opts SEED 1
  oln-d2 sweep configs/my_*.yaml --output output/mine --collect-only

Each recipe has the folder OUTPUT/NAME. The same command again goes on: finished recipes are
skipped, an interrupted one is resumed from its last checkpoint, a failed one is tried again.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipes", metavar="RECIPE", nargs="+", help="config files of train_net.py")
    parser.add_argument("--output", required=True, metavar="DIR", help="where everything goes")
    parser.add_argument("--num-gpus", type=int, default=1, metavar="N", help="as of train_net.py")
    parser.add_argument(
        "--collect-only", action="store_true", help="only the table of what is finished"
    )
    parser.add_argument(
        "--opts",
        nargs=argparse.REMAINDER,
        default=[],
        metavar="KEY VALUE",
        help="override all recipes; has to come last",
    )


def run(args: argparse.Namespace) -> int:
    from oln_d2.sweep import sweep

    failed = sweep(args.recipes, args.output, **pick(args, "num_gpus collect_only opts"))
    if failed:
        print(f"\nfailed: {', '.join(failed)}")
    return 1 if failed else 0
