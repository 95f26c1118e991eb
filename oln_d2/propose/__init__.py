"""Proposals for one's own images: what to propose on, what proposes, and what is written."""

from oln_d2.propose.proposer import Proposer
from oln_d2.propose.run import UnreadableError, propose_files

__all__ = ["Proposer", "UnreadableError", "propose_files"]
