"""`oln_d2.BatchProposer`, also in Ray, by the script in examples/."""

import importlib.util
import io
import os
import pickle
import signal
import sys
import tarfile
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image
from test_propose import noise

import oln_d2
from oln_d2 import weights
from oln_d2.checks import InputError

MODEL = {"weights": weights.find(".onnx"), "min_size": 64}
SIZES = [(64, 64), (96, 64), (64, 64), (64, 72), (96, 64), (64, 64), (64, 100)]


def encoded(image, form="PNG", **options):
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


@pytest.fixture(scope="module")
def images():
    """What files hold, and among them what is none."""
    ret = [encoded(noise(*size, seed=i)) for i, size in enumerate(SIZES)]
    ret[2:2] = [b"no image", b"", None, ret[0][:300]]
    return ret


@pytest.fixture(scope="module")
def expected(images):
    """Boxes and scores of each, None where there is none to be had."""
    proposer = oln_d2.load(**MODEL)

    def propose(data):
        (found,) = proposer(Image.open(io.BytesIO(data)), top_k=5)
        return found.boxes.tolist(), found.scores.tolist()

    return [None if i in (2, 3, 4, 5) else propose(data) for i, data in enumerate(images)]


@pytest.fixture(scope="module")
def stage():
    return oln_d2.BatchProposer(**MODEL, image="jpg", top_k=5, batch_size=2)


def same(found, expected):
    """Whether rows have the boxes expected, or else a sentence."""
    assert len(found) == len(expected)
    for row, rest in zip(found, expected):
        if rest is None:
            assert (list(row["boxes"]), list(row["scores"])) == ([], []) and row["error"]
        else:
            assert ([*map(list, row["boxes"])], list(row["scores"]), row["error"]) == (*rest, "")


def rows(batch):
    return [dict(zip(batch, values)) for values in zip(*batch.values())]


@pytest.mark.parametrize("kind", ["lists", "arrays"])
def test_rows_have_the_boxes_of_their_image(stage, images, expected, kind):
    """Rows of any sizes must get what is found in their image, or why it cannot be read."""
    batch = {"jpg": images, "key": list(range(len(images)))}
    if kind == "arrays":
        batch = {"jpg": np.array(images, object), "key": np.arange(len(images))}
    found = stage(batch)
    assert list(found) == ["jpg", "key", "boxes", "scores", "error"] and list(batch)[2:] == []
    assert all(len(column) == len(images) for column in found.values())
    same(rows(found), expected)
    reasons = [row["error"] for row in rows(found)][2:6]
    for reason, part in zip(reasons, ("is no image", "is empty", "no image in", "truncated")):
        assert reason.startswith("jpg: ") and part in reason
    none = stage({"jpg": [], "key": []})
    assert [len(column) for column in none.values()] == [0] * 5


def test_images_of_every_kind(stage, images, expected):
    """What engines make of images must do as well: decoded ones, and Hugging Face's structures."""
    pixels = np.asarray(Image.open(io.BytesIO(images[0])))
    cells = [images[0], {"bytes": images[0], "path": None}, pixels, Image.fromarray(pixels)]
    turned = Image.Exif()
    turned[0x0112] = 6
    upright = encoded(Image.fromarray(np.rot90(pixels)), exif=turned)
    same(rows(stage({"jpg": [*cells, upright, bytearray(images[0])]})), expected[:1] * 6)
    odd = [{"bytes": b"none", "path": "a/b.jpg"}, 7, "a.jpg", np.zeros((4, 4, 2), np.uint8)]
    found = rows(stage({"jpg": odd}))
    same(found, [None] * 4)
    assert found[0]["error"].startswith("a/b.jpg: ")


def test_it_can_be_sent_to_other_processes(stage, images, expected):
    """Spark and Hugging Face send it as a pickle, with or without a model loaded: only settings."""
    same(rows(stage({"jpg": images[:1]})), expected[:1])
    data = pickle.dumps(stage)
    assert len(data) < 2000
    same(rows(pickle.loads(data)({"jpg": images[:1]})), expected[:1])


