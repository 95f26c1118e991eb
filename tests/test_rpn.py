"""OLN-RPN against the public code: assignment, samples, losses, gradients and proposals."""

import numpy as np
import pytest
import torch
from conftest import GOLDEN, LTRB_OF_TBLR, NEEDS_DETECTRON2, close, load_golden

from oln_d2.localization import (
    assign_anchors,
    candidates,
    decode_ltrb,
    encode_ltrb,
    iou_loss,
    quality_loss,
    without_copies,
)

pytestmark = NEEDS_DETECTRON2
CASES = sorted(path.stem for path in GOLDEN.glob("rpn_*.npz"))


def build_rpn(**oln):
    """
    The proposal generator of the R-50 recipe, on 16-channel features; `oln` overrides MODEL.OLN.
    """
    from detectron2.layers import ShapeSpec
    from detectron2.modeling.proposal_generator import build_proposal_generator
    from test_configs import load_config

    cfg = load_config("oln_box_R_50_FPN.yaml")
    for key, value in oln.items():
        cfg.MODEL.OLN[key] = value
    shapes = {f"p{i}": ShapeSpec(channels=16, stride=2**i) for i in range(2, 7)}
    return build_proposal_generator(cfg, shapes)


class Case:
    """A golden file in Detectron2's terms."""

    def __init__(self, name, rpn=None):
        from detectron2.structures import Boxes, Instances

        self.golden = golden = load_golden(name)
        self.rpn = rpn or build_rpn()
        self.sizes = [tuple(size) for size in golden["img_shapes"].tolist()]
        self.anchors = self.rpn.anchor_generator(
            [torch.zeros(1, 16, *size) for size in golden["fmap_sizes"].tolist()]
        )
        self.gt = []
        for i, size in enumerate(self.sizes):
            self.gt.append(Instances(size, gt_boxes=Boxes(golden[f"img{i}_gt"].reshape(-1, 4))))
        levels = golden["anchors_per_level"].tolist()
        self.ltrb = golden["pred_reg"][..., LTRB_OF_TBLR].requires_grad_()
        self.logits = golden["pred_obj"][..., 0].clone().requires_grad_()
        self.predictions = self.logits.split(levels, dim=1), self.ltrb.split(levels, dim=1)

    def losses(self):
        from detectron2.utils.events import EventStorage

        labels, boxes, _ = self.rpn.label_and_sample_anchors(self.anchors, self.gt)
        with EventStorage() as self.storage:
            return self.rpn.losses(
                self.anchors, self.predictions[0], labels, self.predictions[1], boxes
            )


@pytest.mark.parametrize("name", CASES)
def test_anchors_match_public_code(name):
    """Anchors half a cell off would shift every target and proposal."""
    from detectron2.structures import Boxes

    case = Case(name)
    anchors = Boxes.cat(case.anchors)
    close(anchors.tensor, case.golden["anchors"])
    for i, size in enumerate(case.sizes):
        inside = anchors.inside_box(size, case.rpn.anchor_boundary_thresh)
        assert torch.equal(inside, case.golden[f"img{i}_inside"])


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("sample, limits", [("reg", (0.3, 0.7)), ("obj", (0.1, 0.3))])
def test_assignment_matches_public_code(name, sample, limits):
    """Otherwise anchors learn other objects than in the public model."""
    from detectron2.structures import Boxes, pairwise_iou

    case = Case(name)
    anchors = Boxes.cat(case.anchors)
    for i, gt in enumerate(case.gt):
        inside = case.golden[f"img{i}_inside"]
        matches, overlaps = assign_anchors(pairwise_iou(gt.gt_boxes, anchors[inside]))
        positive, negative = candidates(overlaps, *limits)
        expected = case.golden[f"img{i}_{sample}_assign"][inside]
        assert torch.equal(torch.where(positive, matches + 1, negative.long() - 1), expected)


