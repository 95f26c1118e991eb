"""Backbones of timm, in both runtimes."""

import sys

import pytest
import torch
from conftest import NEEDS_DETECTRON2, close
from test_standalone import GT, image_file, match, standalone_model  # noqa: F401

from oln_d2.checks import InputError
from oln_d2.cli import main
from oln_d2.standalone import build_detector, load_detector, save_checkpoint
from oln_d2.standalone.data import read_image
from oln_d2.standalone.timm_features import TimmFeatures

LITE = "tf_efficientnet_lite0"
# Of batch norms that are frozen, of none, and of batch norms that learn.
MODELS = [(LITE, "FrozenBN", "GN"), ("convnext_atto", "FrozenBN", None), (LITE, "BN", None)]


@pytest.fixture(scope="module", params=MODELS, ids=lambda model: "-".join(map(str, model)))
def both(request, tmp_path_factory):
    """The two runtimes with the same weights and settings, which went through files."""
    from detectron2.modeling import build_model
    from test_configs import load_config

    from oln_d2.engine.trainer import StrictCheckpointer
    from oln_d2.model_zoo.translate import detector_config

    (name, norm, fpn_norm), folder = request.param, tmp_path_factory.mktemp("both")
    cfg = load_config("cpu/oln_box_lite0_FPN.yaml")
    cfg.merge_from_list(
        ["MODEL.OLN.TIMM.NAME", name, "MODEL.OLN.TIMM.NORM", norm, "MODEL.FPN.NORM", fpn_norm or ""]
        + ["MODEL.CHANNELS_LAST", True, "MODEL.FPN.IN_FEATURES", []]  # a run may have had them
        + ["MODEL.FPN.OUT_CHANNELS", 32, "MODEL.ROI_BOX_HEAD.FC_DIM", 64]
        + ["INPUT.MIN_SIZE_TEST", 224, "INPUT.MAX_SIZE_TEST", 320]
        + (["MODEL.OLN.SCORES", ["objectness"]] if norm == "BN" else [])
    )
    (folder / "config.yaml").write_text(cfg.dump())
    config = detector_config(folder / "config.yaml")
    weights = standalone_model(50, norm, backbone=name, fpn_norm=fpn_norm)
    save_checkpoint(weights, folder / "weights.pth")
    theirs = build_model(cfg).eval()
    StrictCheckpointer(theirs).load(str(folder / "weights.pth"))
    torch.save({"model": theirs.state_dict()}, folder / "d2.pth")
    return load_detector(folder / "d2.pth", config), theirs, cfg


@NEEDS_DETECTRON2
def test_detections_agree(both, image_file):  # noqa: F811
    """One checkpoint and its config must find the same in both runtimes."""
    from detectron2.data import transforms as T
    from detectron2.data.detection_utils import read_image as detectron2_read_image

    ours, theirs, cfg = both
    assert [*ours.transform.image_mean] == cfg.MODEL.PIXEL_MEAN == [127.5] * 3
    image = detectron2_read_image(image_file, "RGB")
    height, width = image.shape[:2]
    resize = T.ResizeShortestEdge(cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST)
    image = torch.from_numpy(
        resize.get_transform(image).apply_image(image).transpose(2, 0, 1).copy()
    )
    with torch.no_grad():
        (actual,) = ours([read_image(image_file)])
        (expected,) = theirs([{"image": image, "height": height, "width": width}])
    expected = expected["instances"]
    assert len(expected) > 200 and expected.scores.max() - expected.scores.min() > 0.05
    match(actual, expected.pred_boxes.tensor, expected.scores, max(width, height))


