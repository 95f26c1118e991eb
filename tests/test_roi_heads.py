"""
OLN-Box's second stage against the public code: sample, losses, gradients, scores and detections.
"""

import math

import pytest
import torch
from conftest import NEEDS_DETECTRON2, close, load_golden

from oln_d2.localization import centerness

pytestmark = NEEDS_DETECTRON2
TRAINING = ["roi_one", "roi_no_gt", "roi_only_gt_positive"]
INFERENCE = TRAINING + ["roi_inf_2600"]


def build_roi_heads(**oln):
    """The RoI heads of the R-50 recipe with the golden weights; `oln` overrides MODEL.OLN."""
    from detectron2.layers import ShapeSpec
    from detectron2.modeling.roi_heads import build_roi_heads
    from test_configs import load_config

    cfg = load_config("oln_box_R_50_FPN.yaml")
    cfg.MODEL.ROI_BOX_HEAD.FC_DIM = 32
    for key, value in oln.items():
        cfg.MODEL.OLN[key] = value
    shapes = {f"p{i}": ShapeSpec(channels=16, stride=2**i) for i in range(2, 7)}
    heads = build_roi_heads(cfg, shapes)
    weights = load_golden("roi_head_weights")
    heads.box_head.fc1.load_state_dict(part(weights, "shared_fcs.0"))
    heads.box_head.fc2.load_state_dict(part(weights, "shared_fcs.1"))
    heads.box_predictor.bbox_pred.load_state_dict(part(weights, "fc_reg"))
    heads.box_predictor.box_score.load_state_dict(part(weights, "fc_bbox_score"))
    return heads


def part(weights, name):
    return {leaf: weights[f"{name}.{leaf}"] for leaf in ("weight", "bias")}


class Case:
    """A golden file in Detectron2's terms."""

    def __init__(self, name, heads=None):
        from detectron2.structures import Boxes, Instances

        self.golden = golden = load_golden(name)
        self.heads = heads or build_roi_heads()
        size = tuple(golden["img0_img_shape"].tolist())
        self.features = {f"p{i + 2}": golden[f"feat{i}"].requires_grad_() for i in range(5)}
        gt = golden["img0_gt"].reshape(-1, 4)
        self.gt = [
            Instances(size, gt_boxes=Boxes(gt), gt_classes=torch.zeros(len(gt), dtype=torch.int64))
        ]
        boxes, scores = golden["img0_proposals"].split([4, 1], dim=1)
        self.proposals = [
            Instances(
                size, proposal_boxes=Boxes(boxes), objectness_logits=torch.logit(scores[:, 0])
            )
        ]

    def put_gt_first(self):
        """The public code puts the objects before the proposals, Detectron2 behind them."""
        from detectron2.modeling.proposal_generator.proposal_utils import (
            add_ground_truth_to_proposals,
        )
        from detectron2.structures import Instances

        num_gt = len(self.gt[0])
        (both,) = add_ground_truth_to_proposals(self.gt, self.proposals)
        self.proposals = [Instances.cat([both[-num_gt:], both[:-num_gt]])] if num_gt else [both]
        self.heads.proposal_append_gt = False


def training_losses(case):
    """Sample, pool, predict: the losses and all that led to them."""
    from detectron2.utils.events import EventStorage

    heads = case.heads
    with EventStorage() as storage:
        rois = heads.label_and_sample_proposals(case.proposals, case.gt)
        features = [case.features[f] for f in heads.box_in_features]
        pooled = heads.box_pooler(features, [x.proposal_boxes for x in rois])
        predictions = heads.box_predictor(heads.box_head(pooled))
        for prediction in predictions:
            prediction.retain_grad()
        losses = heads.box_predictor.losses(predictions, rois)
    return rois, pooled, predictions, losses, storage


