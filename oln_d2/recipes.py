"""Recipes of either runtime, trained one after another, and what their models find."""

import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from oln_d2.checks import NOT_NEGATIVE, POSITIVE_INT, InputError, check_limits, needs
from oln_d2.data.coco import load_coco
from oln_d2.data.lookup import find_images
from oln_d2.data.splits import SPLITS, seen_names
from oln_d2.files import StrPath, lock_folder, make_folder, read_json, write_file
from oln_d2.loading import load
from oln_d2.model_zoo import flatten, load_config
from oln_d2.propose import propose_files

TOP_K = 1500  # the protocol "xclass" looks beyond the first 1000
TIMED = 20  # images, after the first
LOG = "compare.log"  # `log.txt` is that of Detectron2


class Trained(NamedTuple):
    """One recipe, trained once or with several seeds."""

    name: str
    results: list[str]  # what each of its models finds
    parameters: int
    milliseconds: float  # of an image, one at a time: the median


def train_recipes(
    recipes: Sequence[StrPath],
    gt: StrPath,
    images: StrPath,
    output: StrPath,
    *,
    seen: str | Sequence[str],
    train_json: StrPath | None = None,
    train_images: StrPath | None = None,
    seeds: Sequence[int] = (0,),
    num_gpus: int = 1,
    opts: Sequence[str] = (),
    device: str = "auto",
) -> tuple[list[Trained], list[str]]:
    """
    Train recipes and propose with each model on the images of a ground truth. What is done is
    skipped, what was interrupted goes on.

    Args:
        recipes: of `train_net.py`, files or names of the model zoo; or of `oln-d2 train`.
        gt, images: what is tested on, a COCO file and the folder of its images.
        output: a folder; each run has one in it, `NAME/seed_0` and so on, with its `compare.log`.
        seen: the seen categories, see :func:`oln_d2.data.splits.seen_names`.
        train_json, train_images: what all train on; without, each recipe names its own.
        seeds: each recipe is trained with each of them.
        num_gpus: of each training.
        opts: KEY VALUE pairs that override all recipes of `train_net.py`.
        device: of the models that propose, see :func:`oln_d2.load`.

    Returns:
        what was trained, and a sentence for each recipe that failed.

    Raises:
        InputError: recipes, settings or folders that cannot be used; before the first one is run.
        ImportError: what a recipe needs is not installed.
    """
    for seed in seeds:
        check_limits(seeds=(seed, NOT_NEGATIVE))
    check_limits(num_gpus=(num_gpus, POSITIVE_INT))
    if (train_json is None) != (train_images is None):
        raise InputError("train_json and train_images go together; give both or neither")
    own = (train_json, train_images, seen) if train_json is not None else None
    runs = _plan(
        [os.fspath(recipe) for recipe in recipes], Path(output), seeds, own, opts, num_gpus
    )
    find_images(images, load_coco(gt)["images"], gt)
    end_together()
    for number, run in enumerate(runs, 1):
        title = f"[{number}/{len(runs)}] {run.recipe}, seed {run.seed}:"
        if (run.folder / "finished").is_file():
            print(title, "trained before")
            continue
        print(title, f"training, see {run.folder / LOG}", flush=True)
        try:
            run.failure = run_training(run.folder, run.command, LOG)
        except InputError as error:  # another process has the folder
            run.failure = str(error)
        if run.failure:
            print(title, f"failed: {run.failure}", flush=True)
    failed = [f"{run.recipe}, seed {run.seed}: {run.failure}" for run in runs if run.failure]
    found: dict[str, list[Any]] = {}
    for run in runs:
        if not run.failure:
            found.setdefault(run.name, []).append(_propose(run, gt, images, device))
    trained = []
    for name, parts in found.items():
        results, costs = zip(*parts)
        milliseconds = statistics.median(cost["milliseconds"] for cost in costs)
        trained.append(Trained(name, list(results), costs[0]["parameters"], milliseconds))
    return trained, failed


class _RecipeRun:
    """A recipe with a seed; `failure` says why it failed."""

    def __init__(self, recipe, name, seed, folder, command, is_detectron2):
        self.recipe, self.name, self.seed, self.folder = recipe, name, seed, folder
        self.command, self.is_detectron2 = command, is_detectron2
        self.failure: str | None = None


def _plan(recipes, output, seeds, own, opts, num_gpus):
    """The runs, seed by seed, so that whole comparisons are there early; all of them checked."""
    runs: list[_RecipeRun] = []
    of_name: dict[str, str] = {}
    for seed in seeds:
        for recipe in recipes:
            name = Path(recipe).stem
            if of_name.setdefault(name, recipe) != recipe:
                raise InputError(
                    f"{recipe}: the second recipe named {name}, for one folder; rename it"
                )
            folder = output / name / f"seed_{seed}"
            is_detectron2 = _is_detectron2(recipe)
            make = _detectron2_command if is_detectron2 else _standalone_command
            command = make(recipe, seed, folder, own, opts, num_gpus)
            runs.append(_RecipeRun(recipe, name, seed, folder, command, is_detectron2))
    for run in runs:
        make_folder(run.folder)
    return runs


