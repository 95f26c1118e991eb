"""What the annotations of a data set lack: found, reviewed, and added."""

from oln_d2.auditing.review import Audit, audit

__all__ = ["Audit", "audit"]