@pytest.mark.parametrize("name", TRAINING)
def test_training_matches_public_code(name, first_n):
    """Sampled RoIs, pooled features, targets, losses, gradients: else training differs."""
    case = Case(name)
    case.put_gt_first()
    golden = case.golden
    rois, pooled, (scores, deltas), losses, storage = training_losses(case)

    close(rois[0].proposal_boxes.tensor, golden["rois"][:, 1:])
    positive = rois[0].gt_classes == 0
    assert positive.sum() == len(golden["img0_pos_inds"])
    assert (~positive).sum() == len(golden["img0_neg_inds"])
    if positive.any():
        expected = golden["img0_gt"][golden["img0_pos_gt"]]
        close(rois[0].gt_boxes.tensor[positive], expected)
        target = storage.latest()["roi_head/iou_target"][0]
        assert target == pytest.approx(golden["t_score_targets"][positive].mean().item(), rel=1e-5)
    close(pooled.detach(), golden["roi_feats"], atol=1e-5)
    close(deltas.detach(), golden["bbox_pred"], atol=1e-5)
    close(scores.detach(), golden["bbox_score"], atol=1e-5)

    close(losses["loss_box_reg"].detach(), golden["L_loss_bbox"])
    close(losses["loss_box_score"].detach(), golden["L_loss_bbox_score"])
    sum(losses.values()).backward()
    close(deltas.grad, golden["grad_bbox_pred"], atol=1e-7)
    close(scores.grad, golden["grad_bbox_score"], atol=1e-7)
    # A sum of 36,000 signed numbers: its accuracy is that of their sizes.
    close(case.features["p2"].grad.sum(), golden["grad_feat0_sum"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", TRAINING)
@pytest.mark.parametrize(
    "oln, everything", [({}, False), ({"BOX_SCORE_NEGATIVES": True}, True)], ids=["", "negatives"]
)
def test_rois_that_teach_nothing_are_not_computed(name, oln, everything):
    """The head sees the positives alone, and neither losses nor gradients change."""
    from detectron2.utils.events import EventStorage

    expected, found = (Case(name, build_roi_heads(**oln)) for _ in range(2))
    torch.manual_seed(0)
    rois, _, _, losses, _ = training_losses(expected)
    sum(losses.values()).backward()
    seen = []
    found.heads.box_head.register_forward_hook(lambda head, args, _: seen.append(len(args[0])))
    torch.manual_seed(0)
    with EventStorage():
        _, own = found.heads(None, found.features, found.proposals, found.gt)
    sum(own.values()).backward()
    assert seen == [len(rois[0]) if everything else (rois[0].gt_classes == 0).sum()]
    assert own.keys() == losses.keys()
    for loss in losses:
        close(own[loss].detach(), losses[loss].detach())
    for ours, theirs in zip(found.heads.parameters(), expected.heads.parameters()):
        close(ours.grad, theirs.grad, atol=1e-7)
    close(found.features["p2"].grad, expected.features["p2"].grad, atol=1e-7)


@pytest.mark.parametrize("name", INFERENCE)
def test_detections_match_public_code(name):
    """Otherwise the public model's weights would give other boxes, scores or cuts."""
    case = Case(name)
    case.heads.eval()
    with torch.no_grad():
        (detections,), _ = case.heads(None, case.features, case.proposals)
    expected = case.golden["img0_dets"]
    assert len(detections) == len(expected)
    close(detections.scores, expected[:, 4], rtol=1e-4, atol=1e-5)
    close(detections.pred_boxes.tensor, expected[:, :4], rtol=1e-4, atol=1e-2)
    assert (detections.pred_classes == 0).all()


def test_degenerate_proposals():
    """
    Proposals without area or turned inside out must not disturb the others. The public code also
    returns such boxes themselves; ours, as any Detectron2 model, drops them in the end.
    """
    from detectron2.modeling.postprocessing import detector_postprocess

    case = Case("roi_inf_degenerate")
    case.heads.eval()
    with torch.no_grad():
        (detections,), _ = case.heads(None, case.features, case.proposals)
    detections = detector_postprocess(detections, *detections.image_size)
    expected = case.golden["img0_dets"]
    expected = expected[(expected[:, 2:4] > expected[:, :2]).all(dim=1)]
    assert len(expected) == 25
    close(detections.scores, expected[:, 4], rtol=1e-4, atol=1e-5)
    close(detections.pred_boxes.tensor, expected[:, :4], rtol=1e-4, atol=1e-2)


def test_deltas_are_clamped_as_in_detectron2():
    """
    Detectron2 clamps large deltas of the size only above, the public code also below: its boxes
    never shrink under 16/1000 of the proposal. We keep Detectron2's way; all other boxes are equal.
    """
    from detectron2.structures import Boxes

    golden = load_golden("primitives")
    transform = build_roi_heads().box_predictor.box2box_transform
    boxes = Boxes(transform.apply_deltas(golden["delta_pred"], golden["anchors"]))
    boxes.clip(golden["max_shape"].tolist())
    shrinks = (golden["delta_pred"][:, 2:] / 5 < math.log(16 / 1000)).any(dim=1)
    assert shrinks.sum() == 1
    close(boxes.tensor[~shrinks], golden["delta_decoded"][~shrinks], rtol=1e-5, atol=1e-4)
    height = boxes.tensor[shrinks, 3] - boxes.tensor[shrinks, 1]
    assert (
        height < 0.01 < (golden["delta_decoded"][shrinks, 3] - golden["delta_decoded"][shrinks, 1])
    )


def test_no_image_has_objects():
    """Losses must be 0 and every parameter must get a gradient, or distributed training hangs."""
    case = Case("roi_no_gt")
    _, _, _, losses, _ = training_losses(case)
    assert set(losses) == {"loss_box_score", "loss_box_reg"}
    assert all(loss.item() == 0 for loss in losses.values())
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in case.heads.parameters())


def test_no_proposals_at_all():
    """
    At the start of training the first stage may propose nothing: no crash, gradients still flow.
    """
    case = Case("roi_no_gt")
    case.proposals = [case.proposals[0][:0]]
    _, _, _, losses, _ = training_losses(case)
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in case.heads.parameters())
    case.heads.eval()
    (detections,), _ = case.heads(None, case.features, case.proposals)
    assert len(detections) == 0


