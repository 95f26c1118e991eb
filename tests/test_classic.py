"""Proposals without learning."""

import sys

import numpy as np
import pytest
from PIL import Image

import oln_d2
from oln_d2.cli import main


def opencv():
    return pytest.importorskip("cv2.ximgproc", reason="the extra `classic` is not installed")


def picture(box, size):
    """A textured box on plain ground."""
    rng = np.random.default_rng(0)
    pixels = np.full((*size[::-1], 3), 90, np.uint8)
    left, top, right, bottom = box
    pixels[top:bottom, left:right] = [200, 60, 50]
    pixels[top + 8 : bottom - 8, left + 8 : right - 8] += rng.integers(
        0, 12, (bottom - top - 16, right - left - 16, 3), dtype=np.uint8
    )
    return Image.fromarray(pixels)


@pytest.mark.heavy
@pytest.mark.parametrize("name", ["selective_search", "edge_boxes"])
def test_finds_what_stands_out(name):
    """
    Boxes must be in pixels of the image, best first, the same in a batch of several processes as
    alone, and one of the first fit what stands out.
    """
    opencv()
    boxes = {(320, 200): (60, 40, 200, 150), (180, 240): (30, 100, 120, 210)}
    images = [picture(box, size) for size, box in boxes.items()]
    proposer = oln_d2.load(name)
    together = list(proposer(images, top_k=300))
    for image, found, box in zip(images, together, boxes.values()):
        overlap = np.minimum(found.boxes[:, 2:], box[2:]) - np.maximum(found.boxes[:, :2], box[:2])
        overlap = overlap.clip(0).prod(axis=1)
        areas = (found.boxes[:, 2:] - found.boxes[:, :2]).prod(axis=1)
        union = areas + (box[2] - box[0]) * (box[3] - box[1]) - overlap
        assert (overlap / union)[:20].max() > 0.8
        assert (np.diff(found.scores) <= 0).all() and 0 < found.scores[0] <= 1
        assert (found.boxes[:, 2:] <= image.size).all() and (found.boxes >= 0).all()
        (alone,) = proposer(image, top_k=300)
        np.testing.assert_array_equal(alone.boxes, found.boxes)


def test_what_it_needs(tmp_path, monkeypatch, capsys):
    """Who lacks the modules of OpenCV must be told what to install."""
    monkeypatch.setitem(sys.modules, "cv2", None)
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    command = ["propose", str(tmp_path / "a.png"), "--output", str(tmp_path / "out"), "--weights"]
    assert main([*command, "edge_boxes"]) == 2
    assert "edge_boxes needs cv2" in (said := capsys.readouterr().err) and "classic" in said
    assert main([*command, str(tmp_path / "model.yml.gz")]) == 2
    assert "model.yml.gz: no such file; give OpenCV's model of edges" in capsys.readouterr().err
    assert main([*command, "edge_boxes", "--device", "cuda"]) == 2
    assert "edge_boxes: learns nothing; it has no config file and no device" in (
        capsys.readouterr().err
    )
