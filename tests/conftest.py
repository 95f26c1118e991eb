"""Shared fixtures. Tests that need Detectron2 ask for `d2_cfg`, or import it with `importorskip`."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[1]
GOLDEN = Path(__file__).parent / "data" / "golden"
CONFIGS = ROOT / "configs"
NEEDS_DETECTRON2 = pytest.mark.skipif(
    importlib.util.find_spec("detectron2") is None, reason="Detectron2 is not installed"
)


def pytest_configure(config):
    torch.set_num_threads(2)


@pytest.fixture
def first_n(monkeypatch):
    """Random samples take the first n candidates, as they did when the golden values were made."""
    randperm = torch.arange
    monkeypatch.setattr(torch, "randperm", lambda n, **kwargs: randperm(n, device=kwargs.get("device")))


def load_golden(name):
    """The arrays of a golden file as tensors."""
    with np.load(GOLDEN / f"{name}.npz") as file:
        return {key: torch.from_numpy(file[key]) for key in file.files}


def close(actual, expected, rtol=1e-5, atol=1e-6):
    """Equal to float32 accuracy."""
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)


# The public code orders distances top, bottom, left, right; we left, top, right, bottom.
LTRB_OF_TBLR = [2, 0, 3, 1]
