"""
OLN (Object Localization Network) for Detectron2.

Importing this package registers its components and data sets with Detectron2, if that is installed.
All that does not need Detectron2 works without it.
"""

import importlib
import importlib.util
import sys
import warnings

__version__ = "0.1.0"

# Public names and their homes; each is imported when first used.
_HOMES = {
    "InputError": "oln_d2.errors",
    "add_oln_config": "oln_d2.config",
    "register_open_world_coco": "oln_d2.data.datasets",
    "OLNRPN": "oln_d2.modeling",
    "OLNRPNHead": "oln_d2.modeling",
    "OLNMaskHead": "oln_d2.modeling",
    "OLNROIHeads": "oln_d2.modeling",
    "OLNOutputLayers": "oln_d2.modeling",
    "OpenWorldEvaluator": "oln_d2.evaluation",
}

__all__ = list(_HOMES)


def __getattr__(name):
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'oln_d2' has no attribute {name!r}")


# `python -m oln_d2` also comes through here, with "-m" as argv[0] until its module has been found.
# Its commands import what they need, so that its help does not wait seconds for Detectron2.
_is_command = sys.argv[:1] == ["-m"] and "oln_d2" in sys.orig_argv
if not _is_command and importlib.util.find_spec("detectron2"):
    try:
        importlib.import_module("oln_d2.modeling")
        importlib.import_module("oln_d2.data.datasets")
    except ImportError as error:
        warnings.warn(f"OLN is not registered with Detectron2, which is there but broken: {error}")
