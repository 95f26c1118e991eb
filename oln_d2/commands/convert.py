"""
Turns a checkpoint of the authors' code (mmdet) or of train_net.py into one that describes itself,
for oln_d2.load and MODEL.WEIGHTS; or pretrained weights of a timm model into MODEL.WEIGHTS to train
from. Every tensor is checked; code in the file is not executed.
"""

import argparse

from oln_d2.checks import InputError

HELP = "the authors' published OLN-Box weights, or others, as a checkpoint for both runtimes"
EXAMPLES = """\
examples:
  oln-d2 convert oln_box_public.pth oln_box_d2.pth
  oln-d2 convert output/model_final.pth oln_box.safetensors --config-file output/config.yaml
  oln-d2 convert efficientnet-lite0.pth lite0_d2.pth --backbone tf_efficientnet_lite0
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="IN", help="the authors' file, e.g. oln_box_public.pth")
    parser.add_argument(
        "target", metavar="OUT", help="ours, e.g. oln_box_d2.pth or oln_box_d2.safetensors"
    )
    parser.add_argument(
        "--config-file",
        metavar="YAML",
        help="of an IN that train_net.py wrote: the config.yaml in its output folder; reading it "
        "needs Detectron2",
    )
    parser.add_argument(
        "--half", action="store_true", help="store the numbers in float16: half the size"
    )
    parser.add_argument(
        "--backbone",
        metavar="NAME",
        help="IN holds pretrained weights of this model of timm, or is the word DEFAULT: they are "
        "fetched",
    )


def run(args: argparse.Namespace) -> None:
    from oln_d2.standalone.convert import convert_backbone, convert_checkpoint

    if args.backbone is not None:
        for option in ("config_file", "half"):
            if getattr(args, option):
                name = option.replace("_", "-")
                raise InputError(f"--{name} and --backbone exclude each other; give one")
        convert_backbone(args.source, args.target, args.backbone)
        print(
            f"Wrote {args.target}, for train_net.py: MODEL.BACKBONE.NAME build_timm_fpn_backbone "
            f"MODEL.OLN.TIMM.NAME {args.backbone} MODEL.WEIGHTS {args.target}"
        )
        return
    config = None
    if args.config_file is not None:
        from oln_d2.model_zoo.translate import detector_config

        config = detector_config(args.config_file)
    model, unused = convert_checkpoint(args.source, args.target, config, args.half)
    config = model.config
    print(
        f"{config['architecture']}: {config['backbone'] or 'ResNet-{depth}'.format(**config)}, "
        f"FPN {config['fpn_channels']}, fc {config['representation_size']}. "
        f"{len(model.state_dict())} tensors converted."
    )
    names = [name for name in unused if not name.endswith(".num_batches_tracked")]
    if len(names) < len(unused):
        names.append(f"{len(unused) - len(names)} counters of batch norm")
    print(f"Not used: {', '.join(names) or 'nothing'}.")
    print(f"Wrote {args.target}. Next, without Detectron2:")
    print(f"  oln-d2 propose photos/ --weights {args.target} --output out/ --draw")
    if unused and config["depth"] == 50:
        print("With Detectron2, on COCO val2017:")
        print(
            "  python train_net.py --config-file configs/oln_box_public_R_50_FPN.yaml --eval-only "
            f"MODEL.WEIGHTS {args.target}"
        )
