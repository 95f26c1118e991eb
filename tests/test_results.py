"""The Python API: `oln_d2.load`, and what a proposer returns."""

import json

import numpy as np
import pytest
import torch
from conftest import make_coco
from PIL import Image
from pycocotools import mask as mask_utils
from test_propose import noise, photos, weights  # noqa: F401

import oln_d2
from oln_d2.checks import InputError
from oln_d2.results import Proposals

BOXES = np.array([[10.0, 10, 60, 60], [12, 10, 62, 60], [70.5, 5.2, 90, 30], [0, 0, 0.4, 0.4]])
SCORES = np.array([0.9, 0.8, 0.5, 0.25])


def some_proposals(**more):
    image = Image.new("RGB", (100, 80), (90, 90, 90))
    return Proposals(BOXES, SCORES, size=(80, 100), image=image, name="grey.png", **more)


def some_masks():
    masks = np.zeros((80, 100, 4), np.uint8, order="F")
    for i, (x1, y1, x2, y2) in enumerate(BOXES.round().astype(int)):
        masks[y1 : y2 + 1, x1 : x2 + 1, i] = 1
    return mask_utils.encode(masks)


def test_every_kind_of_image_gives_the_same(weights, photos):  # noqa: F811
    """Whoever has an array must get the boxes that the file would give, in order and by name."""
    proposer = oln_d2.load(weights)
    paths = sorted(map(str, photos.glob("*.png")))
    images = [Image.open(path).convert("RGB") for path in paths]
    arrays = [np.asarray(image) for image in images]
    tensors = [torch.from_numpy(a.copy()).permute(2, 0, 1) for a in arrays]
    expected = list(proposer(paths))
    assert [found.name for found in expected] == ["0.png", "2.png", "4.png"]
    assert [len(found) for found in expected] == [100] * 3
    floats = [t / 255 for t in tensors], [a / 255 for a in arrays]
    for kind in (photos, images, arrays, tensors, *floats, map(str, paths)):
        if kind is photos:
            kind = str(photos / "*.png")
        for found, one in zip(proposer(kind, batch_size=3), expected, strict=True):
            assert found.size == one.size
            np.testing.assert_allclose(found.boxes, one.boxes, atol=1e-3)
            np.testing.assert_allclose(found.scores, one.scores, atol=1e-5)
    for one_image in (paths[0], photos / "0.png", images[0], arrays[0], tensors[0]):
        (found,) = proposer(one_image, top_k=7)
        np.testing.assert_allclose(found.boxes, expected[0].boxes[:7], atol=1e-3)


def test_selection(weights, photos):  # noqa: F811
    """The arguments must do what those of the command do."""
    proposer = oln_d2.load(weights)
    (every,) = proposer(photos / "0.png", top_k=2000)
    (found,) = proposer(photos / "0.png", score=every.scores[10])
    assert len(found) == 10 and (found.scores > every.scores[10]).all()
    (found,) = proposer(photos / "0.png", nms=0.2, top_k=2000)
    assert 1 < len(found) < len(every)
    assert (found.boxes == every.nms(0.2).boxes).all()


@pytest.mark.parametrize(
    "image, arguments, message",
    [
        (np.zeros((3, 20, 30), np.uint8), {}, r"shape \[3, 20, 30\]"),
        (np.zeros((20, 30, 3), np.int32), {}, "int32"),
        (np.full((20, 30, 3), 255.0), {}, r"\[20, 30, 3\] .* divide 8-bit"),
        (np.full((20, 30, 3), np.nan), {}, "divide 8-bit"),
        (torch.full((3, 20, 30), 255.0), {}, "divide 8-bit"),
        (torch.zeros(20, 30), {}, "tensor"),
        (3, {}, "an image is int; it has to be a path, a PIL image"),
        (b"\x89PNG", {}, "an image is bytes; it"),
        ("none.png", {}, "no such file"),
        (np.zeros((9, 9, 3), np.uint8), {"top_k": 0}, "top_k is 0"),
        (np.zeros((9, 9, 3), np.uint8), {"nms": 1.5}, "nms is 1.5"),
    ],
)
def test_images_and_arguments_that_are_refused(weights, image, arguments, message):  # noqa: F811
    """A tensor in the place of an array must not be silently read as an image of 3 rows."""
    proposer = oln_d2.load(weights)
    for given in (image, [image]) if isinstance(image, (bytes, str)) else ([image],):
        with pytest.raises(InputError, match=message):
            list(proposer(given, **arguments))


def test_bad_weights_and_devices(tmp_path, weights):  # noqa: F811
    """Each must be one sentence."""
    with pytest.raises(InputError, match="none.pth: no such file"):
        oln_d2.load(tmp_path / "none.pth")
    with pytest.raises(InputError, match=f"{tmp_path.name}: is a folder; give a trained model"):
        oln_d2.load(tmp_path)
    with pytest.raises(InputError, match="device is tpu"):
        oln_d2.load(weights, device="tpu")


def test_exported_model_gives_the_same(weights, photos, tmp_path):  # noqa: F811
    """The file without PyTorch must propose what the checkpoint does."""
    from oln_d2.standalone.export import export

    export(str(weights), str(tmp_path / "model.onnx"))
    a, b = oln_d2.load(weights), oln_d2.load(tmp_path / "model.onnx")
    assert a.max_detections == b.max_detections
    for one, other in zip(a(photos), b(photos), strict=True):
        assert one.name == other.name and len(one) == len(other) > 5
        np.testing.assert_allclose(one.scores, other.scores, atol=1e-5)


