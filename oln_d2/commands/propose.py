"""
Proposes objects on images. Boxes are those of the image as it is looked at (EXIF turns it). What
cannot be read is listed at the end and in OUTPUT/unreadable.txt. The same command again skips what
is done and goes on.
"""

import argparse
import os

from oln_d2.commands.arguments import pick

HELP = "proposals on images, folders or videos, with any trained model"
GOES_ON = "the same command goes on"
FORMATS = {
    "coco": "results.json, COCO's results, and images.json (default)",
    "csv": "proposals.csv, a line a box",
    "yolo": "labels/*.txt, with the score as sixth number",
    "detectron2": "detectron2.pkl, its precomputed proposals, and images.json",
    "mmdet2": "mmdet2.pkl, proposals of mmdetection 2, and images.json",
    "mmdet3": "mmdet3.pkl, proposals of mmdetection 3, and images.json",
    "labelstudio": "labelstudio.json, tasks with predictions for Label Studio",
    "cvat": "cvat.json, annotations of COCO 1.0, also for other annotation tools",
}
EXAMPLES = "formats:\n" + "".join(f"  {name:<13}{text}\n" for name, text in FORMATS.items())
EXAMPLES += """
examples:
  oln-d2 propose photos/ --html
  oln-d2 propose photos/ 'more/*.jpg' street.mp4 --weights oln_box_d2.pth --output out/
  oln-d2 propose photos/ --config-file oln_mask_R_50_FPN.yaml --weights model_final.pth \\
      --top-k 50 --draw --contact-sheet --output out/
  oln-d2 propose val2017/ --gt instances_val2017.json --top-k 1500 \\
      --weights oln_box_d2.pth --output out/
  oln-d2 evaluate instances_val2017.json out/results.json --split voc
  torchrun --nproc-per-node 8 -m oln_d2 propose photos/ --output out/
  parallel oln-d2 propose photos/ --output out/ --shard {}/8 ::: 1 2 3 4 5 6 7 8
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "inputs",
        metavar="INPUT",
        nargs="+",
        help="images, folders, globs, videos, or .txt files that list some, one a line",
    )
    parser.add_argument(
        "--weights",
        metavar="FILE",
        help="a checkpoint of `train`, `quickstart` or `convert`, an exported .onnx, "
        "selective_search or edge_boxes; or, with --config-file, one of Detectron2 (default: the "
        "small OLN-Box that comes with this package; with --config-file the recipe's trained ones, "
        "if there are any)",
    )
    parser.add_argument(
        "--config-file",
        metavar="YAML",
        help="Detectron2's: a file, or a recipe of MODEL_ZOO.md; it then runs the model",
    )
    parser.add_argument(
        "--output",
        metavar="DIR",
        default="output/propose",
        help="where everything goes (default %(default)s)",
    )
    parser.add_argument(
        "--format",
        choices=list(FORMATS),
        metavar="FORMAT",
        default="coco",
        help="for which tool, see below",
    )
    parser.add_argument(
        "--gt", metavar="JSON", help="take the image ids of this COCO file, by file_name"
    )
    parser.add_argument(
        "--top-k",
        type=int,
        default=100,
        metavar="K",
        help="the K best of an image (default %(default)s)",
    )
    parser.add_argument(
        "--score", type=float, default=0.0, metavar="T", help="only scores above T, 0 to 1"
    )
    parser.add_argument(
        "--nms",
        type=float,
        metavar="IOU",
        help="leave out boxes that overlap a better one by more, after the model's own NMS (0.7)",
    )
    parser.add_argument(
        "--min-size",
        type=int,
        metavar="PX",
        help="shorter side of an image as the model sees it: more finds smaller objects",
    )
    parser.add_argument(
        "--tiles",
        type=int,
        metavar="PX",
        help="also propose on overlapping tiles of PX x PX pixels, for small objects",
    )
    parser.add_argument(
        "--max-proposals",
        type=int,
        metavar="N",
        help="at most N proposals of an image go through the second stage: less time, and a little "
        "less is found (default: as the card of the shipped model says, all with others)",
    )
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument(
        "--batch-size",
        type=int,
        default=4,
        metavar="N",
        help="images at once, of one size; the boxes do not depend on it (default %(default)s)",
    )
    parser.add_argument(
        "--every", type=int, default=1, metavar="N", help="of a video or animation, one of N frames"
    )
    parser.add_argument(
        "--draw", action="store_true", help="also pictures of the best, OUTPUT/pictures"
    )
    parser.add_argument(
        "--draw-top",
        type=int,
        default=20,
        metavar="K",
        help="on pictures, the K best (default %(default)s)",
    )
    parser.add_argument(
        "--contact-sheet",
        action="store_true",
        help="pictures, and sheets of 60 of them each, OUTPUT/contact_sheet_001.jpg, ...",
    )
    parser.add_argument(
        "--html", action="store_true", help="also a page to look through, OUTPUT/index.html"
    )
    parser.add_argument(
        "--shard",
        metavar="K/N",
        help="do the K-th, from 1, of N shares of the images, for other processes do the others; "
        "slurm: as the SLURM array says (default: as torchrun says, else all)",
    )


def run(args: argparse.Namespace) -> int:
    from oln_d2.data.lookup import plural, some
    from oln_d2.loading import load
    from oln_d2.propose import UnreadableError, propose_files
    from oln_d2.propose.shards import find_shard

    shard, by = find_shard(args.shard)
    if shard is not None:
        print(f"Shard {shard}, as {by} says", flush=True)
    elif "SLURM_ARRAY_TASK_ID" in os.environ:
        print("All images; --shard slurm is this task's share of them", flush=True)
    if by == "torchrun":
        _take_gpu()
    more = pick(args, "min_size tiles max_proposals")
    proposer = load(args.weights, args.config_file, args.device, **more)
    try:
        done = propose_files(
            proposer,
            args.inputs,
            args.output,
            **pick(
                args,
                "format gt top_k score nms batch_size every draw draw_top contact_sheet html",
            ),
            shard=shard,
        )
    except UnreadableError as error:
        failures = error.failures
        print(f"{len(failures)} could not be read, so nothing is written:", *failures, sep="\n  ")
        return 1
    if done.written:
        print(
            f"Proposals for {plural(len(done.names), 'image')}, {done.new} of them new, are in "
            f"{args.output}; images are named relative to {done.root}"
        )
        if done.names and not done.boxes:
            print(
                f"None of them has a box with a score above {args.score}; use a lower --score, "
                "and another --output"
            )
    else:
        others = f"the last of shards {', '.join(map(str, done.waiting))}"
        print(
            f"Shard {shard} is done: {plural(len(done.names), 'image')}, {done.new} of them new; "
            f"{others if done.waiting else 'another process'} writes the results of all"
        )
    if args.html and done.names and done.written:
        print(
            f"Open {args.output}/index.html in a browser; it needs the folder index_files beside it"
        )
    most, kept = proposer.max_detections, proposer.overrides["max_proposals"]
    hint = ""
    if kept is not None and kept < most and args.tiles is None:
        most, hint = kept, " (--max-proposals)"
    if args.top_k > most:
        print(
            f"The model gives at most {most} boxes an image{hint}, not {args.top_k}, less those "
            "that its own NMS leaves out"
        )
    if done.unknown:
        print(f"{len(done.unknown)} left out, not in {args.gt}: {some(done.unknown)}")
    if done.absent:
        print(
            f"{plural(len(done.absent), 'image')} of {args.gt} not among the inputs, so without "
            f"proposals: {some(done.absent)}"
        )
    if done.as_stored:
        print(
            f"{plural(len(done.as_stored), 'image')} read as stored: EXIF would turn the picture, "
            f"but the annotations in {args.gt} are of the unturned one"
        )
    if done.failures:
        print(f"{len(done.failures)} could not be read:", *done.failures, sep="\n  ")
    return 0 if done.names or not done.written else 1


def _take_gpu() -> None:
    """Show the libraries, which are imported later, one GPU: torchrun shows all to all."""
    rank, gpus = os.environ["LOCAL_RANK"], os.environ.get("CUDA_VISIBLE_DEVICES")
    if gpus is None:
        os.environ["CUDA_VISIBLE_DEVICES"] = rank
    elif gpus:
        each = gpus.split(",")
        os.environ["CUDA_VISIBLE_DEVICES"] = each[int(rank) % len(each)]
