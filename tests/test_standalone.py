"""The standalone runtime: against the Detectron2 components, the public code, and on its own."""

import copy
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import NEEDS_DETECTRON2, ROOT, close, load_golden
from PIL import Image

from oln_d2.checks import InputError
from oln_d2.standalone import (
    build_detector,
    load_checkpoint,
    load_detector,
    oln_box_resnet18_fpn,
    oln_box_resnet50_fpn,
    save_checkpoint,
)
from oln_d2.standalone.data import read_image
from oln_d2.standalone.models import StandaloneRPNHead, detect

MODELS = [(18, "FrozenBN"), (18, "GN"), (50, "FrozenBN"), (50, "GN")]
SMALL = {"fpn_channels": 32, "representation_size": 64, "trainable_backbone_layers": 5}
GT = [
    torch.tensor([[20.0, 30, 90, 130], [60, 10, 200, 150], [0, 0, 50, 60.5]]),
    torch.tensor([[100.0, 40, 180, 100]]),
    torch.zeros(0, 4),
]


def standalone_model(depth=18, norm="FrozenBN", **kwargs):
    """A model with weights that give spread-out features, scores and boxes."""
    torch.manual_seed(depth)
    model = build_detector(depth=depth, norm=norm, **SMALL, **kwargs)
    for name, tensor in model.state_dict().items():
        if name.endswith("running_var"):
            tensor.uniform_(0.5, 1.5)
        elif "rpn.head.bbox_pred" in name or "rpn.head.cls_logits" in name:
            tensor.normal_(0.5 if name.endswith("bbox_pred.bias") else 0, 0.3)
        elif "box_predictor" in name:
            tensor.normal_(std=0.1)
        elif tensor.dim() == 1:
            tensor.add_(0.1 * torch.randn_like(tensor))
            if "bn3" in name or "bn2.weight" in name:
                tensor.mul_(0.5)
    return model.eval()


def detectron2_model(depth=18, norm="FrozenBN"):
    """The same from the recipe, with other weights."""
    from detectron2.modeling import build_model
    from test_configs import load_config

    cfg = load_config("oln_box_R_50_FPN.yaml")
    cfg.merge_from_list(
        ["MODEL.RESNETS.DEPTH", depth, "MODEL.RESNETS.NORM", norm, "MODEL.BACKBONE.FREEZE_AT", 0]
        + ["MODEL.FPN.NORM", "GN" if norm == "GN" else "", "MODEL.FPN.OUT_CHANNELS", 32]
        + ["MODEL.ROI_BOX_HEAD.FC_DIM", 64, "INPUT.MIN_SIZE_TEST", 224, "INPUT.MAX_SIZE_TEST", 320]
    )
    if depth == 18:
        cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 64
    return build_model(cfg).eval(), cfg


def match(actual, boxes, scores, side):
    """
    Every expected box is there with its score, to 1e-4 of the image's side and of the score, and no
    other. Not row by row, since nearly equal scores come in any order.
    """
    ours = torch.cat([actual["boxes"] / side, actual["scores"][:, None]], dim=1)
    theirs = torch.cat([boxes / side, scores[:, None]], dim=1)
    distance = torch.cdist(theirs, ours, p=float("inf"))
    assert distance.min(dim=1).values.max() < 1e-4 and distance.min(dim=0).values.max() < 1e-4


@pytest.fixture(scope="module", params=MODELS, ids=lambda model: "R{}-{}".format(*model))
def both(request, tmp_path_factory):
    """The two runtimes with the same weights, which went through a file."""
    from oln_d2.engine.trainer import StrictCheckpointer

    path = str(tmp_path_factory.mktemp("both") / "standalone.pth")
    ours = standalone_model(*request.param, min_size=224, max_size=320)
    save_checkpoint(ours, path)
    theirs, cfg = detectron2_model(*request.param)
    StrictCheckpointer(theirs).load(path)
    return ours, theirs, cfg


@pytest.fixture(scope="module")
def image_file(tmp_path_factory):
    """A picture of odd size, and not square, with some structure."""
    y, x = np.mgrid[:157, :211]
    waves = np.stack([np.sin(x / 9 + y / 31), np.cos(y / 7), np.sin((x - y) / 17)], axis=2)
    noise = np.random.RandomState(0).uniform(-40, 40, waves.shape)
    path = tmp_path_factory.mktemp("image") / "image.png"
    Image.fromarray((128 + 80 * waves + noise).clip(0, 255).astype(np.uint8)).save(path)
    return str(path)


