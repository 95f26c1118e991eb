"""Arguments that several commands have, and a list that several print."""

import argparse
from collections.abc import Sequence
from typing import Any

from oln_d2.data.splits import SPLITS


def add_seen(parser: argparse.ArgumentParser, required: bool = False) -> None:
    """Adds `--split` and `--seen`; `args.split or args.seen` are the seen categories."""
    seen = parser.add_mutually_exclusive_group(required=required)
    seen.add_argument(
        "--split",
        type=_split,
        metavar="SPLIT",
        help="the seen categories: voc, 20 of COCO's 80; person; coco, all 80; or the same by the "
        f"names of another data set, {', '.join(name for name in SPLITS if '_' in name)}",
    )
    seen.add_argument("--seen", help="their names: a,b,c or a file with one a line")


def _split(name: str) -> str:
    if name not in SPLITS:
        raise argparse.ArgumentTypeError(
            f"{name!r} is none of {', '.join(SPLITS)}; categories by their names go with --seen"
        )
    return name


def add_training(parser: argparse._ActionsContainer, what: str) -> None:
    """Adds `--num-gpus`, `--device` and `--opts`, which overrides `what`."""
    parser.add_argument(
        "--num-gpus", type=int, default=1, metavar="N", help="of each training (default 1)"
    )
    parser.add_argument(
        "--device", choices=["auto", "cpu", "cuda"], default="auto", help="that proposes"
    )
    parser.add_argument(
        "--opts",
        nargs=argparse.REMAINDER,
        default=[],
        metavar="KEY VALUE",
        help=f"override {what}; has to come last",
    )


def pick(args: argparse.Namespace, names: str) -> dict[str, Any]:
    """The arguments of these names, separated by spaces, for a function that calls them so, too."""
    return {name: getattr(args, name) for name in names.split()}


def print_failures(title: str, failures: Sequence[str]) -> None:
    """The first 10 sentences, and how many there are more; nothing where there is none."""
    if failures:
        more = [f"and {len(failures) - 10} more"] if len(failures) > 10 else []
        print(title, *failures[:10], *more, sep="\n  ")
