"""Pickles that others write must be read as before; what more they hold must not run."""

import pickle
import subprocess
import sys
from collections import OrderedDict

import numpy as np
import pytest
import torch
from conftest import NEEDS_DETECTRON2

from oln_d2.pickles import load_plain
from oln_d2.standalone.checkpoint import read_checkpoint

VALUES = {
    "arrays": [np.arange(6.0).reshape(2, 3), np.zeros((0, 4), np.float32), np.array(3)],
    "in columns": np.asfortranarray(np.arange(6).reshape(2, 3)),
    "other byte order": np.arange(3, dtype=">i2"),
    "texts": np.array(["a", "bc"]),
    "objects": np.array(["x", None, 2], dtype=object),
    "nothing": [np.zeros((0, 4)), b"", set(), frozenset([1])],
    "scalars": [np.float32(0.5), np.int64(7), np.bool_(True)],
    "plain": {"iteration": 3, "name": "x", "more": (1, [2.5, None, True, b"\0\xff"], {"a"})},
    "ordered": OrderedDict(b=1, a=2),
}


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("name", VALUES)
def test_plain_values_are_read(name, protocol, tmp_path):
    """A file of numbers would be refused, or be read as others."""
    path = tmp_path / "a.pkl"
    path.write_bytes(pickle.dumps(VALUES[name], protocol))
    with open(path, "rb") as file:
        found = load_plain(file)
    np.testing.assert_equal(found, VALUES[name])
    parts = found if isinstance(found, list) else [found]
    given = VALUES[name] if isinstance(found, list) else [VALUES[name]]
    for part, own in zip(parts, given, strict=True):
        assert type(part) is type(own) or isinstance(part, np.ndarray)
        assert getattr(part, "dtype", np.dtype("O")).newbyteorder("=") == getattr(
            own, "dtype", np.dtype("O")
        ).newbyteorder("=")


@pytest.mark.parametrize("zipped", [True, False])
def test_whole_checkpoints_are_read(zipped, tmp_path):
    """A run could not be resumed: what it keeps beside the weights are plain values as well."""
    weight = torch.nn.Parameter(torch.ones(2, 2))
    optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9)
    weight.sum().backward()
    optimizer.step()
    content = {
        "model": OrderedDict({"a.weight": weight, "a.bias": torch.zeros(2, dtype=torch.float16)}),
        "optimizer": optimizer.state_dict(),
        "iteration": np.int64(7),
        "trainer": {"hooks": {"best": np.float64(0.25)}, "seed": 3},
    }
    torch.save(content, tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
    found = read_checkpoint(tmp_path / "a.pth")
    assert found["iteration"] == 7 and found["trainer"] == {"hooks": {"best": 0.25}, "seed": 3}
    momentum = found["optimizer"]["state"][0]["momentum_buffer"]
    assert torch.equal(momentum, torch.ones(2, 2)) and found["model"]["a.bias"].dtype == torch.half


def test_the_model_zoo_is_read(tmp_path):
    """Detectron2's and Caffe2's `.pkl`, the latter of Python 2, are weights to start from."""
    arrays = {"conv1_w": np.ones((2, 3), np.float32), "conv1_w_momentum": np.zeros(1, np.float32)}
    for content in (
        {"model": arrays, "__author__": "Detectron2 Model Zoo", "matching_heuristics": True},
        {"blobs": arrays, "cfg": "text"},
        arrays,
    ):
        (tmp_path / "a.pkl").write_bytes(pickle.dumps(content, protocol=2))
        found = read_checkpoint(tmp_path / "a.pkl")
        assert torch.equal(found["model"]["conv1_w"], torch.ones(2, 3))
        assert found.get("__author__") == content.get("__author__")


@pytest.mark.skipif(sys.platform != "linux", reason="others measure memory in other units")
@pytest.mark.parametrize(
    "content",
    [
        b"\x80\x02Nr\0\0\0\x08.",  # place 2**27 of the memo
        b"Np134217728\n.",
        b"\x80\x05\x96" + (10**9).to_bytes(8, "little") + b".",
        b"\x80\x02cnumpy\nndarray\nJ\0\0\0\x08X\x01\0\0\0O\x86R.",  # of 2**27 objects
    ],
    ids=["memo", "memo as text", "bytearray", "array"],
)
def test_few_bytes_take_little_memory(content, tmp_path):
    """A file of ten bytes from a stranger could fill the memory of the machine."""
    (tmp_path / "a.pkl").write_bytes(content)
    code = (
        "import sys, resource; from oln_d2.pickles import load_plain\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "try: load_plain(open(sys.argv[1], 'rb'))\n"
        "except Exception: pass\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "a.pkl")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 100_000  # KiB


@NEEDS_DETECTRON2
def test_proposals_are_those_of_detectron2(tmp_path):
    """Fast R-CNN would be trained on other boxes than by Detectron2's own reader."""
    from detectron2.data.build import load_proposals_into_dataset

    from oln_d2.engine.datasets import add_proposals

    rng = np.random.default_rng(0)
    ids, numbers = [4, 1, 9, 2], [5, 0, 3, 7]
    boxes = [rng.random((n, 4), np.float32) for n in numbers]
    logits = [rng.integers(0, 3, n).astype(np.float32) for n in numbers]  # some are equal
    records = [{"image_id": i, "file_name": f"{i}.jpg"} for i in (1, 2, 4)]
    for names in ("ids", "objectness_logits"), ("indexes", "scores"):
        content = {names[0]: ids, "boxes": boxes, names[1]: logits, "bbox_mode": 1}
        (tmp_path / "p.pkl").write_bytes(pickle.dumps(content))
        own = [dict(record) for record in records]
        add_proposals(own, str(tmp_path / "p.pkl"))
        theirs = [dict(record) for record in records]
        load_proposals_into_dataset(theirs, str(tmp_path / "p.pkl"))
        np.testing.assert_equal(own, theirs)