@pytest.mark.parametrize("name", CASES)
def test_samples_and_targets_match_public_code(name, first_n):
    """Otherwise other anchors are trained, or with other targets."""
    case = Case(name)
    labels, boxes, _ = case.rpn.label_and_sample_anchors(case.anchors, case.gt)
    anchors = case.golden["anchors"]
    for i in range(len(case.gt)):
        for row, sample in enumerate(["reg", "obj"]):
            expected = {part: case.golden.get(f"img{i}_{sample}_{part}") for part in ("pos", "neg")}
            positive = (labels[i][row] == 1).nonzero().squeeze(1)
            assert torch.equal(positive, expected["pos"].sort().values)
            assert torch.equal(
                (labels[i][row] == 0).nonzero().squeeze(1), expected["neg"].sort().values
            )
            if len(positive) > 0:
                tblr = case.golden[f"img{i}_{sample}_pos_tblr"]
                order = expected["pos"].argsort()
                close(
                    encode_ltrb(anchors[positive], boxes[i][row][positive]),
                    tblr[order][:, LTRB_OF_TBLR],
                )


@pytest.mark.parametrize("name", [name for name in CASES if name != "rpn_border_topleft"])
def test_losses_and_gradients_match_public_code(name, first_n):
    """Otherwise training follows another path than the published one."""
    case = Case(name)
    losses = case.losses()
    close(losses["loss_rpn_loc"].detach(), case.golden["loss_rpn_bbox"].sum())
    close(losses["loss_rpn_obj"].detach(), case.golden["loss_rpn_obj"].sum())
    sum(losses.values()).backward()
    close(case.ltrb.grad, case.golden["grad_reg"][..., LTRB_OF_TBLR], atol=1e-7)
    close(case.logits.grad, case.golden["grad_obj"][..., 0], atol=1e-7)


def test_objects_at_the_border_have_a_box_loss(first_n):
    """
    The public code leaves objects that touch x = 0 or y = 0 without box loss, by looking at
    coordinates where distances were meant. Ours train; all else stays the same.
    """
    case = Case("rpn_border_topleft")
    losses = case.losses()
    assert case.golden["loss_rpn_bbox"].sum() == 0
    close(losses["loss_rpn_obj"].detach(), case.golden["loss_rpn_obj"].sum())
    positive = case.golden["img0_reg_pos"]
    gt = case.golden["img0_gt"][case.golden["img0_reg_pos_gt"]]
    pred = decode_ltrb(case.golden["anchors"][positive], case.ltrb.detach()[0, positive])
    normalizer = case.golden["t_num_total_pos"] + case.golden["t_num_total_neg"]
    close(losses["loss_rpn_loc"].detach(), 10 * iou_loss(pred, gt) / normalizer)
    assert losses["loss_rpn_loc"] > 0.1


@pytest.mark.parametrize("name", CASES)
def test_proposals_match_public_code(name):
    """
    Otherwise the second stage sees other boxes. Ours differ in two ways: they are sorted by score,
    as Detectron2 expects, and those without area are dropped.
    """
    case = Case(name)
    case.rpn.eval()
    proposals = case.rpn.predict_proposals(case.anchors, *case.predictions, case.sizes)
    for i, proposals_i in enumerate(proposals):
        expected = case.golden[f"img{i}_proposals"]
        keep = (expected[:, 2:4] > expected[:, :2]).all(dim=1)
        assert len(proposals_i) == keep.sum()
        actual = torch.cat(
            [proposals_i.proposal_boxes.tensor, proposals_i.objectness_logits.sigmoid()[:, None]],
            dim=1,
        )
        assert (actual[:-1, 4] >= actual[1:, 4]).all()
        close(sort_rows(actual), sort_rows(expected[keep]), atol=1e-4)


def sort_rows(boxes_and_scores):
    """By score, then by coordinates, since equal scores come in any order."""
    order = np.lexsort(boxes_and_scores.T.numpy())
    return boxes_and_scores[torch.from_numpy(order)]


