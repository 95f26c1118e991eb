"""
Writes a trained OLN-Box as one ONNX file, for images of any size, which `propose` takes. The file
computes everything from the resized image to boxes and scores. It covers inference on one image at
a time, in float32 or with --int8; not training, larger batches, the resizing, masks, and other
models.
"""

import argparse
import os
import tempfile
from functools import partial
from typing import Any

from oln_d2.checks import POSITIVE_INT, InputError, check_limits

HELP = "a trained OLN-Box as ONNX"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "checkpoint",
        metavar="IN",
        nargs="?",
        help="a checkpoint of `train`, `quickstart` or `convert`; or, with --config-file, one of "
        "train_net.py; or, with --low-rank or --int8, what this command wrote before (default of "
        "--int8: the model of this package)",
    )
    parser.add_argument("output", metavar="OUT", help="e.g. model.onnx")
    parser.add_argument(
        "--config-file",
        metavar="YAML",
        help="the config.yaml in the output folder of train_net.py, or a recipe of MODEL_ZOO.md; "
        "reading it needs Detectron2",
    )
    parser.add_argument(
        "--low-rank",
        metavar="DIR",
        help="its widest layers as products of two narrower ones, by what they say of photographs "
        "in DIR: less time on any processor",
    )
    parser.add_argument(
        "--int8",
        metavar="DIR",
        help="its largest layers in 8-bit integers, whose range is measured on photographs in DIR: "
        "faster on processors with VNNI, AMX or Arm's dot product",
    )
    parser.add_argument(
        "--int8-images",
        type=int,
        default=64,
        metavar="N",
        help="measured on so many of them (default %(default)s)",
    )


def run(args: argparse.Namespace) -> None:
    from oln_d2.data.lookup import plural
    from oln_d2.loading import load
    from oln_d2.propose.low_rank import PHOTOS, reduce_rank
    from oln_d2.propose.onnx import OnnxProposer, check_target
    from oln_d2.propose.quantize import find_photos, quantize

    source, int8, low_rank = args.checkpoint, args.int8, args.low_rank
    if source is None and (int8 is None or low_rank is not None):
        raise InputError("OUT is missing: oln-d2 export IN OUT; without IN, give --int8 alone")
    if source is None and os.path.exists(args.output):
        raise InputError(
            f"{args.output}: is there already; if it is the model, give OUT behind it, else remove "
            "it first: the model of this package would be written there"
        )
    # All that can be wrong is found before the work.
    check_target(args.output, source or "")
    is_exported = source is None or source.endswith(".onnx")
    if is_exported and ((int8 or low_rank) is None or args.config_file is not None):
        raise InputError(
            f"{source}: is exported already; give --low-rank or --int8, and no --config-file"
        )
    steps: list[partial[Any]] = []  # each from a proposer to a file
    if low_rank is not None:
        steps.append(partial(reduce_rank, photos=find_photos(low_rank, PHOTOS)))
    if int8 is not None:
        check_limits(**{"--int8-images": (args.int8_images, POSITIVE_INT)})
        steps.append(partial(quantize, photos=find_photos(int8, args.int8_images)))
    with tempfile.TemporaryDirectory() as folder:
        exported = source
        if not is_exported:
            exported = os.path.join(folder, "0.onnx") if steps else args.output
            _export(source, exported, args.config_file)
        for i, step in enumerate(steps, start=1):
            proposer = load(exported, device="cpu")
            assert isinstance(proposer, OnnxProposer)
            exported = os.path.join(folder, f"{i}.onnx") if i < len(steps) else args.output
            kept_of = step(proposer, exported) or {}
            print(f"Measured on {plural(len(step.keywords['photos']), 'photograph')}")
            for layer, kept in kept_of.items():
                print(f"{layer}: {100 * kept:.1f} % of the variance is kept")
    what = "" if source else ", the model of this package"
    print(f"{args.output} is written{what}; `oln-d2 propose --weights` takes it")


def _export(checkpoint: str, output: str, config_file: str | None) -> None:
    from oln_d2.standalone.export import export

    config = None
    if config_file is not None:
        from oln_d2.model_zoo.translate import detector_config

        config = detector_config(config_file)
    export(checkpoint, output, config)