def test_score_target_centerness(first_n):
    """With BOX_SCORE_TARGET centerness the score must learn the centerness of the RoI."""
    case = Case("roi_one", build_roi_heads(BOX_SCORE_TARGET="centerness"))
    rois, _, (scores, _), losses, storage = training_losses(case)
    positive = rois[0].gt_classes == 0
    target = centerness(rois[0].proposal_boxes.tensor[positive], rois[0].gt_boxes.tensor[positive])
    close(
        losses["loss_box_score"],
        (scores[positive, 0].sigmoid() - target).abs().sum() / len(rois[0]),
    )
    assert storage.latest()["roi_head/centerness_target"][0] == pytest.approx(target.mean().item())


@pytest.mark.parametrize("name", ["roi_one", "roi_no_gt"])
def test_score_negatives(name, first_n):
    """With BOX_SCORE_NEGATIVES the score must learn every RoI's best IoU, 0 where is no object."""
    from torch.nn.functional import binary_cross_entropy
    from torchvision.ops import box_iou

    case = Case(name, build_roi_heads(BOX_SCORE_NEGATIVES=True))
    rois, _, (scores, _), losses, _ = training_losses(case)
    boxes, gt = rois[0].proposal_boxes.tensor, case.gt[0].gt_boxes.tensor
    target = box_iou(boxes, gt).amax(dim=1) if len(gt) else torch.zeros(len(boxes))
    assert (rois[0].gt_classes != 0).any()
    close(losses["loss_box_score"], binary_cross_entropy(scores[:, 0].sigmoid(), target))


def test_score_loss_weight(first_n):
    """BOX_SCORE_LOSS_WEIGHT must scale the score's loss and nothing else."""
    once = training_losses(Case("roi_one"))[3]
    thrice = training_losses(Case("roi_one", build_roi_heads(BOX_SCORE_LOSS_WEIGHT=3.0)))[3]
    close(thrice["loss_box_score"], 3 * once["loss_box_score"])
    close(thrice["loss_box_reg"], once["loss_box_reg"])


def test_bad_score_target_is_named():
    """A misspelt setting must be reported by its key when the model is built."""
    from oln_d2 import InputError

    with pytest.raises(InputError, match="MODEL.OLN.BOX_SCORE_TARGET"):
        build_roi_heads(BOX_SCORE_TARGET="ious")


def test_predictor_without_a_config():
    """Who builds it by hand for data of many classes must get one box an RoI."""
    from detectron2.layers import ShapeSpec
    from detectron2.modeling.box_regression import Box2BoxTransform

    from oln_d2 import OLNOutputLayers

    transform = Box2BoxTransform((10.0, 10.0, 5.0, 5.0))
    predictor = OLNOutputLayers(ShapeSpec(channels=8), box2box_transform=transform, num_classes=80)
    scores, deltas = predictor(torch.zeros(3, 8))
    assert scores.shape == (3, 1) and deltas.shape == (3, 4)


@pytest.mark.parametrize("name", ["roi_one", "roi_inf_degenerate"])
def test_detections_tell_both_qualities(name):
    """Who looks at why a box ranks high must see the centerness and IoU that made its score."""
    case = Case(name)
    case.heads.eval()
    with torch.no_grad():
        (found,), _ = case.heads(None, case.features, case.proposals)
    assert len(found) > 10
    close(found.scores, (found.objectness * found.box_scores).sqrt())
    assert found.objectness.unique().numel() > 5 and found.box_scores.unique().numel() > 5


