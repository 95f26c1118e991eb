"""The command `python -m oln_d2 sweep`: recipes one after another, their metrics in one table."""

import os
import signal
import subprocess
import sys
from pathlib import Path

from tabulate import tabulate

from oln_d2.data.coco import read_json
from oln_d2.errors import InputError, require_detectron2
from oln_d2.evaluation.result import percent, write_report
from oln_d2.files import lock, write_whole

# The metrics of the table.
_METRICS = [
    ("unseen", "AR@10"), ("unseen", "AR@100"), ("unseen", "AR@1000"), ("unseen", "AUC"),
    ("seen", "AR@100"),
]  # fmt: skip


def sweep(args):
    """
    Args:
        args: the command's arguments, see `oln_d2.cli`.

    Returns:
        int: 0, or 1 if a recipe failed.

    Raises:
        InputError: recipes, settings or folders that cannot be used; before the first one is run.
    """
    folders = _name_folders(args.recipes, args.output)
    failed = []
    if not args.collect_only:
        require_detectron2("sweep")
        _check(folders, args.opts)
        # The default would end this process and leave the one that trains.
        for number in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) != signal.SIG_IGN:  # as nohup has it
                signal.signal(number, lambda number, _: sys.exit(128 + number))
        for number, (recipe, folder) in enumerate(folders.items(), 1):
            title = f"[{number}/{len(folders)}] {recipe}:"
            if _is_finished(folder):
                print(title, "finished before")
                continue
            print(title, f"training, see {_log(folder)}", flush=True)
            reason = _train(recipe, folder, args.num_gpus, args.opts)
            if reason:
                failed.append(recipe)
                print(title, f"failed: {reason}", flush=True)
                continue
            with write_whole(_marker(folder)) as temporary:
                Path(temporary).touch()
            print(title, "finished", flush=True)
    _collect(folders, args.output)
    if failed:
        print(f"\nfailed: {', '.join(failed)}")
    return 1 if failed else 0


def _name_folders(recipes, output):
    """The output folder of each recipe, named as its file."""
    folders = {}
    for recipe in recipes:
        name = Path(recipe).stem
        if name.startswith("Base-"):
            print(f"{recipe}: what recipes share, not one itself; left out")
            continue
        folder = os.path.join(output, name)
        if folder in folders.values():
            raise InputError(f"{recipe}: the second recipe named {name}, for one folder; rename it")
        folders[recipe] = folder
    if not folders:
        raise InputError("no recipes are given; expected YAML files such as configs/cpu/oln*.yaml")
    return folders


def _check(folders, opts):
    """Raises InputError if a recipe cannot be read or its folder holds a run of other settings."""
    import yaml

    from oln_d2.train_net import load_config

    if "OUTPUT_DIR" in opts:
        raise InputError("--opts OUTPUT_DIR: each recipe has its folder in --output")
    for recipe, folder in folders.items():
        settings = _flatten(yaml.safe_load(load_config(recipe, opts).dump()))
        # Written by Detectron2 when a run starts.
        before = os.path.join(folder, "config.yaml")
        if not os.path.isfile(before):
            continue
        with open(before, encoding="utf-8") as f:
            known = _flatten(yaml.safe_load(f))
        changed = [
            key
            for key in sorted({*settings, *known} - {"OUTPUT_DIR"})
            if settings.get(key) != known.get(key)
        ]
        if changed:
            raise InputError(
                f"{folder}: holds a run of {Path(recipe).stem} with another value of "
                f"{', '.join(changed)}; choose another --output or remove the folder"
            )


def _flatten(settings, prefix=""):
    flat = {}
    for key, value in (settings or {}).items():
        if isinstance(value, dict):
            flat.update(_flatten(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat


def _marker(folder):
    return os.path.join(folder, "finished")


def _is_finished(folder):
    return os.path.isfile(_marker(folder))


def _log(folder):
    return os.path.join(folder, "sweep.log")


def _train(recipe, folder, num_gpus, opts):
    """Train a recipe, from its last checkpoint if there is one. Return why that failed, or None."""
    os.makedirs(folder, exist_ok=True)
    with open(_log(folder), "a+b") as log:
        if not lock(log):  # it is the output of the process that trains, too
            return "a process is training there; wait for it or end it"
        process = subprocess.Popen(
            [sys.executable, "-m", "oln_d2.train_net", "--config-file", recipe, "--resume"]
            + ["--num-gpus", str(num_gpus), *opts, "OUTPUT_DIR", folder],
            stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            code = process.wait()
        finally:
            if process.poll() is None:  # this process is being ended
                os.killpg(process.pid, signal.SIGKILL)
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
            for path in sorted(Path(folder).glob("inference/*/open_world_results.json")):
                rows += [
                    {
                        "recipe": Path(recipe).stem,
                        "data set": path.parent.name,
                        "IoU": result["iou_type"],
                        "protocol": result["protocol"],
                        **{f"{group} {name}": result[group].get(name) for group, name in _METRICS},
                    }
                    for result in read_json(path)["results"]
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
    with write_whole(os.path.join(output, "results.md")) as temporary:
        Path(temporary).write_text(table + "\n", encoding="utf-8")
    write_report(os.path.join(output, "results.json"), rows)


def _cell(value):
    if isinstance(value, str):
        return value
    return percent(float("nan") if value is None else value)
