"""Pictures of proposals, and `oln-d2 visualize`."""

import json
import re

import numpy as np
import pytest
from conftest import make_coco
from PIL import Image, ImageColor
from pycocotools import mask as mask_utils

from oln_d2.cli import main
from oln_d2.drawing import FOUND, KNOWN, MISSED, Objects, contact_sheet, draw_proposals

GREY = (90, 90, 90)
# Known; novel and found; novel and missed.
OBJECTS = Objects(
    np.array([[40.0, 40, 140, 140], [200, 60, 300, 160], [60, 200, 200, 280]]),
    np.array([True, False, False]),
    ["cat", "zebra", "pizza"],
)
BOXES = np.array([[205.0, 65, 305, 165], [320, 220, 380, 280]])
SCORES = np.array([0.9, 0.2])


def count(picture, color):
    """Pixels that have nearly this colour."""
    color = np.array(ImageColor.getrgb(color) if isinstance(color, str) else color)
    return int((np.abs(np.asarray(picture).astype(int) - color).max(axis=2) < 12).sum())


@pytest.mark.parametrize(
    "size", [(400, 300), (60, 40), (4000, 3000), (3000, 300), (1, 1), (30, 2000)]
)
def test_pictures_of_any_size(size):
    """Lines, labels and legend must be there on a thumbnail as on a large photo."""
    scale = np.tile(np.array(size) / (400, 300), 2)
    objects = Objects(OBJECTS.boxes * scale, OBJECTS.seen, OBJECTS.names)
    image = Image.new("RGB", size, GREY)
    picture = draw_proposals(image, BOXES * scale, SCORES, {"objectness": SCORES}, objects=objects)
    assert 960 <= max(picture.size) <= 1700
    assert picture.height > round(picture.width * size[1] / size[0]) or size[1] > size[0]
    for color in KNOWN, FOUND:
        assert count(picture, color) > 20
    assert image.getpixel((0, 0)) == GREY  # the image itself is left alone


def test_colours_tell_what_was_found():
    """A found object that looks missed, or the other way, would be a wrong result."""
    image = Image.new("RGB", (400, 300), GREY)
    unfound = Objects(OBJECTS.boxes, OBJECTS.seen, OBJECTS.names)
    assert OBJECTS.found_by(BOXES).tolist() == [False, True, False]
    with_boxes = draw_proposals(image, BOXES, SCORES, objects=OBJECTS)
    without = draw_proposals(image, BOXES[1:], SCORES[1:], objects=unfound)
    legend = 600  # of pixels at most
    assert count(with_boxes, FOUND) > 3000 and count(without, FOUND) < legend
    area = 300 * 960 // 400  # without the legend, which has white
    white = [count(p.crop((0, 0, 960, area)), MISSED) for p in (with_boxes, without)]
    assert white[1] > white[0] + 1500 and white[0] > 1500


def test_colours_tell_the_score():
    """The best must have the bright end of the colour bar, the worst its dark end."""
    picture = draw_proposals(Image.new("RGB", (400, 300), GREY), BOXES, SCORES)
    # The left sides of the two boxes, 2.4 times as large in the picture.
    best, worst = (
        np.array(picture.getpixel((round(2.4 * x), round(2.4 * y))))
        for x, y in ((205, 120), (320, 250))
    )
    assert best.sum() > worst.sum() + 150
    assert draw_proposals(Image.new("RGB", (400, 300)), BOXES[:0], SCORES[:0]).width == 960


def test_masks_are_tinted():
    """`--masks` must show which pixels a mask covers, the better one where two overlap."""
    masks = np.zeros((300, 400, 2), np.uint8, order="F")
    masks[100:200, 100:200, 0] = 1
    masks[100:200, 150:300, 1] = 1
    boxes = np.array([[90.0, 90, 210, 210], [140.0, 90, 310, 210]])
    image = Image.new("RGB", (400, 300), GREY)
    picture = draw_proposals(image, boxes, SCORES, masks=mask_utils.encode(masks))
    first, both, second, outside = (
        picture.getpixel((round(2.4 * x), 360)) for x in (120, 175, 250, 350)
    )
    assert first == both != second != outside == GREY


