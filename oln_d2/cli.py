"""
The command line, `python -m oln_d2`. Each command is a module of the package that is imported when
it is run, so that help comes at once and no command needs the libraries of another.
"""

import argparse
import sys

from oln_d2.data.splits import SPLITS
from oln_d2.errors import InputError

SWEEP_EXAMPLES = """\
examples:
  python -m oln_d2 sweep oln_box_R_50_FPN.yaml ablations/{delta_coding,three_anchors}.yaml \\
      --output output/ablations --num-gpus 8 --opts SEED 1
  python -m oln_d2 sweep configs/my_*.yaml --output output/mine --collect-only

Each recipe has the folder OUTPUT/NAME. The same command again goes on: finished recipes are
skipped, an interrupted one is resumed from its last checkpoint, a failed one is tried again.
"""

EVALUATE_EXAMPLES = """\
examples:
  python -m oln_d2 evaluate instances_val2017.json results.json --split voc --plot ar.png
  python -m oln_d2 evaluate gt.json a.json b.json --seen cat,dog --protocol both --json out.json

RESULTS is in COCO's results format: a list of {"image_id", "bbox": [x, y, width, height] in pixels,
"score"}. category_id is not looked at. Write scores in full, and more than 100 detections an image.

AR@k is the share of the objects that the first k detections of each image find, averaged over the
IoU thresholds .50 to .95. ARs, ARm, ARl: objects below 32 x 32 pixels, up to 96 x 96, above. AUC:
area under AR@k over log k up to 1000. "unseen" are the objects of all categories that are not in
the split. Protocol "xclass" (the OLN paper's): detections of seen objects cost no budget.
"filtered": they do. Numbers of different protocols are not comparable.
"""

TRAIN_EXAMPLES = """\
examples:
  python -m oln_d2 train --train-json train.json --images train/ --seen cat,dog \\
      --val-json val.json --val-images val/ --depth 18 --min-size 480 640 --max-size 1000 \\
      --batch-size 4 --amp
  torchrun --nproc_per_node 8 -m oln_d2 train --train-json instances_train2017.json \\
      --images train2017/ --split voc --amp
"""


PROPOSE_EXAMPLES = """\
examples:
  python -m oln_d2 propose photos/ 'more/*.jpg' street.mp4 --weights oln_box_d2.pth --output out/
  python -m oln_d2 propose photos/ --config-file oln_mask_R_50_FPN.yaml --weights model_final.pth \\
      --top-k 50 --draw --contact-sheet --output out/
  python -m oln_d2 propose val2017/ --gt instances_val2017.json --top-k 1500 \\
      --weights oln_box_d2.pth --output out/
  python -m oln_d2 evaluate instances_val2017.json out/results.json --split voc
"""

VISUALIZE_EXAMPLES = """\
examples:
  python -m oln_d2 visualize instances_val2017.json results.json --images val2017/ --split voc \\
      --num-images 50 --html --output pictures/
  python -m oln_d2 visualize proposals/images.json proposals/results.json --images photos/ \\
      --output pictures/
"""


