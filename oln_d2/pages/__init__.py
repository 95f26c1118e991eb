"""Pictures and pages of results files."""

from oln_d2.pages.visualization import Pictures, visualize

__all__ = ["Pictures", "visualize"]
