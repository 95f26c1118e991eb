"""`oln-d2 propose` in several processes that share the images."""

import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT
from test_propose import noise, propose

from oln_d2 import files as files_module
from oln_d2 import weights
from oln_d2.checks import InputError
from oln_d2.files import lock_folder
from oln_d2.propose import propose_files
from oln_d2.propose.onnx import OnnxProposer
from oln_d2.propose.shards import find_shard
from oln_d2.propose.writers import WRITERS


@pytest.fixture(scope="module")
def proposer():
    ret = OnnxProposer(weights.find(".onnx"), max_proposals=20, max_detections=10)
    ret.look_closer(min_size=64)
    return ret


@pytest.fixture
def photos(tmp_path):
    """Ten images, one of them of two pages, and what is none."""
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    for i in range(8):
        noise(64 + 8 * (i % 3), 64, seed=i).save(folder / ("more" if i % 2 else "") / f"{i}.png")
    pages = [noise(80, 64, seed=10), noise(64, 80, seed=11)]
    pages[0].save(folder / "scan.tif", save_all=True, append_images=pages[1:])
    (folder / "broken.png").write_text("not an image")
    return folder


def written(folder):
    """{path: content} of all that a run writes, but for what each process has of its own."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and not path.name.startswith((".lock", "journal"))
    }


@pytest.fixture
def run(proposer, photos):
    def propose_on_photos(output, shard=None, **options):
        return propose_files(proposer, [str(photos)], output, shard=shard, **options)

    return propose_on_photos


def test_shards_write_what_one_process_does(run, tmp_path):
    """Results, pictures and page of several processes must be those of one, to the byte."""
    one, many = tmp_path / "one", tmp_path / "many"
    for form in WRITERS:
        options = {"format": form, "html": form == "coco", "contact_sheet": form == "coco"}
        whole = run(one, **options)
        for number, waiting in (2, [1, 3]), (3, [1]), (1, []):
            done = run(many, (number, 3), **options)
            if form == "coco":
                assert done.waiting == waiting and done.written == (not waiting)
                assert (many / "unreadable.txt").exists() == done.written
        assert done.names == whole.names and done.failures == whole.failures
    expected, found = written(one), written(many)
    assert b"broken.png" in expected["unreadable.txt"]
    assert {"index.html", "pictures/0.png.jpg", "labels/more/1.txt", "cvat.json"} < {*expected}
    assert found.keys() == expected.keys()
    assert [name for name in expected if found[name] != expected[name]] == []


@pytest.mark.parametrize("after", [(3, 3), (2, 2), None])
def test_a_share_that_died_is_done_by_the_next_run(run, tmp_path, after):
    """
    The next run, of this share, of another number of them, or of all, must do what is left and
    nothing twice, and write the same as one that nothing happened to.
    """
    run(tmp_path / "one")
    output = tmp_path / "out"
    counts = [run(output, (number, 3)).new for number in (1, 2, 3)]
    assert sum(counts) == 10 and min(counts) >= 2
    for name in [*written(output), "journal-1-of-3.jsonl"]:  # as if that had not begun
        (output / name).unlink()
    killed = output / "journal-3-of-3.jsonl"
    lines = killed.read_bytes().splitlines(keepends=True)
    killed.write_bytes(b"".join(lines[:2]) + lines[2][:30])  # one image, a part of the second
    left = counts[0] + counts[2] - 1
    if after == (3, 3):
        assert run(output, after).new == counts[2] - 1
        assert not written(output)
        after = (1, 3)
        left = counts[0]
    if after == (2, 2):
        first = run(output, (1, 2))
        assert first.waiting == [2] and not written(output)
        left -= first.new
    done = run(output, after)
    assert done.new == left and done.written
    assert written(output) == written(tmp_path / "one")


def test_new_and_changed_images_are_done_by_their_shard(run, photos, tmp_path):
    """After images changed, the first process must neither write old results nor do all alone."""
    for number in 1, 2:
        run(tmp_path / "out", (number, 2))
    before = written(tmp_path / "out")
    for name in "0.png", "2.png", "more/9.png":
        noise(64, 64, seed=20 + ord(name[0])).save(photos / name)
    first = run(tmp_path / "out", (2, 2), draw=True)
    assert first.waiting == [1] and 0 < first.new < 3
    assert before["results.json"] == (tmp_path / "out/results.json").read_bytes()
    second = run(tmp_path / "out", (1, 2), draw=True)
    assert second.new == 3 - first.new and second.written
    run(tmp_path / "one", draw=True)
    assert written(tmp_path / "out") == written(tmp_path / "one")


def test_pictures_of_all_shards_are_those_asked_for(run, tmp_path):
    """With another number of boxes on pictures, no process may leave some of the old ones."""
    for top in 1, 9:
        for number in 1, 2:
            run(tmp_path / "out", (number, 2), draw=True, draw_top=top)
        run(tmp_path / "one", draw=True, draw_top=top)
        assert written(tmp_path / "out") == written(tmp_path / "one")


@pytest.mark.parametrize("locks", [True, False])
def test_two_that_finish_at_once(run, tmp_path, monkeypatch, locks):
    """Both find all shards done: one writes the results, or, where nothing locks, both the same."""
    run(tmp_path / "one")
    run(tmp_path / "out", (1, 2))
    run(tmp_path / "out", (2, 2))
    for name in written(tmp_path / "out"):
        (tmp_path / "out" / name).unlink()
    if not locks:
        monkeypatch.setattr(files_module, "_lock", lambda file, shared=False: True)
    with lock_folder(tmp_path / "out", ".lock-results"):
        done = run(tmp_path / "out", (1, 2))
        assert done.waiting == [] and done.written == (not locks)
        assert ("results.json" in written(tmp_path / "out")) == (not locks)
        if not locks:
            assert written(tmp_path / "out") == written(tmp_path / "one")


def test_who_shares_a_folder(run, tmp_path):
    """A shard must not be done twice at once, nor all images while a shard is at work."""
    output = tmp_path / "out"
    run(output, (1, 2))
    with lock_folder(output, ".lock-1-of-2"):
        run(output, (2, 2))
        for refused in (1, 2), None:
            with pytest.raises(InputError, match="is in use by .*process"):
                run(output, refused)
    with lock_folder(output), pytest.raises(InputError, match="is in use by .*process"):
        run(output, (2, 2))
    with pytest.raises(InputError, match="top_k 100 are in this folder"):
        run(output, (2, 3), top_k=7)
    for shard in (0, 2), (3, 2), (1, 0):
        with pytest.raises(InputError, match="K/N with K from 1 to N"):
            run(output, shard)


def test_more_shards_than_images(run, tmp_path):
    """A process without an image has nothing to do, which is no failure."""
    for number in range(1, 13):
        done = run(tmp_path / "out", (number, 12))
    assert done.written and len(done.names) == 10
    run(tmp_path / "one")
    assert written(tmp_path / "out") == written(tmp_path / "one")


TORCHRUN = {"TORCHELASTIC_RUN_ID": "none", "RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}


def slurm(task, first, last, count):
    names = ("ID", "MIN", "MAX", "COUNT")
    values = (task, first, last, count)
    return {f"SLURM_ARRAY_TASK_{n}": str(v) for n, v in zip(names, values)}


@pytest.mark.parametrize(
    "text, environment, expected",
    [
        (None, {}, None),
        (None, TORCHRUN, (2, 4)),
        (None, {**TORCHRUN, "RANK": "0", "WORLD_SIZE": "1"}, None),
        ("3/4", TORCHRUN, (3, 4)),
        # Notebooks, interactive jobs, and arrays that do another folder in each task.
        (None, {"RANK": "1", "WORLD_SIZE": "4"}, None),
        (None, {"SLURM_PROCID": "1", "SLURM_NTASKS": "4"}, None),
        (None, slurm(3, 1, 8, 8), None),
        ("slurm", slurm(3, 1, 8, 8), (3, 8)),
        ("slurm", slurm(0, 0, 7, 8), (1, 8)),
        ("slurm", slurm(5, 5, 5, 1), (1, 1)),
        ("slurm", slurm(3, 3, 9, 2), "with gaps"),
        ("slurm", {"SLURM_PROCID": "1"}, "no task of a SLURM array"),
        ("0/4", {}, "from 1 to N"),
        ("5/4", {}, "from 1 to N"),
        ("2", {}, "has to be K/N"),
        ("two/4", {}, "has to be K/N"),
    ],
)
def test_whose_share(text, environment, expected):
    """A process must do the share that its starter means, and all where nobody means one."""
    if isinstance(expected, str):
        with pytest.raises(InputError, match=expected):
            find_shard(text, environment)
    else:
        assert find_shard(text, environment)[0] == expected


def test_command(photos, tmp_path, capsys, monkeypatch):
    """It must say which share it does and who writes, and not fail for the images of others."""
    for path in photos.rglob("*.png"):
        if path.name != "broken.png":
            path.unlink()
    run = [photos, "--min-size", 64, "--top-k", 3, "--output", tmp_path / "out"]
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert propose(*run) == 0
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "6"
    told = capsys.readouterr().out
    assert "Shard 2/2, as torchrun says\n" in told and "the last of shards 1 writes" in told
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    for name, value in slurm(1, 1, 2, 2).items():
        monkeypatch.setenv(name, value)
    assert propose(*run, "--shard", "slurm") == 0  # of which no image can be read
    told = capsys.readouterr().out
    assert "Shard 1/2, as the SLURM array says\n" in told and "broken.png" in told
    assert "Proposals for 2 images, 0 of them new, are in" in told
    assert propose(*run) == 0
    assert "--shard slurm is this task's share" in capsys.readouterr().out


@pytest.mark.heavy
def test_torchrun_killed_and_repeated(tmp_path):
    """
    Of real processes, which torchrun ends when one is killed, the same command again must write
    what one process does, with all of them finishing at about the same time.
    """
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(30):
        noise(64, 64, seed=i).save(folder / f"{i:02d}.png")
    run = ["-m", "oln_d2", "propose", folder, "--min-size", 32, "--top-k", 5, "--output"]
    python = [sys.executable, "-W", "ignore"]
    torchrun = [*python, "-m", "torch.distributed.run", "--nproc-per-node", 3]
    options = {"cwd": ROOT, "env": {**os.environ, "OMP_NUM_THREADS": "1"}}
    options |= {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}

    def command(*words):
        return list(map(str, words))

    process = subprocess.Popen(command(*torchrun, *run, tmp_path / "out"), **options)
    journal = tmp_path / "out/journal-2-of-3.jsonl"
    while process.poll() is None and not (
        journal.exists() and journal.read_bytes().count(b"\n") > 2
    ):
        time.sleep(0.01)
    lock = (tmp_path / "out/.lock-2-of-3").read_text()
    os.kill(int(lock.partition("(process ")[2].partition(" ")[0]), signal.SIGKILL)
    process.communicate()
    assert process.returncode != 0 and not (tmp_path / "out/results.json").exists()
    again = subprocess.run(command(*torchrun, *run, tmp_path / "out"), **options)
    assert again.returncode == 0, again.stderr
    assert again.stdout.count(", as torchrun says") == 3
    assert "Proposals for 30 images" in again.stdout
    subprocess.run(command(*python, *run, tmp_path / "one"), check=True, **options)
    assert written(tmp_path / "out") == written(tmp_path / "one")
