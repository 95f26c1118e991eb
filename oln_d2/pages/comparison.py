"""Several results files on one page: who finds more, where, and in which images."""

import os
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import PurePath
from typing import Any

import msgspec
import numpy as np
from PIL import Image

from oln_d2.checks import POSITIVE_INT, SEED, InputError, check_limits, one_of
from oln_d2.data.coco import load_coco
from oln_d2.data.images import open_annotated
from oln_d2.data.lookup import find_images, image_name, image_size, plural
from oln_d2.data.splits import SPLITS
from oln_d2.drawing import Objects
from oln_d2.evaluation.coco_results import Detections
from oln_d2.evaluation.comparison import (
    KS,
    MIN_IMAGES,
    Detector,
    Difference,
    Estimate,
    average,
    main_budget,
    measure_detector,
)
from oln_d2.evaluation.ground_truth import GroundTruth
from oln_d2.evaluation.open_world import PROTOCOLS
from oln_d2.evaluation.result import AREA_SUFFIXES, GROUPS, PROTOCOL_TEXT, draw_images
from oln_d2.files import StrPath, check_folder, lock_folder, make_folder, write_file
from oln_d2.pages.figures import COLORS, write_figures
from oln_d2.pages.page import Item, write_page

MOST_FILES = 20  # neither colours nor eyes distinguish more
MOST_PIXELS = 10_000  # a side of the blank ground in place of an image
PICTURE_K = 30  # boxes of an image that are shown at first, and by which images are sorted


@dataclass(frozen=True)
class Row:
    """One results file, or those of several runs of one recipe, whose numbers are means."""

    name: str
    files: list[str]
    num_detections: int
    longest: int  # most detections of an image
    ar: dict[str, dict[int, Estimate]]  # group -> k -> AR@k; no k beyond the longest list
    by_size: dict[str, Estimate]  # size -> AR@k of the objects compared
    by_category: dict[str, float]  # the same by category
    found: int  # how many of the objects compared, at IoU 0.5
    warnings: list[str]
    spread: dict[str, dict[int, tuple[float, float]]]  # least and greatest AR of several runs
    cost: dict[str, float]  # "parameters" and "milliseconds" of an image, where they are known


@dataclass(frozen=True)
class ImageRow:
    """What the detectors find in one image, of the objects compared at IoU 0.5."""

    id: int
    file_name: str
    objects: int
    found: dict[str, int]  # by detector


@dataclass(frozen=True)
class Comparison:
    """What :func:`compare` found. AR and recall are in [0, 1]."""

    group: str  # the objects compared: "unseen", or "all" where no object is unseen
    k: int  # how many detections of an image they are compared by
    rows: list[Row]  # the detector that finds most first
    differences: list[Difference]  # between each two rows, by group and by size
    images: list[ImageRow]  # those where the detectors differ most first
    failures: list[str]  # what was left out and why, a sentence each
    page: str

    def main_differences(self) -> list[Difference]:
        """Those on all objects compared; first those between the best detector and others."""
        return [d for d in self.differences if (d.group, d.area) == (self.group, "all")]

    def __str__(self) -> str:
        lines = [f"Warning: {row.name}: {text}" for row in self.rows for text in row.warnings]
        lines += [str(difference) for difference in self.main_differences()[: len(self.rows) - 1]]
        if len(self.rows) == 1:
            (row,) = self.rows
            objects = "objects" if self.group == "all" else f"{self.group} objects"
            lines.append(
                f"{row.name} alone: {100 * row.ar[self.group][self.k].value:.1f} AR@{self.k} of "
                f"{objects}. Give results of another detector to compare it with."
            )
        return "\n".join(lines)


