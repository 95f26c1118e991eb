"""Recipes trained one after another, and their metrics in one table."""

import contextlib
import math
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tabulate import tabulate

from oln_d2.checks import InputError, needs
from oln_d2.evaluation.result import percent, write_report
from oln_d2.files import StrPath, lock_folder, make_folder, read_json, write_file
from oln_d2.model_zoo import flatten, load_config

# The metrics of the table.
_METRICS = [
    *(("unseen", name) for name in ("AR@10", "AR@100", "AR@1000", "AUC")),
    ("seen", "AR@100"),
]


def sweep(
    recipes: Sequence[StrPath],
    output: StrPath,
    *,
    num_gpus: int = 1,
    collect_only: bool = False,
    opts: Sequence[str] = (),
) -> list[str]:
    """
    Train recipes one after another by `train_net.py`, and print and write a table of their metrics.
    What is finished is skipped, what was interrupted goes on from its last checkpoint.

    Args:
        recipes: config files, or names of the model zoo.
        output: a folder; each recipe has one in it, named as its file.
        num_gpus: for each training, see `train_net.py`.
        collect_only: only the table of what is finished.
        opts: KEY VALUE pairs that override all recipes.

    Returns:
        the recipes that failed.

    Raises:
        InputError: recipes, settings or folders that cannot be used; before the first one is run.
        ImportError: Detectron2 is not installed.
    """
    output = Path(output)
    folders = _name_folders(map(os.fspath, recipes), output)
    failed = []
    if not collect_only:
        _check(folders, opts)
        _end_together()
        for number, (recipe, folder) in enumerate(folders.items(), 1):
            title = f"[{number}/{len(folders)}] {recipe}:"
            if _is_finished(folder):
                print(title, "finished before")
                continue
            print(title, f"training, see {folder / 'sweep.log'}", flush=True)
            try:
                reason = _train(recipe, folder, num_gpus, opts)
            except InputError as error:  # another process has the folder
                reason = error
            if reason:
                failed.append(recipe)
                print(title, f"failed: {reason}", flush=True)
                continue
            (folder / "finished").touch()
            print(title, "finished", flush=True)
    _collect(folders, output)
    return failed


def _end_together():
    """The default of these signals would end this process and leave the one that trains."""
    for name in ("SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)  # Windows has no SIGHUP
        if number and signal.getsignal(number) != signal.SIG_IGN:  # as nohup has it
            signal.signal(number, lambda number, _: sys.exit(128 + number))


def _name_folders(recipes, output):
    """The output folder of each recipe, named as its file."""
    folders = {}
    for recipe in recipes:
        name = Path(recipe).stem
        if name.startswith("Base-"):
            print(f"{recipe}: is the base of other recipes; left out")
            continue
        folder = output / name
        if folder in folders.values():
            raise InputError(f"{recipe}: the second recipe named {name}, for one folder; rename it")
        folders[recipe] = folder
    if not folders:
        raise InputError("no recipes are given; expected YAML files such as configs/cpu/oln*.yaml")
    return folders


def _check(folders, opts):
    """Raises InputError if a recipe cannot be read or its folder holds a run of other settings."""
    with needs("sweep", "detectron2"):
        import yaml

    if "OUTPUT_DIR" in opts:
        raise InputError("--opts OUTPUT_DIR: each recipe has its folder in --output")
    for recipe, folder in folders.items():
        settings = flatten(yaml.safe_load(load_config(recipe, opts).dump()))
        # Written by Detectron2 when a run starts.
        before = folder / "config.yaml"
        if not before.is_file():
            continue
        try:
            known = flatten(yaml.safe_load(before.read_text(encoding="utf-8")) or {})
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
    for folder in folders.values():
        make_folder(folder)


def _is_finished(folder):
    return (folder / "finished").is_file()


def _train(recipe, folder, num_gpus, opts):
    """Train a recipe, from its last checkpoint if there is one; returns why it failed, or None."""
    # The process that trains has the folder too, also when this one is killed.
    with lock_folder(folder) as lock, open(folder / "sweep.log", "a+b") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "oln_d2.train_net", "--config-file", recipe, "--resume"]
            + ["--num-gpus", str(num_gpus), *opts, "OUTPUT_DIR", str(folder)],
            stdin=subprocess.DEVNULL,
            stdout=log,
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
            return None
        log.seek(0)
        lines = log.read().decode(errors="replace").strip().split("\n")
        return f"exit code {code}, {lines[-1].strip() or 'no output'}"


def _collect(folders, output):
    """Print the metrics of all finished recipes, and write them beside their folders."""
    rows = []
    for recipe, folder in folders.items():
        if _is_finished(folder):
            for path in sorted(folder.glob("inference/*/open_world_results.json")):
                rows += [
                    {
                        "recipe": Path(recipe).stem,
                        "data set": path.parent.name,
                        "IoU": result["iou_type"],
                        "protocol": result["protocol"],
                        **{f"{group} {name}": result[group].get(name) for group, name in _METRICS},
                    }
                    for result in read_json(path, dict).get("results", ())
                ]
    missing = [recipe for recipe, folder in folders.items() if not _is_finished(folder)]
    if missing:
        print(f"\nnot finished: {', '.join(missing)}")
    if not rows:
        print("\nno finished recipe has open-world results")
        return
    table = tabulate(
        [[_cell(value) for value in row.values()] for row in rows],
        list(rows[0]),
        tablefmt="github",
        disable_numparse=True,
        colalign=["left"] * 4 + ["right"] * len(_METRICS),
    )
    print(f"\n{table}\n\nPercent. Numbers of different protocols are not comparable.")
    write_file(output / "results.md", table + "\n")
    write_report(output / "results.json", rows)


def _cell(value):
    return value if isinstance(value, str) else percent(math.nan if value is None else value)
