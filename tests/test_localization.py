"""The mathematics of OLN against the public code's outputs and by its properties."""

import pytest
import torch
from conftest import LTRB_OF_TBLR, close, load_golden
from torchvision.ops import box_iou

from oln_d2.localization import (
    aligned_iou,
    anchors_inside,
    assign_anchors,
    box_quality,
    candidates,
    centerness,
    check_finite,
    decode_ltrb,
    encode_ltrb,
    fuse_scores,
    iou_loss,
    label_and_sample,
    quality_loss,
    sample_anchors,
    select_proposals,
    without_copies,
)


@pytest.fixture(scope="module")
def golden():
    return load_golden("primitives")


def random_boxes(n, seed):
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(n, 2, generator=generator) * 100
    return torch.cat([corner, corner + 1 + torch.rand(n, 2, generator=generator) * 80], dim=1)


def test_coding_matches_public_code(golden):
    """Otherwise weights of the public model would give other boxes."""
    close(encode_ltrb(golden["anchors"], golden["gt"]), golden["tblr"][:, LTRB_OF_TBLR])
    close(decode_ltrb(golden["anchors"], golden["pred"][:, LTRB_OF_TBLR]), golden["decoded"])


def test_coding_round_trip():
    """Otherwise the first stage could not express the boxes it is trained on."""
    anchors, boxes = random_boxes(100, 0), random_boxes(100, 1)
    close(decode_ltrb(anchors, encode_ltrb(anchors, boxes)), boxes, atol=1e-4)


def test_decoding_is_linear():
    """A clamp or ReLU on the distances would stop gradients that the public model trains with."""
    box = decode_ltrb(
        torch.tensor([[0.0, 0.0, 10.0, 20.0]]), torch.tensor([[-1.0, 2.0, -3.0, 4.0]])
    )
    close(box, torch.tensor([[15.0, -30.0, -25.0, 90.0]]))


def test_centerness_matches_public_code(golden):
    """Otherwise the first stage learns another target."""
    close(centerness(golden["anchors"], golden["gt"]), golden["centerness"])


def test_centerness_values():
    """1 in the middle, 0 on a side, outside, and diagonally outside, where two negatives meet."""
    anchors = torch.tensor(
        [[4.0, 4, 6, 6], [-1, 4, 1, 6], [-4, 4, -2, 6], [-4, -4, -2, -2], [2, 4, 3, 6]]
    )
    boxes = torch.tensor([[0.0, 0, 10, 10]]).expand(5, 4)
    expected = torch.tensor([1.0, 0, 0, 0, (2.5 / 7.5) ** 0.5])
    close(centerness(anchors, boxes), expected)


@pytest.mark.parametrize("quality", ["centerness", "iou"])
def test_quality_does_not_depend_on_scale_or_place(quality):
    """Otherwise large objects, or those on the right of an image, would score differently."""
    anchors, boxes = random_boxes(50, 2), random_boxes(50, 3)
    expected = box_quality(quality, anchors, boxes)
    assert expected.max() > 0.3
    close(box_quality(quality, anchors * 7, boxes * 7), expected, atol=1e-5)
    close(box_quality(quality, anchors + 30, boxes + 30), expected, atol=1e-4)


def test_iou_and_its_loss_match_public_code(golden):
    """Otherwise box losses or their gradients differ from the public model's."""
    close(aligned_iou(golden["iou_pred"], golden["gt"]), golden["iou_aligned"])
    pred = golden["iou_pred"].clone().requires_grad_()
    weighted = golden["iou_weight"][:, 0] > 0
    loss = 10 * iou_loss(pred[weighted], golden["gt"][weighted]) / 57
    close(loss.detach(), golden["iou_loss_avg57"])
    loss.backward()
    close(pred.grad, golden["iou_grad"])