def main(argv=None):
    """
    Run a command. Return its exit code: 0, 1 if what it ran on failed (recipes of a sweep, all
    images), or 2 for bad input and for training that diverged.
    """
    parser = argparse.ArgumentParser(
        prog="python -m oln_d2", description="Open-world object localization."
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    add_quickstart(commands)
    add_train(commands)
    add_convert(commands)
    add_export(commands)
    add_propose(commands)
    add_sweep(commands)
    add_evaluate(commands)
    add_visualize(commands)
    add_benchmark(commands)
    args = parser.parse_args(argv)
    try:
        return args.run(args) or 0
    except (InputError, ImportError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def add_quickstart(commands):
    parser = commands.add_parser(
        "quickstart",
        help="train OLN and Faster R-CNN on a small synthetic data set and compare what they find",
        description="Makes a small open-world data set, trains OLN-Box and a Faster R-CNN of the "
        "same size on it, evaluates both on known and novel objects, and writes pictures. "
        "Interrupted, it goes on where it was when the same command is given again.",
    )
    parser.add_argument(
        "--output", default="output/quickstart", metavar="DIR", help="default %(default)s"
    )
    parser.add_argument(
        "--engine", choices=["auto", "standalone", "detectron2"], default="auto",
        help="what trains; auto: Detectron2 if it is installed, otherwise torchvision alone",
    )  # fmt: skip
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

    def run(args):
        from oln_d2.quickstart import quickstart

        quickstart(
            args.output,
            engine=args.engine,
            seed=args.seed,
            control=args.control,
            images=args.images,
            epochs=args.epochs,
        )

    parser.set_defaults(run=run)


def add_train(commands):
    parser = commands.add_parser(
        "train",
        help="train OLN-Box on COCO-format data, without Detectron2",
        description="Train OLN-Box with torch and torchvision alone and evaluate it. Defaults are "
        "the paper's settings. For many GPUs and more settings use train_net.py.",
        epilog=TRAIN_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--train-json", required=True, metavar="FILE", help="annotations, COCO format"
    )
    parser.add_argument("--images", required=True, metavar="DIR", help="the folder of their images")
    _add_seen(parser, required=True)
    parser.add_argument(
        "--val-json", metavar="FILE", help="evaluate on these annotations in the end"
    )
    parser.add_argument("--val-images", metavar="DIR", help="the folder of their images")
    parser.add_argument(
        "--output", default="output/train", metavar="DIR", help="default %(default)s"
    )
    parser.add_argument(
        "--depth",
        type=int,
        default=50,
        help="of the ResNet: 10, 18, 34, 50 or 101, default %(default)s",
    )
    parser.add_argument(
        "--scratch", action="store_true",
        help="no ImageNet weights are fetched; the whole model learns, with group norm",
    )  # fmt: skip
    parser.add_argument(
        "--weights", metavar="FILE", help="start from this checkpoint of either runtime"
    )
    parser.add_argument(
        "--min-size", type=int, nargs="+", default=[800], metavar="PX",
        help="length of the shorter image side; of several, training draws one, the last is for "
        "testing (default 800)",
    )  # fmt: skip
    parser.add_argument(
        "--max-size",
        type=int,
        default=1333,
        metavar="PX",
        help="of the longer side (default %(default)s)",
    )
    parser.add_argument("--epochs", type=float, default=8, metavar="N", help="default %(default)s")
    parser.add_argument(
        "--batch-size",
        type=int,
        default=16,
        metavar="N",
        help="of all processes (default %(default)s)",
    )
    parser.add_argument("--lr", type=float, help="default 0.02 for 16 images, in proportion")
    parser.add_argument(
        "--warmup", type=int, default=500, metavar="N", help="iterations, default %(default)s"
    )
    parser.add_argument("--amp", action="store_true", help="half precision, on a GPU")
    parser.add_argument("--device", help="default cuda if there is one, else cpu")
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="that load images")
    parser.add_argument("--checkpoint-every", type=int, default=500, metavar="N", help="iterations")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on from the checkpoint in --output, if there is one",
    )

    def run(args):
        from oln_d2.standalone.training import train_command

        train_command(args)

    parser.set_defaults(run=run)


def add_convert(commands):
    parser = commands.add_parser(
        "convert",
        help="the authors' published OLN-Box weights as a checkpoint for both runtimes",
        description="Turns a checkpoint of the authors' code (mmdet) into one that load_detector "
        "and MODEL.WEIGHTS take. Every tensor is checked; code in the file is not executed.",
    )
    parser.add_argument("source", metavar="IN", help="their file, e.g. oln_box_public.pth")
    parser.add_argument("target", metavar="OUT", help="ours, e.g. oln_box_d2.pth")

    def run(args):
        from oln_d2.convert import convert_command

        convert_command(args)

    parser.set_defaults(run=run)


def add_export(commands):
    parser = commands.add_parser(
        "export",
        help="a trained OLN-Box as ONNX or TorchScript",
        description="Writes a trained OLN-Box as one file: .onnx (images of any size), "
        "which `propose` takes, or .pt, TorchScript. The file computes all from the resized image "
        "to boxes and scores. It covers inference on one image at a time in float32; not training, "
        "larger batches, the resizing, masks, and other models.",
    )
    parser.add_argument(
        "checkpoint", metavar="IN", help="a checkpoint of `train`, `quickstart` or `convert`"
    )
    parser.add_argument("output", metavar="OUT", help="e.g. model.onnx or model.pt")

    def run(args):
        from oln_d2.standalone.export import export

        export(args.checkpoint, args.output)
        print(
            f"{args.output} is written; `propose --weights` takes .onnx, torch.jit.load takes .pt"
        )

    parser.set_defaults(run=run)