def test_rows_go_together():
    """A mask or a score of another box would be silently wrong."""
    more = {"objectness": SCORES / 2, "box_scores": SCORES / 3, "mask_scores": SCORES / 4}
    found = some_proposals(masks=some_masks(), **more)
    order = [2, 0, 3, 1]
    shuffled = Proposals(
        BOXES[order], SCORES[order], size=(80, 100), masks=[found.masks.rles[i] for i in order],
        **{name: values[order] for name, values in more.items()},
    )  # fmt: skip
    for chosen in (shuffled[1:3], found[np.array([1, 2])], shuffled[SCORES < 0.85].top(2)):
        assert (chosen.boxes == BOXES[1:3]).all() and chosen.scores.tolist() == [0.8, 0.5]
        assert chosen.objectness.tolist() == [0.4, 0.25]
        assert chosen.mask_scores.tolist() == [0.2, 0.125]
        assert (np.asarray(chosen.masks) == np.asarray(found.masks)[1:3]).all()
    assert len(found[2]) == 1 and found[-1].scores == [0.25]
    assert [i in found.nms(0.5).scores for i in SCORES] == [True, False, True, True]
    assert len(found.nms(1.0)) == 4
    with pytest.raises(InputError, match=r"boxes have shape \(3, 5\), not"):
        Proposals(np.ones((3, 5)), [0.9, 0.8, 0.7], size=(80, 100))
    with pytest.raises(InputError, match="objectness has 3"):
        some_proposals(objectness=SCORES[:3])
    with pytest.raises(InputError, match="k is 0"):
        found.top(0)


def test_nms_is_torchvisions():
    """The same boxes must stay without PyTorch as with it."""
    from torchvision.ops import nms

    rng = np.random.default_rng(0)
    corners = rng.random((2000, 2)) * 200
    boxes = np.hstack([corners, corners + rng.random((2000, 2)) * 80])
    boxes[7, 2:] = boxes[7, :2]  # without area
    found = Proposals(boxes, np.linspace(1, 0, 2000), size=(300, 300))
    for iou in (0.0, 0.3, 0.7):
        kept = nms(torch.from_numpy(boxes), torch.from_numpy(found.scores), iou)
        assert (found.nms(iou).boxes == boxes[kept.numpy()]).all()


def test_pictures_and_crops():
    """They must show what lies in the box, also of boxes on the border and below one pixel."""
    found = some_proposals(masks=some_masks())
    image = found.image
    image.paste("red", (70, 5, 90, 30))
    crops = found.crops()
    assert [crop.size for crop in crops] == [(50, 50), (50, 50), (20, 25), (1, 1)]
    assert (np.asarray(crops[2]) == [255, 0, 0]).all()
    assert max(found.draw(top=2).size) >= 960
    assert found._repr_jpeg_().startswith(b"\xff\xd8")
    nowhere = Proposals(BOXES, SCORES, size=(80, 100))
    assert nowhere._repr_jpeg_() is None and "4 for an image of 100 x 80" in repr(nowhere)
    with pytest.raises(InputError, match="image is not known"):
        nowhere.draw()


def test_images_of_files_are_read_again(weights, photos):  # noqa: F811
    """Who keeps the proposals for a thousand photos must not keep the photos in memory."""
    found = list(oln_d2.load(weights)(photos))
    assert all(not isinstance(one._image, Image.Image) for one in found)
    assert found[0].image.size == found[0].size[::-1]


def test_to_coco_is_evaluated(tmp_path):
    """The entries must be those of a results file, masks included."""
    root = make_coco(tmp_path)
    gt = str(root / "coco/annotations/instances_val2017.json")
    content = json.loads(open(gt).read())
    entries = []
    for image in content["images"]:
        own = [a for a in content["annotations"] if a["image_id"] == image["id"]]
        x, y, w, h = np.array([a["bbox"] for a in own], float).reshape(-1, 4).T
        found = Proposals(
            np.stack([x, y, x + w, y + h], axis=1),
            np.linspace(0.9, 0.8, len(own)),
            size=(image["height"], image["width"]),
            box_scores=np.full(len(own), 0.5),
        )
        entries += found.to_coco(image["id"])
    assert json.loads(json.dumps(entries)) == entries
    assert entries[0]["box_score"] == 0.5 and "objectness" not in entries[0]
    result = oln_d2.evaluate(gt, entries, seen="voc")
    assert result["unseen"]["AR@100"] == 1
    (masked,) = some_proposals(masks=some_masks()).top(1).to_coco(1)
    assert mask_utils.area(masked["segmentation"]) == 51 * 51


def test_to_supervision():
    """Boxes, scores and masks must arrive in the package that people draw and track with."""
    sv = pytest.importorskip("supervision")
    found = some_proposals(masks=some_masks(), objectness=SCORES / 2)
    detections = found.to_supervision()
    assert isinstance(detections, sv.Detections) and len(detections) == 4
    np.testing.assert_allclose(detections.xyxy, BOXES, rtol=1e-6)
    np.testing.assert_allclose(detections.confidence, SCORES, rtol=1e-6)
    assert detections.mask.shape == (4, 80, 100) and detections.mask.dtype == bool
    assert detections[1:3].data["objectness"].tolist() == [0.4, 0.25]
    drawn = sv.MaskAnnotator().annotate(np.array(found.image), detections)
    assert (drawn != np.array(found.image)).any()
    assert len(found[:0].to_supervision()) == 0