def test_qualities_stay_with_their_boxes():
    """A box that overflows, as in half precision, must not shift the qualities of the others."""
    case = Case("roi_one")
    case.heads.eval()
    with torch.no_grad():
        (before,), _ = case.heads(None, case.features, case.proposals)
        case.proposals[0].proposal_boxes.tensor[0] = float("inf")
        case.heads.box_pooler = FinitePooler(case.heads.box_pooler)
        (after,), _ = case.heads(None, case.features, case.proposals)
    close(after.scores, (after.objectness * after.box_scores).sqrt())
    assert len(before) - 5 <= len(after) <= len(before) + 5


class FinitePooler(torch.nn.Module):
    """Pools the features of a box that is not finite from anywhere."""

    def __init__(self, pooler):
        super().__init__()
        self.pooler = pooler

    def forward(self, features, boxes):
        return self.pooler(features, [type(b)(b.tensor.nan_to_num(posinf=1.0)) for b in boxes])


@pytest.mark.parametrize("scores", [["objectness"], ["box_score"]])
def test_one_score_alone(scores):
    """With MODEL.OLN.SCORES the detections must be ranked by that score alone."""
    case = Case("roi_one", build_roi_heads(SCORES=scores))
    case.heads.eval()
    with torch.no_grad():
        (found,), _ = case.heads(None, case.features, case.proposals)
    expected = found.objectness if scores == ["objectness"] else found.box_scores
    close(found.scores, expected)
    assert (found.scores.diff() <= 0).all()
    if scores == ["objectness"]:  # the other one must not matter, whatever it is
        with torch.no_grad():
            case.heads.box_predictor.box_score.bias.fill_(float("nan"))
            (again,), _ = case.heads(None, case.features, case.proposals)
        close(again.scores, found.scores)


def test_unknown_score_is_named():
    """A misspelt score must be reported by its key when the model is built."""
    from oln_d2 import InputError

    for scores in (["objectnes"], []):
        with pytest.raises(InputError, match="MODEL.OLN.SCORES"):
            build_roi_heads(SCORES=scores)


def test_classification_put_back(first_n):
    """The ablation must teach the features object or background, and change nothing else."""
    plain = training_losses(Case("roi_one"))[3]
    case = Case("roi_one", build_roi_heads(BOX_CLS_LOSS_WEIGHT=0.5))
    rois, _, (scores, _), losses, _ = training_losses(case)
    for name, loss in plain.items():
        close(losses[name], loss)
    expected = torch.nn.functional.cross_entropy(scores[:, 1:], rois[0].gt_classes)
    close(losses["loss_cls"], 0.5 * expected)
    losses["loss_cls"].backward()
    assert case.heads.box_head.fc1.weight.grad.abs().sum() > 0
    case.heads.eval()
    with torch.no_grad():
        (found,), _ = case.heads(None, case.features, case.proposals)
    close(found.scores, (found.objectness * found.box_scores).sqrt())


def test_half_precision_features_do_not_move_boxes():
    """In bfloat16, ROIAlign would look up to 4 pixels beside a box at the right of the image."""
    case = Case("roi_inf_2600")
    case.heads.eval()
    half = {name: feature.detach().bfloat16() for name, feature in case.features.items()}
    exact = {name: feature.float() for name, feature in half.items()}
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected, found = (case.heads(None, x, case.proposals)[0][0] for x in (exact, half))
    assert torch.equal(found.pred_boxes.tensor, expected.pred_boxes.tensor)
    assert torch.equal(found.scores, expected.scores)


def test_objects_without_annotation_teach_nothing():
    """An object that only one of several data sets annotates must not be unlearnt elsewhere."""
    from detectron2.structures import pairwise_iou
    from detectron2.utils.events import EventStorage

    case = Case("roi_one")
    left_out, annotated = case.gt[0][:1], case.gt[0][1:]
    with EventStorage():
        rois = case.heads.label_and_sample_proposals(case.proposals, [annotated])
        on_it = pairwise_iou(left_out.gt_boxes, rois[0].proposal_boxes)[0] >= 0.5
        on_it &= rois[0].gt_classes == 1  # assigned to no other object
        assert on_it.any() and not on_it.all()
        predictions = torch.randn(len(on_it), 1), torch.randn(len(on_it), 4)
        others = [x + on_it[:, None] for x in predictions]
        before, after = (case.heads.box_predictor.losses(x, rois) for x in (predictions, others))
    for name, loss in before.items():
        assert loss > 0 and torch.equal(loss, after[name])
