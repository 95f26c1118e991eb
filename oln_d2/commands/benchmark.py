"""
Measures this package on this machine, side by side with others.
"""

import argparse

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
        "training",
        help="training steps, by number format and order in memory",
        description="Training steps of a recipe of `train` with and without bfloat16 and channels "
        "last, in turns: which options are worth it on this machine.",
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="the recipe, YAML")
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="default 8")
    parser.add_argument("--steps", type=int, default=5, metavar="N", help="default 5, of each")
    parser.add_argument("--device", default="cpu", help="default cpu")
    parser.add_argument("--seed", type=int, default=0, help="of weights and images")
    parser.set_defaults(benchmark=_training)


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


def _training(args: argparse.Namespace) -> None:
    from oln_d2.benchmark.training import benchmark_training
    from oln_d2.standalone.recipe import MODEL, read_recipe

    recipe = read_recipe(args.config)
    model = {**recipe.get("model", {}), **{n: recipe[n] for n in MODEL if n in recipe}}
    benchmark_training(model, **pick(args, "batch_size steps device seed"))