def test_iou_of_boxes_without_area_is_zero():
    """Zero-area boxes must give 0, not NaN, which would end training."""
    boxes = torch.tensor([[5.0, 5, 5, 5], [5, 5, 5, 9], [9, 9, 5, 5]], requires_grad=True)
    iou = aligned_iou(boxes, boxes.detach())
    assert iou.tolist()[:2] == [0, 0] and iou.isfinite().all()
    iou_loss(boxes, boxes.detach()).backward()
    assert boxes.grad.isfinite().all()


def test_losses_of_nothing_keep_a_gradient_path():
    """Images without objects would otherwise break the backward pass or hang other processes."""
    boxes, logits = torch.zeros(0, 4, requires_grad=True), torch.zeros(0, requires_grad=True)
    loss = iou_loss(boxes, torch.zeros(0, 4)) + quality_loss(logits, torch.zeros(0))
    assert loss.item() == 0
    loss.backward()


def test_fused_score_is_geometric_mean():
    """The ranking of detections rests on it."""
    a, b, c = (
        torch.tensor([0.2, 1.0, 0.0]),
        torch.tensor([0.8, 0.5, 0.9]),
        torch.tensor([0.5, 0.5, 1]),
    )
    close(fuse_scores(a, b), (a * b).sqrt())
    close(fuse_scores(a, b, c), (a * b * c) ** (1 / 3))


def assign(iou, *limits):
    """Objects and labels of anchors: 1 positive, 0 negative, -1 ignored."""
    matches, overlaps = assign_anchors(iou)
    positive, negative = candidates(overlaps, *limits)
    return matches.tolist(), torch.where(positive, 1, negative.int() - 1).tolist()


def test_assignment_thresholds():
    """Positives from the upper limit on, negatives below the lower, the rest ignored."""
    iou = torch.tensor([[0.05, 0.1, 0.2, 0.3, 0.9]])
    assert assign(iou, 0.1, 0.3) == ([0] * 5, [0, -1, -1, 1, 1])


def test_assignment_gives_each_object_its_best_anchors():
    """An object whose best anchor overlaps another object more would otherwise never train."""
    iou = torch.tensor([[0.8, 0.5, 0.0, 0.0], [0.0, 0.45, 0.45, 0.0], [0.0, 0.0, 0.1, 0.29]])
    matches, labels = assign(iou, 0.3, 0.7)
    # Both anchors tied at the best IoU of object 1 become its own; 0.29 is below the limit.
    assert matches[:3] == [0, 1, 1]
    assert labels == [1, 1, 1, 0]


def test_assignment_order_of_ties():
    """The first object wins an equal IoU by threshold, the last one an equal best anchor."""
    by_threshold = torch.tensor([[0.9, 0.8], [0.5, 0.8]])
    assert assign(by_threshold, 0.3, 0.7)[0] == [0, 1]
    assert assign(torch.tensor([[0.8, 0.9], [0.8, 0.9]]), 0.3, 0.7)[0] == [0, 1]
    assert assign(torch.tensor([[0.8], [0.8]]), 0.3, 0.7)[0] == [1]


def test_assignment_without_objects_or_anchors():
    """Images without objects: every anchor is a negative."""
    for limit in (0.0, 0.3):
        assert assign(torch.zeros(0, 3), limit, 0.7)[1] == [0, 0, 0]
    assert assign(torch.zeros(2, 0), 0.3, 0.7)[1] == []


def test_sample_of_an_image():
    """An anchor outside the image must not be trained, nor take an object from those inside."""
    anchors = torch.tensor([[-9.0, 0, 11, 20], [0, 0, 20, 20], [50, 50, 70, 70], [90, 0, 110, 20]])
    gt_boxes = torch.tensor([[0.0, 0, 20, 20]])

    inside = torch.tensor([[False, True, True, True]])
    samples = [((0.3, 0.7), 9, 1.0), ((0.0, 0.7), 9, 1.0)]
    labels, boxes, _ = label_and_sample(anchors, inside, [gt_boxes], samples)
    assert labels.tolist() == [[[-1, 1, 0, 0], [-1, 1, -1, -1]]]
    assert boxes[0, :, 1].tolist() == gt_boxes.tolist() * 2
    labels, *_ = label_and_sample(anchors, inside, [gt_boxes[:0]], samples)
    assert labels.tolist() == [[[-1, 0, 0, 0]] * 2]


