"""
Draws the proposals of a results file into the images: coloured by score, weak ones thin, without
near copies, with centerness (c) and predicted IoU (b) where the file has them; and the objects of
the ground truth: known ones, novel ones found at IoU 0.5, novel ones missed. The page (--html)
shows the same, to be switched, sorted and enlarged.
"""

import argparse

from oln_d2.commands.arguments import add_seen, pick, print_failures

HELP = "pictures of a results file: proposals, objects, which novel ones were found"
EXAMPLES = """\
examples:
  oln-d2 visualize instances_val2017.json results.json --images val2017/ --split voc \\
      --num-images 50 --html --output pictures/
  oln-d2 visualize proposals/images.json proposals/results.json --images photos/ \\
      --output pictures/
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "gt", metavar="GT", help="ground truth in COCO format, or images.json of `propose`"
    )
    parser.add_argument("results", metavar="RESULTS", help="detections in COCO format")
    parser.add_argument("--images", required=True, metavar="DIR", help="where the images are")
    parser.add_argument("--output", required=True, metavar="DIR", help="where the pictures go")
    add_seen(parser)
    parser.add_argument(
        "--top-k",
        type=int,
        default=10,
        metavar="K",
        help="draw the K best of an image (default %(default)s)",
    )
    parser.add_argument("--num-images", type=int, metavar="N", help="only the first N images")
    parser.add_argument("--masks", action="store_true", help="also tint the masks of the 10 best")
    parser.add_argument(
        "--html", action="store_true", help="also a page to look through, OUTPUT/index.html"
    )


def run(args: argparse.Namespace) -> int:
    from oln_d2.data.lookup import plural
    from oln_d2.pages import visualize

    pictures = visualize(
        args.gt,
        args.results,
        args.images,
        args.output,
        seen=args.split or args.seen,
        **pick(args, "top_k num_images masks html"),
    )
    if pictures.page:
        print(f"Open {pictures.page} in a browser; it needs the folder index_files beside it")
    print(f"{plural(len(pictures.paths), 'picture')} written to {args.output}")
    print_failures(
        f"{plural(len(pictures.failures), 'image')} could not be drawn:", pictures.failures
    )
    return 0 if pictures.paths else 1