def compare(
    gt: StrPath,
    results: StrPath | Sequence[StrPath] | Mapping[str, Any],
    output: StrPath,
    *,
    seen: StrPath | Sequence[str],
    protocol: str = "xclass",
    iou_type: str = "box",
    images: StrPath | None = None,
    num_images: int = 50,
    samples: int = 1000,
    seed: int = 0,
    costs: Mapping[str, Mapping[str, float]] | None = None,
) -> Comparison:
    """
    Compare detectors by the objects that they find, and write a page that shows it, `index.html`,
    with its figures and, in `comparison.json`, all numbers.

    Args:
        gt: ground truth in COCO format, with `area`.
        results: files in COCO's results format, which are named by what their paths differ in; or,
            by name, files or what `read_results` returned. A list of these under one name are
            several runs of one recipe: one row, of their means.
        output: a folder.
        seen: the seen categories, see :func:`oln_d2.data.splits.seen_names`; an empty list if none
            is.
        protocol: "xclass" or "filtered", see :mod:`oln_d2.evaluation.open_world`.
        iou_type: "box" or "mask".
        images: the folder of the images; without it they are only named.
        num_images: how many images are shown, those where the detectors differ most first.
        samples: how often the images are drawn anew for the intervals.
        seed: starts these draws.
        costs: what is known of detectors, by their names: "parameters", and "milliseconds" of an
            image.

    Raises:
        InputError: a setting or ground truth that cannot be used, or no results file that can. Of
            several results files those that cannot be used are left out, see
            :attr:`Comparison.failures`, and likewise images.
    """
    check_limits(
        protocol=(protocol, one_of(*PROTOCOLS)),
        iou_type=(iou_type, one_of("box", "mask")),
        num_images=(num_images, POSITIVE_INT),
        samples=(samples, POSITIVE_INT),
        seed=(seed, SEED),
    )
    costs = costs or {}
    if isinstance(results, (str, os.PathLike)):
        results = [results]
    if not 1 <= len(results) <= MOST_FILES:
        raise InputError(f"{len(results)} results files are given; compare 1 to {MOST_FILES}")
    content = load_coco(gt)
    truth = GroundTruth(content, seen, gt, keep=False)
    if truth.crowd.all():
        raise InputError(f"{gt}: holds no object to be found, so nothing can be compared")
    entries = {image["id"]: image for image in content["images"]}
    paths = None
    if images is not None:
        paths = find_images(images, content["images"], gt, all_of_them=False)
    del content  # large
    check_folder(output, "compare")
    make_folder(output)
    with lock_folder(output):
        group = "all" if (truth.seen | truth.crowd).all() else "unseen"
        draws = draw_images(len(truth.image_ids), samples, seed)
        named: dict[str, Any]
        if isinstance(results, Mapping):
            named, failures = dict(results), []
        else:
            named, failures = name_files(results)
        best: dict[str, Detections] = {}
        runs: dict[str, list[Detector]] = {}
        for name, sources in named.items():
            for source in sources if isinstance(sources, list) else [sources]:
                try:
                    one, shown = measure_detector(
                        name, truth, source, draws, group, protocol, iou_type, best=PICTURE_K
                    )
                except InputError as error:
                    failures.append(str(error))
                    continue
                runs.setdefault(name, []).append(one)
                best.setdefault(name, shown)
        if not runs:
            raise InputError(failures[-1])
        detectors = [average(own) for own in runs.values()]
        k = main_budget(detectors)
        detectors.sort(key=lambda detector: -detector.estimate(group, k).value)
        comparison = Comparison(
            group,
            k,
            rows=[
                _row(detector, runs[detector.name], group, k, dict(costs.get(detector.name, {})))
                for detector in detectors
            ],
            differences=_differences(detectors, group, k),
            images=_most_different(truth, detectors, group, min(k, PICTURE_K), entries, num_images),
            failures=failures,
            page=os.path.join(output, "index.html"),
        )
        if isinstance(seen, str) and seen in SPLITS:
            options: dict[str, Any] = {"split": seen}
        else:
            options = {"seen": seen if isinstance(seen, (str, os.PathLike)) else ",".join(seen)}
        options |= {"output": output, "protocol": protocol, "iou": iou_type, "images": images}
        options |= {"num-images": num_images, "bootstrap": samples, "seed": seed}
        files = [file for row in comparison.rows for file in row.files]
        command = ["oln-d2", "compare", gt, *files]
        for option, value in options.items():
            command += [f"--{option}", value] if value is not None else []
        made_by = {
            "settings": {
                "ground truth": f"{gt}, {plural(len(truth.image_ids), 'image')}",
                "seen categories": ", ".join(truth.seen_names) or "none",
                "protocol": f"{protocol}: {PROTOCOL_TEXT[protocol]}",
                "overlap": f"{iou_type} IoU",
                "intervals": f"95 %, {samples} draws of the images, seed {seed}",
            },
            "versions": {
                "oln-d2": sys.modules["oln_d2"].__version__,  # the facade must not be imported here
                "numpy": np.__version__,
                "Python": platform.python_version(),
            },
            "command": shlex.join(map(str, command)),
        }
        num_gts = {g: dict(zip(AREA_SUFFIXES, n)) for g, n in zip(GROUPS, detectors[0].num_gts)}
        categories = _categories(comparison, detectors[0].per_category)
        write_page(
            output,
            _items(comparison, truth, best, entries, paths),
            detectors=[row.name for row in comparison.rows],
            number=min(k, PICTURE_K),
            title="Image by image",
            template="compare.html",
            comparison=comparison,
            verdict=_verdict(comparison, num_gts),
            places=_places(comparison, categories),
            num_gts=num_gts,
            ks=[k for k in KS if any(k in row.ar[group] for row in comparison.rows)],
            categories=categories,
            figures=write_figures(output, comparison, detectors, [name for name, *_ in categories]),
            row_colors=COLORS,
            has_images=images is not None,
            made_by=made_by,
        )
        numbers = msgspec.json.encode({**asdict(comparison), **made_by})  # NaN becomes null
        numbers = msgspec.json.format(numbers, indent=2) + b"\n"
        write_file(os.path.join(output, "comparison.json"), numbers)
    return comparison


