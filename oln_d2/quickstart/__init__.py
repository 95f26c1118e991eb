"""A first look at OLN beside Faster R-CNN, on any machine and in a few minutes."""

from oln_d2.checks import needs

with needs("quickstart", "train"):
    from oln_d2.quickstart.run import quickstart
    from oln_d2.quickstart.synthetic import make_dataset

__all__ = ["make_dataset", "quickstart"]
