"""Converting the authors' checkpoints. Values end to end: test_end_to_end, test_standalone."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import NEEDS_DETECTRON2, ROOT
from test_end_to_end import public_state_dict, seeded_weights

from oln_d2.checks import InputError
from oln_d2.standalone import build_detector, load_checkpoint, load_detector
from oln_d2.standalone.checkpoint import read_checkpoint
from oln_d2.standalone.convert import convert_checkpoint
from oln_d2.standalone.names import public_name


@pytest.fixture(scope="module")
def public():
    return public_state_dict()


@NEEDS_DETECTRON2
def test_both_runtimes_agree_on_the_published_size(tmp_path):
    """A user of the published ResNet-50 must get the same boxes and scores from both runtimes."""
    from detectron2.modeling import build_model
    from test_configs import load_config
    from test_standalone import match

    from oln_d2.engine.trainer import StrictCheckpointer

    own = build_detector().state_dict()
    shapes = {public_name(name): tensor.shape for name, tensor in own.items()}
    arrays = seeded_weights().state(shapes, seed=5)
    theirs, path = str(tmp_path / "oln_box_public.pth"), str(tmp_path / "oln_box_d2.pth")
    torch.save({"state_dict": {n: torch.from_numpy(a) for n, a in arrays.items()}}, theirs)
    convert_checkpoint(theirs, path)

    pixels = torch.randint(
        0, 256, (3, 160, 192), generator=torch.Generator().manual_seed(0)
    ).float()
    standalone = load_detector(path)
    standalone.transform.min_size = (160,)
    cfg = load_config("oln_box_public_R_50_FPN.yaml")
    model = build_model(cfg).eval()
    StrictCheckpointer(model).load(path)
    with torch.no_grad():
        (found,) = standalone([pixels / 255])
        instances = model([{"image": pixels}])[0]["instances"]
    assert len(instances) == len(found["boxes"]) > 100
    assert instances.scores.max() - instances.scores.min() > 0.1
    match(found, instances.pred_boxes.tensor, instances.scores, 192)


@NEEDS_DETECTRON2
def test_recipe_of_the_published_weights():
    """Other settings than the authors' in inference would not reproduce their numbers."""
    from detectron2.modeling import build_model
    from test_configs import load_config

    cfg = load_config("oln_box_public_R_50_FPN.yaml")
    assert cfg == load_config("oln_box_R_50_FPN.yaml")  # both without weights
    assert cfg.INPUT.FORMAT == "RGB" and not cfg.MODEL.RESNETS.STRIDE_IN_1X1
    assert (cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST) == (800, 1333)
    assert cfg.MODEL.PIXEL_MEAN == [123.675, 116.28, 103.53]
    assert cfg.MODEL.PIXEL_STD == [58.395, 57.12, 57.375]
    assert cfg.MODEL.ANCHOR_GENERATOR.SIZES == [[32], [64], [128], [256], [512]]
    assert cfg.MODEL.ANCHOR_GENERATOR.OFFSET == 0 and not cfg.MODEL.OLN.RPN_NMS_TEST
    assert cfg.MODEL.RPN.PRE_NMS_TOPK_TEST == 2000 and cfg.MODEL.RPN.POST_NMS_TOPK_TEST == 10000
    assert cfg.MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS == (10.0, 10.0, 5.0, 5.0)
    assert (cfg.MODEL.ROI_BOX_HEAD.POOLER_TYPE, cfg.MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION) == (
        "ROIAlignV2",
        7,
    )
    assert (cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST, cfg.MODEL.ROI_HEADS.NMS_THRESH_TEST) == (0, 0.7)
    assert cfg.TEST.DETECTIONS_PER_IMAGE == 1500
    # The paper's two widths, which the converted file has.
    assert (cfg.MODEL.FPN.OUT_CHANNELS, cfg.MODEL.ROI_BOX_HEAD.FC_DIM) == (256, 1024)
    model = build_model(cfg)
    assert len(model.backbone.bottom_up.res4) == 6


@pytest.mark.parametrize("depth, blocks", [(34, 16), (101, 33)])
def test_other_depths(depth, blocks, tmp_path):
    """The depth must be inferred from the file, since nobody is asked for it."""
    own = build_detector(depth=depth, fpn_channels=8, representation_size=16).state_dict()
    theirs, path = str(tmp_path / "theirs.pth"), str(tmp_path / "ours.pth")
    torch.save({public_name(name): tensor for name, tensor in own.items()}, theirs)
    convert_checkpoint(theirs, path)
    model = load_detector(path)
    assert model.config == {
        **build_detector(depth=18).config,
        "depth": depth,
        "fpn_channels": 8,
        "representation_size": 16,
    }
    body = model.backbone.body
    assert sum(len(body[f"layer{i}"]) for i in range(1, 5)) == blocks