def one_by_one(anchors, inside, gt_boxes, samples, gt_weights):
    """What `label_and_sample` returns of an image, by loops."""
    labels = torch.full((len(samples), len(anchors)), -1, dtype=torch.int8)
    boxes, weights = torch.zeros(*labels.shape, 4), torch.ones(labels.shape)
    iou = box_iou(gt_boxes, anchors[inside])
    for row, (limits, number, share) in enumerate(samples):
        low, high = torch.tensor(limits).tolist()  # in float32, as the IoU
        matches, kinds = [], []
        for overlaps in iou.T.tolist():
            highest = max(overlaps, default=-1)
            matches.append(overlaps.index(highest) if overlaps else 0)
            kinds.append(1 if highest >= high else 0 if highest < low else -1)
        for gt, overlaps in enumerate(iou.tolist()):
            for anchor, overlap in enumerate(overlaps):
                if overlap == max(overlaps) >= 0.3:
                    matches[anchor], kinds[anchor] = gt, 1
        room = number
        for kind, most in ((1, int(number * share)), (0, number)):
            found = [anchor for anchor, own in enumerate(kinds) if own == kind]
            order = torch.randperm(len(found)).tolist()[: min(most, room)]
            room -= len(order)
            for anchor in (found[i] for i in order):
                place = inside.nonzero()[anchor, 0]
                labels[row, place] = kind
                if kind == 1:
                    boxes[row, place] = gt_boxes[matches[anchor]]
                    weights[row, place] = gt_weights[matches[anchor]]
    return labels, boxes, weights


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("seed", [None, 0, 1])
def test_samples_of_a_batch(weighted, seed, request):
    """What images share must not change any of them, nor the draws that a seed gives."""
    if seed is None:
        request.getfixturevalue("first_n")
    y, x = (8 * i.flatten().float() for i in torch.meshgrid(*[torch.arange(16)] * 2, indexing="ij"))
    anchors = torch.cat([torch.stack([x - s, y - s, x + s, y + s], 1) for s in (8, 16, 32)])
    tied = torch.tensor([[20.0, 20, 36, 36], [20, 20, 36, 36], [64, 64, 96, 100]])
    sizes = [(128, 128), (128, 100), (10, 10), (90, 128), (128, 128)]
    gt_boxes = [tied, tied[:0], tied[:1], random_boxes(9, 6), random_boxes(2, 7)]
    gt_weights = [torch.rand(len(gt)) for gt in gt_boxes]
    inside = anchors_inside(anchors, sizes, 0)
    assert inside.sum(dim=1).bool().tolist() == [True, True, False, True, True]
    samples = [((0.3, 0.7), 16, 0.5), ((0.1, 0.3), 64, 1.0)]
    tried = []

    def retry(function):
        return lambda *args: tried.append(function) or function(*args)

    torch.manual_seed(seed or 0)
    found = label_and_sample(
        anchors, inside, gt_boxes, samples, retry, gt_weights if weighted else None
    )
    torch.manual_seed(seed or 0)
    images = zip(inside, gt_boxes, gt_weights)
    expected = zip(*(one_by_one(anchors, own, gt, samples, w) for own, gt, w in images))
    for actual, parts in zip(found, expected):
        assert actual is None or torch.equal(actual, torch.stack(parts))
    assert (found[2] is not None) == weighted
    assert tried == [box_iou, assign_anchors] * len(sizes)


