"""Files and situations from public bug reports, broken and hostile ones, see `real_files`."""

import importlib
import itertools
import logging
import pkgutil
import shlex
import sys

import pytest
import real_files
from conftest import NEEDS_DETECTRON2
from real_files import broken
from test_propose import small_recipe, weights  # noqa: F401

from oln_d2.checks import LONGEST
from oln_d2.cli import main

MODULES = [
    importlib.import_module(f"real_files.{m.name}")
    for m in pkgutil.iter_modules(real_files.__path__)
]
ROWS = [
    pytest.param(
        row,
        id=f"{module.__name__.partition('.')[2]}: {row.name}",
        marks=[NEEDS_DETECTRON2] if row.detectron2 else [],
    )
    for module in MODULES
    for row in module.ROWS
]

NUMBERS = itertools.count()  # data sets stay registered


def run(words, monkeypatch):
    """The exit code of a command, or of `train_net.py`, whose errors count as 2, too."""
    if words[0] != "train_net":
        return main(words)
    from oln_d2 import train_net
    from oln_d2.model_zoo import load_config

    # Without its loggers, which would outlive the test.
    monkeypatch.setattr(train_net, "setup", lambda args: load_config(args.config_file, args.opts))
    logging.getLogger("detectron2").setLevel(logging.INFO)
    monkeypatch.setattr(sys, "argv", words)
    try:
        train_net.run()
    except SystemExit as error:
        print(f"error: {error.code}", file=sys.stderr)
        return 2
    return 0


@pytest.mark.parametrize("row", ROWS)
def test_row(row, weights, tmp_path, monkeypatch, capfd):  # noqa: F811
    """
    What is unambiguous must be read, what is not must be named with the remedy, and nothing lost.
    """
    monkeypatch.chdir(tmp_path)
    row.make(tmp_path)
    recipe = small_recipe(tmp_path) if "{recipe}" in row.line else None
    line = row.line.format(weights=weights, recipe=recipe, name=f"row{next(NUMBERS)}")
    assert run(shlex.split(line), monkeypatch) == row.code, capfd.readouterr()
    printed = "".join(capfd.readouterr())
    for part in row.says:
        assert part in printed, printed
    for part in ("Traceback", *row.lacks):
        assert part not in printed, printed
    if row.code == 2:
        error = printed[printed.index("error: ") :]
        assert len(error) < LONGEST + 30 and len(error.strip().splitlines()) == 1, error
    if row.check:
        row.check(tmp_path)


def test_rows_of_broken_files_differ():
    """Rows could come to repeat each other, so that fewer mistakes are told than it seems."""
    assert len({row.name for row in broken.ROWS}) == len(broken.ROWS)
    assert len({row.says for row in broken.ROWS}) > 200