@pytest.mark.parametrize("zipped", [True, False])
def test_file_as_mmdet_writes_it(zipped, public, tmp_path):
    """The command must take a real file, of old PyTorch as well, and say what it did."""
    meta = {
        "config": "model = dict(type='FasterRCNN')",
        "CLASSES": ("person", "car"),
        "hook_msgs": {"best": None},
        "seed": np.int64(0),
    }
    optimizer = {"state": {0: {"momentum_buffer": torch.zeros(3)}}, "param_groups": [{"lr": 0.02}]}
    source, target = tmp_path / "public.pth", tmp_path / "ours.pth"
    torch.save(
        {"meta": meta, "state_dict": public, "optimizer": optimizer},
        source,
        _use_new_zipfile_serialization=zipped,
    )
    if zipped:
        command = [sys.executable, "-m", "oln_d2", "convert", str(source), str(target)]
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        assert "ResNet-18, FPN 32, fc 64" in result.stdout
        assert "rpn_head.rpn_cls.weight" in result.stdout and "20 counters" in result.stdout
        assert "oln-d2 propose" in result.stdout
    else:  # then numpy was old as well, and its scalars had another name
        source.write_bytes(source.read_bytes().replace(b"numpy._core", b"numpy.core"))
        convert_checkpoint(str(source), str(target))
    assert set(read_checkpoint(str(target))) == {"model", "config"}
    assert load_detector(str(target)).config["depth"] == 18
    for load in (load_detector, lambda path: load_checkpoint(build_detector(depth=18), path)):
        with pytest.raises(InputError, match="public.pth: .*oln_d2 convert"):
            load(str(source))


def without(name):
    return lambda state: state.pop(name)


def put(name, change):
    return lambda state: state.update({name: change(state.get(name))})


def only(*names):
    def change(state):
        state.clear()
        state.update({name: torch.zeros(2) for name in names})

    return change


@pytest.mark.parametrize(
    "change, message",
    [
        (
            without("rpn_head.rpn_obj.bias"),
            "rpn_head.rpn_obj.bias .*objectness_logits.bias.* is missing",
        ),
        (without("rpn_head.rpn_obj.weight"), "rpn_head.rpn_obj.weight .* is missing"),
        (
            without("neck.lateral_convs.0.conv.weight"),
            "neck.lateral_convs.0.conv.weight is missing",
        ),
        (
            put("roi_head.bbox_head.fc_reg.weight", lambda tensor: torch.zeros(320, 64)),
            r"fc_reg.weight has shape \[320, 64\]; .*bbox_pred.weight .* has \[4, 64\]",
        ),
        (put("rpn_head.rpn_reg.bias", lambda _: torch.zeros(12)), r"rpn_reg.bias has shape \[12\]"),
        (put("roi_head.mask_head.x", lambda _: torch.zeros(1)), "mask_head.x is no parameter"),
        (
            put("neck.fpn_convs.4.conv.bias", lambda _: torch.zeros(1)),
            "fpn_convs.4.conv.bias is no",
        ),
        (
            put("backbone.layer1.0.x", lambda _: torch.zeros(1)),
            "backbone.layer1.0.x is no parameter",
        ),
        (put("backbone.layer1.2.x", lambda _: torch.zeros(1)), r"\(3, 2, 2, 2\) basic blocks"),
        (put("rpn_head.rpn_reg.bias", lambda b: b * float("nan")), "rpn_reg.bias .* NaN"),
        (put("backbone.bn1.bias", lambda b: b / 0), "backbone.bn1.bias .* infinite"),
        (only("conv1.weight", "layer1.0.conv1.weight", "fc.weight"), "seems to be a ResNet alone"),
        (
            only(
                "backbone.conv1.weight",
                "rpn_head.rpn_cls.weight",
                "roi_head.bbox_head.fc_cls.weight",
            ),
            "seems to be a Faster R-CNN of mmdet",
        ),
        (only("backbone.body.conv1.weight"), "seems to be .* torchvision detector"),
        (
            only("backbone.bottom_up.stem.conv1.weight"),
            "seems to be another detector of Detectron2",
        ),
        (only("weight"), "holds no OLN-Box .*first name is weight"),
    ],
)
def test_files_that_do_not_fit(change, message, public, tmp_path):
    """A model with parts of its weights missing or mixed up would find rubbish without a word."""
    state = dict(public)
    change(state)
    source, target = str(tmp_path / "public.pth"), tmp_path / "ours.pth"
    torch.save({"meta": {}, "state_dict": state}, source)
    with pytest.raises(InputError, match=f"public.pth: .*{message}"):
        convert_checkpoint(source, str(target))
    assert not target.exists()


def test_output_that_cannot_be(public, tmp_path):
    """The downloaded file must not be lost."""
    source, target = tmp_path / "public.pth", tmp_path / "ours.pth"
    torch.save({"state_dict": public}, source)
    before = source.read_bytes()
    for path in (source, tmp_path / "link.pth", tmp_path / "none" / "ours.pth"):
        if path.name == "link.pth":
            path.symlink_to(source)
        with pytest.raises(InputError, match=f"{path.name}: is"):
            convert_checkpoint(str(source), str(path))
    assert source.read_bytes() == before
    for _ in range(2):  # overwriting is fine
        convert_checkpoint(str(source), str(target))
