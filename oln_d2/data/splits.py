"""Category splits: which categories of a data set are seen in training. All others are unseen."""

import difflib
from pathlib import Path

from oln_d2.data.vocabularies import COCO_NAMES, counterparts
from oln_d2.errors import InputError

# The one table of splits, by category name. `voc`: the 20 PASCAL VOC categories under the names
# that COCO gives them (the paper's main experiment); `person`: one seen category; `coco`: all of
# COCO's 80, for another data set's tests. `lvis_v1_voc` and the like: the same in its vocabulary.
SPLITS = {
    "voc": (
        "airplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "couch",
        "cow", "dining table", "dog", "horse", "motorcycle", "person", "potted plant", "sheep",
        "train", "tv",
    ),
    "person": ("person",),
    "coco": COCO_NAMES,
}  # fmt: skip
SPLITS.update(
    (f"{dataset}_{split}", counterparts(dataset, SPLITS[split]))
    for dataset in ("lvis_v1", "objects365_v2", "ade20k")
    for split in ("voc", "coco")
)


def seen_names(seen):
    """
    Args:
        seen (str | list[str]): the name of a split in `SPLITS`, the path of a text file with one
            category name a line, a comma-separated list of names, or a list of names.

    Returns:
        tuple[str]: the names of the seen categories, without repetition, in the given order. May be
        empty (nothing is seen) if an empty list is given.

    Raises:
        InputError: a string that is neither a split nor a file nor category names.
    """
    if isinstance(seen, (str, Path)):
        if str(seen) in SPLITS:
            return SPLITS[str(seen)]
        path = Path(seen).expanduser()
        if path.is_file():
            try:
                names = path.read_text(encoding="utf-8-sig").splitlines()
            except (OSError, UnicodeDecodeError) as error:
                raise InputError(f"{seen}: cannot be read as UTF-8 text ({error})") from None
        elif path.suffix in (".txt", ".lst") or isinstance(seen, Path):
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


def split_category_ids(categories, seen, source):
    """
    Args:
        categories (list[dict]): COCO categories, each with `id` and `name`.
        seen (str | list[str]): see :func:`seen_names`.
        source (str): the file that `categories` came from; named in errors.

    Returns:
        (list[int], list[int]): ids of the seen and of the unseen categories, ascending.

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
            f"(asked for by the split {seen if isinstance(seen, str) else 'given as a list'!r}); "
            f"{there}"
        )
    in_seen = {category["id"]: category["name"] in names for category in categories}
    return (
        sorted(i for i, is_seen in in_seen.items() if is_seen),
        sorted(i for i, is_seen in in_seen.items() if not is_seen),
    )
