"""Every shipped recipe of Detectron2."""

import pytest
from conftest import CONFIGS, NEEDS_DETECTRON2

from oln_d2 import model_zoo

pytestmark = NEEDS_DETECTRON2
RECIPES = sorted(
    str(path.relative_to(CONFIGS))
    for path in CONFIGS.rglob("*.yaml")
    if not path.name.startswith("Base-") and "standalone" not in path.parts
)
# Those in datasets/ are OLN-Box again.
MODELS = [recipe for recipe in RECIPES if not recipe.startswith("datasets/")]


def load_config(recipe):
    """A recipe as a config, on the CPU and without downloaded weights."""
    cfg = model_zoo.get_config(recipe)
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.WEIGHTS = ""
    return cfg


def one_image(height=256, width=320):
    """A training input of one image with one object."""
    import torch
    from detectron2.structures import Boxes, Instances, PolygonMasks

    instances = Instances((height, width))
    instances.gt_boxes = Boxes(torch.tensor([[40.0, 50.0, 170.0, 190.0]]))
    instances.gt_masks = PolygonMasks([[[40.0, 50.0, 170.0, 60.0, 100.0, 190.0]]])
    instances.gt_classes = torch.tensor([0])
    generator = torch.Generator().manual_seed(height * width)
    image = torch.randint(0, 256, (3, height, width), generator=generator).float()
    return {"image": image, "instances": instances}


@pytest.mark.parametrize("recipe", MODELS)
def test_recipe_builds_trains_and_proposes(recipe):
    """A recipe with a misspelt key, or a model that cannot take a step, would reach users."""
    import torch
    from detectron2.modeling import build_model
    from detectron2.structures import Boxes, Instances
    from detectron2.utils.events import EventStorage

    cfg = load_config(recipe)
    if "ablations" in recipe:  # quicker, and shows that Base-R18-GN makes any recipe small
        cfg.merge_from_file(str(CONFIGS / "cpu" / "Base-R18-GN.yaml"))
    cfg.TEST.DETECTIONS_PER_IMAGE = 100  # not 1500 masks
    model = build_model(cfg)
    inputs = one_image()
    if cfg.MODEL.LOAD_PROPOSALS:
        boxes = Boxes(torch.tensor([[30.0, 40.0, 160.0, 190.0], [200.0, 20.0, 240.0, 90.0]]))
        proposals = Instances((256, 320), proposal_boxes=boxes, objectness_logits=torch.ones(2))
        inputs["proposals"] = proposals
    with EventStorage():
        losses = model([inputs])
    assert losses and all(name.startswith("loss_") for name in losses)
    assert all(loss.isfinite() for loss in losses.values())
    sum(losses.values()).backward()
    without = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not without
    model.eval()
    with torch.no_grad():
        del inputs["instances"]
        (output,) = model([{**inputs, "height": 128, "width": 160}])
    if cfg.MODEL.META_ARCHITECTURE == "ProposalNetwork":
        assert len(output["proposals"]) <= 1500
    else:
        assert output["instances"].has("pred_masks") == cfg.MODEL.MASK_ON
        assert output["instances"].image_size == (128, 160)


@pytest.mark.parametrize(
    "recipe", [r for r in MODELS if "oln" in r and "R_50" in r and "public" not in r]
)
def test_no_image_of_the_batch_has_objects(recipe):
    """Without losses and gradients for every parameter, training on many GPUs would hang."""
    from detectron2.modeling import build_model
    from detectron2.utils.events import EventStorage

    model = build_model(load_config(recipe))
    batch = [one_image(200, 240), one_image(180, 250)]
    for inputs in batch:
        inputs["instances"] = inputs["instances"][:0]
    with EventStorage():
        losses = model(batch)
    sum(losses.values()).backward()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained.values())
    assert losses["loss_rpn_obj"] > 0 and losses["loss_rpn_loc"] == 0  # negatives still teach