def test_proposals_per_level_and_over_all_levels():
    """
    PRE_NMS_TOPK is a limit per level and POST_NMS_TOPK one per image, as users of the keys expect.
    """
    case = Case("rpn_rand_small")
    case.rpn.eval()
    case.rpn.pre_nms_topk[False] = 50
    case.rpn.post_nms_topk[False] = 10**9
    (proposals,) = case.rpn.predict_proposals(case.anchors, *case.predictions, case.sizes)
    top = torch.cat([logits[0].sort(descending=True).values[:50] for logits in case.predictions[0]])
    assert len(proposals) <= len(top)
    assert torch.isin(proposals.objectness_logits, top).all()
    case.rpn.post_nms_topk[False] = 7
    (best,) = case.rpn.predict_proposals(case.anchors, *case.predictions, case.sizes)
    boxes, logits = proposals.proposal_boxes.tensor, proposals.objectness_logits
    assert torch.equal(best.objectness_logits, logits[without_copies(boxes, logits)[:7].sort()[0]])
    assert torch.equal(best.objectness_logits[0], logits[0])


@pytest.mark.parametrize("training", [True, False])
def test_rpn_nms_is_a_setting_of_its_own_in_training_and_test(training):
    """Whether the published weights were made with NMS is unknown, so both must be possible."""
    from torchvision.ops import box_iou

    def proposals(train, test):
        case = Case("rpn_rand_small", build_rpn(RPN_NMS_TRAIN=train, RPN_NMS_TEST=test))
        case.rpn.train(training)
        # Distances near the anchors' own, so that neighbours overlap.
        predictions = case.predictions[0], [0.5 + 0 * p for p in case.predictions[1]]
        return case.rpn.predict_proposals(case.anchors, *predictions, case.sizes)[0]

    on, off = proposals(training, not training), proposals(not training, training)
    assert 0 < len(on) < len(off)
    small = on.proposal_boxes.tensor[on.proposal_boxes.area() < 33**2]  # of one level
    assert box_iou(small, small).fill_diagonal_(0).max() <= 0.7


