"""
Compares detectors by the objects that they find, and writes a page, `index.html`, that shows who
finds more, where, and in which images; beside it its figures and all numbers, `comparison.json`.
"""

import argparse

from oln_d2.commands.arguments import add_seen, pick, print_failures

HELP = "which of several detectors finds more, on a page: numbers, intervals, images"
EXAMPLES = """\
examples:
  oln-d2 compare instances_val2017.json oln.json rpn.json --split voc --images val2017/ \\
      --output report/
  oln-d2 compare gt.json */results.json --seen cat,dog --output report/

RESULTS is in COCO's results format, as for `evaluate`. Keep 100 boxes of an image at least.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("gt", metavar="GT", help="ground truth in COCO format, with `area`")
    parser.add_argument("results", metavar="RESULTS", nargs="+", help="detections in COCO format")
    parser.add_argument("--output", required=True, metavar="DIR", help="where the page goes")
    add_seen(parser, required=True)
    parser.add_argument("--images", metavar="DIR", help="where the images are; to show them")
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


def run(args: argparse.Namespace) -> int:
    from oln_d2.pages.comparison import compare

    comparison = compare(
        args.gt,
        args.results,
        args.output,
        seen=args.split or args.seen,
        iou_type=args.iou,
        samples=args.bootstrap,
        **pick(args, "protocol images num_images seed"),
    )
    print(comparison)
    print(f"Open {comparison.page}")
    print_failures("Left out:", comparison.failures)
    return 1 if comparison.failures else 0
