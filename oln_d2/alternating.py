"""
The four-step alternating training of the Faster R-CNN paper (Ren et al., 2015): the two stages of a
recipe in turn, on one backbone in the end.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from oln_d2.checks import POSITIVE_INT, InputError, check_limits, needs
from oln_d2.files import StrPath, make_folder, write_file
from oln_d2.loading import load
from oln_d2.model_zoo import load_config
from oln_d2.propose import propose_files
from oln_d2.recipes import check_same, end_together, run_training

STEPS = ("1_first_stage", "2_second_stage", "3_first_stage", "4_second_stage")
SHARED = "backbone"  # its FPN, too, which both stages look at
LOG = "train.log"


def train_alternating(
    recipe: StrPath,
    output: StrPath,
    *,
    num_gpus: int = 1,
    opts: Sequence[str] = (),
    device: str = "auto",
) -> Path:
    """
    Train a recipe of two stages, each step with its schedule: (1) the first stage and (2) the
    second, on the first's proposals, both from MODEL.WEIGHTS; (3) the first stage on the backbone
    of (2), which is frozen from here on; (4) the second stage of (2) goes on, on the proposals of
    (3). Steps that are done are skipped, one that was interrupted goes on.

    Args:
        recipe: of `train_net.py`, a file or a name of the model zoo; MODEL.PROPOSAL_GENERATOR is
            its first stage, MODEL.ROI_HEADS its second.
        output: a folder, with one in it for each step.
        num_gpus: of each training.
        opts: KEY VALUE pairs that override the recipe.
        device: that proposes, see :func:`oln_d2.load`.

    Returns:
        the model: the recipe's, with the first stage of (3) and all else of (4). The file
        `config.yaml` beside it names it as MODEL.WEIGHTS.

    Raises:
        InputError: settings, data or folders that cannot be used, before the first step; a step
            that failed; steps that do not belong together.
        ImportError: Detectron2 is not installed.
    """
    check_limits(num_gpus=(num_gpus, POSITIVE_INT))
    recipe, output = os.fspath(recipe), Path(output)
    if "OUTPUT_DIR" in opts:
        raise InputError("--opts OUTPUT_DIR: each step has its folder in --output")
    data, plan = _plan(recipe, output, list(opts))
    end_together()
    for number, (folder, options) in enumerate(plan, 1):
        title = f"[{number}/{len(plan)}] {folder.name}:"
        if (folder / "finished").is_file():
            print(title, "trained before")
            continue
        if number % 2 == 0:  # a second stage
            _propose(plan[number - 2][0], folder, data, device)
        print(title, f"training, see {folder / LOG}", flush=True)
        command = ["oln_d2.train_net", "--config-file", recipe, "--resume"]
        command += ["--num-gpus", str(num_gpus), *options, "OUTPUT_DIR", str(folder)]
        if failure := run_training(folder, command, LOG):
            raise InputError(f"{folder}: the step failed: {failure}")
    return _join(recipe, output, opts)


def _plan(recipe, output, opts):
    """The data sets to propose on; and of each step its folder and its KEY VALUE pairs; checked."""
    opts = [*opts, "DATASETS.TEST", "()"]
    cfg = load_config(recipe, opts)
    model = cfg.MODEL
    generator = model.PROPOSAL_GENERATOR.NAME
    if model.META_ARCHITECTURE != "GeneralizedRCNN" or generator == "PrecomputedProposals":
        raise InputError(
            f"{recipe}: has no two stages to train in turn; give a recipe of MODEL."
            "META_ARCHITECTURE GeneralizedRCNN that proposes itself, such as "
            "faster_rcnn_1_anchor_R_50_FPN.yaml or oln_box_R_50_FPN.yaml"
        )
    folders = [output / step for step in STEPS]
    number = model.RPN.POST_NMS_TOPK_TRAIN
    if generator == "OLNProposals":
        number = model.OLN.NUM_PROPOSALS[0]
    first = {
        "MODEL.META_ARCHITECTURE": "ProposalNetwork",
        # What it will propose on the training images is what it hands on in joint training.
        "MODEL.RPN.PRE_NMS_TOPK_TEST": model.RPN.PRE_NMS_TOPK_TRAIN,
        "MODEL.RPN.POST_NMS_TOPK_TEST": model.RPN.POST_NMS_TOPK_TRAIN,
        "MODEL.OLN.RPN_NMS_TEST": model.OLN.RPN_NMS_TRAIN,
        "MODEL.OLN.NUM_PROPOSALS": [number, number],
    }
    second = {
        "MODEL.PROPOSAL_GENERATOR.NAME": "PrecomputedProposals",
        "MODEL.LOAD_PROPOSALS": True,
        "DATASETS.PRECOMPUTED_PROPOSAL_TOPK_TRAIN": number,
    }
    frozen = {
        "MODEL.FROZEN": [*model.FROZEN, SHARED],
        "MODEL.WEIGHTS": str(folders[1] / "model_final.pth"),
    }
    plan = []
    for place, folder in enumerate(folders):
        settings: dict[str, Any] = {**(second if place % 2 else first)}
        if place % 2:
            files = [str(_proposals(folder, name)) for name in cfg.DATASETS.TRAIN]
            settings["DATASETS.PROPOSAL_FILES_TRAIN"] = tuple(files)
        if place >= 2:
            settings |= frozen
        options = [*opts, *(str(word) for pair in settings.items() for word in pair)]
        check_same(folder, load_config(recipe, options))
        plan.append((folder, options))
    data = _check_data([cfg, *(load_config(recipe, options) for _, options in plan[:2])])
    for folder in folders:
        make_folder(folder)
    return (number, data), plan


def _check_data(configs):
    """Annotations and images of each data set of DATASETS.TRAIN, by its name."""
    from detectron2.data import MetadataCatalog

    from oln_d2.engine.trainer import Trainer

    for cfg in configs:
        Trainer.check_data(cfg)
    data = {}
    for name in configs[0].DATASETS.TRAIN:
        metadata = MetadataCatalog.get(name)
        data[name] = metadata.get("json_file"), metadata.get("image_root")
        if not all(data[name]):
            raise InputError(
                f"DATASETS.TRAIN: {name} has no file of COCO's format to propose for; describe it "
                "in DATASETS.OWN"
            )
    return data


def _proposals(folder, name):
    return folder / "proposals" / name / "detectron2.pkl"


def _propose(first, second, data, device):
    """Writes what the first stage finds in the training images to the folder of the second."""
    number, data_sets = data
    with needs("a recipe", "torch"):
        import torch

    proposer = load(first / "model_final.pth", first / "config.yaml", device)
    for name, (json_file, images) in data_sets.items():
        target = _proposals(second, name).parent
        done = propose_files(
            proposer, [images], target, format="detectron2", gt=json_file, top_k=number
        )
        if done.failures:
            raise InputError(done.failures[0])
    del proposer
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # the training needs it


def _join(recipe, output, opts):
    """The model of both stages."""
    from oln_d2.standalone.checkpoint import read_checkpoint, write_checkpoint

    paths = [output / step / "model_final.pth" for step in STEPS[1:]]
    before, first, second = (read_checkpoint(path)["model"] for path in paths)
    for name in before:
        if not name.startswith(f"{SHARED}."):
            continue
        for path, other in zip(paths[1:], (first, second)):
            if not before[name].equal(other[name]):
                raise InputError(
                    f"{path}: {name} is not that of {paths[0]}, which was trained again since; "
                    f"remove the folders {STEPS[2]} and {STEPS[3]} and run again"
                )
    own = {name: t for name, t in first.items() if name.startswith("proposal_generator.")}
    path = output / "model_final.pth"
    write_checkpoint(path, second | own)
    more = ["MODEL.WEIGHTS", str(path), "OUTPUT_DIR", str(output)]
    write_file(output / "config.yaml", load_config(recipe, [*opts, *more]).dump())
    return path