def add_propose(commands):
    parser = commands.add_parser(
        "propose",
        help="proposals on images, folders or videos, with any trained model",
        description="Proposes objects on images. Boxes are those of the image as it is looked at "
        "(EXIF turns it). What cannot be read is told in the end and in OUTPUT/unreadable.txt. The "
        "same command again skips what is done and goes on.",
        epilog=PROPOSE_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "inputs", metavar="INPUT", nargs="+", help="images, folders, globs or videos"
    )
    parser.add_argument(
        "--weights", metavar="FILE",
        help="a checkpoint of `train`, `quickstart` or `convert`, an exported .onnx; or, with "
        "--config-file, one of Detectron2 (without: the recipe's trained ones, if there are any)",
    )  # fmt: skip
    parser.add_argument(
        "--config-file", metavar="YAML",
        help="Detectron2's: a file, or a recipe of MODEL_ZOO.md; it then runs the model",
    )  # fmt: skip
    parser.add_argument("--output", required=True, metavar="DIR", help="where all of it goes")
    parser.add_argument(
        "--format", choices=["coco", "csv", "yolo"], default="coco",
        help="coco: results.json and images.json (default); csv: proposals.csv; yolo: "
        "labels/*.txt, with the score as sixth number",
    )  # fmt: skip
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
        "--nms", type=float, metavar="IOU",
        help="leave out boxes that overlap a better one by more (the model's own: 0.7)",
    )  # fmt: skip
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument(
        "--batch-size", type=int, default=4, metavar="N",
        help="images at once, of one size; the boxes do not depend on it (default %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--every", type=int, default=1, metavar="N", help="of a video, one of N frames"
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
        "--contact-sheet", action="store_true",
        help="pictures, and sheets of 60 of them each, OUTPUT/contact_sheet_001.jpg, ...",
    )  # fmt: skip

    def run(args):
        from oln_d2.inference.command import propose

        return propose(args)

    parser.set_defaults(run=run)


