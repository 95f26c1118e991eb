"""Figures of a comparison, as SVG."""

import os
import warnings

import numpy as np

from oln_d2.evaluation.result import AREA_SUFFIXES, GROUPS
from oln_d2.files import write_whole

# Apart from each other on white, also for the colour-blind where there are few.
COLORS = (
    "#0072b2 #e69f00 #009e73 #cc79a7 #56b4e9 #d55e00 #7f3c8d #333333 #b5a000 #999999 "
    "#1b4f72 #8a5a00 #00543d #7a2e55 #2a86c7 #8c2d04 #b084cc #5c5c5c #6d6400 #c4b7a6"
).split()
CATEGORIES = 15  # in the figure; the table has all


def write_figures(folder, comparison, detectors, categories):
    """
    Args:
        folder: where they go.
        comparison: a :class:`oln_d2.pages.comparison.Comparison`.
        detectors: in the order of its rows.
        categories: names, those where the detectors differ most first.

    Returns:
        file names by what they show.
    """
    # Not pyplot: no window system, no global state.
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    rows, k = comparison.rows, comparison.k
    objects = "objects" if comparison.group == "all" else f"{comparison.group} objects"
    labels = [_plain(row.name) for row in rows]
    names = {}

    def save(name, figure):
        names[name] = f"{name}.svg"
        with write_whole(os.path.join(folder, names[name])) as path, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # fonts without a character: the browser's has it
            figure.savefig(path, metadata={"Date": None}, bbox_inches="tight", facecolor="white")

    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "oln-d2", "font.size": 11}):
        sizes = [a for a in AREA_SUFFIXES if not np.isnan(rows[0].by_size[a].value)]
        titles = [f"all {objects}" if a == "all" else f"{a} ones" for a in sizes]
        values = np.array([[100 * row.by_size[a].value for a in sizes] for row in rows])
        ends = [
            [(100 * row.by_size[a].low, 100 * row.by_size[a].high) for a in sizes] for row in rows
        ]
        save("found", _bars(Figure, labels, titles, values, ends, f"AR@{k}, percent"))

        chosen = categories[:CATEGORIES]
        if chosen:
            values = np.array([[100 * row.by_category[c] for c in chosen] for row in rows])
            titles = [_plain(name) for name in chosen]
            save("categories", _dots(Figure, labels, titles, values, f"AR@{k}, percent"))

        groups = [g for v, g in enumerate(GROUPS) if detectors[0].num_gts[v, 0]]
        figure = Figure(figsize=(4 * len(groups) + 0.5, 3.6), layout="constrained")
        for axes, group in zip(figure.subplots(1, len(groups), squeeze=False)[0], groups):
            for detector, color in zip(detectors, COLORS):
                curve = detector.curves[GROUPS.index(group)]
                axes.plot(detector.curve_ks, 100 * curve, color=color)
            axes.set(xscale="log", title=f"{group} objects", xlabel="boxes of an image, k")
        figure.axes[0].set_ylabel("AR@k, percent")
        save("budgets", _legend(figure, labels))

        figure = Figure(figsize=(6, 3.8), layout="constrained")
        axes = figure.add_subplot(
            title=objects, xlabel="least score of a box", ylabel="found at IoU 0.5, percent"
        )
        for detector, color in zip(detectors, COLORS):
            scores = np.sort(detector.found_scores[np.isfinite(detector.found_scores)])
            share = np.arange(len(scores), 0, -1) / max(len(detector.found_scores), 1)
            step = 1 + len(scores) // 300
            axes.plot(scores[::step], 100 * share[::step], color=color)
        save("scores", _legend(figure, labels))
    return names


def _plain(text):
    """As matplotlib shows it: no formula, and not left out of the legend for a first `_`."""
    text = " ".join(text.split()).replace("$", r"\$")
    return f" {text[:20]}…{text[-20:]}" if len(text) > 42 else f" {text}"


def _bars(Figure, labels, titles, values, ends, axis):
    """Bars (rows, titles) with intervals."""
    high = 0.8 / len(labels)
    inch = len(titles) * (0.2 * len(labels) + 0.25)
    figure = Figure(figsize=(7.5, inch + 1.1), layout="constrained")
    axes = figure.add_subplot(xlabel=axis)
    top = np.nanmax(ends, initial=1.0)
    for i, (row, color) in enumerate(zip(values, COLORS)):
        y = np.arange(len(titles)) + (i - (len(labels) - 1) / 2) * high
        axes.barh(y, row, height=0.92 * high, color=color)
        for at, value, (low, up) in zip(y, row, ends[i]):
            axes.plot((low, up), (at, at), color="white", linewidth=3)
            axes.plot((low, up), (at, at), color="black", linewidth=1.2)
            axes.text(max(value, up) + 0.01 * top, at, f"{value:.1f}", va="center", fontsize=9.5)
    axes.set_yticks(range(len(titles)), titles)
    axes.set_ylim(len(titles) - 0.5, -0.5)
    axes.set_xlim(0, 1.12 * top)
    return _legend(figure, labels, grid="x")


def _dots(Figure, labels, titles, values, axis):
    """A line of dots for each title."""
    figure = Figure(figsize=(7.5, 0.3 * len(titles) + 1.2), layout="constrained")
    axes = figure.add_subplot(xlabel=axis)
    y = np.arange(len(titles))
    axes.hlines(y, values.min(0), values.max(0), color="#bbb", linewidth=2)
    for row, color in zip(values, COLORS):
        axes.plot(row, y, "o", color=color, markersize=7)
    axes.set_yticks(y, titles)
    axes.invert_yaxis()
    axes.set_xlim(left=0)
    return _legend(figure, labels, grid="x")


def _legend(figure, labels, grid="both"):
    from matplotlib.patches import Patch

    for axes in figure.axes:
        axes.grid(alpha=0.3, axis=grid)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        if grid == "both":
            axes.set_ylim(bottom=0)
    handles = [Patch(color=color) for color in COLORS[: len(labels)]]
    columns = max(1, min(len(labels), 90 // (max(map(len, labels)) + 4)))
    figure.legend(handles, labels, loc="outside upper left", ncols=columns, frameon=False)
    return figure
