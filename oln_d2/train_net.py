"""
Train or evaluate OLN and its reference detectors.

    python train_net.py --config-file configs/oln_box_R_50_FPN.yaml --num-gpus 8
    python train_net.py --config-file configs/oln_box_R_50_FPN.yaml --eval-only MODEL.WEIGHTS FILE
"""

import argparse
import contextlib
import datetime
import logging
import multiprocessing
import sys
from typing import TYPE_CHECKING, Any

from oln_d2.checks import InputError, interrupted, reason, require_detectron2
from oln_d2.files import check_links, lock_folder, make_folder
from oln_d2.model_zoo import find_config_file, load_config

if TYPE_CHECKING:
    from detectron2.config import CfgNode

# That processes wait for each other: as long as one of them scores a large data set for all.
TIMEOUT = datetime.timedelta(hours=2)


def setup(args: argparse.Namespace) -> "CfgNode":
    """The frozen config of a run, see :func:`main`, whose output folder and loggers are set up."""
    import detectron2.utils.comm as comm
    from detectron2.engine import default_setup
    from detectron2.utils.logger import setup_logger

    logging.raiseExceptions = False  # a full disk would give a traceback for each line of the log
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
        args: as Detectron2's `default_argument_parser` makes them.

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
        evaluators = Trainer.check_data(cfg, training=False)
        model = Trainer.build_model(cfg)
        StrictCheckpointer(model).load(cfg.MODEL.WEIGHTS)
        results = Trainer.test(cfg, model, evaluators)
        if comm.is_main_process():
            verify_results(cfg, results)
        return results
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=args.resume)
    return trainer.train()


def _reason(error):
    diverged = ""
    if isinstance(error, FloatingPointError):
        from oln_d2.modeling.rpn import DIVERGED as diverged
    processes = "lower DATALOADER.NUM_WORKERS, or in docker run raise --shm-size; --resume goes on"
    memory = "lower SOLVER.IMS_PER_BATCH or INPUT.MIN_SIZE_TRAIN; --resume goes on"
    return reason(error, processes, memory, diverged)


def _main_of_process(args, messages):
    """`main`; of several processes, the one that started them gets the reason of a failure."""
    try:
        main(args)
    except Exception as error:
        if sentence := _reason(error):
            messages.put(sentence)
        raise


def _check(args):
    """The config; InputError for settings that cannot be used, before processes are started."""
    import torch

    if not args.config_file:
        raise InputError("--config-file is missing; give a recipe of configs/")
    if args.num_machines > 1 and args.dist_url == "auto":
        raise InputError(
            f"--num-machines {args.num_machines} needs --dist-url; give an address of the first "
            "machine that all can reach, such as tcp://HOST:PORT"
        )
    cfg = load_config(args.config_file, args.opts)
    device = cfg.MODEL.DEVICE
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
    batch, processes = cfg.SOLVER.IMS_PER_BATCH, needed * args.num_machines
    for key in "IMS_PER_BATCH", "MAX_ITER":
        if cfg.SOLVER[key] < 1 and not args.eval_only:
            raise InputError(f"SOLVER.{key} is {cfg.SOLVER[key]}; it has to be 1 or more")
    if not args.eval_only and cfg.SOLVER.REFERENCE_WORLD_SIZE == 0 and batch % processes:
        raise InputError(
            f"SOLVER.IMS_PER_BATCH is {batch}, which {processes} processes cannot share evenly; "
            "give a multiple, and SOLVER.BASE_LR in proportion"
        )
    make_folder(cfg.OUTPUT_DIR)
    check_links(cfg.OUTPUT_DIR)
    return cfg


def run() -> None:
    """The command line."""
    messages = multiprocessing.get_context("spawn").SimpleQueue()
    try:
        try:
            require_detectron2("train_net.py")
        except ImportError as error:
            sys.exit(f"{error}. Without it, `python -m oln_d2 train` trains OLN-Box")
        from detectron2.engine import default_argument_parser, launch

        parser = default_argument_parser(epilog=__doc__)
        parser.set_defaults(dist_url="auto")  # any free port; the default is always the same
        args = parser.parse_args()
        cfg = _check(args)
        writes = not args.eval_only and args.machine_rank == 0
        with lock_folder(cfg.OUTPUT_DIR) if writes else contextlib.nullcontext():
            launch(
                _main_of_process,
                args.num_gpus,
                num_machines=args.num_machines,
                machine_rank=args.machine_rank,
                dist_url=args.dist_url,
                args=(args, messages),
                timeout=TIMEOUT,
            )
    except (KeyboardInterrupt, Exception) as error:
        if interrupted(error):
            for process in multiprocessing.active_children():
                process.terminate()
            print("train_net.py: stopped; a training goes on with --resume", file=sys.stderr)
            sys.exit(130)
        sentence = _reason(error) if messages.empty() else messages.get()
        if sentence is None:
            raise
        sys.exit(f"train_net.py: {sentence}")


if __name__ == "__main__":
    run()