@NEEDS_DETECTRON2
def test_training_agrees(both):
    """The same parameters must learn, by the same gradients, frozen stages and norms included."""
    from detectron2.structures import Boxes, Instances
    from detectron2.utils.events import EventStorage

    from oln_d2.standalone.names import detectron2_name

    ours, theirs, cfg = both
    training = {"box_batch_size_per_image": 128, "rpn_pre_nms_top_n_train": 500}
    training["trainable_backbone_layers"] = 3
    trained = build_detector(**{**ours.config, **training}).train()
    trained.load_state_dict(ours.state_dict())
    pixels = torch.randint(0, 256, (3, 224, 288), generator=torch.Generator().manual_seed(0))
    torch.manual_seed(7)
    losses = trained([pixels / 255], [{"boxes": GT[0]}])
    gt = Instances((224, 288), gt_boxes=Boxes(GT[0]), gt_classes=torch.zeros(3).long())
    torch.manual_seed(7)
    with EventStorage():
        expected = theirs.train()([{"image": pixels.to(torch.uint8), "instances": gt}])
    theirs.eval()
    for name in expected:
        close(losses[name].detach(), expected[name].detach(), rtol=1e-4)
    sum(losses.values()).backward(), sum(expected.values()).backward()
    parameters = dict(theirs.named_parameters())
    for name, parameter in trained.named_parameters():
        grad = parameters[detectron2_name(name)].grad
        assert (parameter.grad is None) == (grad is None) == (not parameter.requires_grad), name
        if grad is not None:
            close(parameter.grad, grad, rtol=1e-2, atol=1e-3 * grad.abs().max().item() + 1e-7)


@pytest.mark.parametrize(
    "norm, layers, frozen",
    [("FrozenBN", 5, set()), ("BN", 5, set()), ("BN", 4, {"conv_stem", "bn1", "blocks.0"})]
    + [("FrozenBN", 2, {"conv_stem", "blocks.0", "blocks.1", "blocks.2"})],
)
def test_what_is_frozen(norm, layers, frozen):
    """Neither weights nor statistics of what is frozen may move, nor may the rest stand still."""
    settings = {"backbone": LITE, "norm": norm, "trainable_backbone_layers": layers}
    model = build_detector(**settings, fpn_channels=32, representation_size=32).train()
    body = model.backbone.body.timm
    before = {name: tensor.clone() for name, tensor in body.state_dict().items()}
    features = model.backbone(torch.rand(2, 3, 64, 64))
    sum(level.mean() for level in features.values()).backward()
    torch.optim.SGD([p for p in model.parameters() if p.grad is not None], 1.0).step()
    for name, tensor in body.state_dict().items():
        is_norm = ".bn" in name or name.startswith("bn")
        still = (is_norm and norm == "FrozenBN") or any(name.startswith(f"{s}.") for s in frozen)
        assert torch.equal(before[name], tensor) == still, name


def test_pretrained_weights(tmp_path):
    """
    ImageNet weights must come from a file under timm's names or, in the same order, others, and
    those of another model be refused; random ones in their place would spoil a training.
    """
    import timm

    torch.manual_seed(0)
    classifier = timm.create_model(LITE)
    theirs = classifier.state_dict()
    counters = [name for name in theirs if name.endswith("num_batches_tracked")]
    others = {f"layer {i}": theirs[n] for i, n in enumerate(theirs) if n not in counters}
    head = {"classifier.weight": torch.zeros(7, 1280), "classifier.bias": torch.zeros(7)}
    for content in (theirs, others, {**theirs, **head}):
        torch.save(content, tmp_path / "lite0.pth")
        model = build_detector(backbone=LITE, weights_backbone=tmp_path / "lite0.pth")
        ours = model.backbone.body.timm.state_dict()
        assert all(torch.equal(theirs[name], tensor) for name, tensor in ours.items())
    others.pop("layer 8")
    for content in (others, {**theirs, "conv_stem.weight": torch.zeros(8, 3, 3, 3)}):
        torch.save(content, tmp_path / "lite0.pth")
        with pytest.raises(InputError, match="lite0.pth: .*conv_stem.weight is missing or not"):
            TimmFeatures(LITE, weights=tmp_path / "lite0.pth")
    assert model.config["pixel_mean"] == model.config["pixel_std"] == (127.5, 127.5, 127.5)
    assert build_detector(depth=10).config["pixel_mean"] == (123.675, 116.28, 103.53)


def test_pretrained_weights_of_a_resnet(tmp_path):
    """A file must do for a ResNet as well, and a name that is neither be called a missing file."""
    from torchvision.models import resnet18

    theirs, file = resnet18(num_classes=3).state_dict(), tmp_path / "r18.pth"
    torch.save(theirs, file)
    body = build_detector(depth=18, weights_backbone=file).backbone.body
    assert all(torch.equal(theirs[name], tensor) for name, tensor in body.state_dict().items())
    with pytest.raises(InputError, match="r18.pth: .* torchvision's resnet50: layer1"):
        build_detector(depth=50, weights_backbone=file)
    with pytest.raises(InputError, match="IMAGENET1K_V9: no such file"):
        build_detector(depth=50, weights_backbone="IMAGENET1K_V9")