@NEEDS_DETECTRON2
def test_detections_of_an_image_file_agree(both, image_file):
    """
    From the file to the boxes: resize, normalisation, features, anchors, pooling, NMS, rescaling.
    """
    from detectron2.data import transforms as T
    from detectron2.data.detection_utils import read_image as detectron2_read_image

    ours, theirs, cfg = both
    with torch.no_grad():
        (actual,) = ours([read_image(image_file)])
        image = detectron2_read_image(image_file, "RGB")
        height, width = image.shape[:2]
        resize = T.ResizeShortestEdge(cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST)
        image = resize.get_transform(image).apply_image(image)
        image = torch.from_numpy(image.transpose(2, 0, 1).copy())
        (expected,) = theirs([{"image": image, "height": height, "width": width}])
    expected = expected["instances"]
    assert len(expected) > 200 and expected.scores.max() - expected.scores.min() > 0.05
    assert len(actual["boxes"]) == len(expected)
    close(actual["scores"], expected.scores, rtol=0, atol=1e-4)
    match(actual, expected.pred_boxes.tensor, expected.scores, max(width, height))


def test_rpn_feature_norm():
    """With `rpn_feature_norm` 8 the predictors, at an eighth of the weights, predict as without."""
    models = [standalone_model(min_size=160, rpn_feature_norm=norm) for norm in (1, 8)]
    for predictor in (models[1].rpn.head.cls_logits, models[1].rpn.head.bbox_pred):
        predictor.weight.data /= 8
    image = torch.rand(3, 160, 200)
    with torch.no_grad():
        (one,), (eight,) = (model([image]) for model in models)
    match(eight, one["boxes"], one["scores"], 200)


@NEEDS_DETECTRON2
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("negatives", [False, True])
def test_losses_agree(both, negatives, weighted):
    """
    The same seed draws the same samples: the losses must be those of Detectron2.
    """
    from detectron2.structures import Boxes, Instances
    from detectron2.utils.events import EventStorage

    ours, theirs, _ = both
    torch.manual_seed(1)
    pixels = [torch.randint(0, 256, (3, *size)) for size in [(224, 224), (224, 301), (224, 250)]]
    ours.train(), theirs.train()
    ours.roi_heads.score_negatives = theirs.roi_heads.box_predictor.score_negatives = negatives
    try:
        torch.manual_seed(7)
        targets = [{"boxes": boxes} for boxes in GT]
        for target in targets if weighted else ():
            target["weights"] = torch.linspace(0.2, 1, len(target["boxes"]))
        actual = ours([p / 255 for p in pixels], targets)
        inputs = []
        for p, boxes in zip(pixels, GT):
            gt = Instances(p.shape[-2:], gt_boxes=Boxes(boxes))
            gt.gt_classes = torch.zeros(len(boxes), dtype=torch.int64)
            if weighted:
                gt.gt_weights = torch.linspace(0.2, 1, len(boxes))
            inputs.append({"image": p.to(torch.uint8), "instances": gt})
        torch.manual_seed(7)
        with EventStorage():
            expected = theirs(inputs)
    finally:
        ours.eval(), theirs.eval()
        ours.roi_heads.score_negatives = theirs.roi_heads.box_predictor.score_negatives = False
    assert set(actual) == set(expected)
    for name in expected:
        assert expected[name] > 1e-3
        close(actual[name].detach(), expected[name].detach(), rtol=1e-4)


@pytest.mark.parametrize("negatives", [False, True])
def test_rois_that_teach_nothing_are_not_computed(negatives, monkeypatch):
    """That their losses are the same is in `test_losses_agree`."""
    model = standalone_model(min_size=160, box_score_negatives=negatives).train()
    heads, computed, sampled = model.roi_heads, [], []
    heads.box_head.register_forward_hook(lambda head, args, _: computed.append(len(args[0])))
    sample = heads.select_training_samples
    monkeypatch.setattr(
        heads, "select_training_samples", lambda *args: sampled.append(sample(*args)) or sampled[0]
    )
    boxes = torch.tensor([[10.0, 10, 90, 100], [100, 50, 190, 150]])
    model([torch.rand(3, 160, 200)] * 2, [{"boxes": boxes}, {"boxes": boxes[:0]}])
    labels = torch.cat(sampled[0][2])
    assert 0 < (labels > 0).sum() < len(labels)
    assert computed == [len(labels) if negatives else (labels > 0).sum()]


