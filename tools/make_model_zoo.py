"""Prints `MODEL_ZOO.md`: `python tools/make_model_zoo.py > MODEL_ZOO.md`."""

from itertools import groupby
from pathlib import Path

from oln_d2 import weights
from oln_d2.model_zoo import rows

HEAD = """\
# Model zoo

Made by `python tools/make_model_zoo.py > MODEL_ZOO.md` from
[`zoo.json`](oln_d2/model_zoo/zoo.json), which is the file to edit.

## How to read it

* Each row is a recipe in [`configs/`](configs), named relative to it. Train it with
  `python train_net.py --config-file configs/RECIPE`, see [Train](README.md#train); or
  `from oln_d2 import model_zoo; cfg = model_zoo.get_config("RECIPE")`.
* **Weights** are those trained with the recipe. Where there are none,
  `model_zoo.get_checkpoint_url("RECIPE")` says how to get some. The authors published weights of
  OLN-Box, see [Published weights](docs/published_weights.md).
* **Measured** are metrics of these weights. **Published** are other people's, of their weights, and
  not measured here. A table without such a column has none; what the small models find is in
  [docs/model_card.md](docs/model_card.md).
* [docs/experiments.md](docs/experiments.md) lists the recipes of each experiment of the paper.
* Metrics are percent, on COCO val2017, for objects of the 60 categories that the `voc` split does
  not train on, protocol "xclass" (see [Evaluate](README.md#evaluate)); of boxes unless "mask" is
  given. Higher is better.
"""
GROUPS = {
    "OLN": "OLN, ResNet-50-FPN, 8 epochs",
    "references": "Class-agnostic detectors to compare with, of Detectron2's parts",
    "ablations": "OLN-Box with one thing changed",
    "datasets": "OLN-Box on other data and splits",
    "small": "Small, with trained weights, see [their card](docs/model_card.md)",
    "photographs": "Small, to [compare](docs/photographs_study.md) on some thousand photographs",
    "cpu": "Small enough to train on a CPU: to try things out, not to compare",
}


def model_zoo_md() -> str:
    """The text of `MODEL_ZOO.md`."""
    text = HEAD
    for group, members in groupby(rows(), key=lambda row: row["group"]):
        members = list(members)
        metrics = [key for key in ("measured", "published") if any(row.get(key) for row in members)]
        columns = ["recipe", "what", "weights", *metrics]
        table = [[column.capitalize() for column in columns], ["---"] * len(columns)]
        for row in members:
            recipe = row["recipe"]
            cells = [f"[`{recipe}`](configs/{recipe})", row["what"], _link(row.get("weights"))]
            table.append(cells + [_metrics(row.get(key)) for key in metrics])
        text += f"\n## {GROUPS[group]}\n\n"
        text += "".join(f"| {' | '.join(line)} |\n" for line in table)
    return text


def _link(name):
    """To trained weights in the repository."""
    if name is None:
        return "none"
    path = Path(weights.find(".safetensors", name)).relative_to(Path(__file__).resolve().parents[1])
    digest = weights.card(name)["sha256"]["safetensors"]
    return f"[file]({path.as_posix()}), sha256 `{digest}`"


def _metrics(values):
    if not values:
        return "none"
    values = dict(values)
    whose = values.pop("whose", None)
    text = ", ".join(f"{name} {value}" for name, value in values.items())
    return f"{text} ({whose})" if whose else text


if __name__ == "__main__":
    print(model_zoo_md(), end="")
