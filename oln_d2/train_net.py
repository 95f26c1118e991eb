"""
Train or evaluate OLN and its reference detectors.

    python train_net.py --config-file configs/oln_box_R_50_FPN.yaml --num-gpus 8
    python train_net.py --config-file configs/oln_box_R_50_FPN.yaml --eval-only MODEL.WEIGHTS FILE
"""

import argparse
import multiprocessing
import sys
from typing import TYPE_CHECKING, Any

from oln_d2.checks import InputError, require_detectron2
from oln_d2.model_zoo import find_config_file, load_config

if TYPE_CHECKING:
    from detectron2.config import CfgNode


def setup(args: argparse.Namespace) -> "CfgNode":
    """
    The frozen config of a run, whose output folder and loggers are then set up.

    Args:
        args: of Detectron2's `default_argument_parser`.

    Raises:
        InputError: see :func:`oln_d2.model_zoo.load_config`.
    """
    import detectron2.utils.comm as comm
    from detectron2.engine import default_setup
    from detectron2.utils.logger import setup_logger

    cfg = load_config(args.config_file, args.opts)
    cfg.freeze()
    args.config_file = find_config_file(args.config_file)  # which `default_setup` opens
    default_setup(cfg, args)
    setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name="oln_d2")
    return cfg


def main(args: argparse.Namespace) -> dict[str, Any]:
    """
    Train, or evaluate with `args.eval_only`, in this process.

    Args:
        args: of Detectron2's `default_argument_parser`.

    Returns:
        the metrics of the last evaluation; {} in all processes but the main one.

    Raises:
        InputError: files or settings that cannot be used.
    """
    import detectron2.utils.comm as comm
    from detectron2.evaluation import verify_results

    from oln_d2.engine.trainer import StrictCheckpointer, Trainer

    cfg = setup(args)
    if args.eval_only:
        evaluators = Trainer.check_data(cfg)
        model = Trainer.build_model(cfg)
        StrictCheckpointer(model).load(cfg.MODEL.WEIGHTS)
        results = Trainer.test(cfg, model, evaluators)
        if comm.is_main_process():
            verify_results(cfg, results)
        return results
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=args.resume)
    return trainer.train()


def _main_of_process(args, messages):
    """`main`; of several processes, the one that started them gets the message of an InputError."""
    try:
        main(args)
    except InputError as error:
        messages.put(str(error))
        raise


def _check(args):
    """Raises InputError for settings that cannot be used, before processes are started."""
    import torch

    if not args.config_file:
        raise InputError("--config-file is missing; give a recipe of configs/")
    if args.num_machines > 1 and args.dist_url == "auto":
        raise InputError(
            f"--num-machines {args.num_machines} needs --dist-url; give an address of the first "
            "machine that all can reach, such as tcp://HOST:PORT"
        )
    device = load_config(args.config_file, args.opts).MODEL.DEVICE
    found, needed = torch.cuda.device_count(), max(args.num_gpus, 1)
    if device.startswith("cuda") and found < needed:
        raise InputError(
            f"this needs {needed} CUDA devices, and PyTorch finds {found} here; lower --num-gpus, "
            "or run on the CPU: MODEL.DEVICE cpu, with the recipes in configs/cpu"
        )
    if 0 < found < needed:
        raise InputError(
            f"--num-gpus {needed}: Detectron2 gives each process a GPU where there are any, also "
            f"with MODEL.DEVICE {device}, and PyTorch finds {found} here; lower --num-gpus, or "
            "hide the GPUs: set the environment variable CUDA_VISIBLE_DEVICES to nothing"
        )


def run() -> None:
    """The command line."""
    try:
        require_detectron2("train_net.py")
    except ImportError as error:
        sys.exit(f"{error}. Without it, `python -m oln_d2 train` trains OLN-Box")
    from detectron2.engine import default_argument_parser, launch
    from torch.multiprocessing import ProcessExitedException, ProcessRaisedException

    parser = default_argument_parser(epilog=__doc__)
    parser.set_defaults(dist_url="auto")  # any free port; the default is always the same
    args = parser.parse_args()
    messages = multiprocessing.get_context("spawn").SimpleQueue()
    try:
        _check(args)
        launch(
            _main_of_process,
            args.num_gpus,
            num_machines=args.num_machines,
            machine_rank=args.machine_rank,
            dist_url=args.dist_url,
            args=(args, messages),
        )
    except InputError as error:
        sys.exit(f"train_net.py: {error}")
    except (ProcessExitedException, ProcessRaisedException):
        if messages.empty():
            raise
        sys.exit(f"train_net.py: {messages.get()}")


if __name__ == "__main__":
    run()
