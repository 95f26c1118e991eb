"""Detectron2's trainer, evaluator and data sets for OLN. Import from its modules."""

from oln_d2.checks import require_detectron2

require_detectron2("oln_d2.engine")