def test_sizes_of_samples():
    """Positives beyond their share would outweigh the background; too few must not end the run."""
    positive, negative = torch.arange(6), torch.arange(6, 26)
    for number, share, expected in ((8, 0.5, (4, 4)), (20, 1.0, (6, 14)), (99, 0.5, (6, 20))):
        drawn = sample_anchors(positive, negative, number, share)
        assert tuple(map(len, drawn)) == expected
        assert all(torch.isin(index, of).all() for index, of in zip(drawn, (positive, negative)))
        assert all(len(index.unique()) == len(index) for index in drawn)
    draws = {tuple(sample_anchors(positive, negative, 4, 0.5)[0].tolist()) for _ in range(50)}
    assert len(draws) > 10


def test_proposals_of_an_image():
    """Boxes without area or not finite must go, the others come best first within the image."""
    boxes = torch.tensor(
        [[0.0, 0, 10, 10], [5, 5, 5, 9], [-5, 0, 200, 60], [0, 0, torch.nan, 9], [150, 0, 160, 9]]
    )
    logits, levels = torch.tensor([0.1, 5, 0.3, 4, 0.2]), torch.tensor([0, 0, 1, 0, 0])
    found, scores = select_proposals(boxes, logits, levels, (50, 100), 9)
    assert found.tolist() == [[0, 0, 100, 50], [0, 0, 10, 10]] and scores[0] > scores[1]
    assert len(select_proposals(boxes, logits, levels, (50, 100), 1)[0]) == 1
    small = select_proposals(boxes, logits, levels, (50, 100), 9, min_side=10)
    assert small[0].tolist() == [[0, 0, 100, 50]]
    of_level_0 = select_proposals(
        boxes, logits, levels, (50, 100), 9, nms=lambda b, s, level: (level == 0).nonzero()[:, 0]
    )
    assert of_level_0[0].tolist() == [[0, 0, 10, 10]]


def test_copies_come_last():
    """Who takes few proposals must not get the same object many times and others not at all."""
    boxes = torch.tensor([[0.0, 0, 20, 20], [0, 0, 20, 19], [0, 0, 19, 19], [50, 0, 60, 10]])
    logits, levels = torch.tensor([4.0, 3, 2, 1]), torch.tensor([0, 1, 0, 1])

    def kept(top_n, copies_last=True):
        found, scores = select_proposals(
            boxes, logits, levels, (50, 100), top_n, copies_last=copies_last
        )
        assert torch.equal(found, boxes[(4 - scores).long()])
        return scores.tolist()

    assert kept(1) == [4] and kept(2) == [4, 1] and kept(3) == [4, 3, 1]
    assert kept(4) == kept(9) == [4, 3, 2, 1]  # the public code's
    assert kept(2, copies_last=False) == [4, 3]


def test_the_best_of_many_without_copies_are_those_of_all():
    """NMS of a part, which is faster, must not choose otherwise."""
    generator = torch.Generator().manual_seed(0)
    corners = 90 * torch.rand(40, 2, generator=generator)
    boxes = torch.cat([corners, corners + 10], dim=1).repeat(10, 1)  # nine copies of each
    boxes += torch.rand(boxes.shape, generator=generator)
    logits = torch.randint(50, (len(boxes),), generator=generator).float()  # with ties
    order = logits.sort(descending=True, stable=True).indices
    best = order[without_copies(boxes[order], logits[order])]
    for top_n in (1, 10, 30, 60, 150):  # of some 50 that differ
        found, _ = select_proposals(
            boxes, logits, torch.zeros(400), (200, 200), top_n, copies_last=True
        )
        chosen = torch.isin(torch.arange(400), best[:top_n])[order]
        assert torch.equal(found, boxes[order][chosen])


def test_what_diverged_is_named():
    boxes, logits = torch.tensor([[0.0, 0, torch.nan, 9]]), torch.zeros(1)
    losses = {"loss_a": torch.tensor(0.5), "loss_b": torch.tensor(torch.nan)}
    with pytest.raises(FloatingPointError, match="RPN .*loss_a 0.5, loss_b nan.: lower the rate"):
        check_finite(boxes, logits, losses, "lower the rate")