def name_files(
    results: Sequence[StrPath],
) -> tuple[dict[str, Any], list[str]]:
    """
    Returns:
        files by the ends of their paths that differ; and a sentence for each that is given twice.
    """
    files: dict[str, StrPath] = {}
    failures = []
    for path in results:
        if os.path.realpath(path) in files:
            failures.append(f"{path}: is given twice; the second is left out")
        files[os.path.realpath(path)] = path
    parts = [PurePath(os.path.splitext(path)[0]).parts for path in files]
    lengths = range(1, max(map(len, parts), default=1) + 1)
    choices = [["/".join(part[-length:]) for part in parts] for length in lengths]
    choices.append([str(path) for path in files.values()])  # they differ in their endings
    names = next(choice for choice in choices if len(set(choice)) == len(files))
    return dict(zip(names, files.values())), failures


def _row(detector, runs, group, k, cost):
    ks = [k for k in KS if k <= max(detector.longest, KS[0])]
    spread = {}
    if len(runs) > 1:
        values = [{g: {k: run.estimate(g, k).value for k in ks} for g in GROUPS} for run in runs]
        spread = {
            g: {k: (min(v[g][k] for v in values), max(v[g][k] for v in values)) for k in ks}
            for g in GROUPS
        }
    return Row(
        detector.name,
        [run.source for run in runs],
        detector.num_detections,
        detector.longest,
        ar={g: {k: detector.estimate(g, k) for k in ks} for g in GROUPS},
        by_size={area: detector.estimate(group, k, area) for area in AREA_SUFFIXES},
        by_category={c: numbers[f"AR@{k}"] for c, numbers in detector.per_category.items()},
        found=int(detector.found[GROUPS.index(group), KS.index(k)].sum()),
        warnings=detector.warnings,
        spread=spread,
        cost=cost,
    )


def _differences(detectors, group, k):
    cases = [(g, "all") for g in GROUPS] + [(group, area) for area in list(AREA_SUFFIXES)[1:]]
    differences = [
        first.minus(second, g, k, area)
        for i, first in enumerate(detectors)
        for second in detectors[i + 1 :]
        for g, area in cases
    ]
    return [difference for difference in differences if difference.num_images]


def _most_different(gt, detectors, group, k, entries, number):
    """The first of :attr:`Comparison.images`: those that hold objects of the group."""
    at, num_images = gt.images, len(gt.image_ids)
    v = GROUPS.index(group)
    wanted = ~gt.crowd & (~gt.seen if group == "unseen" else True)
    objects = np.bincount(at[wanted], minlength=num_images)
    found = np.stack(
        [np.bincount(at[d.found[v, KS.index(k)]], minlength=num_images) for d in detectors]
    )
    order = np.lexsort((-objects, -np.ptp(found, axis=0)))
    return [
        ImageRow(
            id := int(gt.image_ids[i]),
            image_name(entries[id]) or f"image {id}",
            int(objects[i]),
            {d.name: n for d, n in zip(detectors, found[:, i].tolist())},
        )
        for i in order[objects[order] > 0][:number]
    ]


