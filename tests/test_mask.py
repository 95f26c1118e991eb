"""OLN-Mask: masks of the image's size, their scores, and what both do to the detections."""

import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import NEEDS_DETECTRON2, ROOT, close
from pycocotools import mask as mask_utils

from oln_d2.localization import mask_iou
from oln_d2.masks import RLEMasks, paste_masks

RECIPE = "cpu/oln_mask_R_18_FPN_GN.yaml"


def some_masks(num=40, height=97, width=131):
    """Blobs in boxes that reach beyond the image, one of them without area."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(num, 1, 6, 6, generator=generator)
    small = torch.nn.functional.interpolate(coarse, size=28, mode="bicubic")[:, 0].sigmoid()
    corner = torch.rand(num, 2, generator=generator) * torch.tensor([width, height]) - 8
    size = torch.rand(num, 2, generator=generator) ** 2 * torch.tensor([width, height]) + 1
    boxes = torch.cat([corner, corner + size], dim=1)
    boxes[3, 2] = boxes[3, 0]
    return small, boxes, height, width


@NEEDS_DETECTRON2
def test_pasted_masks_are_detectron2s():
    """Masks that are shifted or scaled otherwise would lower the mask AR of every model."""
    from detectron2.layers.mask_ops import paste_masks_in_image
    from detectron2.structures import Boxes

    small, boxes, height, width = some_masks()
    has_area = boxes[:, 2] > boxes[:, 0]
    ours = np.asarray(paste_masks(small, boxes, height, width))
    assert not ours[~has_area].any()
    theirs = paste_masks_in_image(small[has_area], Boxes(boxes[has_area]), (height, width)).numpy()
    assert theirs.any(axis=(1, 2)).mean() > 0.9
    assert (ours[has_area] != theirs).mean() < 1e-5


def test_rle_masks_serve_as_a_stack_of_masks():
    """
    Who indexes, iterates over or selects from `pred_masks` must get the masks that were found.
    """
    small, boxes, height, width = some_masks(5)
    masks = paste_masks(small, boxes, height, width)
    array = np.asarray(masks)
    assert array.shape == masks.shape == (5, height, width) and array.dtype == bool
    assert (mask_utils.decode(masks.rles).transpose(2, 0, 1) == array).all()
    assert [m.tolist() for m in masks] == array.tolist()
    assert (masks[4] == array[4]).all() and masks[4].dtype == bool
    with pytest.raises(IndexError):
        masks[5]
    chosen = torch.tensor([False, True, False, False, True])
    index = chosen.nonzero().squeeze(1)
    for i in (np.int64(3), torch.tensor(3), -2):
        assert (masks[i] == array[3]).all()
    assert len(masks[[]]) == len(masks[torch.zeros(5, dtype=torch.bool)]) == 0
    for item in (slice(1, None, 3), chosen, index, [1, 4], chosen.numpy(), index.numpy()):
        assert isinstance(masks[item], RLEMasks)
        assert (np.asarray(masks[item]) == array[[1, 4]]).all()
    assert (np.asarray(RLEMasks.cat([masks[:2], masks[2:]])) == array).all()
    assert len(paste_masks(small[:0], boxes[:0], height, width)) == 0


def test_mask_iou_counts_what_lies_outside_the_roi():
    """A mask of half an object would otherwise learn that it fits perfectly."""
    half = torch.zeros(1, 4, 4, dtype=torch.bool)
    half[:, :, 2:] = True
    full = torch.ones(1, 4, 4, dtype=torch.bool)
    close(mask_iou(half, half, torch.tensor([8.0])), torch.tensor([1.0]))
    close(mask_iou(half, full, torch.tensor([16.0])), torch.tensor([0.5]))
    close(mask_iou(full, full, torch.tensor([32.0])), torch.tensor([0.5]))
    close(mask_iou(~full, half, torch.tensor([8.0])), torch.tensor([0.0]))
    close(mask_iou(~full, ~full, torch.tensor([0.0])), torch.tensor([0.0]))


def build(*opts):
    from detectron2.modeling import build_model
    from test_configs import load_config

    cfg = load_config(RECIPE)
    cfg.merge_from_list(list(opts))
    torch.manual_seed(0)
    model = build_model(cfg)
    for predictor in (
        model.roi_heads.mask_head.score.predictor,
        model.roi_heads.mask_head.predictor,
    ):
        torch.nn.init.normal_(
            predictor.weight, std=0.5
        )  # as after training: masks and scores differ
    return model


def images(*sizes):
    generator = torch.Generator().manual_seed(0)
    return [
        {"image": torch.randint(0, 256, (3, *size), generator=generator).float()} for size in sizes
    ]


@NEEDS_DETECTRON2
def test_all_three_scores_rank_before_the_cut():
    """
    With the mask's score applied to some boxes only, or after the cut, AR at 300 to 1000 could not
    be measured: all boxes that NMS leaves take part.
    """
    model = build("TEST.DETECTIONS_PER_IMAGE", 50).eval()
    inputs = images((192, 256))
    with torch.no_grad():
        (found,) = model.inference(inputs, do_postprocess=False)
        model.roi_heads.num_detections = 10**6
        (everything,) = model.inference(inputs, do_postprocess=False)
    assert len(found) == 50 < len(everything) / 2
    product = everything.objectness * everything.box_scores * everything.mask_scores
    close(everything.scores, product ** (1 / 3))
    assert (everything.scores.diff() <= 0).all() and everything.mask_scores.std() > 0.01
    close(found.scores, everything.scores[:50])
    close(found.pred_boxes.tensor, everything.pred_boxes.tensor[:50])
    before = (everything.objectness * everything.box_scores).argsort(descending=True)[:50]
    assert set(before.tolist()) != set(range(50))  # the mask's score decides who is kept


@NEEDS_DETECTRON2
def test_score_threshold_is_that_of_the_final_score():
    """SCORE_THRESH_TEST must not pass boxes whose mask is bad, nor drop any whose mask is good."""
    inputs = images((128, 160))
    model = build().eval()
    with torch.no_grad():
        (every,) = model(inputs)
        limit = every["instances"].scores.median().item()
        torch.manual_seed(0)
        (found,) = build("MODEL.ROI_HEADS.SCORE_THRESH_TEST", limit).eval()(inputs)
    expected = every["instances"][every["instances"].scores > limit]
    assert 0 < len(expected) < len(every["instances"])
    assert found["instances"].scores.tolist() == expected.scores.tolist()


@NEEDS_DETECTRON2
def test_parts_and_batches_do_not_change_masks(monkeypatch):
    """
    The same image must get the same masks and scores alone, in a batch, and whatever the parts.
    """
    import oln_d2.modeling.roi_heads as module

    model = build("TEST.DETECTIONS_PER_IMAGE", 30).eval()
    inputs = images((192, 256), (192, 256))
    with torch.no_grad():
        together = [output["instances"] for output in model(inputs)]
        monkeypatch.setattr(module, "MASKS_AT_ONCE", 7)
        alone = [model([x])[0]["instances"] for x in inputs]
    for a, b in zip(together, alone):
        assert len(a) == len(b) == 30
        close(a.scores, b.scores, rtol=1e-4, atol=1e-5)
        close(a.mask_scores, b.mask_scores, rtol=1e-4, atol=1e-5)
        close(a.pred_boxes.tensor, b.pred_boxes.tensor, rtol=1e-4, atol=1e-2)
        masks = np.asarray(a.pred_masks), np.asarray(b.pred_masks)
        assert masks[0].any() and (masks[0] != masks[1]).mean() < 1e-4


@NEEDS_DETECTRON2
def test_masks_are_those_of_detectron2s_postprocessing():
    """Projects that expect Mask R-CNN's `pred_masks` must find the same masks in OLN-Mask's."""
    from detectron2.evaluation.coco_evaluation import instances_to_coco_json
    from detectron2.modeling.postprocessing import detector_postprocess

    model = build("TEST.DETECTIONS_PER_IMAGE", 20).eval()
    inputs = images((192, 256))
    with torch.no_grad():
        (ours,) = model([{**inputs[0], "height": 96, "width": 128}])
        (raw,) = model.inference(inputs, do_postprocess=False)
    ours = ours["instances"].to("cpu")
    raw.pred_masks = raw.pred_masks.tensor[:, None]
    theirs = detector_postprocess(raw, 96, 128)
    assert isinstance(ours.pred_masks, RLEMasks)
    assert (np.asarray(ours.pred_masks) != theirs.pred_masks.numpy()).mean() < 1e-4
    assert (ours[ours.scores > 0].pred_masks[0] == ours.pred_masks[0]).all()
    entries = instances_to_coco_json(ours[:3], 1), instances_to_coco_json(theirs[:3], 1)
    for a, b in zip(*entries):
        assert mask_utils.iou([a["segmentation"]], [b["segmentation"]], [False]) > 0.99


@NEEDS_DETECTRON2
def test_runtimes_agree(tmp_path):
    """Who trains with Detectron2 must get the same masks and scores where it is not installed."""
    from oln_d2.standalone import build_detector, load_checkpoint

    theirs = build("TEST.DETECTIONS_PER_IMAGE", 60).eval()
    path = str(tmp_path / "model.pth")
    torch.save({"model": theirs.state_dict()}, path)
    ours = build_detector(
        "oln_mask",
        depth=18,
        norm="GN",
        fpn_channels=64,
        representation_size=256,
        mask_channels=64,
        anchor_sizes=(16, 32, 64, 128, 256),
        min_size=192,
        max_size=256,
        rpn_pre_nms_top_n_test=1000,
        box_detections_per_img=60,
    )
    load_checkpoint(ours, path)
    inputs = images((192, 256), (192, 256))
    with torch.no_grad():
        expected = [output["instances"] for output in theirs(inputs)]
        actual = ours.eval()([x["image"] / 255 for x in inputs])
    for a, b in zip(actual, expected):
        assert len(a["masks"]) == 60
        close(a["scores"], b.scores, rtol=0, atol=1e-4)
        distance = torch.cdist(a["boxes"], b.pred_boxes.tensor, p=float("inf"))
        nearest = distance.argmin(dim=1)
        assert distance.min(dim=1).values.max() < 0.02 and len(nearest.unique()) == 60
        close(a["mask_scores"], b.mask_scores[nearest], rtol=0, atol=1e-4)
        assert (np.asarray(a["masks"]) != np.asarray(b.pred_masks[nearest])).mean() < 1e-3


def test_standalone_mask_model_only_runs():
    """Training it must be refused in words, not fail on a missing loss."""
    from oln_d2 import InputError
    from oln_d2.standalone import build_detector

    model = build_detector(
        "oln_mask", depth=10, norm="GN", fpn_channels=32, representation_size=32, mask_channels=32
    )
    target = {"boxes": torch.tensor([[2.0, 2, 30, 30]])}
    with pytest.raises(InputError, match="train_net.py"):
        model.train()([torch.rand(3, 64, 64)], [target])


def head_and_batch(mask_type):
    from detectron2.structures import BitMasks, Boxes, Instances, PolygonMasks

    head = build().roi_heads.mask_head.train()
    polygon = np.array([20.0, 20, 60, 20, 60, 80, 20, 80])  # 40 x 60
    masks = PolygonMasks([[polygon]] * 3)
    if mask_type == "bitmask":
        masks = BitMasks.from_polygon_masks(masks, 128, 128)
    boxes = Boxes(torch.tensor([[20.0, 20, 60, 80], [20, 20, 40, 80], [0, 0, 100, 100]]))
    positives = Instances((128, 128), proposal_boxes=boxes, gt_masks=masks)
    features = torch.randn(3, 64, 14, 14, generator=torch.Generator().manual_seed(0))
    return head, features, [positives]


@NEEDS_DETECTRON2
@pytest.mark.parametrize("mask_type", ["polygon", "bitmask"])
def test_mask_losses(mask_type):
    """The mask must learn the object's, and its score the IoU with the whole object, by L1."""
    from detectron2.modeling.roi_heads.mask_head import mask_rcnn_loss
    from detectron2.utils.events import EventStorage

    head, features, positives = head_and_batch(mask_type)
    with EventStorage() as storage:
        losses = head(features, positives)
        logits = head.layers(features)
        expected = mask_rcnn_loss(logits, positives)
    close(losses["loss_mask"].detach(), expected.detach(), rtol=1e-4)

    # In the cells of the masks: the first RoI is the object's box, the second its left half, and
    # the third reaches beyond it.
    masks = logits[:, 0] > 0
    cell = (torch.arange(28) + 0.5) * 100 / 28
    inside = ((cell > 20) & (cell < 80))[:, None] & ((cell > 20) & (cell < 60))
    found, area = masks[2].sum(), 28**2 * 0.4 * 0.6
    iou = torch.stack(
        [
            masks[0].sum() / 28**2,
            masks[1].sum() / (2 * 28**2),
            (masks[2] & inside).sum() / (found + area - (masks[2] & inside).sum()),
        ]
    )
    assert storage.latest()["mask_head/iou_target"][0] == pytest.approx(iou.mean().item(), abs=0.01)
    score = head.score(features, logits.sigmoid()).sigmoid()
    assert losses["loss_mask_score"].item() == pytest.approx(
        (score - iou).abs().mean().item(), abs=0.01
    )
    weighted = build("MODEL.OLN.MASK_SCORE_LOSS_WEIGHT", 3.0).roi_heads.mask_head.train()
    weighted.load_state_dict(head.state_dict())
    with EventStorage():
        tripled = weighted(features, positives)
    close(tripled["loss_mask_score"], 3 * losses["loss_mask_score"], rtol=1e-4)
    close(tripled["loss_mask"], losses["loss_mask"], rtol=1e-4)