@pytest.mark.parametrize("three_anchors", [False, True])
def test_gradient_comes_by_the_sampled_anchors(three_anchors, monkeypatch):
    """Nothing may change by it: neither proposals, nor losses, nor what is learnt."""
    from detectron2.layers import ShapeSpec
    from detectron2.modeling.proposal_generator import build_proposal_generator
    from detectron2.structures import Boxes, ImageList, Instances
    from detectron2.utils.events import EventStorage
    from test_configs import load_config

    cfg = load_config(f"{'ablations/three_anchors' if three_anchors else 'oln_box_R_50_FPN'}.yaml")
    shapes = {f"p{i}": ShapeSpec(channels=16, stride=2**i) for i in range(2, 7)}
    rpn = build_proposal_generator(cfg, shapes)
    torch.manual_seed(0)
    torch.nn.init.constant_(rpn.rpn_head.anchor_deltas.bias, 0.5)  # boxes near the anchors
    boxes = torch.tensor([[20.0, 20, 120, 100], [60, 50, 180, 120], [5, 5, 40, 30]])
    gt = [
        Instances((128, 192), gt_boxes=Boxes(own), gt_classes=torch.zeros(len(own)))
        for own in (boxes, boxes[:1], boxes[:0])
    ]
    levels = [torch.randn(3, 16, 128 // 2**i, 192 // 2**i) for i in range(2, 7)]
    images = ImageList(torch.zeros(3, 3, 128, 192), [(128, 192)] * 3)
    runs, dense = [], []
    rpn.rpn_head.conv.register_forward_hook(lambda *args: dense.append(args[2].requires_grad))
    for few in (True, False):
        monkeypatch.setattr(type(rpn.rpn_head), "predicts_at", few)
        features = {f"p{i}": x.clone().requires_grad_() for i, x in enumerate(levels, 2)}
        torch.manual_seed(0)
        with EventStorage():
            proposals, losses = rpn(images, features, gt)
        rpn.zero_grad()
        sum(losses.values()).backward()
        assert all(parameter.grad.abs().sum() > 0 for parameter in rpn.parameters())
        gradients = [x.grad for x in (*rpn.parameters(), *features.values())]
        runs.append(gradients + [losses[name].detach() for name in sorted(losses)])
        runs[-1] += [p.proposal_boxes.tensor for p in proposals]
    assert dense == [False] * len(levels) + [True] * len(levels)
    for few, everything in zip(*runs, strict=True):
        close(few, everything, rtol=1e-4, atol=1e-5)


def test_non_finite_predictions():
    """In training they must stop the run with advice; in test the other boxes must survive."""
    from detectron2.structures import ImageList
    from detectron2.utils.events import EventStorage

    case = Case("rpn_rand_small")
    with torch.no_grad():
        case.logits[0, 3] = float("nan")
        case.ltrb[0, 5] = float("inf")
    features = {
        f"p{i + 2}": torch.randn(1, 16, *size)
        for i, size in enumerate(case.golden["fmap_sizes"].tolist())
    }
    images, head = ImageList(torch.zeros(1, 3, 256, 288), case.sizes), case.rpn.rpn_head
    for parameter in (head.objectness_logits.bias, head.anchor_deltas.bias):
        torch.nn.init.constant_(parameter, float("nan"))
        told = "loss_rpn_obj .*, loss_rpn_loc .*BASE_LR"
        with EventStorage(), pytest.raises(FloatingPointError, match=told):
            case.rpn(images, features, case.gt)
        torch.nn.init.zeros_(parameter)
    case.rpn.eval()
    (proposals,) = case.rpn.predict_proposals(case.anchors, *case.predictions, case.sizes)
    assert len(proposals) > 1000
    assert proposals.proposal_boxes.tensor.isfinite().all()
    assert proposals.objectness_logits.isfinite().all()


def test_objectness_without_negatives():
    """With OBJECTNESS_NEGATIVES off only positives may teach the score."""
    case = Case("rpn_rand_small", build_rpn(OBJECTNESS_NEGATIVES=False))
    sum(case.losses().values()).backward()
    expected = case.golden["img0_obj_pos"].sort().values
    assert torch.equal(case.logits.grad[0].nonzero().squeeze(1), expected)


def test_objects_without_annotation_are_no_negatives():
    """
    Of several data sets, an object that only one annotates must not be unlearnt by the others; with
    OBJECTNESS_NEGATIVES on it is, which `train_net.py` therefore refuses.
    """
    from detectron2.structures import Boxes, pairwise_iou

    def losses(negatives, more):
        case = Case("rpn_rand_small", build_rpn(OBJECTNESS_NEGATIVES=negatives))
        left_out, case.gt = case.gt[0][:1], [case.gt[0][1:]]
        anchors = Boxes.cat(case.anchors)
        on_it = pairwise_iou(left_out.gt_boxes, anchors)[0] > 0.1
        on_it &= pairwise_iou(case.gt[0].gt_boxes, anchors).max(dim=0).values < 0.1
        assert on_it.any()
        levels = case.golden["anchors_per_level"].tolist()
        changed = case.logits + more * on_it, case.ltrb + more * on_it[:, None]
        case.predictions = [prediction.split(levels, dim=1) for prediction in changed]
        torch.manual_seed(0)
        case.rpn.objectness_batch_size_per_image = len(anchors)  # all of them
        return case.losses()

    for name, loss in losses(False, 0).items():
        assert loss > 0 and torch.equal(loss, losses(False, 2)[name])
    assert losses(True, 2)["loss_rpn_obj"] > losses(True, 0)["loss_rpn_obj"]


def test_objectness_target_iou():
    """With OBJECTNESS_TARGET iou the score must learn the IoU of the anchor."""
    from detectron2.structures import Boxes, pairwise_iou

    case = Case("rpn_rand_small", build_rpn(OBJECTNESS_TARGET="iou", OBJECTNESS_NEGATIVES=False))
    loss = case.losses()["loss_rpn_obj"]
    positive = case.golden["img0_obj_pos"]
    iou = pairwise_iou(case.gt[0].gt_boxes, Boxes(case.golden["anchors"][positive]))
    iou = iou[case.golden["img0_obj_pos_gt"], torch.arange(len(positive))]
    normalizer = case.golden["t_num_total_pos"] + case.golden["t_num_total_neg"]
    close(loss, (case.logits[0, positive].sigmoid() - iou).abs().sum() / normalizer)
    assert case.storage.latest()["rpn/iou_target"][0] == pytest.approx(iou.mean().item(), rel=1e-5)


def test_sizes_and_weights_of_the_objectness_loss():
    """OBJECTNESS_BATCH_SIZE_PER_IMAGE, _IOU_THRESHOLDS and _LOSS_WEIGHT must have an effect."""
    case = Case("rpn_rand_small", build_rpn(OBJECTNESS_BATCH_SIZE_PER_IMAGE=40))
    labels, *_ = case.rpn.label_and_sample_anchors(case.anchors, case.gt)
    assert (labels[0][1] >= 0).sum() == 40 and (labels[0][0] >= 0).sum() == 256

    case = Case("rpn_rand_small", build_rpn(OBJECTNESS_IOU_THRESHOLDS=[0.5, 0.6]))
    labels, *_ = case.rpn.label_and_sample_anchors(case.anchors, case.gt)
    assert 0 < (labels[0][1] == 1).sum() < len(case.golden["img0_obj_pos"])

    def loss(weight, seed=0):
        torch.manual_seed(seed)
        return Case("rpn_rand_small", build_rpn(OBJECTNESS_LOSS_WEIGHT=weight)).losses()

    close(loss(3.0)["loss_rpn_obj"], 3 * loss(1.0)["loss_rpn_obj"])
    close(loss(3.0)["loss_rpn_loc"], loss(1.0)["loss_rpn_loc"])


@pytest.mark.parametrize(
    "key, value",
    [
        ("OLN.OBJECTNESS_TARGET", "giou"),
        ("OLN.OBJECTNESS_IOU_THRESHOLDS", [0.3, 0.1]),
        ("OLN.OBJECTNESS_IOU_THRESHOLDS", [0.3]),
        ("OLN.OBJECTNESS_IOU_THRESHOLDS", ["a", 1]),
        ("RPN.IOU_THRESHOLDS", [0.5]),
        ("OLN.OBJECTNESS_BATCH_SIZE_PER_IMAGE", 0),
    ],
)
def test_bad_settings_are_named(key, value):
    """A wrong setting must be reported by its key when the model is built."""
    from detectron2.modeling import build_model
    from test_configs import load_config

    from oln_d2 import InputError

    cfg = load_config("cpu/oln_rpn_R_18_FPN_GN.yaml")
    cfg.merge_from_list([f"MODEL.{key}", value])
    with pytest.raises(InputError, match=f"MODEL.{key}"):
        build_model(cfg)


def test_rpn_without_a_config():
    """Who builds the parts by hand must get the paper's weights of the losses by default."""
    from oln_d2 import OLNRPN

    by_config = build_rpn()
    by_hand = OLNRPN(
        in_features=by_config.in_features,
        head=by_config.rpn_head,
        anchor_matcher=None,
        anchor_generator=by_config.anchor_generator,
        batch_size_per_image=256,
        positive_fraction=0.5,
        box2box_transform=by_config.box2box_transform,
        pre_nms_topk=(9, 9),
        post_nms_topk=(9, 9),
    )
    assert by_hand.loss_weight == by_config.loss_weight
    assert by_hand.box_iou_thresholds == tuple(by_config.box_iou_thresholds)


def test_feature_norm():
    """With RPN_FEATURE_NORM 8 the predictors, at an eighth of the weights, predict as without."""
    torch.manual_seed(0)
    features = [torch.randn(2, 16, 9, 7) for _ in range(5)]
    heads = [build_rpn(RPN_FEATURE_NORM=norm).rpn_head for norm in (1.0, 8.0)]
    heads[1].load_state_dict(heads[0].state_dict())
    with torch.no_grad():
        for predictor in (heads[1].objectness_logits, heads[1].anchor_deltas):
            predictor.weight /= 8
    for one, eight in zip(*(head(features) for head in heads)):
        for expected, found in zip(one, eight):
            close(found, expected)


def test_head_normalises_features():
    """Without L2 normalisation the weights of the public model give other predictions."""
    head = build_rpn().rpn_head
    x = torch.randn(2, 16, 5, 7)
    objectness, ltrb = head([x])
    hidden = head.conv(x)
    hidden = hidden / hidden.norm(dim=1, keepdim=True)
    close(objectness[0], head.objectness_logits(hidden))
    close(ltrb[0], head.anchor_deltas(hidden))
    assert objectness[0].shape == (2, 1, 5, 7) and ltrb[0].shape == (2, 4, 5, 7)


def test_half_precision():
    """Large half precision features must not overflow, nor boxes or losses lose accuracy."""
    rpn = build_rpn()
    x = torch.randn(1, 16, 5, 7)
    exact = rpn.rpn_head([x])
    with torch.no_grad():
        rpn.rpn_head.conv.weight *= 1e5  # its outputs are normalised, but reach 20,000 before
        with torch.autocast("cpu", dtype=torch.float16):
            half = rpn.rpn_head([x])
    for a, b in zip(exact, half):
        assert b[0].dtype == torch.float32  # else many scores tie
        close(b[0].float(), a[0].detach(), rtol=0.05, atol=1e-3)
    logits = torch.tensor([0.37]).half()
    close(quality_loss(logits, torch.zeros(1)), logits.float().sigmoid()[0])
    ltrb = torch.full((1, 4), 0.3).half()
    boxes = rpn.box2box_transform.apply_deltas(ltrb, torch.tensor([[0.0, 0, 512, 512]]).half())
    assert boxes.dtype == torch.float32


def test_training_scalars():
    """What the README tells users to watch must be logged, with the right values."""
    from detectron2.structures import ImageList, pairwise_iou
    from detectron2.utils.events import EventStorage

    case = Case("rpn_batch2")
    features = {
        f"p{i + 2}": torch.randn(2, 16, *size)
        for i, size in enumerate(case.golden["fmap_sizes"].tolist())
    }
    images = ImageList(torch.zeros(2, 3, 256, 288), case.sizes)
    torch.nn.init.constant_(case.rpn.rpn_head.anchor_deltas.bias, 0.5)  # boxes near the anchors
    with EventStorage() as storage:
        proposals, losses = case.rpn(images, features, case.gt)
    values = {name: value for name, (value, _) in storage.latest().items()}
    assert set(losses) == {"loss_rpn_obj", "loss_rpn_loc"}
    assert values["rpn/num_pos_anchors"] == 101 / 2
    assert values["rpn/num_neg_anchors"] == 411 / 2
    assert values["rpn/num_objectness_pos_anchors"] == (112 + 256) / 2
    assert 0 < values["rpn/centerness_target"] < 1 and 0 < values["rpn/centerness_pred"] < 1
    recall = values["rpn/proposal_recall"]
    found = [
        (pairwise_iou(gt.gt_boxes, p.proposal_boxes).max(dim=1).values >= 0.5).sum()
        for gt, p in zip(case.gt, proposals)
    ]
    assert recall > 0 and recall == pytest.approx(sum(found).item() / 14)


def test_first_boxes():
    """
    LTRB_INIT 0.5 must make the first boxes the anchors: at 0 they have no area, and hardly learn.
    """
    for value in (0.0, 0.5):
        rpn = build_rpn(LTRB_INIT=value)
        anchors = rpn.anchor_generator([torch.zeros(1, 16, 8, 8)] * 5)
        _, ltrb = rpn.rpn_head([torch.zeros(1, 16, 8, 8)])
        ltrb = ltrb[0].permute(0, 2, 3, 1).flatten(0, 2)
        boxes = rpn.box2box_transform.apply_deltas(ltrb, anchors[0].tensor)
        if value:
            close(boxes, anchors[0].tensor, atol=1e-4)
        else:
            close(boxes[:, :2], boxes[:, 2:])


def test_delta_coding(first_n):
    """The ablation must learn and decode Detectron2's deltas, with the same loss of the boxes."""
    from detectron2.modeling.box_regression import Box2BoxTransform
    from detectron2.structures import Boxes

    delta = build_rpn(RPN_BOX_CODING="delta", LTRB_INIT=0.5)
    assert type(delta.box2box_transform) is Box2BoxTransform
    assert (delta.rpn_head.anchor_deltas.bias == 0).all()
    reference, case = Case("rpn_rand_small"), Case("rpn_rand_small", delta)
    sizes = [len(level) for level in case.anchors]
    # The same boxes in both codes; boxes turned inside out have no deltas.
    ltrb = reference.ltrb.detach().clamp(min=0.1)
    reference.predictions = reference.predictions[0], ltrb.split(sizes, dim=1)
    anchors = Boxes.cat(case.anchors).tensor
    boxes = decode_ltrb(anchors, ltrb)
    deltas = torch.stack([delta.box2box_transform.get_deltas(anchors, b) for b in boxes])
    deltas.requires_grad_()
    case.predictions = case.predictions[0], deltas.split(sizes, dim=1)
    losses, expected = case.losses(), reference.losses()
    close(losses["loss_rpn_loc"].detach(), expected["loss_rpn_loc"], rtol=1e-4)
    losses["loss_rpn_loc"].backward()
    assert deltas.grad.abs().sum() > 0
    pairs = zip(
        delta.predict_proposals(case.anchors, *case.predictions, case.sizes),
        reference.rpn.predict_proposals(case.anchors, *reference.predictions, case.sizes),
    )
    for ours, theirs in pairs:
        close(ours.proposal_boxes.tensor, theirs.proposal_boxes.tensor, rtol=1e-4, atol=1e-2)


def test_unknown_coding_is_named():
    """A misspelt setting must be reported by its key when the model is built."""
    from oln_d2 import InputError

    with pytest.raises(InputError, match="MODEL.OLN.RPN_BOX_CODING"):
        build_rpn(RPN_BOX_CODING="deltas")


def test_classification_put_back(first_n):
    """The ablation must teach the features object or background, and change nothing else."""
    from detectron2.structures import Boxes, ImageList, Instances
    from detectron2.utils.events import EventStorage

    rpn = build_rpn(RPN_CLS_LOSS_WEIGHT=0.5)
    size = (128, 160)
    gt = [Instances(size, gt_boxes=Boxes(torch.tensor([[30.0, 30.0, 90.0, 100.0]])))]
    features = {f"p{i}": torch.randn(1, 16, 128 >> i, 160 >> i) for i in range(2, 7)}
    images = ImageList(torch.zeros(1, 3, *size), [size])
    with EventStorage():
        _, losses = rpn(images, features, gt)
        levels = [features[f] for f in rpn.in_features]
        logits = torch.cat([x.flatten() for x in rpn.rpn_head(levels)[2]])
        labels = rpn.label_and_sample_anchors(rpn.anchor_generator(levels), gt)[0][0][0]
    sampled = labels >= 0
    assert (labels == 1).any() and (labels == 0).any()
    expected = torch.nn.functional.binary_cross_entropy_with_logits(
        logits[sampled], labels[sampled].float(), reduction="sum"
    )
    close(losses["loss_rpn_cls"], 0.5 * expected / 256)
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in rpn.parameters())
    rpn.eval()
    with torch.no_grad():
        assert len(rpn(images, features)[0][0]) > 0
    assert set(build_rpn().rpn_head.state_dict()) < set(rpn.rpn_head.state_dict())
