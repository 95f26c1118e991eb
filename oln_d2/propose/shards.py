"""Which of the images of a run are this process's, where several processes share them."""

import os
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeVar

from oln_d2.checks import InputError

Item = TypeVar("Item")


class Shard(NamedTuple):
    """A part of the images of a run."""

    number: int  # from 1
    total: int  # how many there are

    def __str__(self) -> str:
        return f"{self.number}/{self.total}"

    def of(self, items: Sequence[Item]) -> Sequence[Item]:
        """Every so many-th: neighbours, which often take as long as each other, are spread."""
        return items[self.number - 1 :: self.total]

    def check(self) -> "Shard":
        """Itself. Raises InputError where there is no such shard."""
        if not 1 <= self.number <= self.total:
            raise InputError(
                f"shard is {self}; it has to be K/N with K from 1 to N, as 2/8 for the second of 8"
            )
        return self


def find_shard(
    text: str | None, environment: Mapping[str, str] = os.environ
) -> tuple[Shard | None, str]:
    """
    Args:
        text: "K/N"; "slurm", the task of the SLURM array that this process is; None: what torchrun
            says, if that has started the process. Nothing else is read from the environment: that
            of a notebook or an interactive job may have a rank as well, and the tasks of an array
            may well have all images of a folder of their own each.
        environment: the variables.

    Returns:
        the shard, None for all images, and who says so.

    Raises:
        InputError: there is no such shard.
    """
    if text is None:
        # Of all starters that set RANK only torchrun sets this.
        if "TORCHELASTIC_RUN_ID" not in environment:
            return None, ""
        shard = Shard(int(environment["RANK"]) + 1, int(environment["WORLD_SIZE"]))
        return (shard, "torchrun") if shard.total > 1 else (None, "")
    if text != "slurm":
        found = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", text)
        if found is None:
            raise InputError(f"shard is {text}; it has to be K/N, as 2/8, or slurm")
        return Shard(int(found[1]), int(found[2])).check(), "--shard"
    names = [f"SLURM_ARRAY_TASK_{name}" for name in ("ID", "MIN", "MAX", "COUNT")]
    values = [environment.get(name, "") for name in names]
    if not all(map(str.isdecimal, values)):
        raise InputError(
            "shard is slurm, but this is no task of a SLURM array; start it by sbatch --array=1-8, "
            "or give K/N, as 2/8"
        )
    task, first, last, count = map(int, values)
    if last - first + 1 != count:
        raise InputError(
            f"shard is slurm, but the {count} tasks of this SLURM array are numbered {first} to "
            f"{last} with gaps; number them without any, as --array=1-{count}, or give K/N"
        )
    return Shard(task - first + 1, count).check(), "the SLURM array"
