"""Category splits: which categories of a data set are seen in training. All others are unseen."""

import difflib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from oln_d2.checks import InputError
from oln_d2.data.vocabularies import COCO_NAMES, counterparts
from oln_d2.files import StrPath

# The one table of splits, by category name. `voc`: the 20 PASCAL VOC categories under the names
# that COCO gives them (the paper's main experiment); `person`: one seen category; `coco`: all of
# COCO's 80, to test on another data set. `lvis_v1_voc` and the like: the same in its vocabulary.
SPLITS: dict[str, tuple[str, ...]] = {
    "voc": tuple(
        "airplane, bicycle, bird, boat, bottle, bus, car, cat, chair, couch, cow, dining table, "
        "dog, horse, motorcycle, person, potted plant, sheep, train, tv".split(", ")
    ),
    "person": ("person",),
    "coco": COCO_NAMES,
}
SPLITS.update(
    (f"{dataset}_{split}", counterparts(dataset, SPLITS[split]))
    for dataset in ("lvis_v1", "objects365_v2", "ade20k")
    for split in ("voc", "coco")
)


def seen_names(seen: StrPath | Sequence[str]) -> tuple[str, ...]:
    """
    Args:
        seen: the name of a split in `SPLITS`, the path of a text file with one category name a
            line, a comma-separated list of names, or a list of names.

    Returns:
        the names of the seen categories in the given order, each once. Empty (nothing is seen) if
        an empty list is given.

    Raises:
        InputError: a string that is neither a split nor a file nor category names.
    """
    if isinstance(seen, (str, os.PathLike)):
        if str(seen) in SPLITS:
            return SPLITS[str(seen)]
        path = Path(seen).expanduser()
        if path.is_file():
            try:
                names = path.read_text(encoding="utf-8-sig").splitlines()
            except (OSError, UnicodeDecodeError) as error:
                raise InputError(f"{seen}: cannot be read as UTF-8 text ({error})") from None
        elif path.suffix in (".txt", ".lst") or isinstance(seen, os.PathLike):
            raise InputError(
                f"{seen}: no such file; expected a text file of category names, one a line"
            )
        else:
            names = seen.split(",")
        names = [name.strip() for name in names if name.strip()]
        if not names:
            raise InputError(f"{seen!r}: names no category; expected at least one name")
    else:
        names = list(seen)
    return tuple(dict.fromkeys(names))


def split_category_ids(
    categories: list[dict[str, Any]], seen: StrPath | Sequence[str], source: StrPath
) -> tuple[list[int], list[int]]:
    """
    Args:
        categories: COCO categories, each with `id` and `name`.
        seen: see :func:`seen_names`.
        source: the file that `categories` came from; named in errors.

    Returns:
        ids of the seen and of the unseen categories, ascending.

    Raises:
        InputError: a seen name that is no category of the data set.
    """
    names = seen_names(seen)
    known = {category["name"] for category in categories}
    unknown = [name for name in names if name not in known]
    if unknown:
        there = f"it has: {', '.join(sorted(known))}"
        if len(known) > 100:
            similar = [x for name in unknown for x in difflib.get_close_matches(name, known, 1)]
            there = f"of its {len(known)} these are similar: {', '.join(similar) or 'none'}"
        raise InputError(
            f"{source}: field 'categories' has no category named {', '.join(map(repr, unknown))} "
            f"(named by the split {seen if isinstance(seen, str) else 'given as a list'!r}); "
            f"{there}"
        )
    in_seen = {category["id"]: category["name"] in names for category in categories}
    return (
        sorted(i for i, is_seen in in_seen.items() if is_seen),
        sorted(i for i, is_seen in in_seen.items() if not is_seen),
    )
