"""
Files and situations as people reported them of tools of this field, made anew: what each command
must say of them. `tests/test_real_files.py` runs the rows of these modules.
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple


class Row(NamedTuple):
    """A situation."""

    name: str
    # Writes the inputs into an empty folder; "{weights}" in `line` is the checkpoint of a small
    # OLN-Box, "{recipe}" the config file that builds it with Detectron2, "{name}" a name for data.
    make: Callable[[Path], None]
    line: str  # the command, run in that folder: "evaluate gt.json d.json --seen mug"; or train_net
    says: tuple[str, ...]  # parts of what is printed, in any order
    code: int = 0
    lacks: tuple[str, ...] = ()  # parts that must not be printed
    check: Callable[[Path], None] | None = None  # looks at what was written
    detectron2: bool = False  # needs it