def add_sweep(commands):
    parser = commands.add_parser(
        "sweep",
        help="train recipes one after another with Detectron2 and collect their metrics in a table",
        description="Trains recipes one after another, as train_net.py does, and collects the "
        "metrics of their last evaluation in OUTPUT/results.md and results.json. A recipe that "
        "fails does not stop the others; the exit code is then 1.",
        epilog=SWEEP_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("recipes", metavar="RECIPE", nargs="+", help="config files of train_net.py")
    parser.add_argument("--output", required=True, metavar="DIR", help="where all of it goes")
    parser.add_argument("--num-gpus", type=int, default=1, metavar="N", help="as of train_net.py")
    parser.add_argument(
        "--collect-only", action="store_true", help="only the table of what is finished"
    )
    parser.add_argument(
        "--opts", nargs=argparse.REMAINDER, default=[], metavar="KEY VALUE",
        help="override all recipes; has to come last",
    )  # fmt: skip

    def run(args):
        from oln_d2.sweep import sweep

        return sweep(args)

    parser.set_defaults(run=run)


def add_evaluate(commands):
    parser = commands.add_parser(
        "evaluate",
        help="recall of unseen, seen and all objects from a results file of any detector",
        description="Recall of unseen, seen and all objects from results files of any detector.",
        epilog=EVALUATE_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("gt", metavar="GT", help="ground truth in COCO format, with `area`")
    parser.add_argument("results", metavar="RESULTS", nargs="+", help="detections in COCO format")
    _add_seen(parser, required=True)
    parser.add_argument(
        "--protocol", choices=["xclass", "filtered", "both"], default="xclass", help="see below"
    )
    parser.add_argument(
        "--iou",
        choices=["box", "mask"],
        default="box",
        help="what overlaps; mask: the results need RLE",
    )
    parser.add_argument("--k", type=_ks, metavar="K,...", help="budgets, default 1,10,20,...,1500")
    parser.add_argument(
        "--max-dets", type=int, metavar="N",
        help="look at the N best detections of an image (default 1500; by the second protocol "
        "some papers look at 100, some at 900)",
    )  # fmt: skip
    parser.add_argument("--json", metavar="OUT", help="write all numbers here, values in 0..1")
    parser.add_argument("--plot", metavar="OUT", help="write a picture of AR@k here, e.g. ar.png")
    parser.add_argument(
        "--per-category", action="store_true", help="also the recall of each unseen category"
    )
    parser.add_argument(
        "--bootstrap",
        type=int,
        metavar="N",
        help="also 95 %% confidence intervals from N draws of images",
    )
    parser.add_argument("--seed", type=int, default=0, help="of these draws, default 0")

    def run(args):
        from oln_d2.evaluation.command import evaluate

        evaluate(args)

    parser.set_defaults(run=run)


def add_visualize(commands):
    parser = commands.add_parser(
        "visualize",
        help="pictures of a results file: proposals, objects, which novel ones were found",
        description="Draws the proposals of a results file into the images: coloured by score, "
        "with centerness (c) and predicted IoU (b) where the file has them; and the objects of the "
        "ground truth: known ones, novel ones found at IoU 0.5, novel ones missed.",
        epilog=VISUALIZE_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "gt", metavar="GT", help="ground truth in COCO format, or images.json of `propose`"
    )
    parser.add_argument("results", metavar="RESULTS", help="detections in COCO format")
    parser.add_argument("--images", required=True, metavar="DIR", help="where the images are")
    parser.add_argument("--output", required=True, metavar="DIR", help="where the pictures go")
    _add_seen(parser)
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
        "--html", action="store_true", help="also a page that tells scores on hover"
    )

    def run(args):
        from oln_d2.visualize import visualize

        return visualize(args)

    parser.set_defaults(run=run)


def add_benchmark(commands):
    parser = commands.add_parser("benchmark", help="measure this package on this machine")
    what = parser.add_subparsers(metavar="WHAT", required=True)
    parser = what.add_parser(
        "evaluator",
        help="the evaluator against pycocotools, on the same simulated detections",
        description="The evaluator against pycocotools, on the same simulated detections: seconds, "
        "memory, and whether the numbers agree.",
    )
    parser.add_argument("gt", metavar="GT", help="ground truth in COCO format, with `area`")
    parser.add_argument(
        "--split", default="voc", help="the seen categories, a split's name or names"
    )
    parser.add_argument("--images", type=int, metavar="N", help="only the first N images")
    parser.add_argument("--dets", type=int, default=1500, metavar="N", help="detections an image")
    parser.add_argument(
        "--reference-images", type=int, default=100, metavar="N",
        help="pycocotools runs on N of the images, its time is scaled to all (default %(default)s)",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="of the simulated detections")

    def run(args):
        from oln_d2.evaluation.benchmark import benchmark

        benchmark(args.gt, args.split, args.images, args.dets, args.reference_images, args.seed)

    parser.set_defaults(run=run)
    parser = what.add_parser(
        "masks",
        help="from predicted masks to RLE, against Detectron2",
        description="From the small masks of a mask head to RLE of the image's size, against "
        "Detectron2: seconds, memory, and whether the masks agree.",
    )
    parser.add_argument("--masks", type=int, default=1500, metavar="N", help="number of masks")
    parser.add_argument(
        "--size", type=int, nargs=2, default=[800, 1333], metavar=("H", "W"), help="of the image"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the simulated masks")

    def run_masks(args):
        from oln_d2.evaluation.benchmark import benchmark_masks

        benchmark_masks(args.masks, *args.size, args.seed)

    parser.set_defaults(run=run_masks)


def _add_seen(parser, required=False):
    seen = parser.add_mutually_exclusive_group(required=required)
    seen.add_argument(
        "--split",
        choices=list(SPLITS),
        metavar="SPLIT",
        help="the seen categories: voc, 20 of COCO's 80; person; coco, all 80; or the same by the "
        f"names of another data set, {', '.join(name for name in SPLITS if '_' in name)}",
    )
    seen.add_argument("--seen", help="their names: a,b,c or a file with one a line")


def _ks(text):
    try:
        return sorted({int(k) for k in text.split(",")})
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a list of integers such as 10,100"
        ) from None
