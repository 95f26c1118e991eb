"""
OLN (Object Localization Network): open-world object proposals, for Detectron2 and without it.

Importing this package costs nothing: each public name is imported when it is first used, and then
says what has to be installed if its layer (PyTorch, Detectron2) is missing. Detectron2 knows the
components and the data sets once :func:`add_oln_config` was called.
"""

import importlib
from typing import TYPE_CHECKING

__version__ = "0.2.0"

if TYPE_CHECKING:
    from oln_d2.auditing import audit as audit
    from oln_d2.checks import InputError as InputError
    from oln_d2.config import add_oln_config as add_oln_config
    from oln_d2.engine.datasets import register_datasets as register_datasets
    from oln_d2.engine.datasets import register_open_world_coco as register_open_world_coco
    from oln_d2.engine.evaluator import OpenWorldEvaluator as OpenWorldEvaluator
    from oln_d2.evaluation import evaluate as evaluate
    from oln_d2.loading import load as load
    from oln_d2.modeling import OLNRPN as OLNRPN
    from oln_d2.modeling import OLNMaskHead as OLNMaskHead
    from oln_d2.modeling import OLNOutputLayers as OLNOutputLayers
    from oln_d2.modeling import OLNROIHeads as OLNROIHeads
    from oln_d2.modeling import OLNRPNHead as OLNRPNHead
    from oln_d2.pages import visualize as visualize
    from oln_d2.pages.comparison import compare as compare
    from oln_d2.results import Proposals as Proposals
    from oln_d2.stage import BatchProposer as BatchProposer

# Public names and their homes.
_HOMES = {
    "InputError": "oln_d2.checks",
    "load": "oln_d2.loading",
    "BatchProposer": "oln_d2.stage",
    "Proposals": "oln_d2.results",
    "evaluate": "oln_d2.evaluation",
    "audit": "oln_d2.auditing",
    "compare": "oln_d2.pages.comparison",
    "visualize": "oln_d2.pages",
    "add_oln_config": "oln_d2.config",
    "register_datasets": "oln_d2.engine.datasets",
    "register_open_world_coco": "oln_d2.engine.datasets",
    "OLNRPN": "oln_d2.modeling",
    "OLNRPNHead": "oln_d2.modeling",
    "OLNMaskHead": "oln_d2.modeling",
    "OLNROIHeads": "oln_d2.modeling",
    "OLNOutputLayers": "oln_d2.modeling",
    "OpenWorldEvaluator": "oln_d2.engine.evaluator",
}

__all__ = list(_HOMES)


def __getattr__(name: str) -> object:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'oln_d2' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
