"""The scores that the score of a detection is made of, in the one table that names them."""

from typing import NamedTuple


class Score(NamedTuple):
    """A predicted quality in [0, 1]."""

    attribute: str  # detections have it, an array
    field: str  # in the entries of results files, and in MODEL.OLN.SCORES
    letter: str  # in the labels of pictures
    meaning: str


SCORES = (
    Score("objectness", "objectness", "c", "centerness"),
    Score("box_scores", "box_score", "b", "IoU of the box"),
    Score("mask_scores", "mask_score", "m", "IoU of the mask"),
)
OBJECTNESS, BOX_SCORE, MASK_SCORE = SCORES
FUSED = (OBJECTNESS.field, BOX_SCORE.field)  # in the score of OLN-Box
