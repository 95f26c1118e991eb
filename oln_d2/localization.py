"""
The mathematics of OLN, on plain tensors: box coding, quality targets, assignment, losses, proposals
and scores. Both runtimes use these functions; nothing here imports Detectron2.

Shape shorthand in this module:

    N: number of images in the minibatch
    R: number of boxes, anchors or RoIs
    G: number of ground-truth boxes of an image

Boxes are XYXY in absolute pixels. `ltrb` are the distances from the centre of an anchor to the
left, top, right and bottom side of a box; left and right divided by the anchor's width, top and
bottom by its height. A *quality* is a number in [0, 1]: how well a box fits an object.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torchvision.ops import box_iou, clip_boxes_to_image, nms

from oln_d2.checks import list_losses

# Floor of the union in an IoU and of the denominators of a centerness: they keep the quotients, and
# their gradients, finite for boxes without area.
IOU_EPS = 1e-6
CENTERNESS_EPS = 1e-12

# A ground-truth box keeps its best anchors as positives only if they reach this IoU.
LOW_QUALITY_MIN_IOU = 0.3
COPY_IOU = 0.7  # of proposals, see `without_copies`; by recall on photographs, docs/benchmarks.md


def encode_ltrb(anchors: Tensor, boxes: Tensor) -> Tensor:
    """
    Args:
        anchors, boxes: shape (R, 4).

    Returns:
        shape (R, 4), `ltrb` of each box seen from its anchor. Negative where a side lies beyond the
        anchor's centre. Infinite for an anchor without area.
    """
    centers = (anchors[..., :2] + anchors[..., 2:]) / 2
    sizes = anchors[..., 2:] - anchors[..., :2]
    return torch.cat(
        [(centers - boxes[..., :2]) / sizes, (boxes[..., 2:] - centers) / sizes], dim=-1
    )


def decode_ltrb(anchors: Tensor, ltrb: Tensor) -> Tensor:
    """
    Inverse of :func:`encode_ltrb`. Linear, without clamp: predicted distances may be negative and
    the box then turned inside out (x2 < x1).

    Args:
        anchors, ltrb: shape (R, 4).

    Returns:
        shape (R, 4), boxes, not clipped to the image.
    """
    centers = (anchors[..., :2] + anchors[..., 2:]) / 2
    sizes = anchors[..., 2:] - anchors[..., :2]
    return torch.cat([centers - ltrb[..., :2] * sizes, centers + ltrb[..., 2:] * sizes], dim=-1)


def centerness(anchors: Tensor, boxes: Tensor) -> Tensor:
    """
    How central an anchor's centre lies in a box (FCOS, eq. 3; OLN, sec. III-B): the square root of
    min(l, r) / max(l, r) * min(t, b) / max(t, b).

    Args:
        anchors, boxes: shape (R, 4).

    Returns:
        shape (R,), in [0, 1]; 0 where the centre is on a side of the box or outside.
    """
    left, top, right, bottom = encode_ltrb(anchors, boxes).unbind(dim=-1)
    horizontal = torch.minimum(left, right) / torch.maximum(left, right).clamp(min=CENTERNESS_EPS)
    vertical = torch.minimum(top, bottom) / torch.maximum(top, bottom).clamp(min=CENTERNESS_EPS)
    # Clamped one by one: outside in both directions the product of two negatives would be positive.
    return (horizontal.clamp(min=0) * vertical.clamp(min=0)).sqrt()


def aligned_iou(boxes1: Tensor, boxes2: Tensor) -> Tensor:
    """
    Args:
        boxes1, boxes2: shape (R, 4).

    Returns:
        shape (R,), IoU of each pair, in [0, 1]; 0 for boxes without area. Differentiable.
    """
    area1 = (boxes1[..., 2] - boxes1[..., 0]) * (boxes1[..., 3] - boxes1[..., 1])
    area2 = (boxes2[..., 2] - boxes2[..., 0]) * (boxes2[..., 3] - boxes2[..., 1])
    overlap = torch.minimum(boxes1[..., 2:], boxes2[..., 2:]) - torch.maximum(
        boxes1[..., :2], boxes2[..., :2]
    )
    width, height = overlap.clamp(min=0).unbind(dim=-1)
    inter = width * height  # the gradient of `prod` would make a GPU wait
    return inter / (area1 + area2 - inter).clamp(min=IOU_EPS)


def mask_iou(masks: Tensor, gt_masks: Tensor, gt_areas: Tensor) -> Tensor:
    """
    Args:
        masks, gt_masks: shape (R, M, M), bool; the masks within the RoIs.
        gt_areas: shape (R,), area of the whole objects, inside and outside the RoIs, in cells of
            the masks.

    Returns:
        shape (R,), IoU of each pair, in [0, 1].
    """
    inter = (masks & gt_masks).flatten(1).sum(dim=1)
    # An object is not smaller than its part in the RoI, though its polygon's area may be.
    gt_areas = torch.maximum(gt_areas, gt_masks.flatten(1).sum(dim=1))
    return inter / (masks.flatten(1).sum(dim=1) + gt_areas - inter).clamp(min=1)


QUALITIES = {"centerness": centerness, "iou": aligned_iou}


def box_quality(kind: str, boxes: Tensor, gt_boxes: Tensor) -> Tensor:
    """
    The target that a score learns.

    Args:
        kind: "centerness" or "iou".
        boxes, gt_boxes: shape (R, 4); anchors or RoIs, and the object each is assigned to.

    Returns:
        shape (R,), in [0, 1].
    """
    return QUALITIES[kind](boxes, gt_boxes)


def anchors_inside(
    anchors: Tensor, image_sizes: Sequence[tuple[int, int]], beyond: float
) -> Tensor:
    """
    Args:
        anchors: shape (R, 4).
        image_sizes: N heights and widths.
        beyond: so many pixels an anchor may reach beyond its image; below 0 any number.

    Returns:
        shape (N, R), bools: which anchors train.
    """
    beyond = beyond if beyond >= 0 else math.inf
    x1, y1, x2, y2 = anchors.unbind(dim=1)
    # Sizes as numbers: a GPU would wait for a tensor of them.
    ends = [(x2 < width + beyond) & (y2 < height + beyond) for height, width in image_sizes]
    return torch.stack(ends) & ((x1 >= -beyond) & (y1 >= -beyond))


def assign_anchors(iou: Tensor) -> tuple[Tensor, Tensor]:
    """
    Assign anchors to objects: each to the object it overlaps most, the first if tied. Then every
    anchor that reaches the highest IoU of some object (all of them if tied) is given to *that
    object*, if that IoU is at least `LOW_QUALITY_MIN_IOU`; the last such object wins. Detectron2's
    `Matcher` leaves such an anchor with the object it overlaps most, so the object may get no
    anchor at all, and has no lower limit.

    Args:
        iou: shape (G, R), between objects and anchors; G may be 0.

    Returns:
        shape (R,) both: index of the object in [0, G), 0 where G is 0; and the overlap for
        :func:`candidates`: the IoU with the object, 2 or more for an object's best anchors, and -1
        where G is 0.
    """
    num_gt, num_anchors = iou.shape
    if num_gt == 0 or num_anchors == 0:
        return iou.new_zeros(num_anchors, dtype=torch.int64), iou.new_full((num_anchors,), -1)
    best = iou.amax(dim=1, keepdim=True)
    best = best.masked_fill(best < LOW_QUALITY_MIN_IOU, -1)  # equal to no IoU
    # Above every IoU, and ascending: so one maximum finds both kinds of objects.
    order = torch.arange(2, num_gt + 2, dtype=iou.dtype, device=iou.device)[:, None]
    overlaps, matches = iou.where(iou != best, order).max(dim=0)
    return matches, overlaps


def candidates(overlaps: Tensor, negative_iou: float, positive_iou: float) -> tuple[Tensor, Tensor]:
    """
    Which anchors a sample is drawn from: the positives, whose overlap reaches `positive_iou`, and
    the negatives, where it stays below `negative_iou`. The rest are ignored.

    Args:
        overlaps: of :func:`assign_anchors`, any shape.
        negative_iou, positive_iou: in [0, 1], ascending.

    Returns:
        bools of the same shape, the positives and the negatives.
    """
    return overlaps >= positive_iou, overlaps < negative_iou


def sample_anchors(
    positive: Tensor, negative: Tensor, number: int, positive_share: float
) -> tuple[Tensor, Tensor]:
    """
    Pick anchors at random: positives, at most their share, and negatives to fill the sample.

    Args:
        positive, negative: indices of the :func:`candidates`.
        number: how many are picked, if there are so many.
        positive_share: in [0, 1].

    Returns:
        indices of the positives and of the negatives.
    """
    num_pos = min(int(number * positive_share), len(positive))
    counts = num_pos, number - num_pos
    positive, negative = (
        index[torch.randperm(len(index), device=index.device)[:count]]
        for index, count in zip((positive, negative), counts)
    )
    return positive, negative


def positives(labels: Sequence[Tensor]) -> list[Tensor]:
    """
    Args:
        labels: bools, shape (Ri,) for each image.

    Returns:
        the indices of those that are true in each, in order. A GPU waits once for all.
    """
    counts = torch.stack([label.sum() for label in labels]).tolist()
    # A stable sort brings them first, where `nonzero` would wait for the number in every image.
    return [
        label.to(torch.uint8).argsort(descending=True, stable=True)[:count]
        for label, count in zip(labels, counts)
    ]


def _sample_images(overlaps, inside, samples):
    """
    :func:`sample_anchors` for each image and sample: indices in the flattened (N, S, R). Of all
    arguments see :func:`label_and_sample`.
    """
    kinds = zip(*(candidates(overlaps, *limits) for limits, *_ in samples))
    found = torch.stack([torch.stack(kind, dim=1) for kind in kinds]) & inside[:, None]
    # A GPU waits only here. The positives of all images come first, then the negatives.
    counts = found.sum(dim=3).flatten().tolist()
    index = found.flatten().nonzero().squeeze(1).split(counts)
    rows = len(index) // 2
    drawn = [
        sample_anchors(*both, *sample)
        for *both, (_, *sample) in zip(index[:rows], index[rows:], [*samples] * len(inside))
    ]
    positive, negative = map(torch.cat, zip(*drawn))
    return positive, negative - found[0].numel()


@torch.no_grad()
def label_and_sample(
    anchors: Tensor,
    inside: Tensor,
    gt_boxes: Sequence[Tensor],
    samples: Sequence[tuple[tuple[float, float], int, float]],
    retry: Callable[[Callable], Callable[..., Any]] = lambda function: function,
    gt_weights: Sequence[Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """
    Assign the anchors of each image to its objects and sample some, once for each loss. A GPU waits
    twice for all images.

    Args:
        anchors: shape (R, 4).
        inside: shape (N, R), bools, the anchors that are assigned: an object's best anchor is its
            best one among these.
        gt_boxes: N, each (G, 4).
        samples: for each of S losses the limits of :func:`candidates`, and `number` and
            `positive_share` of :func:`sample_anchors`.
        retry: wraps the functions that need much memory; what it makes of them may leave their
            results on the CPU.
        gt_weights: N, each (G,), how much each object counts; None: all count 1.

    Returns:
        the `labels`, shape (N, S, R), the `gt_boxes`, shape (N, S, R, 4), and the `weights`, shape
        (N, S, R) or None, of :func:`rpn_losses`, image by image.
    """
    assigned = []
    for own, gt in zip(inside, gt_boxes):
        # The others get no area, so they overlap nothing; to leave them out would make a GPU wait.
        iou = retry(box_iou)(gt, anchors * own[:, None])
        assigned.append([x.to(anchors.device) for x in retry(assign_anchors)(iou)])
    matches, overlaps = map(torch.stack, zip(*assigned))
    del assigned  # a second copy
    positive, negative = _sample_images(overlaps, inside, samples)

    shape = len(inside), len(samples), len(anchors)
    labels = torch.full(shape, -1, dtype=torch.int8, device=anchors.device)
    labels.view(-1).index_fill_(0, positive, 1).index_fill_(0, negative, 0)
    image, anchor = positive // labels[0].numel(), positive % len(anchors)
    match = matches[image, anchor]
    boxes = anchors.new_zeros(*shape, 4)
    boxes.view(-1, 4)[positive] = pad_sequence(gt_boxes, batch_first=True)[image, match]
    weights = None
    if gt_weights is not None:
        weights = anchors.new_ones(shape)
        weights.view(-1)[positive] = pad_sequence(gt_weights, batch_first=True)[image, match]
    return labels, boxes, weights


def has_area(boxes: Tensor, min_side: float = 0.0) -> Tensor:
    """Whether both sides of boxes, shape (R, 4), are longer than `min_side` pixels, shape (R,)."""
    return (boxes[:, 2:] - boxes[:, :2] > min_side).all(dim=1)


def check_finite(
    boxes: Tensor, logits: Tensor, losses: Mapping[str, Tensor], diverged: str
) -> None:
    """
    Args:
        boxes, logits: any shapes; predictions in training.
        losses: of them, by name, for the message.
        diverged: the end of the message.

    Raises:
        FloatingPointError: a prediction is NaN or infinite.
    """
    if not (boxes.isfinite().all() & logits.isfinite().all()):
        told = list_losses({name: loss.detach() for name, loss in losses.items()})
        raise FloatingPointError(
            f"the RPN predicts NaN or infinite boxes or scores ({told}): {diverged}"
        )


def select_proposals(
    boxes: Tensor,
    logits: Tensor,
    levels: Tensor,
    image_size: tuple[int, int],
    top_n: int,
    *,
    min_side: float = 0.0,
    nms: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None,
    copies_last: bool = False,
) -> tuple[Tensor, Tensor]:
    """
    The proposals of an image: of the best boxes of each level those that are finite and have area,
    clipped to the image.

    Args:
        boxes, logits, levels: shape (R, 4), (R,), (R,); in any order.
        image_size: height and width.
        top_n: at most so many are kept.
        min_side: in pixels, see :func:`has_area`.
        nms: from boxes, logits and levels to the indices that it keeps, by descending logit.
        copies_last: where there are more than `top_n`, :func:`without_copies` chooses.

    Returns:
        boxes, shape (P, 4), and logits, shape (P,), descending.
    """
    logits, order = logits.sort(descending=True, stable=True)
    boxes, levels = boxes[order], levels[order]
    finite = boxes.isfinite().all(dim=1) & logits.isfinite()
    boxes = clip_boxes_to_image(boxes, image_size)
    keep = (finite & has_area(boxes, min_side)).nonzero().squeeze(1)
    if nms is not None:
        keep = keep[nms(boxes[keep], logits[keep], levels[keep])]
    if copies_last and len(keep) > top_n:
        keep = keep[_first_without_copies(boxes[keep], logits[keep], top_n)]
    keep = keep[:top_n]
    return boxes[keep], logits[keep]


def without_copies(boxes: Tensor, logits: Tensor) -> Tensor:
    """
    In which order to take proposals where not all can be: those that NMS leaves at `COPY_IOU`, then
    the others. Many are near copies of a better one, of which the second stage makes nearly the
    same box: so half of them, in this order, find about as much as all.

    Args:
        boxes, logits: shape (P, 4), (P,), descending.

    Returns:
        indices, shape (P,).
    """
    copies = torch.ones_like(logits, dtype=torch.bool)
    copies[nms(boxes, logits, COPY_IOU)] = False
    return torch.cat([(~copies).nonzero().squeeze(1), copies.nonzero().squeeze(1)])


def _first_without_copies(boxes, logits, top_n):
    """The `top_n` first of :func:`without_copies`, ascending."""
    number = 2 * top_n
    # NMS of thousands takes long, and what it leaves of the best boxes it leaves of all.
    while number < len(boxes):
        kept = nms(boxes[:number], logits[:number], COPY_IOU)
        if len(kept) >= top_n:
            return kept.sort().values[:top_n]
        number *= 2
    return without_copies(boxes, logits)[:top_n].sort().values


def iou_loss(pred_boxes: Tensor, gt_boxes: Tensor, weights: Tensor | None = None) -> Tensor:
    """
    Args:
        pred_boxes, gt_boxes: shape (R, 4).
        weights: shape (R,), of each box in the sum; None: 1.

    Returns:
        scalar, the sum of 1 - IoU; 0 with a gradient path if R is 0. The gradient is 0 where a
        predicted box does not overlap its object.
    """
    return _sum(1 - aligned_iou(pred_boxes, gt_boxes).clamp(min=IOU_EPS), weights)


def _sum(losses, weights):
    return losses.sum() if weights is None else (weights * losses).sum()


def quality_loss(logits: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
    """
    L1 between the predicted and the true quality (OLN, sec. III-B): no notion of foreground.

    Args:
        logits, targets: shape (R,); targets in [0, 1].
        weights: shape (R,), of each in the sum; None: 1.

    Returns:
        scalar, the sum over R; 0 with a gradient path if R is 0.
    """
    return _sum((logits.float().sigmoid() - targets).abs(), weights)


def quality_entropy(logits: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
    """
    Cross-entropy between the predicted and the true quality. It learns their mean, where L1 learns
    the median, which is 0 where most boxes are on no object.

    Args, returns: see :func:`quality_loss`.
    """
    return F.binary_cross_entropy_with_logits(logits.float(), targets, weights, reduction="sum")


def predict_scaled(hidden: Tensor, length: float, layers: Sequence[nn.Conv2d]) -> list[Tensor]:
    """
    The predictions of the first stage from hidden features brought to a length. What is scaled is
    the few outputs: the features are many times as many.

    Args:
        hidden: shape (N, C, H, W), float32.
        length: of the features of a location over the channels.
        layers: 1 x 1 convolutions.
    """
    if torch.onnx.is_in_onnx_export():  # on onnxruntime it takes a quarter of the norm's time
        norm = F.conv2d(hidden * hidden, hidden.new_ones(1, hidden.shape[1], 1, 1)).sqrt()
    else:
        norm = torch.linalg.vector_norm(hidden, dim=1, keepdim=True)
    scale = length / norm.clamp_min(1e-12)  # as in F.normalize
    return [F.conv2d(hidden, layer.weight) * scale + layer.bias[:, None, None] for layer in layers]


def convolve_at(
    weight: Tensor,
    bias: Tensor | None,
    features: Sequence[Tensor],
    image: Tensor,
    location: Tensor,
) -> Tensor:
    """
    A 3 x 3 convolution at some locations only: where the losses of the first stage need few of its
    outputs, a gradient through all would take most of its time.

    Args:
        weight, bias: of the convolution, (D, C, 3, 3) and (D,).
        features: L feature maps, each (N, C, Hi, Wi).
        image, location: S indices of images and of locations, which are counted row by row from one
            map to the next.

    Returns:
        shape (S, D), equal to those of a convolution with padding 1, but for rounding.
    """
    # All maps, padded, one after another: to look for the locations of each would make a GPU wait.
    # Of each location: the width of its map, and the padded cell left above of it.
    padded = [F.pad(level, (1, 1, 1, 1)).permute(0, 2, 3, 1) for level in features]
    width, corner = torch.zeros_like(location), torch.zeros_like(location)
    first = begin = 0
    for level in features:
        rows, columns = level.shape[-2:]
        here, cell = location >= first, location - first
        own = begin + cell // columns * (columns + 2) + cell % columns
        width, corner = width.masked_fill(here, columns), own.where(here, corner)
        first += rows * columns
        begin += (rows + 2) * (columns + 2)
    steps = torch.arange(3, device=location.device)
    cells = corner[:, None, None] + steps[:, None] * (width + 2)[:, None, None] + steps
    around = torch.cat([level.flatten(1, 2) for level in padded], dim=1)
    around = around[image[:, None, None], cells].flatten(1)
    return F.linear(around, weight.permute(0, 2, 3, 1).flatten(1), bias)


def rpn_losses(
    anchors: Tensor,
    logits: Tensor,
    ltrb: Tensor,
    labels: Tensor,
    gt_boxes: Tensor,
    target: str = "centerness",
    negatives: bool = True,
    decode: Callable[[Tensor, Tensor], Tensor] = decode_ltrb,
    weights: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """
    The two losses of the first stage, before their weights.

    Args:
        anchors: shape (R, 4).
        logits: shape (N, R), of the score of each anchor.
        ltrb: shape (N, R, 4), predicted distances.
        labels: shape (2, N, R), of the sample for the boxes (0) and of that for the score (1): 1
            positive, 0 negative, -1 not in the sample.
        gt_boxes: shape (2, N, R, 4), the assigned object's box; used where the label is 1.
        target: what the score learns, "centerness" or "iou".
        negatives: whether the negatives of its sample teach the score, with target 0.
        decode: makes boxes of anchors and what `ltrb` holds.
        weights: shape (2, N, R), how much the assigned object counts where the label is 1, else 1;
            None: all count 1.

    Returns:
        scalars, the loss of the score and that of the boxes; and the targets of the score, shape
        (N, R), 0 where its sample has no positive.
    """
    box_labels, score_labels = labels
    box_gt, score_gt = gt_boxes

    # Both losses are divided by the size of the box sample. An image whose sample lacks positives
    # (or negatives) counts as if it had one: the authors' normaliser, 257 for an image without gt.
    num_pos = (box_labels == 1).sum(dim=1)
    num_neg = (box_labels == 0).sum(dim=1)
    normalizer = (num_pos.clamp(min=1) + num_neg.clamp(min=1)).sum()

    image, anchor = (box_labels == 1).nonzero(as_tuple=True)
    # In float32: half precision moves sides by pixels.
    pred_boxes = decode(anchors[anchor], ltrb[image, anchor].float())
    own = None if weights is None else weights[0, image, anchor]
    loss_boxes = iou_loss(pred_boxes, box_gt[image, anchor], own) / normalizer

    positive = score_labels == 1
    sample = image, anchor = positive.nonzero(as_tuple=True)
    targets = torch.zeros_like(logits, dtype=torch.float32)
    targets[image, anchor] = box_quality(target, anchors[anchor], score_gt[image, anchor])
    if negatives:
        sample = (score_labels >= 0).nonzero(as_tuple=True)
    own = None if weights is None else weights[1][sample]
    loss_score = quality_loss(logits[sample], targets[sample], own) / normalizer
    return loss_score, loss_boxes, targets


def fuse_scores(*qualities: Tensor) -> Tensor:
    """
    The score of a detection: the geometric mean of the predicted qualities of all stages (OLN,
    sec. III-C).

    Args:
        qualities: shape (R,) each, in [0, 1].

    Returns:
        shape (R,), in [0, 1].
    """
    return torch.stack(qualities).prod(dim=0) ** (1 / len(qualities))
