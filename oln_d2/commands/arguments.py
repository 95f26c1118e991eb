"""Arguments that several commands have."""

import argparse

from oln_d2.data.splits import SPLITS


def add_seen(parser: argparse.ArgumentParser, required: bool = False) -> None:
    """Adds `--split` and `--seen`; `args.split or args.seen` are the seen categories."""
    seen = parser.add_mutually_exclusive_group(required=required)
    seen.add_argument(
        "--split",
        choices=list(SPLITS),
        metavar="SPLIT",
        help="the seen categories: voc, 20 of COCO's 80; person; coco, all 80; or the same by the "
        f"names of another data set, {', '.join(name for name in SPLITS if '_' in name)}",
    )
    seen.add_argument("--seen", help="their names: a,b,c or a file with one a line")
