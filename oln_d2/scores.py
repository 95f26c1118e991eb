"""The scores that the score of a detection is made of, in the one table that names them."""

from typing import NamedTuple


class Score(NamedTuple):
    """A predicted quality in [0, 1]."""

    attribute: str  # of detections, an array
    field: str  # of an entry of a results file, and in MODEL.OLN.SCORES
    letter: str  # in the labels of pictures
    meaning: str


SCORES = (
    Score("objectness", "objectness", "c", "centerness"),
    Score("box_scores", "box_score", "b", "IoU of the box"),
    Score("mask_scores", "mask_score", "m", "IoU of the mask"),
)
OBJECTNESS, BOX_SCORE, MASK_SCORE = SCORES