@NEEDS_DETECTRON2
@pytest.mark.parametrize("mask_type", ["polygon", "bitmask"])
def test_areas_follow_their_objects(mask_type):
    """Areas are measured once an object: RoIs with another object's would learn a wrong score."""
    from detectron2.structures import BitMasks, Boxes, Instances, PolygonMasks
    from detectron2.utils.events import EventStorage

    from oln_d2.modeling.mask_head import mask_areas

    corners = torch.tensor([[10, 10, 50, 90], [60, 20, 120, 40], [30, 100, 80, 120]]).double()
    x1, y1, x2, y2 = corners.numpy().T
    polygons = np.stack([x1, y1, x2, y1, x2, y2, x1, y2], axis=1)
    masks = PolygonMasks([[polygon] for polygon in polygons])
    if mask_type == "bitmask":
        masks = BitMasks.from_polygon_masks(masks, 128, 128)
    gt = Instances((128, 128), gt_boxes=Boxes(corners.float()), gt_masks=masks)
    gt.gt_classes = torch.zeros(3, dtype=torch.int64)
    boxes = corners.float().repeat(10, 1) + torch.randn(30, 4)
    proposals = Instances((128, 128), proposal_boxes=Boxes(boxes), objectness_logits=boxes[:, 0])
    with EventStorage():
        (rois,) = build().roi_heads.label_and_sample_proposals([proposals], [gt])
    rois = rois[rois.gt_classes == 0]
    assert len(rois) > 20 and len(set(rois.gt_areas.tolist())) == 3
    assert torch.equal(rois.gt_areas, mask_areas(rois.gt_masks))


