"""
Writes a trained OLN-Box as one ONNX file, for images of any size, which `propose` takes. The file
computes everything from the resized image to boxes and scores. It covers inference on one image at
a time in float32; not training, larger batches, the resizing, masks, and other models.
"""

import argparse
import os
import tempfile

from oln_d2.checks import InputError

HELP = "a trained OLN-Box as ONNX"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "checkpoint",
        metavar="IN",
        nargs="?",
        help="a checkpoint of `train`, `quickstart` or `convert`; or, with --config-file, one of "
        "train_net.py; or, with --int8, what this command wrote before (default there: the model "
        "of this package)",
    )
    parser.add_argument("output", metavar="OUT", help="e.g. model.onnx")
    parser.add_argument(
        "--config-file",
        metavar="YAML",
        help="the config.yaml in the output folder of train_net.py, or a recipe of MODEL_ZOO.md; "
        "reading it needs Detectron2",
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
    from oln_d2.loading import load
    from oln_d2.propose.inputs import find_sources
    from oln_d2.propose.onnx import OnnxProposer
    from oln_d2.propose.quantize import quantize

    is_exported = args.checkpoint is None or args.checkpoint.endswith(".onnx")
    if is_exported and (args.int8 is None or args.config_file is not None):
        what = args.checkpoint or "without IN"
        raise InputError(f"{what}: is exported already; give --int8, and no --config-file")
    if args.int8 is not None:
        find_sources([args.int8])  # before the work
    with tempfile.TemporaryDirectory() as folder:
        exported = args.checkpoint
        if not is_exported:
            exported = args.output if args.int8 is None else os.path.join(folder, "model.onnx")
            _export(args.checkpoint, exported, args.config_file)
        if args.int8 is not None:
            proposer = load(exported, device="cpu")
            assert isinstance(proposer, OnnxProposer)
            quantize(proposer, args.output, args.int8, args.int8_images)
    print(f"{args.output} is written; `oln-d2 propose --weights` takes it")


def _export(checkpoint: str, output: str, config_file: str | None) -> None:
    from oln_d2.standalone.export import export

    config = None
    if config_file is not None:
        from oln_d2.model_zoo.translate import detector_config

        config = detector_config(config_file)
    export(checkpoint, output, config)
