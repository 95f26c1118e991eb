"""
Trained models. The one that the package ships lies beside this file; others are in the folder
`weights/` of the repository. Each has one name, with its version, and some of

    NAME.onnx: for any machine, without PyTorch
    NAME.safetensors: the weights for PyTorch and Detectron2, also to train on from; of these the
        other has wide layers reduced (`oln-d2 export --low-rank`)
    NAME.json: what they are: "sha256" of the others by their endings, "likely_score" and
        "copy_factor" (see `Proposer`), maybe "min_size" and "max_proposals" (see `load`), and how
        the model was trained and measured

docs/model_card.md says what they find, MODEL_LICENSES.md where they come from.
"""

from functools import cache
from pathlib import Path
from typing import Any

from oln_d2.checks import InputError
from oln_d2.files import file_digest, read_json

SHIPPED = "oln_box_lite0_general_v2"
FORMAT = 1  # of the .json
PACKAGE = Path(__file__).parent
REPOSITORY = PACKAGE.parents[1] / "weights"


@cache
def card(name: str = SHIPPED) -> dict[str, Any]:
    """What `NAME.json` says. Errors: see :func:`find`."""
    path = _path(name, ".json")
    content = read_json(path)
    if content.get("format") != FORMAT:
        raise _damaged(path, f"is of the format {content.get('format')}, not {FORMAT}")
    return content


def card_of(digest: str) -> dict[str, Any] | None:
    """The card of the weights whose file has this SHA-256, wherever it lies; None for others."""
    for folder in (PACKAGE, REPOSITORY):
        for path in sorted(folder.glob("*.json")):
            content = read_json(path)
            if digest in content.get("sha256", {}).values():
                return content
    return None


def find(ending: str, name: str = SHIPPED) -> str:
    """
    Args:
        ending: ".onnx" or ".safetensors".
        name: of the model.

    Returns:
        the path of its weights in this form.

    Raises:
        InputError: they are missing, damaged or of another version than the package.
    """
    path = _path(name, ending)
    found, expected = file_digest(path), card(name)["sha256"][ending[1:]]
    if found != expected:
        raise _damaged(path, f"has the SHA-256 {found[:12]}... instead of {expected[:12]}...")
    return str(path)


def _path(name, ending):
    file = f"{name}{ending}"
    path = next((f / file for f in (PACKAGE, REPOSITORY) if (f / file).is_file()), PACKAGE / file)
    if path.is_file():
        return path
    if name != SHIPPED:
        raise InputError(
            f"{name}: these weights are not in the installed package; clone the repository, which "
            "has them in weights/, and run it from there"
        )
    raise _damaged(path, "is missing")


def _damaged(path, what):
    return InputError(
        f"{path}: {what}, so this installation of oln-d2 is damaged or mixes two versions; "
        "install it again, or give weights of your own"
    )
