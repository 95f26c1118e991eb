"""
Train OLN-Box with torch and torchvision alone and evaluate it. Defaults are the paper's settings.
For many GPUs and more settings use train_net.py.
"""

import argparse
import logging
import os

from oln_d2.commands.arguments import add_seen, pick

HELP = "train OLN-Box on COCO-format data, without Detectron2"
GOES_ON = "the same command with --resume goes on from the last checkpoint"
EXAMPLES = """\
examples:
  oln-d2 train --train-json train.json --images train/ --seen cat,dog \\
      --val-json val.json --val-images val/ --depth 18 --min-size 480 640 --max-size 1000 \\
      --batch-size 4 --amp
  torchrun --nproc_per_node 8 -m oln_d2 train --train-json instances_train2017.json \\
      --images train2017/ --split voc --amp
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--train-json", required=True, metavar="FILE", help="annotations, COCO format"
    )
    parser.add_argument("--images", required=True, metavar="DIR", help="the folder of their images")
    add_seen(parser, required=True)
    parser.add_argument(
        "--val-json", metavar="FILE", help="evaluate on these annotations at the end"
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
        "--scratch",
        action="store_true",
        help="no ImageNet weights are fetched; the whole model learns, with group norm",
    )
    parser.add_argument(
        "--weights", metavar="FILE", help="start from this checkpoint of either runtime"
    )
    parser.add_argument(
        "--min-size",
        type=int,
        nargs="+",
        default=[800],
        metavar="PX",
        help="length of the shorter image side; of several, training draws one, the last is for "
        "testing (default 800)",
    )
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


def run(args: argparse.Namespace) -> None:
    from oln_d2.standalone import train

    is_main = os.environ.get("RANK", "0") == "0"
    if is_main:  # which images and objects are left out, and why
        logging.basicConfig(format="%(message)s")
        logging.getLogger("oln_d2").setLevel(logging.INFO)
    config = {"depth": args.depth, "min_size": tuple(args.min_size), "max_size": args.max_size}
    weights_backbone = None
    if args.scratch:
        config.update(norm="GN", trainable_backbone_layers=5, ltrb_init=0.5)
    elif args.weights is None:
        weights_backbone = "IMAGENET1K_V1"
    result = train(
        args.train_json,
        args.images,
        args.split or args.seen,
        args.output,
        config=config,
        weights_backbone=weights_backbone,
        **pick(
            args,
            "val_json val_images weights epochs batch_size lr warmup amp device workers "
            "checkpoint_every seed resume",
        ),
    )
    if result is not None:
        print(result)
    if is_main:
        print(f"The model is {os.path.join(args.output, 'model_final.pth')}.")
