"""Every shipped recipe."""

from pathlib import Path

import pytest
from conftest import CONFIGS, NEEDS_DETECTRON2

pytestmark = NEEDS_DETECTRON2
RECIPES = sorted(
    str(path.relative_to(CONFIGS))
    for path in CONFIGS.rglob("*.yaml")
    if not path.name.startswith("Base-")
)


def load_config(recipe):
    """A recipe as a config, on the CPU and without downloaded weights."""
    from detectron2.config import get_cfg

    from oln_d2 import add_oln_config

    cfg = get_cfg()
    add_oln_config(cfg)
    cfg.merge_from_file(str(Path(CONFIGS, recipe)))
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.WEIGHTS = ""
    return cfg