@pytest.mark.parametrize("negatives", [False, True])
def test_weights_of_objects(negatives):
    """An object of weight 0.5 must teach half of what it does; background stays what it is."""
    model = standalone_model(min_size=160, box_score_negatives=negatives).train()
    image, losses = torch.rand(3, 160, 200), []
    for weights in (None, [1.0, 1.0], [0.5, 0.5], [1.0, 0.5]):
        target = {"boxes": torch.tensor([[10.0, 10, 90, 100], [100, 50, 190, 150]])}
        if weights is not None:
            target["weights"] = torch.tensor(weights)
        torch.manual_seed(0)
        losses.append(model([image], [target]))
    none, ones, halves, mixed = losses
    for name in none:
        close(ones[name].detach(), none[name].detach())
        assert halves[name] < mixed[name] < none[name]
    for name in ("loss_rpn_loc", "loss_box_reg", *(["loss_box_score"] * (not negatives))):
        close(halves[name].detach(), none[name].detach() / 2)


@NEEDS_DETECTRON2
@pytest.mark.parametrize("depth, norm", MODELS)
def test_detectron2_checkpoints_load(depth, norm, tmp_path):
    """
    What Detectron2's trainer saves, optimizer and all, must load without executing pickled code.
    """
    from detectron2.checkpoint import DetectionCheckpointer

    theirs, cfg = detectron2_model(depth, norm)
    optimizer = torch.optim.SGD(theirs.parameters(), 0.1)
    checkpointer = DetectionCheckpointer(theirs, str(tmp_path), optimizer=optimizer)
    checkpointer.save("model", iteration=3)
    ours = standalone_model(depth, norm)
    load_checkpoint(ours, str(tmp_path / "model.pth"))
    back = str(tmp_path / "back.pth")
    save_checkpoint(ours, back)
    expected = theirs.state_dict()
    actual = torch.load(back, weights_only=True)["model"]
    assert set(actual) == set(expected)
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


@pytest.fixture(scope="module")
def golden():
    return load_golden("e2e_r18_small")


@pytest.fixture(scope="module")
def golden_model(tmp_path_factory):
    """The golden model with the weights of the public code, by way of a file."""
    from test_end_to_end import converted_golden

    return load_detector(converted_golden(tmp_path_factory.mktemp("golden")))


def golden_inputs(golden):
    from torchvision.models.detection.image_list import ImageList

    return ImageList(golden["image"], [tuple(golden["img_shape"].tolist())])


def test_detections_match_public_code(golden_model, golden):
    """
    The standalone runtime, too, must give a user of the public weights the public boxes and scores.
    """
    images = golden_inputs(golden)
    with torch.no_grad():
        features = golden_model.backbone(images.tensors)
        for i, level in enumerate(features.values(), 2):
            close(level, golden[f"P{i}"], rtol=1e-4, atol=1e-5)
        proposals, _ = golden_model.rpn(images, features)
        (detections,), _ = golden_model.roi_heads(features, proposals, images.image_sizes)
    for found, scores, name in (
        (proposals[0], proposals[0]["objectness"], "proposals"),
        (detections, detections["scores"], "dets"),
    ):
        expected = golden[name]
        expected = expected[(expected[:, 2:4] > expected[:, :2]).all(dim=1)]
        area = (found["boxes"][:, 2:] > found["boxes"][:, :2]).all(dim=1)
        assert area.sum() == len(expected)
        found = {"boxes": found["boxes"][area], "scores": scores[area]}
        match(found, expected[:, :4], expected[:, 4], 213)


def test_losses_match_public_code(golden_model, golden, first_n):
    """A step of standalone training must be the public model's."""
    images = golden_inputs(golden)
    targets = [{"boxes": golden["train_gt"]}]
    golden_model.train()
    try:
        features = golden_model.backbone(images.tensors)
        proposals, losses = golden_model.rpn(images, features, targets)
        # The sample takes the first n: bring the proposals into the public code's order, level by
        # level, and the objects before them.
        theirs = golden["proposals"]
        theirs = theirs[(theirs[:, 2:4] > theirs[:, :2]).all(dim=1), :4]
        boxes = proposals[0]["boxes"]
        order = torch.cdist(theirs, boxes).argmin(dim=1)
        proposals = [{"boxes": torch.cat([golden["train_gt"], boxes[order]])}]
        golden_model.roi_heads.add_gt_proposals = lambda proposals, gt_boxes: proposals
        losses.update(golden_model.roi_heads(features, proposals, images.image_sizes, targets)[1])
    finally:
        del golden_model.roi_heads.add_gt_proposals
        golden_model.eval()
    for ours, theirs in {
        "loss_rpn_loc": "train_loss_rpn_bbox",
        "loss_rpn_obj": "train_loss_rpn_obj",
        "loss_box_reg": "train_loss_bbox",
        "loss_box_score": "train_loss_bbox_score",
    }.items():
        close(losses[ours].detach(), golden[theirs].sum(), rtol=1e-4)


def watch_first_stage(model):
    """
    A list that, once the losses of one image are computed, holds the anchors that teach the first
    stage, and what it predicts for them: logits and distances.
    """
    seen, at = [], model.rpn.head.at

    def keep(features, image, anchor):
        predicted = at(features, image, anchor)
        seen.extend([anchor, *predicted])
        return predicted

    model.rpn.head.at = keep
    return seen