def test_what_cannot_be_used(stage):
    """A wrong column or setting must stop the work, not give each row an error."""
    with pytest.raises(InputError, match="no column 'jpg', but 'png', 'key'"):
        stage({"png": [], "key": []})
    with pytest.raises(InputError, match="a column 'scores' already"):
        stage({"jpg": [], "scores": []})
    with pytest.raises(InputError, match="top_k is 0"):
        oln_d2.BatchProposer(top_k=0)
    with pytest.raises(InputError, match="no such file"):
        oln_d2.BatchProposer("missing.onnx")({"image": [b""]})


@pytest.mark.heavy
def test_tables(stage, images, expected):
    """Columns of Arrow tables must have one type in every batch, also where no row has boxes."""
    pa = pytest.importorskip("pyarrow", reason="pyarrow is not installed (extra `ray`)")
    whole = stage(pa.table({"jpg": pa.array(images, pa.binary()), "key": range(len(images))}))
    same(whole.to_pylist(), expected)
    without = stage(pa.table({"jpg": pa.array(images[2:4], pa.binary()), "key": range(2)}))
    empty = stage(whole.select(["jpg", "key"]).slice(0, 0))
    assert without.schema == whole.schema == empty.schema
    assert pa.concat_tables([whole, without, empty]).num_rows == len(images) + 2


@pytest.mark.heavy
def test_frames(stage, images, expected):
    """As Spark's mapInPandas takes it, by the lines in docs/propose.md."""
    pd = pytest.importorskip("pandas", reason="pandas is not installed (extra `ray`)")
    frame = pd.DataFrame({"jpg": images, "key": range(len(images))}, index=range(5, 16))
    found = pd.DataFrame(stage(dict(frame)))
    same(found.to_dict("records"), expected)
    assert found["key"].tolist() == list(range(len(images)))


@pytest.fixture(scope="module")
def cluster():
    ray = pytest.importorskip("ray", reason="Ray is not installed (extra `ray`)")
    pytest.importorskip("ray.data", reason="Ray Data is not installed (extra `ray`)")
    # On a busy machine its workers would hardly run.
    os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112
    ray.init(
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=2 * 10**8,
        _system_config={"worker_niceness": 0},  # a busy machine would hardly run them
    )
    ray.data.DataContext.get_current().target_min_block_size = (
        10**5
    )  # so that both workers get some
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    yield ray
    ray.shutdown()


class KilledOnce(oln_d2.BatchProposer):
    """Ends its process, as a machine that fails does, when it gets one row for the first time."""

    died = ""  # a file

    def __call__(self, batch):
        if "0000017" in batch["__key__"].to_pylist() and not os.path.exists(self.died):
            open(self.died, "w").close()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(batch)


@pytest.mark.heavy
@pytest.mark.parametrize("form", ["parquet", "webdataset"])
def test_ray(cluster, images, expected, tmp_path, monkeypatch, form):
    """
    Two workers, of which one is killed on the way, must write every row once, with its boxes, by
    the script in examples/.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = ROOT / "examples/propose_with_ray.py"
    spec = importlib.util.spec_from_file_location("propose_with_ray", path)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    keys = [f"{i:07d}" for i in range(4 * len(images))]
    (tmp_path / "in").mkdir()
    for part in range(4):
        own = slice(part, None, 4)
        chosen = list(zip(keys[own], (images * 4)[own]))
        if form == "parquet":
            columns = {"__key__": keys[own], "png": pa.array((images * 4)[own], pa.binary())}
            pq.write_table(pa.table(columns), tmp_path / f"in/{part}.parquet")
            continue
        with tarfile.open(tmp_path / f"in/{part}.tar", "w") as tar:
            for key, data in chosen:
                for ending, content in (("png", data), ("json", b"{}")):
                    entry = tarfile.TarInfo(f"{key}.{ending}")
                    entry.size = len(content or b"")
                    tar.addfile(entry, io.BytesIO(content or b""))
    monkeypatch.setattr(KilledOnce, "died", str(tmp_path / "died"))
    monkeypatch.setattr(oln_d2, "BatchProposer", KilledOnce)
    script.propose(
        SimpleNamespace(
            input=str(tmp_path / "in"), output=str(tmp_path / "out"), image="png", workers=2,
            webdataset=form == "webdataset", rows=8, cpus=0.5, gpus=0, top_k=5, **MODEL,
        )
    )  # fmt: skip
    assert (tmp_path / "died").exists()
    found = sorted(pq.read_table(tmp_path / "out").to_pylist(), key=lambda row: row["__key__"])
    assert [row["__key__"] for row in found] == keys
    same(found, expected * 4)
