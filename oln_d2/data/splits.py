"""Category splits: which categories of a data set are seen in training. All others are unseen."""

import difflib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from oln_d2.checks import InputError
from oln_d2.data.vocabularies import COCO_NAMES, counterparts
from oln_d2.files import StrPath

NAMED = 5  # names of categories in a message

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
        if os.path.isfile(path):  # False, too, where a list of names is too long for a path
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
        seen: see :func:`seen_names`. Spaces around names, here and there, do not matter, nor does
            case where one category alone is meant.
        source: the file that `categories` came from; named in errors.

    Returns:
        ids of the seen and of the unseen categories, ascending.

    Raises:
        InputError: a seen name that is no category of the data set, or could be several.
    """
    ids: dict[str, list[int]] = {}
    folded: dict[str, list[str]] = {}
    for category in categories:
        ids.setdefault(category["name"].strip(), []).append(category["id"])
    for name in ids:
        folded.setdefault(name.casefold(), []).append(name)
    seen_ids: set[int] = set()
    unknown = []
    for name in seen_names(seen):
        name = str(name).strip()
        alike = [name] if name in ids else folded.get(name.casefold(), [])
        if len(alike) > 1:
            raise InputError(
                f"{source}: the category {name!r} could be {' or '.join(map(repr, alike))}; write "
                "it as it is there"
            )
        if alike:
            seen_ids.update(ids[alike[0]])
        else:
            unknown.append(name)
    if unknown:
        there = f"it has: {', '.join(map(repr, sorted(ids)))}"
        if len(there) > 150:
            close = (difflib.get_close_matches(x.casefold(), folded, 1) for x in unknown)
            similar = dict.fromkeys(name for match in close for x in match for name in folded[x])
            names = ", ".join(map(repr, list(similar)[:NAMED]))
            there = f"of its {len(ids)} these are similar: {names or 'none'}"
        more = f" and {len(unknown) - NAMED} more" if len(unknown) > NAMED else ""
        commas = "; names with a comma go into a text file, one a line"
        # One name alone may be a slip in that of a split.
        alone = isinstance(seen, str) and seen.strip() in unknown
        splits = f"; nor is it a split: these are {', '.join(SPLITS)}" if alone else ""
        raise InputError(
            f"{source}: field 'categories' has no category named "
            f"{', '.join(map(repr, unknown[:NAMED]))}{more} (seen categories: "
            f"{seen if isinstance(seen, str) and len(seen) < 50 else 'given as a list'!r}); {there}"
            f"{commas if any(',' in name for name in ids) else ''}{splits}"
        )
    return sorted(seen_ids), sorted({i for own in ids.values() for i in own} - seen_ids)