@pytest.mark.parametrize("negatives", [True, False])
def test_objects_without_annotation(negatives):
    """
    Without `objectness_negatives` an object that nobody has annotated must never be taken for
    background, by either stage; with them, as in the authors' code, it may be.
    """
    from torchvision.ops import box_iou

    settings = {"min_size": 160, "max_size": 160, "objectness_negatives": negatives}
    model = build_detector(depth=10, norm="GN", ltrb_init=0.5, **SMALL, **settings).train()
    annotated, other = torch.tensor([[8.0, 8, 60, 60]]), torch.tensor([[80.0, 80, 150, 150]])
    seen = {}  # what each stage predicts, and where
    first = watch_first_stage(model)
    model.rpn.anchor_generator.register_forward_hook(lambda *call: seen.update(anchors=call[2][0]))
    model.roi_heads.box_roi_pool.register_forward_pre_hook(lambda _, args: seen.update(rois=args))
    model.roi_heads.box_predictor.register_forward_hook(lambda *call: seen.update(box=call[2]))
    losses = model([torch.rand(3, 160, 160)], [{"boxes": annotated}])
    anchor, *predicted = first
    grads = torch.autograd.grad(sum(losses.values()), [*predicted, *seen["box"]])
    scores, sides = torch.zeros(len(seen["anchors"])), torch.zeros(len(seen["anchors"]), 4)
    scores[anchor], sides[anchor] = grads[0][:, 0], grads[1]
    on_other = box_iou(seen["anchors"], other)[:, 0] > 0.3
    rois_on_other = box_iou(seen["rois"][1][0], other)[:, 0] > 0.3
    assert on_other.any() and (scores != 0).any()
    assert (scores[on_other] != 0).any() == negatives
    assert not sides[on_other].any()
    assert not rois_on_other.any() and grads[2].any() and grads[3].any()