def test_contact_sheet():
    """Every picture must be on the sheet, in order."""
    colors = ["red", "lime", "blue", "yellow", "cyan"]
    sizes = [(300, 200), (200, 300), (1000, 100), (40, 30), (300, 300)]
    pictures = [Image.new("RGB", size, color) for size, color in zip(sizes, colors)]
    sheet = contact_sheet(pictures, ["a very long name " * 10] * 5, columns=3)
    assert all(count(sheet, color) > 2000 for color in colors)
    assert sheet.width < 1500 and sheet.height < 1100


@pytest.fixture
def files(tmp_path):
    """Images, ground truth and results of a small data set; the folder."""
    root = make_coco(tmp_path / "data")
    gt = json.loads((root / "coco/annotations/instances_val2017.json").read_text())
    results = [
        {"image_id": a["image_id"], "bbox": a["bbox"], "score": 0.5 + 0.01 * i}
        | {"objectness": 0.25, "box_score": 0.75, "category_id": 1}
        for i, a in enumerate(gt["annotations"])
    ]
    (tmp_path / "results.json").write_text(json.dumps(results))
    return tmp_path


def visualize(files, *arguments, gt="data/coco/annotations/instances_val2017.json"):
    line = ["visualize", files / gt, files / "results.json"]
    line += ["--images", files / "data/coco/val2017", "--output", files / "out", *arguments]
    return main(list(map(str, line)))


def test_command(files, capsys):
    """One picture an image; the page must tell each box's scores, and what each object is."""
    assert visualize(files, "--split", "voc", "--html", "--top-k", 1) == 0
    # Not of the image without detections.
    assert len(list((files / "out").glob("*.jpg"))) == 4
    page = (files / "out/index.html").read_text()
    assert page.count("<figure>") == page.count("data:image/jpeg") == 4
    for i in range(1, 5):
        assert f"<figcaption>{i:012d}.jpg</figcaption>" in page
    titles = re.findall("<title>(.+?)</title>", page)[1:]
    assert len([title for title in titles if "c 0.250, b 0.750" in title]) == 4  # no object in one
    kinds = [re.sub(r".*\((.+)\)", r"\1", title) for title in titles if "(" in title]
    # The best of each image is on its last object, the zebra; one known object is a crowd.
    assert sorted({kind: kinds.count(kind) for kind in kinds}.items()) == [
        ("known", 7),
        ("novel, found", 4),
    ]
    assert "4 pictures" in capsys.readouterr().out


def test_command_without_objects(files):
    """
    What `propose` writes has no ground truth and needs no split; other detectors no qualities.
    """
    gt = json.loads((files / "data/coco/annotations/instances_val2017.json").read_text())
    (files / "images.json").write_text(json.dumps({**gt, "annotations": []}))
    results = json.loads((files / "results.json").read_text())
    bare = [{key: e[key] for key in ("image_id", "bbox", "score")} for e in results]
    (files / "results.json").write_text(json.dumps(bare))
    assert visualize(files, "--num-images", 2, gt="images.json") == 0
    pictures = sorted((files / "out").glob("*.jpg"))
    assert [path.name for path in pictures] == ["000000000001.jpg", "000000000002.jpg"]


def test_missing_images_are_told_in_the_end(files, capsys):
    """One broken image must not cost the pictures of the others."""
    (files / "data/coco/val2017/000000000002.jpg").write_text("no image")
    (files / "data/coco/val2017/000000000003.jpg").unlink()
    assert visualize(files, "--split", "voc") == 0
    told = capsys.readouterr().out
    assert (
        "2 pictures" in told
        and "000000000002.jpg: is no image" in told
        and "3.jpg: no such" in told
    )
    for path in (files / "data/coco/val2017").glob("*.jpg"):
        path.unlink()
    assert visualize(files, "--split", "voc") == 1


def test_bad_input_is_one_sentence(files, capsys):
    """Nothing must be drawn, and the message must name the remedy."""
    for arguments, expected in (
        ([], "--split or --seen"),
        (["--split", "voc", "--top-k", 0], "top_k is 0"),
        (["--seen", "unicorn"], "unicorn"),
        (["--split", "voc", "--images", files / "none"], "no such folder"),
        (["--split", "voc", "--masks"], "segmentation"),
    ):
        assert visualize(files, *arguments) == 2
        error = capsys.readouterr().err
        assert expected in error and len(error.strip().splitlines()) == 1
    assert not (files / "out").exists()