def _items(comparison, gt, best, entries, paths):
    """The images to be shown; where one is missing its objects and boxes are on blank ground."""
    for row in comparison.images:
        index = int(gt.index_images([row.id])[0])
        objects = Objects.of(gt, index)
        image: Image.Image | None = None
        if paths is not None:
            try:
                if row.id not in paths:
                    raise InputError(f"{row.file_name}: is not among the images")
                size = image_size(entries[row.id])
                image, as_stored = open_annotated(paths[row.id], size, gt.source)
                height, width = image.height, image.width
                image = image if as_stored else paths[row.id]
            except InputError as error:
                comparison.failures.append(str(error))
        if image is None:
            sides = gt.image_sizes[index]
            sides = objects.boxes.max(0)[3:1:-1] if np.isnan(sides).any() else sides
            height, width = np.ceil(sides).clip(1).tolist()
            if max(height, width) > MOST_PIXELS:
                comparison.failures.append(
                    f"{row.file_name}: is {width:.0f} x {height:.0f} px in {gt.source}, too large "
                    "to be shown without its photograph"
                )
                continue
            height, width = int(height), int(width)
            image = Image.new("RGB", (width, height), "#555")
        found = []
        for each in comparison.rows:
            detections = best[each.name]
            own = slice(*np.searchsorted(detections.image_ids, [row.id, row.id + 1]))
            found.append(detections.select(own).to_proposals((height, width), row.file_name))
        yield Item(row.file_name, image, found, objects)


def _categories(comparison, per_category):
    """Name, number of objects, and how many more one detector finds than another; most first."""
    table = []
    for name, numbers in per_category.items():
        values = [row.by_category[name] for row in comparison.rows]
        table.append((name, numbers["gts"], numbers["gts"] * (max(values) - min(values))))
    return sorted(table, key=lambda entry: -entry[2])


def _verdict(comparison, num_gts):
    """A headline and what it is based on: for who does not know what AR is."""
    rows, k = comparison.rows, comparison.k
    best, others = rows[0], rows[1:]
    objects = "objects" if comparison.group == "all" else f"{comparison.group} objects"
    total = num_gts[comparison.group]["all"]
    count = {row.name: f"{row.found:,} ({_share(row.found, total)})" for row in rows}
    from_best = comparison.main_differences()[: len(others)]
    even = [d.second for d in from_best if not d.differs]
    if not others:
        title = f"{best.name} finds {_share(best.found, total)} of the {objects}"
    elif from_best and from_best[0].num_images < MIN_IMAGES:
        title = f"Too few images hold {objects} to say which detector finds more"
    elif len(even) == len(others):
        title = f"No difference can be seen: the detectors find about as many of the {objects}"
    elif len(others) == 1:
        title = f"{best.name} finds more of the {objects} than {others[0].name}"
    else:
        title = f"{best.name} finds the most {objects}"
        if even:
            title += f", but no difference to {_listed(even)} can be seen"
    text = f"Of {total:,} {objects} " + _listed(
        [f"{row.name} finds {count[row.name]}" for row in rows[:3]]
    )
    text += f", with the first {k} boxes of each image."
    if others:
        text += f" Difference to {others[0].name}: {from_best[0].numbers}."
        if from_best[0].differs and others[0].found > best.found:
            text += (
                f" At the loose overlap that was counted here {others[0].name} finds more, but the "
                f"boxes of {best.name} fit better, which AR counts too."
            )
    return title, text


def _places(comparison, categories):
    """Sentences on where the first two detectors differ: all sizes, and the main categories."""
    if len(comparison.rows) < 2:
        return []
    first, second = comparison.rows[:2]
    by_size = [
        d
        for d in comparison.differences
        if (d.first, d.second, d.group) == (first.name, second.name, comparison.group)
        and d.area != "all"
    ]
    places = []
    for row, other, sign in ((first, second, 1), (second, first, -1)):
        sizes = [
            f"{d.area} ones ({100 * abs(d.ar.value):+.1f})"
            for d in by_size
            if d.differs and sign * d.ar.value > 0
        ]
        more = [
            (count * (row.by_category[name] - other.by_category[name]), name, count)
            for name, count, _ in categories
        ]
        names = [
            f"{name} ({100 * more_found / count:+.1f}, {plural(count, 'object')})"
            for more_found, name, count in sorted(more)[:-4:-1]
            if more_found > 0
        ]
        found = [", ".join(sizes), "above all " + ", ".join(names) if names else ""]
        if any(found):
            places.append(
                f"{row.name} finds more than {other.name} of: {'; '.join(filter(None, found))}."
            )
    return places


def _share(part, whole):
    """In percent; 100 only where it is all of them."""
    return f"{min(round(100 * part / whole), 100 if part == whole else 99)}%"


def _listed(names):
    """a, b and c; no more than three of them."""
    names = list(names)
    if len(names) > 3:
        names = [*names[:2], f"{len(names) - 2} others"]
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))
