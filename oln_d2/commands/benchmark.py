"""
Measures this package on this machine, side by side with others.
"""

import argparse
from typing import Any

from oln_d2.commands.arguments import pick

HELP = "measure this package on this machine"


def add_arguments(parser: argparse.ArgumentParser) -> None:
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
        "--reference-images",
        type=int,
        default=100,
        metavar="N",
        help="pycocotools runs on N of the images, its time is scaled to all (default %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the simulated detections")
    parser.set_defaults(benchmark=_evaluator)
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
    parser.set_defaults(benchmark=_masks)
    parser = what.add_parser(
        "train",
        help="training steps, against Faster R-CNN",
        description="Training steps of OLN-Box and of a class-agnostic Faster R-CNN of the same "
        "size, in turn, on photographs with random boxes: seconds, how they divide, and memory.",
    )
    _add_models(parser)
    parser.add_argument(
        "--every-format",
        action="store_true",
        help="with and without bfloat16 and channels last: which options are worth it here",
    )
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="default 8")
    parser.set_defaults(benchmark=_train)
    parser = what.add_parser(
        "infer",
        help="inference, against Faster R-CNN",
        description="Inference of OLN-Box, with all proposals and with fewer, and of a "
        "class-agnostic Faster R-CNN of the same size, in turn: seconds, how they divide, and "
        "memory.",
    )
    _add_models(parser)
    parser.add_argument(
        "--proposals",
        type=int,
        nargs="+",
        default=[1000, 500, 300],
        metavar="N",
        help="how many go through the second stage (default 1000 500 300)",
    )
    parser.add_argument(
        "--compile",
        dest="compiled",
        action="store_true",
        help="also with backbone and pyramid by torch.compile (needs a C++ compiler)",
    )
    parser.set_defaults(benchmark=_infer)
    parser = what.add_parser(
        "onnx",
        help="the shipped model on onnxruntime, against other small detectors",
        description="The shipped model on onnxruntime against torchvision's "
        "fasterrcnn_mobilenet_v3_large_320_fpn, eager and as ONNX, and against a file of your own: "
        "milliseconds for the same images, and recall.",
    )
    parser.add_argument("images", metavar="DIR", help="a folder of photographs")
    parser.add_argument("--gt", metavar="JSON", help="of them, COCO format: also print recall")
    parser.add_argument("--split", default="voc", help="its seen categories (default voc)")
    parser.add_argument("--number", type=int, metavar="N", help="of images (default: all)")
    parser.add_argument(
        "--other",
        nargs="+",
        default=[],
        metavar="FILE",
        help="ONNX files: of TensorFlow's form, such as Google's Mobile Object Localizer, or those "
        "that `oln-d2 export` writes",
    )
    parser.add_argument(
        "--proposals",
        type=int,
        nargs="*",
        default=[2000, 200],
        metavar="N",
        help="also with --max-proposals N (default 2000, which are all, and 200)",
    )
    parser.add_argument(
        "--sizes", type=int, nargs="*", default=[], metavar="PX", help="also by these --min-size"
    )
    parser.add_argument("--top-k", type=int, default=100, metavar="K", help="boxes (default 100)")
    parser.add_argument(
        "--threads", type=int, nargs="+", default=[1, 2], metavar="N", help="default 1 2"
    )
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="turns (default 5)")
    parser.add_argument("--plot", metavar="FILE", help="with --gt: recall against time")
    parser.set_defaults(benchmark=_onnx)
    parser = what.add_parser(
        "propose",
        help="how much of its time `propose` spends in the model",
        description="`propose` on images: seconds, how much of them is spent in the model, what "
        "reading and resizing alone takes, and memory early and late.",
    )
    parser.add_argument("inputs", metavar="INPUT", nargs="+", help="see `oln-d2 propose`")
    parser.add_argument("--weights", metavar="FILE", help="default: the shipped model")
    parser.add_argument("--batch-size", type=int, default=4, metavar="N", help="default 4")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="default cpu")
    parser.set_defaults(benchmark=_propose)


def _add_models(parser):
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--config", metavar="FILE", help="a recipe of `train`, YAML (default: the shipped model)"
    )
    which.add_argument(
        "--detectron2",
        nargs=2,
        metavar=("OURS", "THEIRS"),
        help="two recipes of MODEL_ZOO.md, an OLN-Box and a Faster R-CNN",
    )
    parser.add_argument(
        "--photos", metavar="DIR", help="a folder (default: the repository's examples/photos)"
    )
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="turns (default 5)")
    parser.add_argument("--device", default="cpu", help="default cpu")
    parser.add_argument("--seed", type=int, default=0, help="of weights and random boxes")


def run(args: argparse.Namespace) -> None:
    args.benchmark(args)


def _evaluator(args: argparse.Namespace) -> None:
    from oln_d2.benchmark.evaluator import benchmark_evaluator

    benchmark_evaluator(
        args.gt,
        args.split,
        num_images=args.images,
        dets=args.dets,
        reference_images=args.reference_images,
        seed=args.seed,
    )


def _masks(args: argparse.Namespace) -> None:
    from oln_d2.benchmark.masks import benchmark_masks

    height, width = args.size
    benchmark_masks(args.masks, height, width, args.seed)


def _train(args: argparse.Namespace) -> None:
    from oln_d2.benchmark.training import benchmark_train

    names = "photos every_format batch_size repeats device seed"
    benchmark_train(_model(args), args.detectron2, **pick(args, names))


def _infer(args: argparse.Namespace) -> None:
    from oln_d2.benchmark.inference import benchmark_infer

    names = "photos proposals compiled repeats device seed"
    benchmark_infer(_model(args), args.detectron2, **pick(args, names))


def _onnx(args: argparse.Namespace) -> None:
    from oln_d2.benchmark.onnx import benchmark_onnx

    names = "gt split number other proposals sizes top_k threads repeats plot"
    benchmark_onnx(args.images, **pick(args, names))


def _propose(args: argparse.Namespace) -> None:
    from oln_d2.benchmark.propose import benchmark_propose

    benchmark_propose(args.inputs, **pick(args, "weights batch_size device"))


def _model(args: argparse.Namespace) -> dict[str, Any] | None:
    from oln_d2.standalone.recipe import MODEL, read_recipe

    if args.config is None:
        return None
    recipe = read_recipe(args.config)
    return {**recipe.get("model", {}), **{n: recipe[n] for n in MODEL if n in recipe}}
