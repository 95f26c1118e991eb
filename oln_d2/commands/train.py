"""
Train OLN-Box with PyTorch Lightning, without Detectron2, and evaluate it. Defaults are the paper's
settings. What the options are called, with _ for -, a YAML file can hold, too (--config); options
on the command line go before it.
"""

import argparse
import logging
import os
from collections.abc import Iterator
from typing import Any

from oln_d2.checks import InputError, needs
from oln_d2.commands.arguments import add_seen
from oln_d2.files import StrPath

HELP = "train OLN-Box on COCO-format data, without Detectron2"
GOES_ON = "the same command with --resume goes on from the last checkpoint"
EXAMPLES = """\
examples:
  oln-d2 train --train-json train.json --images train/ --seen cat,dog \\
      --val-json val.json --val-images val/ --depth 18 --min-size 480 640 --max-size 1000 \\
      --batch-size 4
  oln-d2 train --config configs/standalone/small.yaml --train-json train.json --images train/ \\
      --split voc --more-data rivets.json rivets/ rivet,bolt
  torchrun --nproc_per_node 8 -m oln_d2 train --train-json instances_train2017.json \\
      --images train2017/ --split voc --amp
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    # What is not given has the defaults of the function `train`, which the texts repeat.
    parser.argument_default = argparse.SUPPRESS
    add = parser.add_argument
    add("--config", metavar="FILE", help="YAML: options by name, and the model's under `model:`")
    add("--train-json", metavar="FILE", help="annotations, COCO format")
    add("--images", metavar="DIR", help="the folder of their images")
    add_seen(parser)
    add(
        "--more-data",
        nargs=3,
        action="append",
        metavar=("FILE", "DIR", "SEEN"),
        help="another data set, with its own categories: a split, names with commas or a file; may "
        "be given several times. What one set does not annotate is no negative",
    )
    add(
        "--data-weights",
        type=float,
        nargs="+",
        metavar="X",
        help="how often images of each data set are drawn (default: each image equally often)",
    )
    add(
        "--pseudo-weight",
        type=float,
        metavar="X",
        help="how much an annotation counts that `audit` added without a review (default 1)",
    )
    add("--val-json", metavar="FILE", help="evaluate on these annotations at the end")
    add("--val-images", metavar="DIR", help="the folder of their images")
    add("--output", metavar="DIR", help="default output/train")

    model = parser.add_argument_group("model")
    add = model.add_argument
    add("--depth", type=int, help="of the ResNet: 10, 18, 34, 50 or 101, default 50")
    add(
        "--backbone", metavar="NAME", help="a model of timm, such as tf_efficientnet_lite0, instead"
    )
    add(
        "--scratch",
        action="store_true",
        help="no pretrained weights are fetched; the whole model learns, with group norm",
    )
    add(
        "--weights",
        metavar="NAME|FILE",
        help="go on from this checkpoint of either runtime or name of the model zoo, with other "
        "data too",
    )
    add(
        "--weights-backbone",
        metavar="FILE",
        help="ImageNet weights of the backbone (default: fetched)",
    )
    add(
        "--min-size",
        type=int,
        nargs="+",
        metavar="PX",
        help="length of the shorter image side; of several, training draws one, the last is for "
        "testing (default 800)",
    )
    add("--max-size", type=int, metavar="PX", help="of the longer side (default 1333)")

    schedule = parser.add_argument_group("schedule")
    add = schedule.add_argument
    add("--epochs", type=float, metavar="N", help="default 8")
    add("--batch-size", type=int, metavar="N", help="of all processes (default 16)")
    add(
        "--accumulate",
        type=int,
        metavar="N",
        help="parts that a batch is computed in, for less memory (default 1)",
    )
    add("--lr", type=float, help="default 0.02 for 16 images, in proportion")
    add("--warmup", type=int, metavar="N", help="iterations, default 500")
    add("--schedule", choices=["step", "cosine"], help="of the rate, default step, the paper's")
    add("--clip", type=float, metavar="X", help="largest norm of the gradients (default: any)")
    add(
        "--ema",
        type=float,
        metavar="DECAY",
        help="evaluate and keep a moving average of the weights, such as 0.999",
    )
    add("--seed", type=int, help="default 0")

    images = parser.add_argument_group("images")
    add = images.add_argument
    add(
        "--scale-jitter",
        type=float,
        nargs=2,
        metavar=("LEAST", "GREATEST"),
        help="factor of the image size, drawn for each image; what is too large is cut off",
    )
    add(
        "--no-group-by-aspect",
        dest="group_by_aspect",
        action="store_false",
        help="images of any shape share batches",
    )
    add("--workers", type=int, metavar="N", help="processes that load images (default 2)")

    machine = parser.add_argument_group("machine")
    add = machine.add_argument
    add("--device", help="default cuda if there is one, else cpu")
    add("--devices", type=int, metavar="N", help="processes, one a GPU (default 1)")
    add("--num-nodes", type=int, metavar="N", help="machines, as of SLURM (default 1)")
    add(
        "--precision",
        choices=["float32", "auto", "bfloat16", "float16"],
        help="default float32; auto: bfloat16 mixed with it where the device computes that",
    )
    add("--amp", action="store_true", help="the same as --precision float16, on a GPU")
    add(
        "--channels-last",
        action="store_true",
        help="the order in memory in which convolutions may be faster",
    )

    run = parser.add_argument_group("run")
    add = run.add_argument
    add("--checkpoint-every", type=int, metavar="N", help="iterations, default 500")
    add("--evaluate-every", type=int, metavar="N", help="iterations (default: at the end only)")
    add("--patience", type=int, metavar="N", help="end after N evaluations without a better one")
    add(
        "--loggers",
        nargs="+",
        metavar="NAME",
        help="of csv (default), tensorboard, wandb and mlflow",
    )
    add(
        "--resume",
        action="store_true",
        help="go on from the checkpoint in --output, if there is one",
    )


def run(args: argparse.Namespace) -> None:
    with needs("train", "train"):
        import torch  # noqa: F401  or its absence would be told, without the extra for training
    from oln_d2.standalone import train
    from oln_d2.standalone.recipe import MODEL, read_recipe

    given = {name: value for name, value in vars(args).items() if value is not None}
    for name in ("run", "goes_on"):
        given.pop(name)
    path = given.pop("config", None)
    recipe = read_recipe(path) if path else {}
    check_kinds(path, recipe)
    if "split" in given or "seen" in given:  # one of them
        recipe = {name: value for name, value in recipe.items() if name not in ("split", "seen")}
    options = {**recipe, **given}
    model = {
        **options.pop("model", {}),
        **{name: options.pop(name) for name in MODEL if name in options},
    }
    if "depth" in given and "backbone" not in given:
        model.pop("backbone", None)
    for name in ("train_json", "images"):
        if name not in options:
            raise InputError(f"--{name.replace('_', '-')} is missing; give the training data")
    split = options.pop("split", None) or options.pop("seen", None)
    if not split:
        raise InputError("--split or --seen is missing; give the categories that are annotated")
    output = options.setdefault("output", "output/train")
    ranks = "RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID"
    is_main = all(os.environ.get(name, "0") == "0" for name in ranks)
    if is_main:  # which images and objects are left out, and why
        logging.basicConfig(format="%(message)s")
        logging.getLogger("oln_d2").setLevel(logging.INFO)
    timm = model.get("backbone")
    scratch = options.pop("scratch", False)
    if scratch and ("weights" in options or "weights_backbone" in options):
        raise InputError("--scratch starts from no weights; leave it out, or the weights")
    if scratch:
        learning = {"norm": "BN", "fpn_norm": "GN"} if timm else {"norm": "GN"}
        model = {**learning, "trainable_backbone_layers": 5, "ltrb_init": 0.5, **model}
    elif "weights" in options:
        options["weights"] = _found(options["weights"])
    else:
        options.setdefault("weights_backbone", "DEFAULT" if timm else "IMAGENET1K_V1")
    result = train(options.pop("train_json"), options.pop("images"), split, config=model, **options)
    if result is not None:
        print(result)
    if is_main:
        print(f"The model is {os.path.join(output, 'model_final.pth')}.")


def check_kinds(path: StrPath, options: dict[str, Any]) -> None:
    """Raises InputError for a value that is of another kind than on the command line."""
    kinds = {str: "text", int: "an integer", float: "a number", bool: "true or false"}
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    for action in parser._actions:
        kind: Any = bool if action.nargs == 0 else action.type or str
        if action.dest not in options or kind not in kinds:
            continue
        value = options[action.dest]
        several = action.nargs is not None or action.dest in ("split", "seen")
        fits = all(_fits(leaf, kind) for leaf in _leaves(value))
        if not fits or (isinstance(value, list) and not several):
            what = kinds[kind] + (", or a list of that" if several and kind is not bool else "")
            raise InputError(f"{path}: {action.dest} is {value!r}; write {what}")


def _fits(value: Any, kind: type) -> bool:
    if isinstance(value, bool) or kind is bool:
        return isinstance(value, bool) and kind is bool
    return isinstance(value, (int, float) if kind is float else kind)


def _leaves(value: Any) -> Iterator[Any]:
    for item in value if isinstance(value, list) else [value]:
        if isinstance(item, list):
            yield from _leaves(item)
        else:
            yield item


def _found(weights: str) -> str:
    """The file of weights that are given by their name in the model zoo."""
    if os.path.isfile(weights) or not weights.endswith(".yaml"):
        return weights
    from oln_d2.model_zoo import get_checkpoint_url

    return get_checkpoint_url(weights)
