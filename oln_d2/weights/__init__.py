"""
The trained model that the package ships. Beside this file lie, under one name with its version,

    NAME.onnx: for any machine, without PyTorch
    NAME.safetensors: the same weights for PyTorch and Detectron2, also to train on from
    NAME.json: what it is: "sha256" of the others by their endings, "likely_score" and
        "copy_factor" (see `Proposer`), and how the model was trained and measured

docs/model_card.md says what it finds, MODEL_LICENSES.md where it comes from.
"""

from functools import cache
from pathlib import Path
from typing import Any

from oln_d2.checks import InputError
from oln_d2.files import file_digest, read_json

SHIPPED = "oln_box_lite0_general_v1"
FORMAT = 1  # of the .json
PACKAGE = Path(__file__).parent


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
    for path in sorted(PACKAGE.glob("*.json")):
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
    path = PACKAGE / f"{name}{ending}"
    if not path.is_file():
        raise _damaged(path, "is missing")
    return path


def _damaged(path, what):
    return InputError(
        f"{path}: {what}, so this installation of oln-d2 is damaged or mixes two versions; "
        "install it again, or give weights of your own"
    )
