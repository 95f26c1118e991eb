"""Pictures and pages of results files."""

from oln_d2.pages.page import Item, write_page
from oln_d2.pages.visualization import Pictures, visualize

__all__ = ["Item", "Pictures", "visualize", "write_page"]
