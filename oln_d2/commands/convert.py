"""
Turns a checkpoint of the authors' code (mmdet) into one that oln_d2.load and MODEL.WEIGHTS take.
Every tensor is checked; code in the file is not executed.
"""

import argparse

HELP = "the authors' published OLN-Box weights as a checkpoint for both runtimes"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="IN", help="their file, e.g. oln_box_public.pth")
    parser.add_argument("target", metavar="OUT", help="ours, e.g. oln_box_d2.pth")


def run(args: argparse.Namespace) -> None:
    from oln_d2.standalone.convert import convert_checkpoint

    model, unused = convert_checkpoint(args.source, args.target)
    config = model.config
    print(
        f"OLN-Box: ResNet-{config['depth']}, FPN {config['fpn_channels']}, "
        f"fc {config['representation_size']}. {len(model.state_dict())} tensors converted."
    )
    names = [name for name in unused if not name.endswith(".num_batches_tracked")]
    if len(names) < len(unused):
        names.append(f"{len(unused) - len(names)} counters of batch norm")
    print(f"Not used: {', '.join(names) or 'nothing'}.")
    print(f"Wrote {args.target}. Next, without Detectron2:")
    print(f"  oln-d2 propose photos/ --weights {args.target} --output out/ --draw")
    if config["depth"] == 50:
        print("With Detectron2, on COCO val2017:")
        print(
            "  python train_net.py --config-file configs/oln_box_public_R_50_FPN.yaml --eval-only "
            f"MODEL.WEIGHTS {args.target}"
        )
