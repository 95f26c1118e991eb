"""The whole detector against the public code, and as Detectron2's users run it."""

import importlib.util
import json

import pytest
import torch
from conftest import GOLDEN, NEEDS_DETECTRON2, close, load_golden
from test_configs import load_config

from oln_d2.standalone.convert import convert_checkpoint, convert_public_state_dict

pytestmark = NEEDS_DETECTRON2


def seeded_weights():
    """The module that makes weights from names and shapes."""
    spec = importlib.util.spec_from_file_location("seeded_weights", GOLDEN / "seeded_weights.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def public_state_dict():
    """The seeded weights of the golden model under the public names."""
    seeded = seeded_weights()
    info = json.loads((GOLDEN / "e2e_r18_small.json").read_text())
    arrays = seeded.state(
        json.loads((GOLDEN / "e2e_r18_small_shapes.json").read_text()), info["seed"]
    )
    assert seeded.digest(arrays) == info["weights_sha256"]
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def converted_golden(folder):
    """The path of the golden model as a user gets it: converted from a file of the public code."""
    public, ours = str(folder / "public.pth"), str(folder / "ours.pth")
    torch.save({"meta": {"epoch": 8}, "state_dict": public_state_dict()}, public)
    convert_checkpoint(public, ours)
    return ours


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Our OLN-Box with a ResNet-18 of the golden model's size and its weights, by way of a file."""
    from detectron2.modeling import build_model

    from oln_d2.engine.trainer import StrictCheckpointer

    cfg = load_config("oln_box_R_50_FPN.yaml")
    cfg.merge_from_list(
        ["MODEL.RESNETS.DEPTH", 18, "MODEL.RESNETS.RES2_OUT_CHANNELS", 64]
        + ["MODEL.FPN.OUT_CHANNELS", 32, "MODEL.ROI_BOX_HEAD.FC_DIM", 64]
        + ["MODEL.WEIGHTS", converted_golden(tmp_path_factory.mktemp("golden"))]
    )
    model = build_model(cfg)
    StrictCheckpointer(model).load(cfg.MODEL.WEIGHTS)
    return model.eval()


@pytest.fixture(scope="module")
def golden():
    return load_golden("e2e_r18_small")


@pytest.fixture(scope="module")
def features(model, golden):
    with torch.no_grad():
        return model.backbone(golden["image"])


def image_list(golden):
    from detectron2.structures import ImageList

    return ImageList(golden["image"], [tuple(golden["img_shape"].tolist())])


def test_features_match_public_code(features, golden):
    """The name map of the weights must give the public model's features."""
    for level in range(2, 7):
        close(features[f"p{level}"], golden[f"P{level}"], rtol=1e-4, atol=1e-5)


def test_predictions_of_the_rpn_match_public_code(model, features, golden):
    """Otherwise weights, or the order of the distances, are mixed up."""
    rpn = model.proposal_generator
    with torch.no_grad():
        objectness, ltrb = rpn.rpn_head([features[f] for f in rpn.in_features])
    for i, level in enumerate(rpn.in_features):
        close(objectness[i], golden[f"rpn_obj_{level.upper()}"], rtol=1e-4, atol=1e-4)
        close(ltrb[i], golden[f"rpn_reg_{level.upper()}"][:, [2, 0, 3, 1]], rtol=1e-4, atol=1e-4)


def test_proposals_and_detections_match_public_code(model, features, golden):
    """The final boxes and scores that a user of the public weights would get."""
    with torch.no_grad():
        (proposals,), _ = model.proposal_generator(image_list(golden), features)
        (detections,), _ = model.roi_heads(None, features, [proposals])
    expected = golden["proposals"]
    has_area = (expected[:, 2:4] > expected[:, :2]).all(dim=1)
    expected = expected[has_area]
    assert len(proposals) == len(expected)
    match(proposals.proposal_boxes.tensor, proposals.objectness_logits.sigmoid(), expected)

    for key, scale in (("dets", None), ("dets_rescaled", golden["scale_factor"])):
        expected = golden[key]
        expected = expected[(expected[:, 2:4] > expected[:, :2]).all(dim=1)]
        boxes = (
            detections.pred_boxes.tensor if scale is None else detections.pred_boxes.tensor / scale
        )
        has_area = (boxes[:, 2:] > boxes[:, :2]).all(dim=1)
        assert has_area.sum() == len(expected)
        match(boxes[has_area], detections.scores[has_area], expected)


def match(boxes, scores, expected):
    """Each expected box and score is there, whatever the order of nearly equal scores."""
    ours = torch.cat([boxes, 100 * scores[:, None]], dim=1)
    theirs = torch.cat([expected[:, :4], 100 * expected[:, 4:]], dim=1)
    distance = torch.cdist(theirs, ours, p=float("inf"))
    assert distance.min(dim=1).values.max() < 1e-2
    assert distance.min(dim=0).values.max() < 1e-2
    close(scores.sort().values, expected[:, 4].sort().values, rtol=1e-4, atol=1e-5)


def test_training_losses_and_gradients_match_public_code(model, golden, first_n):
    """A step of training must be the public model's."""
    from detectron2.modeling.proposal_generator.proposal_utils import add_ground_truth_to_proposals
    from detectron2.structures import Boxes, Instances
    from detectron2.utils.events import EventStorage

    images = image_list(golden)
    gt = Instances(images.image_sizes[0], gt_boxes=Boxes(golden["train_gt"]))
    gt.gt_classes = torch.zeros(len(gt), dtype=torch.int64)
    model.train()
    try:
        with EventStorage():
            features = model.backbone(images.tensor)
            (proposals,), losses = model.proposal_generator(images, features, [gt])
            # The sample takes the first n: bring the proposals into the public code's order, level
            # by level as they come from the feature maps, objects first.
            theirs = golden["proposals"]
            theirs = theirs[(theirs[:, 2:4] > theirs[:, :2]).all(dim=1)]
            order = torch.cdist(theirs[:, :4], proposals.proposal_boxes.tensor).argmin(dim=1)
            both = add_ground_truth_to_proposals([gt], [proposals[order]])[0]
            model.roi_heads.proposal_append_gt = False
            both = Instances.cat([both[-len(gt) :], both[: -len(gt)]])
            losses.update(model.roi_heads(images, features, [both], [gt])[1])
            sum(losses.values()).backward()
    finally:
        model.roi_heads.proposal_append_gt = True
        model.eval()
    names = {
        "loss_rpn_loc": "train_loss_rpn_bbox",
        "loss_rpn_obj": "train_loss_rpn_obj",
        "loss_box_reg": "train_loss_bbox",
        "loss_box_score": "train_loss_bbox_score",
    }
    assert set(losses) == set(names)
    for ours, theirs in names.items():
        close(losses[ours].detach(), golden[theirs].sum(), rtol=1e-4)
    close(sum(losses.values()).detach(), golden["train_total"], rtol=1e-4)

    norms = json.loads((GOLDEN / "e2e_r18_small.json").read_text())["grad_norms"]
    renamed, _ = convert_public_state_dict(
        {name: torch.full((4,), norm) for name, norm in norms.items()}
    )
    parameters = dict(model.named_parameters())
    compared = 0
    for name, norm in renamed.items():
        if (
            name in parameters
        ):  # Detectron2's frozen batch norm has no parameters, the public one has
            grad = parameters[name].grad
            close(0.0 * norm[0] if grad is None else grad.norm(), norm[0], rtol=1e-3, atol=1e-5)
            compared += 1
    assert compared == 45
