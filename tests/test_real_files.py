"""Files and situations from public bug reports, see `real_files`."""

import importlib
import pkgutil
import shlex

import pytest
import real_files
from conftest import NEEDS_DETECTRON2
from test_propose import small_recipe, weights  # noqa: F401

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


@pytest.mark.parametrize("row", ROWS)
def test_row(row, weights, tmp_path, monkeypatch, capfd):  # noqa: F811
    """
    What is unambiguous must be read, what is not must be named with the remedy, and nothing lost.
    """
    monkeypatch.chdir(tmp_path)
    row.make(tmp_path)
    recipe = small_recipe(tmp_path) if "{recipe}" in row.line else None
    line = row.line.format(weights=weights, recipe=recipe)
    assert main(shlex.split(line)) == row.code, capfd.readouterr()
    printed = "".join(capfd.readouterr())
    for part in row.says:
        assert part in printed, printed
    for part in ("Traceback", *row.lacks):
        assert part not in printed, printed
    if row.code == 2:
        error = printed[printed.index("error: ") :]
        assert len(error) < 400 and len(error.strip().splitlines()) == 1, error
    if row.check:
        row.check(tmp_path)