@NEEDS_DETECTRON2
def test_score_does_not_shape_the_mask():
    """Else masks would learn to be easy to score instead of to fit."""
    from detectron2.utils.events import EventStorage

    head, features, positives = head_and_batch("bitmask")
    features.requires_grad_()
    with EventStorage():
        head(features, positives)["loss_mask_score"].backward()
    assert head.predictor.weight.grad is None and head.deconv.weight.grad is None
    assert features.grad.abs().sum() > 0 and head.score.predictor.weight.grad.abs().sum() > 0


@NEEDS_DETECTRON2
def test_score_needs_a_head_that_predicts_it():
    """A recipe that ranks by the mask's score without one must be refused by its keys."""
    from oln_d2 import InputError

    for opts in (
        ("MODEL.MASK_ON", False),
        ("MODEL.ROI_MASK_HEAD.NAME", "MaskRCNNConvUpsampleHead"),
    ):
        with pytest.raises(InputError, match="MODEL.OLN.SCORES.*OLNMaskHead"):
            build(*opts)


@NEEDS_DETECTRON2
def test_masks_without_scores():
    """Authors of other projects may put Detectron2's own mask head behind OLN-Box."""
    from detectron2.modeling import build_model
    from test_configs import load_config

    cfg = load_config(RECIPE)
    cfg.MODEL.ROI_MASK_HEAD.NAME = "MaskRCNNConvUpsampleHead"
    cfg.MODEL.OLN.SCORES = ["objectness", "box_score"]
    cfg.TEST.DETECTIONS_PER_IMAGE = 20
    model = build_model(cfg).eval()
    with torch.no_grad():
        found = model(images((192, 256)))[0]["instances"]
    assert found.pred_masks.shape == (20, 192, 256)
    close(found.scores, (found.objectness * found.box_scores).sqrt())


@NEEDS_DETECTRON2
def test_benchmark():
    """`benchmark masks` must run and compare the same masks."""
    result = subprocess.run(
        [sys.executable, "-m", "oln_d2", *"benchmark masks --masks 20 --size 60 80".split()],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    differing, area = re.search(r"(\d+) pixels differ, of (\d+)", result.stdout).groups()
    assert int(differing) <= 2 and int(area) > 1000