@NEEDS_DETECTRON2
@pytest.mark.parametrize("size", [(64, 96), (101, 333), (1, 1)])
def test_anchors_agree(size):
    """Anchors of odd image sizes, and of odd or broken sizes, must not be rounded or shifted."""
    from detectron2.layers import ShapeSpec
    from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
    from torchvision.models.detection.image_list import ImageList

    from oln_d2.standalone.models import STRIDES, SquareAnchors

    sizes = [45, 64, 128.5, 256, 512]
    features = [torch.zeros(2, 8, -(-size[0] // s), -(-size[1] // s)) for s in STRIDES]
    shapes = [ShapeSpec(channels=8, stride=s) for s in STRIDES]
    theirs = DefaultAnchorGenerator(
        sizes=[[s] for s in sizes],
        aspect_ratios=[[1.0]],
        strides=[s.stride for s in shapes],
        offset=0.0,
    )
    ours = SquareAnchors(sizes)(ImageList(torch.zeros(2, 3, *size), [size] * 2), features)
    assert len(ours) == 2
    assert torch.equal(ours[0], torch.cat([boxes.tensor for boxes in theirs(features)]))


@NEEDS_DETECTRON2
def test_resized_shapes_agree():
    """One pixel off would make other features of every image."""
    from detectron2.data.transforms import ResizeShortestEdge

    from oln_d2.data.images import resized_shape

    rng = np.random.RandomState(0)
    for height, width in [
        *rng.randint(20, 2000, (500, 2)).tolist(),
        [480, 640],
        [333, 1000],
        [7, 7],
    ]:
        for limits in [(800, 1333), (256, 426), (224, 320), (256, 256)]:
            expected = ResizeShortestEdge.get_output_shape(height, width, *limits)
            assert resized_shape(height, width, *limits) == expected


def test_rpn_nms_drops_duplicates():
    """`rpn_nms_thresh` must thin the proposals of a level, and only then."""
    from torchvision.ops import box_iou

    image = [torch.rand(3, 96, 128)]
    counts = []
    for thresh in (None, 0.7):
        model = standalone_model(min_size=96, max_size=128, rpn_nms_thresh=thresh)
        images, _ = model.transform(image)
        (proposals,), _ = model.rpn(images, model.backbone(images.tensors))
        assert (proposals["objectness"].diff() <= 0).all()
        counts.append(len(proposals["boxes"]))
    small = proposals["boxes"][
        (proposals["boxes"][:, 2:] - proposals["boxes"][:, :2]).amax(dim=1) < 30
    ]
    assert 0 < counts[1] < counts[0]
    assert box_iou(small, small).fill_diagonal_(0).max() <= 0.7 or len(small) == 0


@pytest.mark.parametrize("field, attribute", [("objectness",) * 2, ("box_score", "box_scores")])
def test_one_score_alone(field, attribute, tmp_path):
    """Detections must be ranked by the score that was chosen, after a checkpoint as before."""
    model = standalone_model(min_size=96, max_size=128, scores=[field]).eval()
    save_checkpoint(model, tmp_path / "model.safetensors")
    for own in model, load_detector(tmp_path / "model.safetensors"):
        (found,) = own([torch.rand(3, 96, 128)])
        assert found["scores"].equal(found[attribute]) and (found["scores"].diff() <= 0).all()
        assert len(found["scores"]) > 20 and found["scores"].unique().numel() > 20


def test_images_without_objects_and_batches():
    """
    Images without objects must train with a gradient for every parameter; results keep the order.
    """
    torch.manual_seed(0)
    model = standalone_model(18, "GN", min_size=96, max_size=160).train()
    images = [torch.rand(3, 90, 120), torch.rand(3, 60, 80)]  # of one size once resized
    losses = model(images, [{"boxes": torch.zeros(0, 4)}] * 2)
    assert losses["loss_box_reg"] == losses["loss_box_score"] == losses["loss_rpn_loc"] == 0
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in model.parameters())
    model.eval()
    with torch.no_grad():
        together = model(images)
        alone = [model([image])[0] for image in images]
    for one, other, image in zip(together, alone, images):
        close(one["scores"], other["scores"], rtol=0, atol=1e-4)
        match(one, other["boxes"], other["scores"], 120)
        height, width = image.shape[-2:]
        assert (one["boxes"] >= 0).all() and (
            one["boxes"] <= torch.tensor([width, height] * 2)
        ).all()
        assert (one["scores"].diff() <= 0).all()


def test_half_precision():
    """Mixed precision must train every parameter, and find what full precision finds."""
    model = standalone_model(min_size=128, max_size=192)
    image = [torch.rand(3, 128, 192)]
    features, predictions = [], []
    model.backbone.body.layer1.register_forward_hook(lambda *call: features.append(call[2].dtype))
    model.rpn.head.register_forward_hook(lambda *call: predictions.extend(sum(call[2], [])))
    with torch.autocast("cpu", torch.bfloat16):
        (half,) = model(image)
        # Frozen norms must not give the memory away again; scores and sides must not be rounded.
        assert features == [torch.bfloat16]
        assert len(predictions) == 10 and {x.dtype for x in predictions} == {torch.float32}
        losses = model.train()(image, [{"boxes": GT[0]}])
    sum(losses.values()).backward()
    assert all(loss.isfinite() and loss.dtype == torch.float32 for loss in losses.values())
    (full,) = model.eval()(image)
    assert half["boxes"].dtype == half["scores"].dtype == torch.float32
    from torchvision.ops import box_iou

    best = box_iou(full["boxes"][:50], half["boxes"]).amax(dim=1)
    assert best.median() > 0.9


def test_half_precision_of_faster_rcnn():
    """
    Sides of its proposals and objects would be rounded to two pixels, and a thin object to none:
    the loss is NaN then, and without thin objects the comparison with OLN unfair.
    """
    torch.manual_seed(0)
    model = build_detector("faster_rcnn", depth=18, min_size=256, max_size=512, **SMALL)
    proposals = []
    model.rpn.register_forward_hook(lambda module, args, out: proposals.extend(out[0]))
    image, thin = torch.rand(3, 256, 512), torch.tensor([[401.3, 30, 402.2, 90], [10, 20, 90, 80]])
    with torch.autocast("cpu", torch.bfloat16):
        losses = model.train()([image], [{"boxes": thin, "labels": torch.ones(2).long()}])
    assert all(loss.isfinite() for loss in losses.values())
    assert proposals[0].dtype == torch.float32
    assert (proposals[0] % 1 != 0).float().mean() > 0.5


def test_channels_last():
    """The layout that GPUs are fast with must give the same boxes, losses and gradients."""
    image = [torch.rand(3, 128, 160, generator=torch.Generator().manual_seed(0))]
    runs = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        model = standalone_model(min_size=128, max_size=160).to(memory_format=memory_format)
        (found,) = model(image)
        torch.manual_seed(0)
        losses = model.train()(image, [{"boxes": GT[0][:1]}])
        sum(losses.values()).backward()
        runs.append((found, losses, model.backbone.body.conv1.weight.grad))
    (found, losses, grad), (same_found, same_losses, same_grad) = runs
    match(found, same_found["boxes"], same_found["scores"], 160)
    for name, loss in losses.items():
        close(loss.detach(), same_losses[name].detach(), rtol=1e-4)
    close(grad, same_grad, rtol=1e-3, atol=5e-3 * grad.abs().max().item())


def test_anchors_beyond_the_border():
    """What fills a small image has an anchor of its size only if that may reach beyond."""
    from torchvision.models.detection.image_list import ImageList

    small = {"depth": 10, "norm": "GN", "fpn_channels": 32, "representation_size": 32}
    boxes = [{"boxes": torch.tensor([[4.0, 4, 60, 60]])}]
    features = [torch.zeros(1, 32, 64 // s, 64 // s) for s in (4, 8, 16, 32, 64)]
    image = ImageList(torch.zeros(1, 3, 64, 64), [(64, 64)])
    trained = {}
    for beyond in (None, 0, 8, -1, 10**6):
        settings = {} if beyond is None else {"rpn_boundary_thresh": beyond}
        rpn = build_detector(**small, **settings).rpn
        anchors = rpn.anchor_generator(image, features)[0]
        labels = rpn._label_and_sample(anchors, boxes, image.image_sizes)[0]
        chosen = anchors[(labels == 1).any(dim=0)[0]]
        trained[beyond] = sorted((chosen[:, 2] - chosen[:, 0]).tolist())
    assert trained[None] == trained[0] and set(trained[0]) == {32.0}
    assert set(trained[8]) == {32.0, 64.0} and len(trained[-1]) > len(trained[8])
    assert trained[-1] == trained[10**6]
    with pytest.raises(InputError, match="rpn_boundary_thresh is -2; .* an integer, -1 or more"):
        build_detector(**small, rpn_boundary_thresh=-2)


def test_gradient_of_pooled_features():
    """The gradient must reach the level that an RoI was pooled from, and no other."""
    from oln_d2.standalone.models import RoIAlign

    torch.manual_seed(0)
    shapes = [(1, 2, 128 // 2**i, 128 // 2**i) for i in range(4)]
    levels = [torch.rand(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    small, large = [10.0, 20, 60, 70], [5.0, 5, 505, 500]
    pooled = RoIAlign(2)(levels, [torch.tensor([small, large, small])])
    grads = torch.autograd.grad((pooled * torch.arange(3)[:, None, None, None]).sum(), levels)
    # Each value of an RoI is an average, of weights that sum up to 1: 0 + 2 times 2 x 2 x 2 values
    # of the small one, 1 time those of the large one.
    assert [grad.sum().item() for grad in grads] == pytest.approx([16, 0, 0, 8])


def test_points_of_a_bin():
    """With one a bin, a feature is what stands at its centre; 0 averages over all of it."""
    features = [torch.arange(64.0).square().expand(1, 1, 64, 64)]
    boxes = [torch.tensor([[0.0, 0, 84, 84]])]  # three cells a bin
    small = {"depth": 10, "norm": "GN", "fpn_channels": 32, "representation_size": 32}
    one, every = (
        build_detector(**small, box_sampling_ratio=number).roi_heads.box_roi_pool(features, boxes)
        for number in (1, 0)
    )
    centres = torch.arange(1, 21, 3.0)  # pixel centres are at halves
    close(one[0, 0, 0], centres**2)
    close(every[0, 0, 0], centres**2 + 2 / 3)
    for wrong in (-1, 1.5):
        with pytest.raises(InputError, match=f"box_sampling_ratio is {wrong}; .* an integer"):
            build_detector(**small, box_sampling_ratio=wrong)
    with pytest.raises(InputError, match="box_sampling_ratio is None; leave it out"):
        build_detector(**small, box_sampling_ratio=None)


def test_first_stage_at_some_locations():
    """Training computes the losses of the few sampled anchors alone: nothing else may be learnt."""
    torch.manual_seed(0)
    head = StandaloneRPNHead(8, 1, 4.0)
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    sizes = (6, 9), (3, 5), (2, 3)
    features = [torch.randn(2, 8, *size, requires_grad=True) for size in sizes]
    logits, ltrb = head(features)
    everywhere = (
        torch.cat([level.flatten(1) for level in logits], dim=1),
        torch.cat([level.flatten(2).transpose(1, 2) for level in ltrb], dim=1),
    )
    # In any order; corners and borders of all levels.
    image, anchor = torch.ones(2, 75).nonzero()[torch.randperm(150)[:90]].T
    learning = [*head.parameters(), *features]
    gradients = []
    for found in ([x[image, anchor] for x in everywhere], head.at(features, image, anchor)):
        scores, distances = found[0].flatten(), found[1]
        gradients.append([scores, distances])
        loss = (scores * torch.arange(90)).sum() + (distances**2).sum()
        gradients[-1] += torch.autograd.grad(loss, learning)
    for dense, sparse in zip(*gradients):
        torch.testing.assert_close(sparse, dense, rtol=1e-4, atol=1e-3)


def test_no_proposals():
    """Predictions that are all without area, or not finite, must not break inference."""
    model = standalone_model(min_size=64, max_size=64)
    for value in (0.0, float("nan")):
        torch.nn.init.constant_(model.rpn.head.bbox_pred.weight, 0)
        torch.nn.init.constant_(model.rpn.head.bbox_pred.bias, value)
        (found,) = model([torch.rand(3, 50, 60)])
        assert found["boxes"].shape == (0, 4) and found["scores"].shape == (0,)
        model.train()
        if value == 0:
            losses = model([torch.rand(3, 50, 60)], [{"boxes": torch.zeros(0, 4)}])
            sum(losses.values()).backward()
        else:
            with pytest.raises(FloatingPointError, match="learning rate"):
                model([torch.rand(3, 50, 60)], [{"boxes": torch.zeros(0, 4)}])
        model.eval()


@pytest.mark.parametrize(
    "image, message",
    [
        (torch.zeros(3, 20, 20, dtype=torch.uint8), "has to be float"),
        (torch.zeros(1, 20, 20), r"\(3, H, W\)"),
        (torch.full((3, 20, 20), 128.0), "divide 8 bit images by 255"),
        (torch.full((3, 20, 20), float("nan")), "outside"),
        (torch.zeros(3, 0, 20), "empty"),
    ],
)
def test_bad_images(image, message):
    """An image in another range or layout must not silently give nonsense."""
    with pytest.raises(InputError, match=message):
        standalone_model()([image])


@pytest.mark.parametrize(
    "config, message",
    [
        ({"depth": 42}, "depth is 42; it has to be one of 10, 18"),
        ({"norm": "SyncBN"}, "norm is SyncBN; .*FrozenBN, BN, GN"),
        ({"fpn_norm": "BN"}, "fpn_norm is BN; it has to be one of GN"),
        ({"fpn_norm": "GN", "fpn_channels": 40}, "fpn_channels is 40; .*multiple of 32"),
        ({"pixel_std": (1.0, 0.0, 1.0)}, "pixel_std .*above 0"),
        ({"depth": 10, "weights_backbone": "DEFAULT"}, "no pretrained weights for depth 10"),
        ({"architecture": "yolo"}, "oln_box, oln_mask, faster_rcnn"),
        ({"anchor_sizes": [32]}, "P2..P5"),
        ({"scores": ["objectnes"]}, "scores is .*one or more of objectness, box_score"),
        ({"scores": []}, "scores is .*one or more of objectness, box_score"),
    ],
)
def test_bad_settings(config, message):
    """A misspelt setting must be reported with what is possible."""
    with pytest.raises(InputError, match=message):
        build_detector(**config)


def test_pretrained_weights_out_of_reach(monkeypatch, tmp_path):
    """On a machine without network the user must be told what to do."""
    from urllib.error import URLError

    def fail(*args, **kwargs):
        raise URLError("no route to host")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub.urlopen", fail)
    with pytest.raises(InputError, match="no route to host.*from scratch"):
        oln_box_resnet18_fpn()


def test_checkpoints_that_do_not_fit(tmp_path):
    """The user must be told which file, what differs and what to do; the model stays as it was."""
    path = str(tmp_path / "model.pth")
    save_checkpoint(standalone_model(), path)
    for other, message in (
        (standalone_model(50), "stem|res2.0.conv1.weight has shape"),
        (
            standalone_model(18, "GN"),
            r"res2.0.conv1.norm.running_mean is not in this model|is missing",
        ),
        (
            build_detector("faster_rcnn", depth=18, **SMALL),
            "box_predictor.cls_score.weight is missing",
        ),
    ):
        before = copy.deepcopy(other.state_dict())
        with pytest.raises(
            InputError, match=f"model.pth: the checkpoint of another model: .*({message})"
        ):
            load_checkpoint(other, path)
        assert all(torch.equal(before[k], v) for k, v in other.state_dict().items())


class Code:
    """Pickled, it would call `print`."""

    def __reduce__(self):
        return print, ("executed",)


def test_files_that_are_no_checkpoints(tmp_path, capsys):
    """Nothing in a downloaded file may be executed, and each kind of bad file must be named."""
    model = standalone_model()
    for name, content, message in (
        ("code.pth", {"model": Code()}, "not executed"),
        ("list.pth", [1, 2], "holds a list"),
        ("empty.pth", {}, "holds no tensors"),
    ):
        torch.save(content, tmp_path / name)
        with pytest.raises(InputError, match=f"{name}: .*{message}"):
            load_checkpoint(model, str(tmp_path / name))
    (tmp_path / "text.pth").write_text("not a checkpoint")
    (tmp_path / "half.pth").write_bytes((tmp_path / "code.pth").read_bytes()[:100])
    for name in ("text.pth", "half.pth", "gone.pth"):
        with pytest.raises(InputError, match=name):
            load_checkpoint(model, str(tmp_path / name))
    assert "executed" not in capsys.readouterr().out


def test_load_detector_builds_the_model(tmp_path):
    """A checkpoint of the standalone training must need no further settings; others must say so."""
    path = str(tmp_path / "model.pth")
    model = standalone_model(
        min_size=64, max_size=100, anchor_sizes=(16, 32, 64, 128), ltrb_init=0.5
    )
    save_checkpoint(model, path)
    loaded = load_detector(path)
    image = [torch.rand(3, 60, 90)]
    (actual,), (expected,) = loaded(image), model(image)
    assert torch.equal(actual["boxes"], expected["boxes"]) and len(actual["boxes"]) > 0
    torch.save({"model": model.state_dict()}, path)
    with pytest.raises(InputError, match="oln_box_resnet50_fpn"):
        load_detector(path)


@pytest.mark.parametrize("architecture", ["oln_box", "oln_mask", "faster_rcnn"])
def test_settings_are_in_the_checkpoint(architecture, tmp_path):
    """
    A checkpoint must hold every setting, so that it stays the same model when a default changes;
    one from before, which holds those that were given, must still load.
    """
    given = {"depth": 10, "norm": "GN", "fpn_channels": 32, "representation_size": 32}
    model = build_detector(architecture, **given)
    assert model.config == build_detector(**model.config).config
    assert {"min_size", "max_size", "box_nms_thresh", "box_detections_per_img"} <= set(model.config)
    path = str(tmp_path / "model.pth")
    save_checkpoint(model, path)
    content = torch.load(path, weights_only=True)
    assert content["config"] == model.config
    torch.save({**content, "config": {"architecture": architecture, **given}}, path)
    assert load_detector(path).config == model.config


@pytest.mark.parametrize("architecture", ["oln_box", "oln_mask", "faster_rcnn"])
def test_images_that_are_resized_already(architecture):
    """Who resizes images while loading them must get the boxes and masks of the images."""
    if architecture == "oln_box":
        model = standalone_model(min_size=96, max_size=128)
    else:
        torch.manual_seed(0)
        model = build_detector(
            architecture,
            depth=10,
            norm="GN",
            fpn_channels=32,
            representation_size=32,
            min_size=96,
            max_size=128,
            box_detections_per_img=20,
        ).eval()
        torch.nn.init.constant_(model.rpn.head.bbox_pred.bias, 0.5)
    images = [torch.randint(0, 256, (3, *size)) / 255 for size in [(90, 120), (96, 100), (50, 90)]]
    pixels = [model.transform.resized_pixels(image).to(torch.uint8) for image in images]
    with torch.no_grad():
        expected = model(images)
    actual = detect(model, pixels, [tuple(image.shape[-2:]) for image in images])
    for a, b in zip(actual, expected):
        assert set(a) == set(b) and len(a["boxes"]) > 0
        for name in a:
            assert (np.asarray(a[name]) == np.asarray(b[name])).all()


def test_class_names_are_unique():
    """Two classes of a name, or that differ by case only, would be taken for one another."""
    lines = [line for path in (ROOT / "oln_d2").rglob("*.py") for line in path.open()]
    names = [match[1].lower() for match in map(re.compile(r"class (\w+)").match, lines) if match]
    assert len(names) > 40 and len(set(names)) == len(names)


def test_builders_have_the_papers_settings():
    """
    `oln_box_resnet50_fpn()` must be the paper's model: frozen stem, 1500 detections, no RPN NMS.
    """
    model = oln_box_resnet50_fpn(weights_backbone=None, trainable_backbone_layers=3)
    frozen = {name.split(".")[2] for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {"conv1", "layer1"}
    assert model.rpn.nms_thresh is None and model.roi_heads.detections_per_img == 1500
    assert [size for (size,) in model.rpn.anchor_generator.sizes] == [32, 64, 128, 256, 512]
    assert (model.transform.min_size, model.transform.max_size) == ((800,), 1333)
    assert all(p.requires_grad for p in oln_box_resnet18_fpn(weights_backbone=None).parameters())


def test_detectron2_is_not_imported(tmp_path):
    """
    The runtime must work on machines without Detectron2, and where it is there must not need it.
    """
    code = """
import sys
sys.modules["detectron2"] = None  # as if it were not installed
import oln_d2.quickstart, oln_d2.standalone
assert not [name for name in sys.modules if name.startswith("detectron2.")]
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