def test_autocast():
    """Under AMP, losses, boxes and scores must be those of float32 but for rounding."""
    import torch
    from detectron2.modeling import build_model
    from detectron2.utils.events import EventStorage

    torch.manual_seed(0)
    model = build_model(load_config("cpu/oln_box_R_18_FPN_GN.yaml"))
    inputs = one_image()
    losses, outputs = [], []
    for enabled in (False, True):
        model.train()
        torch.manual_seed(0)
        with EventStorage(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            losses.append(model([inputs]))
        model.eval()
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            outputs.append(model([{"image": inputs["image"]}])[0]["instances"])
    for name, loss in losses[0].items():
        assert losses[1][name].item() == pytest.approx(loss.item(), rel=0.05, abs=2e-3)
    sum(losses[1].values()).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    best = [output[:5] for output in outputs]
    torch.testing.assert_close(best[1].scores, best[0].scores, rtol=0.02, atol=0)


@pytest.mark.parametrize("recipe", [r for r in MODELS if "fast_rcnn_" not in r])
def test_default_predictor(recipe):
    """Detectron2's users propose on one image with `DefaultPredictor(cfg)(image)`."""
    import numpy as np
    from detectron2.engine import DefaultPredictor

    cfg = load_config(recipe)
    if not recipe.startswith(("cpu/", "photographs/", "small/")):  # quicker
        cfg.merge_from_file(str(CONFIGS / "cpu" / "Base-R18-GN.yaml"))
    cfg.merge_from_list(["INPUT.MIN_SIZE_TEST", 64, "TEST.DETECTIONS_PER_IMAGE", 20])
    cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = 0.0  # what is untrained is sure of nothing
    image = np.random.RandomState(0).randint(0, 256, (90, 120, 3), dtype=np.uint8)
    output = DefaultPredictor(cfg)(image)
    name = "proposals" if cfg.MODEL.META_ARCHITECTURE == "ProposalNetwork" else "instances"
    assert output[name].image_size == (90, 120) and len(output[name]) > 0


@pytest.mark.parametrize(
    "recipe", [r for r in MODELS if r.startswith("photographs/") and "fast_" not in r]
)
def test_references_train_in_bfloat16(recipe):
    """The recipes that are compared train with the same precision."""
    import torch
    from detectron2.modeling import build_model
    from detectron2.utils.events import EventStorage

    cfg = load_config(recipe)
    assert cfg.SOLVER.AMP.DTYPE == "bfloat16"
    with EventStorage(), torch.autocast("cpu", dtype=torch.bfloat16):
        losses = build_model(cfg)([one_image()])
    sum(losses.values()).backward()
    assert all(loss.isfinite() for loss in losses.values())


def test_batch_does_not_change_detections():
    """A user must get the same boxes for an image alone and in a batch of images of its size."""
    import torch
    from detectron2.modeling import build_model

    torch.manual_seed(0)
    model = build_model(load_config("cpu/oln_box_R_18_FPN_GN.yaml")).eval()
    inputs = [{"image": one_image(192, 256)["image"]} for _ in range(2)]
    with torch.no_grad():
        together = [output["instances"] for output in model(inputs)]
        alone = [model([x])[0]["instances"] for x in inputs]
    for a, b in zip(together, alone):
        assert len(a) == len(b) > 100
        torch.testing.assert_close(a.scores, b.scores, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(
            a.pred_boxes.tensor[0], b.pred_boxes.tensor[0], rtol=0, atol=0.01
        )


def test_published_schedule():
    """The R-50 recipe must be 8 epochs of about 95,280 images with steps after 6 and 7."""
    cfg = load_config("oln_box_R_50_FPN.yaml")
    epoch = 95280 / cfg.SOLVER.IMS_PER_BATCH
    assert [round(x / epoch, 3) for x in (*cfg.SOLVER.STEPS, cfg.SOLVER.MAX_ITER)] == [6, 7, 8]
    assert (cfg.SOLVER.BASE_LR, cfg.SOLVER.MOMENTUM, cfg.SOLVER.WEIGHT_DECAY) == (0.02, 0.9, 1e-4)
    assert (cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TRAIN) == ((800,), 1333)
    assert cfg.TEST.DETECTIONS_PER_IMAGE == 1500 and cfg.MODEL.ROI_HEADS.NMS_THRESH_TEST == 0.7


def test_recipes_of_other_data():
    """A misspelt data set would be found after hours; another model could not be compared."""
    from detectron2.data import DatasetCatalog

    oln = load_config("oln_box_R_50_FPN.yaml")
    recipes = {recipe: load_config(recipe) for recipe in RECIPES if recipe not in MODELS}
    for recipe, cfg in recipes.items():
        assert cfg.MODEL == oln.MODEL and cfg.INPUT == oln.INPUT
        assert {*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST} <= {*DatasetCatalog.list()}
        assert (cfg.DATASETS.TRAIN, cfg.DATASETS.TEST) != (oln.DATASETS.TRAIN, oln.DATASETS.TEST)
        if "_to_" in recipe:  # its weights are those of coco_all.yaml
            assert cfg.SOLVER == recipes["datasets/coco_all.yaml"].SOLVER
            assert cfg.DATASETS.TRAIN == recipes["datasets/coco_all.yaml"].DATASETS.TRAIN
    for recipe, images in ("coco_person", 64115), ("coco_all", 117266):
        solver = recipes[f"datasets/{recipe}.yaml"].SOLVER
        epoch = images / solver.IMS_PER_BATCH
        assert [round(x / epoch, 3) for x in (*solver.STEPS, solver.MAX_ITER)] == [6, 7, 8]
    for (
        cfg
    ) in recipes.values():  # an evaluation just before the last one would take hours for nothing
        period = cfg.TEST.EVAL_PERIOD
        assert (cfg.SOLVER.MAX_ITER - 1) % period > 0.1 * period


def test_references_differ_from_oln_only_in_the_method():
    """A comparison with other data, schedule, image size or box count would not be one."""
    oln = load_config("oln_box_R_50_FPN.yaml")
    for recipe in RECIPES:
        if recipe.startswith("faster_rcnn") and "R_50" in recipe:
            reference = load_config(recipe)
            for section in ("DATASETS", "SOLVER", "INPUT", "TEST"):
                assert reference[section] == oln[section]
            assert reference.MODEL.BACKBONE == oln.MODEL.BACKBONE
            assert reference.MODEL.ROI_HEADS.NMS_THRESH_TEST == oln.MODEL.ROI_HEADS.NMS_THRESH_TEST


def test_detectron2_keys_are_left_alone():
    """`add_oln_config` in another project must not change that project's defaults."""
    from detectron2.config import get_cfg

    from oln_d2 import add_oln_config

    cfg, stock = get_cfg(), get_cfg()
    add_oln_config(cfg)
    cfg.MODEL.OLN.LTRB_INIT = 0.25
    add_oln_config(cfg)  # by another part of the project; keeps what was set
    assert cfg.MODEL.OLN.LTRB_INIT == 0.25
    stock, with_ours = model_zoo.flatten(stock), model_zoo.flatten(cfg)
    assert {key: with_ours[key] for key in stock} == stock


@pytest.mark.parametrize("anchors", [1, 3])
def test_other_backbones_and_anchors(anchors):
    """Authors of other projects plug the components into backbones without a feature pyramid."""
    import torch
    from detectron2.modeling import build_model
    from detectron2.utils.events import EventStorage

    cfg = load_config("cpu/oln_box_R_18_FPN_GN.yaml")
    cfg.merge_from_list(
        ["MODEL.BACKBONE.NAME", "build_resnet_backbone", "MODEL.RESNETS.OUT_FEATURES", ["res4"]]
        + ["MODEL.RPN.IN_FEATURES", ["res4"], "MODEL.ROI_HEADS.IN_FEATURES", ["res4"]]
        + ["MODEL.ANCHOR_GENERATOR.SIZES", [[64]]]
        + ["MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS", [[0.5, 1.0, 2.0][:anchors]]]
        + ["MODEL.ROI_HEADS.NUM_CLASSES", 80]
    )
    model = build_model(cfg)
    batch = [one_image(160, 192), one_image(200, 256), one_image(180, 200)]
    batch[0]["instances"].gt_classes[:] = 79
    batch[1]["instances"] = batch[1]["instances"][:0]
    with EventStorage():
        losses = model(batch)
    sum(losses.values()).backward()
    assert losses["loss_box_score"] > 0
    model.eval()
    with torch.no_grad():
        outputs = model([{"image": x["image"]} for x in batch])
    assert all((output["instances"].pred_classes == 0).all() for output in outputs)
