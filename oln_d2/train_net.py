"""
Train or evaluate OLN and its reference detectors.

    python train_net.py --config-file configs/oln_box_R_50_FPN.yaml --num-gpus 8
    python train_net.py --config-file configs/oln_box_R_50_FPN.yaml --eval-only MODEL.WEIGHTS FILE
"""

import os
import sys

from oln_d2 import InputError, add_oln_config, model_zoo
from oln_d2.errors import require_detectron2


def load_config(config_file, opts):
    """
    Args:
        config_file (str): a file, or a recipe's name in the model zoo.
        opts (list[str]): KEY VALUE pairs that override it.

    Returns:
        CfgNode: the frozen config.

    Raises:
        InputError: a file that cannot be read, or a key or value that does not exist.
    """
    import yaml
    from detectron2.config import get_cfg

    if not config_file:
        raise InputError("--config-file is missing; give a recipe of configs/")
    if not os.path.isfile(config_file):
        config_file = model_zoo.get_config_file(config_file)
    cfg = get_cfg()
    add_oln_config(cfg)
    try:
        cfg.merge_from_file(config_file)
        cfg.merge_from_list(opts)
    except (OSError, KeyError, ValueError, AssertionError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"--config-file {config_file}, or a KEY VALUE pair: {reason}") from None
    cfg.freeze()
    return cfg


def setup(args):
    import detectron2.utils.comm as comm
    from detectron2.engine import default_setup
    from detectron2.utils.logger import setup_logger

    cfg = load_config(args.config_file, args.opts)
    default_setup(cfg, args)
    setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name="oln_d2")
    return cfg


def main(args):
    import detectron2.utils.comm as comm
    from detectron2.evaluation import verify_results

    from oln_d2.training import StrictCheckpointer, Trainer

    cfg = setup(args)
    if args.eval_only:
        Trainer.check_data(cfg)
        model = Trainer.build_model(cfg)
        StrictCheckpointer(model).load(cfg.MODEL.WEIGHTS)
        results = Trainer.test(cfg, model)
        if comm.is_main_process():
            verify_results(cfg, results)
        return results
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=args.resume)
    return trainer.train()


def _check_device(cfg, num_gpus):
    """Before processes are started: raises InputError where there are not as many GPUs."""
    import torch

    if cfg.MODEL.DEVICE.startswith("cuda") and torch.cuda.device_count() < max(num_gpus, 1):
        raise InputError(
            f"this needs {max(num_gpus, 1)} CUDA devices, and PyTorch finds "
            f"{torch.cuda.device_count()} here; lower --num-gpus, or run on the CPU: MODEL.DEVICE "
            "cpu, with the recipes in configs/cpu"
        )


def run():
    """The command line."""
    try:
        require_detectron2("train_net.py")
    except ImportError as error:
        sys.exit(f"{error}. Without it, `python -m oln_d2 train` trains OLN-Box")
    from detectron2.engine import default_argument_parser, launch
    from torch.multiprocessing import ProcessRaisedException

    parser = default_argument_parser(epilog=__doc__)
    parser.set_defaults(dist_url="auto")  # any free port; the default is always the same
    args = parser.parse_args()
    try:
        _check_device(load_config(args.config_file, args.opts), args.num_gpus)
        launch(
            main,
            args.num_gpus,
            num_machines=args.num_machines,
            machine_rank=args.machine_rank,
            dist_url=args.dist_url,
            args=(args,),
        )
    except InputError as error:
        sys.exit(f"train_net.py: {error}")
    except ProcessRaisedException as error:
        # The traceback of one of several processes, as text.
        _, is_input_error, message = str(error).rpartition("InputError: ")
        if not is_input_error:
            raise
        sys.exit(f"train_net.py: {message.strip()}")


if __name__ == "__main__":
    run()