def _is_detectron2(recipe):
    """Of a recipe that both runtimes could not read; one that is no file is a name of the zoo."""
    with needs(recipe, "train"):
        import yaml

    if not os.path.isfile(recipe):
        return True
    try:
        content = yaml.safe_load(Path(recipe).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return True  # what reads it has its sentence
    return not isinstance(content, dict) or any(str(key).isupper() for key in content)


def _detectron2_command(recipe, seed, folder, own, opts, num_gpus):
    """Raises InputError if a recipe cannot be read, or its folder holds a run of other settings."""
    if "OUTPUT_DIR" in opts:
        raise InputError("--opts OUTPUT_DIR: each run has its folder in --output")
    options = [*opts, "SEED", str(seed)]
    if own is not None:
        row = ["compare_train", *map(os.fspath, own[:2]), _seen_text(own[2])]
        options += ["DATASETS.OWN", str([row]), "DATASETS.TRAIN", "('compare_train',)"]
    options += ["DATASETS.TEST", "()"]
    check_same(folder, load_config(recipe, options))
    command = ["oln_d2.train_net", "--config-file", recipe, "--resume", "--num-gpus", str(num_gpus)]
    return [*command, *options, "OUTPUT_DIR", str(folder)]


def check_same(folder: Path, cfg: Any) -> None:
    """
    Args:
        cfg: the Detectron2 config of a training that is about to start, or to go on, in `folder`.

    Raises:
        InputError: the folder holds a run of other settings.
    """
    import yaml
    from detectron2.config import get_cfg

    from oln_d2.config import add_oln_config

    before = folder / "config.yaml"  # written by Detectron2 when a run starts
    if not before.is_file():
        return
    defaults = get_cfg()  # an older version may not have known all keys
    add_oln_config(defaults)
    settings, defaults = (flatten(yaml.safe_load(one.dump())) for one in (cfg, defaults))
    try:
        known = defaults | flatten(yaml.safe_load(before.read_text(encoding="utf-8")) or {})
    except (OSError, UnicodeDecodeError, yaml.YAMLError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{before}: is damaged ({reason}); remove it and run again") from None
    keys = sorted({*settings, *known} - {"OUTPUT_DIR"})
    changed = [key for key in keys if settings.get(key) != known.get(key)]
    if changed:
        raise InputError(
            f"{folder}: holds a run with another value of {', '.join(changed[:5])}; choose "
            "another --output or remove the folder"
        )


def _standalone_command(recipe, seed, folder, own, opts, num_gpus):
    """Raises InputError if a recipe cannot be read, or names no data and none is given."""
    from oln_d2.standalone.recipe import read_recipe

    options = read_recipe(recipe)
    command = ["oln_d2", "train", "--config", recipe, "--resume", "--devices", str(num_gpus)]
    if own is not None:
        json_file, folder_of_images, seen = own
        command += ["--train-json", str(json_file), "--images", str(folder_of_images)]
        command += ["--split" if seen in SPLITS else "--seen", _seen_text(seen)]
    elif missing := sorted({"train_json", "images"} - options.keys()):
        raise InputError(
            f"{recipe}: lacks {' and '.join(missing)}; give --train-json and --train-images, which "
            "all recipes then train on"
        )
    return [*command, "--seed", str(seed), "--output", str(folder)]


def _seen_text(seen):
    return seen if isinstance(seen, str) else ",".join(seen_names(seen))


def end_together() -> None:
    """The default of these signals would end this process and leave the one that trains."""
    for name in ("SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)  # Windows has no SIGHUP
        if number and signal.getsignal(number) != signal.SIG_IGN:  # as nohup has it
            signal.signal(number, lambda number, _: sys.exit(128 + number))


def run_training(folder: Path, command: list[str], log: str) -> str | None:
    """
    Train, from the last checkpoint if there is one; the folder is then `finished`.

    Args:
        command: a module and its arguments.
        log: the name of a file in the folder.

    Returns:
        why it failed, or None.

    Raises:
        InputError: another process has the folder.
    """
    # The process that trains has the folder too, also when this one is killed.
    with lock_folder(folder) as lock, open(folder / log, "a+b") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", *command],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            pass_fds=[lock.fileno()] if os.name == "posix" else (),
        )
        try:
            code = process.wait()
        finally:
            if process.poll() is None:  # this process is being ended
                with contextlib.suppress(ProcessLookupError):  # it may end by itself meanwhile
                    if hasattr(os, "killpg"):  # not on Windows
                        os.killpg(process.pid, signal.SIGKILL)
                    process.kill()
                process.wait()
        if code == 0:
            (folder / "finished").touch()
            return None
        output.seek(0)
        lines = output.read().decode(errors="replace").strip().split("\n")
        return f"exit code {code}, {lines[-1].strip() or 'no output'}"


def _propose(run, gt, images, device):
    """What a trained model finds, and what it costs."""
    config = os.fspath(run.folder / "config.yaml") if run.is_detectron2 else None
    proposer = load(run.folder / "model_final.pth", config, device)
    found = run.folder / "proposals"
    propose_files(proposer, [os.fspath(images)], found, gt=gt, top_k=TOP_K)
    path = run.folder / "cost.json"
    if not path.is_file():
        entries = load_coco(gt)["images"][: TIMED + 1]
        paths = find_images(images, entries, gt)
        seconds = []
        for entry in entries:
            begin = time.perf_counter()
            list(proposer(paths[entry["id"]], top_k=TOP_K))
            seconds.append(time.perf_counter() - begin)
        milliseconds = 1000 * statistics.median(seconds[1:] or seconds)
        parameters = sum(p.numel() for p in proposer.model.parameters())
        write_file(path, json.dumps({"parameters": parameters, "milliseconds": milliseconds}))
    return os.fspath(found / "results.json"), read_json(path)
