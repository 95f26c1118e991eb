"""OLN's keys in a Detectron2 config: what each means, its range, and the paper's value."""

from oln_d2.checks import needs

with needs("oln_d2.add_oln_config", "detectron2"):
    from detectron2.config import CfgNode

import oln_d2.modeling  # noqa: F401  registers the components
from oln_d2.engine.datasets import register_datasets


def add_oln_config(cfg: CfgNode) -> None:
    """
    Add the keys of OLN to a Detectron2 config, and register OLN's components and data sets with
    Detectron2. No value of Detectron2 is changed. If the config has the keys already, they keep
    their values.

    Args:
        cfg: changed in place.

    Raises:
        ImportError: Detectron2 is not installed.
    """
    register_datasets()
    if "OLN" in cfg.MODEL:
        return
    _C = cfg
    _C.MODEL.OLN = CfgNode()

    # ---------------------------------------------------------------------------- #
    # First stage: OLNRPN (the box loss is set by Detectron2's own MODEL.RPN keys:
    # IOU_THRESHOLDS, BATCH_SIZE_PER_IMAGE, POSITIVE_FRACTION, BBOX_REG_LOSS_WEIGHT, ...)
    # ---------------------------------------------------------------------------- #
    # What the objectness score of an anchor learns: "centerness" of the anchor's centre in its
    # object (paper), or "iou" of the anchor with its object (an ablation of the paper).
    _C.MODEL.OLN.OBJECTNESS_TARGET = "centerness"
    # IoU below which an anchor is a negative and from which on it is a positive of the objectness
    # loss, two numbers in [0, 1], ascending; anchors between them are ignored. Paper: 0.1, 0.3.
    _C.MODEL.OLN.OBJECTNESS_IOU_THRESHOLDS = [0.1, 0.3]
    # Anchors sampled per image for the objectness loss, positives first. Paper: 256.
    _C.MODEL.OLN.OBJECTNESS_BATCH_SIZE_PER_IMAGE = 256
    # Whether negatives, with target 0, fill the sample of an image that has fewer positives. The
    # authors' code does so; the paper says "without any explicit background sampling": False.
    _C.MODEL.OLN.OBJECTNESS_NEGATIVES = True
    # Factor of the objectness loss. Paper: 1. (Of the box loss: MODEL.RPN.BBOX_REG_LOSS_WEIGHT, 10.
    # MODEL.RPN.LOSS_WEIGHT multiplies both.)
    _C.MODEL.OLN.OBJECTNESS_LOSS_WEIGHT = 1.0
    # The distances to the four sides that the head predicts at the start of training, in widths and
    # heights of the anchor. Authors' code: 0, boxes without area; most then overlap no object and
    # get no gradient from the IoU loss. With ImageNet weights and a long schedule that passes;
    # short schedules from scratch need 0.5, where the first boxes are the anchors.
    _C.MODEL.OLN.LTRB_INIT = 0.0
    # The length that the hidden features of a location are brought to before the head predicts from
    # them. Authors' code: 1, so small that the predictors take thousands of iterations to leave
    # their start. With F, they learn as at F * F times the rate: short schedules want 4.
    _C.MODEL.OLN.RPN_FEATURE_NORM = 1.0
    # How a box is encoded relative to its anchor: "ltrb", distances from the anchor's centre to the
    # sides (paper), or "delta", Detectron2's shift of the centre and logarithm of the size (an
    # ablation of the paper). The loss is the IoU of the decoded box in both.
    _C.MODEL.OLN.RPN_BOX_CODING = "ltrb"
    # Factor of the loss by which the features also learn to classify anchors, object or background,
    # as those of an RPN do. Paper: 0, without (above 0: an ablation of the paper).
    _C.MODEL.OLN.RPN_CLS_LOSS_WEIGHT = 0.0
    # Whether proposals go through a per-level NMS at MODEL.RPN.NMS_THRESH, in training and in test.
    # The authors' code runs none. Proposals per level: MODEL.RPN.PRE_NMS_TOPK_TRAIN and _TEST
    # (paper: 2000); over all levels: POST_NMS_TOPK_TRAIN and _TEST (authors' code: no limit).
    _C.MODEL.OLN.RPN_NMS_TRAIN = False
    _C.MODEL.OLN.RPN_NMS_TEST = False

    # ---------------------------------------------------------------------------- #
    # Second stage: OLNROIHeads
    # ---------------------------------------------------------------------------- #
    # What the score of an RoI learns: "iou" of the RoI with its object (paper), or "centerness" of
    # the RoI's centre in its object (an ablation of the paper).
    _C.MODEL.OLN.BOX_SCORE_TARGET = "iou"
    # Factor of the loss of that score. Paper: 1. (Of the box loss:
    # MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_WEIGHT, 1.)
    _C.MODEL.OLN.BOX_SCORE_LOSS_WEIGHT = 1.0
    # Whether sampled RoIs on no object teach that score, too: it then learns the quality of every
    # RoI for the object that it overlaps most, by cross-entropy instead of L1. Paper: no. Ranks
    # better where most of what the images show is annotated.
    _C.MODEL.OLN.BOX_SCORE_NEGATIVES = False

    # The scores whose geometric mean ranks the detections: "objectness" (first stage), "box_score"
    # (second stage) and, where masks are predicted by OLNMaskHead, "mask_score". Paper: all there
    # are.
    _C.MODEL.OLN.SCORES = ["objectness", "box_score"]
    # Factor of the loss by which the second stage's features also learn to classify, object or
    # background, as those of Faster R-CNN do. Paper: 0, without (above 0: an ablation of the
    # paper).
    _C.MODEL.OLN.BOX_CLS_LOSS_WEIGHT = 0.0

    # ---------------------------------------------------------------------------- #
    # Masks: OLNMaskHead
    # ---------------------------------------------------------------------------- #
    # Factor of the loss of a mask's score. Its other settings are Detectron2's own: the layers are
    # as many and as wide as MODEL.ROI_MASK_HEAD's convolutions and MODEL.ROI_BOX_HEAD's linear
    # layers.
    _C.MODEL.OLN.MASK_SCORE_LOSS_WEIGHT = 1.0

    # ---------------------------------------------------------------------------- #
    # Backbones of timm: MODEL.BACKBONE.NAME build_timm_fpn_backbone. Stages are frozen by
    # Detectron2's MODEL.BACKBONE.FREEZE_AT, and MODEL.FPN.IN_FEATURES chooses levels ([]: all);
    # MODEL.PIXEL_MEAN and PIXEL_STD have to be timm's, times 255, with INPUT.FORMAT RGB;
    # `oln-d2 convert --backbone` makes MODEL.WEIGHTS of timm's.
    # ---------------------------------------------------------------------------- #
    _C.MODEL.OLN.TIMM = CfgNode()
    # A model of timm with features of strides 4, 8, 16 and 32.
    _C.MODEL.OLN.TIMM.NAME = "tf_efficientnet_lite0"
    # "FrozenBN": the statistics, scale and shift of its batch norms stay those of MODEL.WEIGHTS; or
    # "BN": they learn.
    _C.MODEL.OLN.TIMM.NORM = "FrozenBN"

    # ---------------------------------------------------------------------------- #
    # Evaluation
    # ---------------------------------------------------------------------------- #
    # Protocols to report: "xclass" (the paper's: a detection of a seen object is free) and
    # "filtered" (seen objects are not there at all).
    _C.TEST.OPEN_WORLD_PROTOCOLS = ["xclass", "filtered"]

    # ---------------------------------------------------------------------------- #
    # Both stages before a detector with classes: MODEL.PROPOSAL_GENERATOR.NAME OLNProposals
    # ---------------------------------------------------------------------------- #
    # How many boxes of an image the detector gets at most, in training and in test. They have gone
    # through NMS at MODEL.RPN.NMS_THRESH.
    _C.MODEL.OLN.NUM_PROPOSALS = [1000, 1000]

    # ---------------------------------------------------------------------------- #
    # Data
    # ---------------------------------------------------------------------------- #
    # One's own data sets, one row [name, annotations, images, seen] each: the name for
    # DATASETS.TRAIN or DATASETS.TEST; a COCO file; the folder of its images; and the seen
    # categories: a split, a .txt file of names, names with commas between them, or a list of names.
    _C.DATASETS.OWN = []
    # Whether these keep the classes of their seen categories, in that order, for a detector of
    # as many (MODEL.ROI_HEADS.NUM_CLASSES), which COCO's AP on these is the test of. False: all
    # objects are one class, and recall is.
    _C.DATASETS.CLASSES = False
    # How often each of DATASETS.TRAIN is drawn from, in proportion: one number above 0 for each.
    # Empty: in proportion to their images, so that an epoch has each image once.
    _C.DATASETS.TRAIN_WEIGHTS = []
    # How much an annotation counts in the losses that an audit added without a review
    # (`oln-d2 audit --accept-above`), above 0; others count 1. Only OLN looks at it.
    _C.DATASETS.PSEUDO_WEIGHT = 1.0
    # Large-scale jitter: an image is scaled to fit a square of INPUT.MAX_SIZE_TRAIN pixels times a
    # random number between these two, such as [0.1, 2.0], and what is beyond the square is cropped
    # at random. INPUT.MIN_SIZE_TRAIN is then not used. Empty: without.
    _C.INPUT.SCALE_JITTER = []

    # ---------------------------------------------------------------------------- #
    # Training, with `train_net.py`
    # ---------------------------------------------------------------------------- #
    # Decay of the moving average (EMA) of the weights at each iteration, in [0, 1), such as 0.9998.
    # The average is what is evaluated and what checkpoints hold; early in a run it is over fewer
    # iterations. 0: without.
    _C.SOLVER.EMA_DECAY = 0.0
    # "bfloat16" or "float16" (a GPU's only): train with automatic mixed precision of this type. "":
    # float16 if Detectron2's SOLVER.AMP.ENABLED is True, float32 if not.
    _C.SOLVER.AMP.DTYPE = ""
    # Whether the model keeps images and features with the channels last in memory, which some
    # devices convolve faster, above all in half precision. Results differ by rounding only.
    _C.MODEL.CHANNELS_LAST = False
    # Names of parts of the model that do not learn, as in its code, such as ["backbone"] or
    # ["backbone.bottom_up"]. Their batch norms keep their statistics. Empty: all learns that
    # MODEL.BACKBONE.FREEZE_AT does not freeze.
    _C.MODEL.FROZEN = []
