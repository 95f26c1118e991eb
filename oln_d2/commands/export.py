"""
Writes a trained OLN-Box as one file: .onnx (images of any size), which `propose` takes, or .pt,
TorchScript. The file computes everything from the resized image to boxes and scores. It covers
inference on one image at a time in float32; not training, larger batches, the resizing, masks, and
other models.
"""

import argparse

HELP = "a trained OLN-Box as ONNX or TorchScript"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "checkpoint", metavar="IN", help="a checkpoint of `train`, `quickstart` or `convert`"
    )
    parser.add_argument("output", metavar="OUT", help="e.g. model.onnx or model.pt")


def run(args: argparse.Namespace) -> None:
    from oln_d2.standalone.export import export

    export(args.checkpoint, args.output)
    print(
        f"{args.output} is written; `oln-d2 propose --weights` takes .onnx, torch.jit.load takes "
        ".pt"
    )
