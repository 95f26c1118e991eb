"""Picture of average recall against the budget."""

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from oln_d2.checks import InputError
from oln_d2.files import StrPath, write_whole

if TYPE_CHECKING:
    from oln_d2.evaluation.result import OpenWorldResult


def plot_results(
    path: StrPath, results: "Mapping[str, OpenWorldResult]", group: str = "unseen"
) -> None:
    """
    Write a picture: AR against k on a logarithmic axis, one curve for each result.

    Args:
        path: where it goes; the ending chooses the format, e.g. .png or .svg.
        results: by label.
        group: "unseen", "seen" or "all".

    Raises:
        InputError: an unknown format or group, or the file cannot be written.
    """
    require_format(path)
    # Not pyplot: no window system, no global state.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4.5), layout="constrained")
    axes = figure.add_subplot(
        xscale="log", xlabel="detections an image, k", ylabel=f"AR@k of {group} objects in percent"
    )
    for label, result in results.items():
        ks = np.unique(np.geomspace(1, result.max_dets, 60).round().astype(int))
        recalls = [100 * result.ar(k, group) for k in ks]
        auc = result[group]["AUC"]
        axes.plot(ks, recalls, label=f"{label}, AUC {100 * auc:.1f}")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    with write_whole(path) as temporary:
        figure.savefig(temporary, dpi=150)


def require_format(path: StrPath) -> None:
    """Raises InputError where the ending of a picture's path is no format that can be written."""
    from matplotlib.backend_bases import FigureCanvasBase

    ending = os.path.splitext(path)[1][1:].lower()
    formats = FigureCanvasBase.get_supported_filetypes()
    if ending not in formats:
        raise InputError(f"{path}: its ending has to be one of {', '.join(sorted(formats))}")
