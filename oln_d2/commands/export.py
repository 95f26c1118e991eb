"""
Writes a trained OLN-Box as one ONNX file, for images of any size, which `propose` takes. The file
computes everything from the resized image to boxes and scores. It covers inference on one image at
a time in float32; not training, larger batches, the resizing, masks, and other models.
"""

import argparse

HELP = "a trained OLN-Box as ONNX"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "checkpoint",
        metavar="IN",
        help="a checkpoint of `train`, `quickstart` or `convert`; or, with --config-file, one of "
        "train_net.py",
    )
    parser.add_argument("output", metavar="OUT", help="e.g. model.onnx")
    parser.add_argument(
        "--config-file",
        metavar="YAML",
        help="the config.yaml in the output folder of train_net.py, or a recipe of MODEL_ZOO.md; "
        "reading it needs Detectron2",
    )


def run(args: argparse.Namespace) -> None:
    from oln_d2.standalone.export import export

    config = None
    if args.config_file is not None:
        from oln_d2.model_zoo.translate import detector_config

        config = detector_config(args.config_file)
    export(args.checkpoint, args.output, config)
    print(f"{args.output} is written; `oln-d2 propose --weights` takes it")