def test_pretrained_weights_out_of_reach(monkeypatch, tmp_path):
    """Without network the user must be told what to do."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(InputError, match="cannot be fetched .*give a file"):
        build_detector(backbone=LITE, weights_backbone="DEFAULT")


@NEEDS_DETECTRON2
def test_pretrained_weights_for_detectron2(tmp_path, capsys):
    """What `convert --backbone` writes must be weights to start a training of the recipe from."""
    import timm
    from detectron2.modeling import build_model
    from test_configs import load_config

    from oln_d2.engine.trainer import SafeCheckpointer

    classifier = timm.create_model(LITE)
    torch.save(classifier.state_dict(), tmp_path / "lite0.pth")
    target = str(tmp_path / "lite0_d2.safetensors")
    assert main(["convert", str(tmp_path / "lite0.pth"), target, "--backbone", LITE]) == 0
    assert "build_timm_fpn_backbone" in capsys.readouterr().out
    model = build_model(load_config("cpu/oln_box_lite0_FPN.yaml"))
    SafeCheckpointer(model).load(target)
    theirs, ours = classifier.state_dict(), model.backbone.bottom_up.timm.state_dict()
    assert all(torch.equal(theirs[name], tensor) for name, tensor in ours.items())


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"backbone": "efficientnet_lit0"}, "no model of timm; near it: .*efficientnet_lite0"),
        ({"backbone": "vit_tiny_patch16_224"}, "strides 4, 8, 16 and 32 .its strides are 16"),
        ({"backbone": "swin_tiny_patch4_window7_224"}, "Input height"),
        ({"backbone": LITE, "norm": "GN"}, "norm is GN; it has to be one of FrozenBN, BN"),
    ],
)
def test_backbones_that_cannot_be(settings, message):
    """A name that is misspelt or of a model without a pyramid must be refused with what can be."""
    with pytest.raises(InputError, match=message) as error:
        build_detector(**settings)
    assert len(str(error.value)) < 300


def test_without_timm(monkeypatch):
    """Who lacks the extra must be given its name, and needs it for these backbones only."""
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ImportError, match=rf"backbone {LITE} needs timm.*\[timm\]"):
        build_detector(backbone=LITE)
    build_detector(depth=10)


def test_features_are_those_of_timm():
    """Weights trained in timm would see shifted pixels if a stage were padded in another way."""
    import timm

    body = TimmFeatures(LITE).eval()
    theirs = timm.create_model(LITE, features_only=True).eval()
    theirs.load_state_dict(body.timm.state_dict())
    for size in ((32, 32), (64, 96), (160, 224)):
        image = torch.rand(1, 3, *size)
        with torch.no_grad():
            expected = [theirs(image)[i] for i in body.indices]
            assert all(map(torch.equal, body(image).values(), expected))


def test_export(tmp_path):
    """An exported model must find what the checkpoint finds, in images of any size."""
    from oln_d2.standalone.export import OnnxDetector, export

    sizes = {"min_size": 96, "max_size": 160}
    model = standalone_model(50, backbone=LITE, **sizes)
    save_checkpoint(model, tmp_path / "model.safetensors")
    export(tmp_path / "model.safetensors", tmp_path / "model.onnx")
    image = torch.randint(0, 256, (3, 130, 77)) / 255
    (expected,) = model([image])
    (actual,) = OnnxDetector(tmp_path / "model.onnx")([image])
    match(actual, expected["boxes"], expected["scores"], 130)


def test_depthwise_convolutions_on_a_cpu():
    """In bfloat16 they would take three times as long there as all others gain."""
    found = {}
    net = TimmFeatures(LITE)
    for module in net.modules():
        if isinstance(module, torch.nn.Conv2d):
            kinds = found.setdefault(module.groups > 1, set())
            module.register_forward_hook(lambda _, x, y, kinds=kinds: kinds.add(y.dtype))
    image = torch.rand(1, 3, 64, 64)
    with torch.autocast("cpu", torch.bfloat16):
        net(image)
    assert found == {True: {torch.float32}, False: {torch.bfloat16}}
    found[True].clear(), found[False].clear()
    net.bfloat16()(image.bfloat16())
    assert found == {True: {torch.bfloat16}, False: {torch.bfloat16}}
