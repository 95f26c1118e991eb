"""The notebooks in `examples/`."""

import shutil

import pytest
from conftest import ROOT


@pytest.mark.heavy
def test_quick_look(tmp_path):
    """Whoever opens it must see pictures and numbers in every cell, and no error."""
    nbformat = pytest.importorskip("nbformat")
    client = pytest.importorskip("nbclient")
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    notebook = nbformat.read(ROOT / "examples/quick_look.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells)  # none are committed
    client.NotebookClient(notebook, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    shown = [kind for output in outputs for kind in output.get("data", ())]
    assert shown.count("image/jpeg") + shown.count("image/png") >= 3
    text = "".join(output.get("text", "") for output in outputs)
    assert "unseen" in text
