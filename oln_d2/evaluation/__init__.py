"""
Open-world recall of any detector. Only `OpenWorldEvaluator`, the Detectron2 evaluator, needs
Detectron2.
"""

import importlib

# Public names and their homes; each is imported when first used.
_HOMES = {
    "GroundTruth": "oln_d2.evaluation.ground_truth",
    "OpenWorldRecall": "oln_d2.evaluation.open_world",
    "OpenWorldResult": "oln_d2.evaluation.result",
    "OpenWorldEvaluator": "oln_d2.evaluation.detectron2_evaluator",
    "read_results": "oln_d2.evaluation.coco_results",
    "write_results": "oln_d2.evaluation.coco_results",
    "plot_results": "oln_d2.evaluation.plot",
}

__all__ = list(_HOMES)


def __getattr__(name):
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'oln_d2.evaluation' has no attribute {name!r}")
