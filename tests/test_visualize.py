"""Pictures of proposals, and `oln-d2 visualize`."""

import json

import numpy as np
import pytest
from conftest import make_coco
from PIL import Image, ImageColor
from pycocotools import mask as mask_utils

from oln_d2.cli import main
from oln_d2.drawing import (
    FOUND,
    KNOWN,
    MISSED,
    Objects,
    choose,
    contact_sheet,
    draw_proposals,
    score_colors,
)
from oln_d2.results import Proposals

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


def test_colours_and_lines_tell_the_score():
    """The best must have the bright end of the colour bar and a broad line, the worst neither."""
    picture = draw_proposals(Image.new("RGB", (400, 300), GREY), BOXES, SCORES)
    # Across the left sides of the two boxes, 2.4 times as large in the picture.
    best, worst = (
        np.array([picture.getpixel((round(2.4 * x) + i, round(2.4 * y))) for i in range(8)])
        for x, y in ((205, 120), (320, 250))
    )
    widths = [(side.max(axis=1) > 150).sum() for side in (best, worst)]
    assert widths[0] > widths[1] > 0
    assert best[0].sum() > worst[0].sum() + 60
    assert draw_proposals(Image.new("RGB", (400, 300)), BOXES[:0], SCORES[:0]).width == 960


@pytest.mark.parametrize("ground", [0, 60, 127, 190, 255])
def test_lines_are_seen_on_any_ground(ground):
    """No box may vanish, dark on dark or light on light: its colour or its rim stands out."""

    def luminance(rgb):
        linear = np.where(np.array(rgb) > 10, ((np.array(rgb) / 255 + 0.055) / 1.055) ** 2.4, 0)
        return linear @ (0.2126, 0.7152, 0.0722)

    colors = score_colors(np.linspace(0, 1, 20), 0, 1)
    colors += [ImageColor.getrgb(color) for color in (KNOWN, FOUND, MISSED)]
    for color in colors:
        contrasts = []
        for part in color, (0, 0, 0):
            low, high = sorted([luminance(part), luminance((ground,) * 3)])
            contrasts.append((high + 0.05) / (low + 0.05))
        assert max(contrasts) > 2.4  # 1 is none, dark purple on black has 1.3


def test_few_boxes_and_no_copies():
    """Ten copies of a box would hide its object; the best of them has to stay, and other boxes."""
    copies = BOXES[0] + np.random.RandomState(0).uniform(-8, 8, (30, 4))
    boxes, scores = np.vstack([copies, BOXES[1:]]), np.linspace(0.1, 0.9, 31)
    scores[-1] = 0.2
    assert choose(boxes, scores).tolist() == [29, 30]
    far = np.arange(40)[:, None] * 10 + np.array([0.0, 0, 5, 5])
    assert choose(far, np.linspace(1, 0, 40)).tolist() == list(range(20))
    found = Proposals(boxes, scores, size=(300, 400), image=Image.new("RGB", (400, 300), GREY))
    image, few = found.draw(), found[np.isin(found.scores, scores[[29, 30]])].draw()
    assert np.array_equal(np.asarray(image), np.asarray(few))


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


def read_page(folder):
    """What the data of a page say, `about` and `images`."""
    text = (folder / "index_files/data.js").read_text(encoding="utf-8")
    about, images = (
        text.removeprefix("const about = ").removesuffix(";\n").split(";\nconst images = ")
    )
    return json.loads(about), json.loads(images)


def visualize(files, *arguments, gt="data/coco/annotations/instances_val2017.json"):
    line = ["visualize", files / gt, files / "results.json"]
    line += ["--images", files / "data/coco/val2017", "--output", files / "out", *arguments]
    return main(list(map(str, line)))


def test_command(files, capsys):
    """One picture an image; the page must have each box with its scores, and what objects are."""
    assert visualize(files, "--split", "voc", "--html", "--top-k", 1) == 0
    # Not of the image without detections.
    assert len(list((files / "out").glob("*.jpg"))) == 4
    images = read_page(files / "out")[1]
    assert [image["name"] for image in images] == [f"{i:012d}.jpg" for i in range(1, 5)]
    for image in images:
        for file in image["small"], image["full"]:
            assert Image.open(files / "out" / file).size == tuple(image["size"])
        (found,) = image["found"]
        # All, to be shown by the page's sliders; the best first.
        assert found["scores"] == sorted(found["scores"], reverse=True)
        assert set(found["c"]) == {0.25} and set(found["b"]) == {0.75} and "m" not in found
    seen = [seen for image in images for *_, seen, _ in image["objects"]]
    names = {name for image in images for *_, name in image["objects"]}
    assert sum(seen) == 7 and len(seen) == 11  # one known object is a crowd
    assert names == {"person", "dog", "zebra"}
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
        and "3.jpg: is not among the images" in told
    )


def test_no_page_of_nothing(files, capsys):
    """A wrong folder gave an empty page, as if there were nothing to see."""
    for path in (files / "data/coco/val2017").glob("*.jpg"):
        path.write_text("no image")
    assert visualize(files, "--split", "voc", "--html") == 1
    assert "is no image" in capsys.readouterr().out
    assert not list((files / "out").glob("index*"))
    (files / "empty").mkdir()
    assert visualize(files, "--split", "voc", "--html", "--images", files / "empty") == 2
    error = capsys.readouterr().err
    assert f"{files / 'empty'}: holds none of the" in error and error.count("\n") == 1


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
