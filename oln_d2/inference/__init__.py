"""Proposals on one's own images: the command `python -m oln_d2 propose`."""
