"""What is killed, disks that are full or not to be written to, see docs/reliability.md."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import NEEDS_DETECTRON2, ROOT, make_coco
from test_propose import noise
from test_standalone_train import run
from test_train_net import run as train_net

from oln_d2.checks import InputError
from oln_d2.cli import main
from oln_d2.files import check_output, make_folder, write_file, write_whole

# Writes a file, and is killed before that is done.
KILLED = """
import os, signal, sys
from oln_d2.files import write_whole
with write_whole(sys.argv[1]) as temporary, open(temporary, "w") as file:
    file.write("half")
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("clear", [lambda p: make_folder(p.parent), lambda p: check_output(p, [])])
def test_what_a_kill_leaves_is_removed(tmp_path, clear):
    """
    Each kill would leave a hidden file as large as a checkpoint, until the disk is full; but nobody
    may take away what another process is writing.
    """
    path = tmp_path / "model.pth"
    write_file(path, "whole")
    (tmp_path / ".oln-d2_mine").mkdir()  # whatever that is
    done = subprocess.run([sys.executable, "-c", KILLED, path], cwd=ROOT)
    assert done.returncode == -9 and path.read_text() == "whole"
    assert len(list(tmp_path.iterdir())) == 3
    with write_whole(tmp_path / "other.pth") as temporary:
        Path(temporary).write_text("half")
        clear(path)
        assert len(list(tmp_path.iterdir())) == 3 and Path(temporary).read_text() == "half"
    assert sorted(p.name for p in tmp_path.iterdir()) == [".oln-d2_mine", "model.pth", "other.pth"]


@pytest.mark.heavy
@pytest.mark.parametrize(
    "what",
    [
        pytest.param("train_net", marks=NEEDS_DETECTRON2),
        *("train", "evaluate", "propose", "compare", "audit", "quickstart"),
    ],
)
def test_three_kills(what):
    """What was killed and run again must leave what an undisturbed run leaves, to the last bit."""
    line = [sys.executable, "-W", "ignore", ROOT / "tools/kill_and_resume.py", what]
    done = subprocess.run(
        [*line, "--kills", "3", "--seed", "1"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{what}: killed 3 times" in done.stdout and "0 differences" in done.stdout


def test_the_last_score_survives_a_kill(tmp_path):
    """Else the last checkpoint of a training says whether it was resumed after its evaluation."""
    from oln_d2.standalone.training import Best

    before, after = (Best(str(tmp_path), "AR@100") for _ in range(2))
    before.current_score = torch.tensor(0.5)
    after.load_state_dict(before.state_dict())
    assert after.state_dict() == before.state_dict()


class Disk:
    """A file system of its own, of so many bytes."""

    def __init__(self, folder):
        self.folder = folder
        folder.mkdir()

    def mount(self, *options):
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", self.folder],
            capture_output=True,
            text=True,
        )
        if done.returncode:
            pytest.skip(f"a small file system cannot be mounted here ({done.stderr.strip()})")

    def resize(self, size):
        self.mount("remount", f"size={size}")

    def fill(self, left=0):
        """Writes a file that leaves so many bytes."""
        with open(self.folder / "filler", "wb", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(4096))
            except OSError as error:
                assert error.errno == errno.ENOSPC
            file.truncate(max(file.tell() - left, 0))


@pytest.fixture
def disk(tmp_path):
    if os.name != "posix" or os.geteuid() != 0:
        pytest.skip("to mount a small file system one has to be root")
    disk = Disk(tmp_path / "disk")
    disk.mount("size=100m")
    yield disk
    subprocess.run(["umount", disk.folder], check=True)


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    return make_coco(tmp_path_factory.mktemp("data"))


def half_files(folder):
    return [path for path in folder.rglob(".*") if path.name != ".lock"]


def commands(coco, folder):
    """Each command that writes to a folder, and a file that it needs room for."""
    import json

    val, images = coco / "coco/annotations/instances_val2017.json", coco / "coco/val2017"
    results = folder.parent / "results.json"
    rows = [
        {"image_id": i % 5 + 1, "category_id": 1, "bbox": [i % 50, 9, 40, 30], "score": 1 / (i + 1)}
        for i in range(300)
    ]
    results.write_text(json.dumps(rows))
    output = ["--output", folder]
    return {
        "propose": ([images, "--gt", val, *output], "journal.jsonl"),
        "compare": ([val, results, "--split", "voc", "--images", images, *output], "found.svg"),
        "audit": ([val, "--images", images, *output], "proposals/journal.jsonl"),
        "evaluate": ([val, results, "--split", "voc", "--json", folder / "ar.json"], "ar.json"),
        "quickstart": (["--engine", "standalone", "--images", 2, "--epochs", 1, *output], None),
    }


@pytest.mark.parametrize("name", ["propose", "compare", "audit", "evaluate", "quickstart"])
def test_commands_on_a_full_disk(coco, disk, tmp_path, capsys, name):
    """
    One sentence must say that there is no room, and where; nothing that is half written may stay,
    and the same command must go on once there is room.
    """
    folder = disk.folder / "out"
    folder.mkdir()
    arguments, path = commands(coco, folder)[name]
    line = [name, *map(str, arguments)]
    disk.fill(left=4096)
    assert main(line) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("error: ") and "No space left on device" in message
    assert str(folder / path) in message if path else "make room" in message
    assert not half_files(folder)
    (disk.folder / "filler").unlink()
    disk.mount("remount", "ro")
    assert main(line) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert str(folder) in message and "Read-only file system" in message
    if name != "quickstart":  # which takes a minute
        disk.mount("remount", "rw")
        assert main(line) == 0
        assert (folder / path).stat().st_size > 0


def test_training_on_a_full_disk(coco, disk, tmp_path):
    """The last good checkpoint must stay, and the run go on from it once there is room."""
    run(coco, tmp_path / "whole", checkpoint_every=1)
    size = (tmp_path / "whole/checkpoint.pth").stat().st_size
    disk.resize(size * 3 // 2)
    output = disk.folder / "out"
    with pytest.raises(InputError, match=r"out/checkpoint.pth: cannot be written \(No space left"):
        run(coco, output, checkpoint_every=1)
    assert not half_files(output)
    content = torch.load(output / "checkpoint.pth", weights_only=True)
    assert content["global_step"] == 1
    disk.resize(4 * size)
    run(coco, output, checkpoint_every=1, resume=True)
    for name in ("model_final.pth", "checkpoint.pth"):
        found, expected = (
            torch.load(folder / name, weights_only=True)["model"]
            for folder in (output, tmp_path / "whole")
        )
        assert all(torch.equal(expected[key], value) for key, value in found.items())
    disk.mount("remount", "ro")
    with pytest.raises(
        InputError, match="out: cannot be written to .Read-only file system.; choos"
    ):
        run(coco, output, checkpoint_every=1, resume=True)


@pytest.mark.heavy
@NEEDS_DETECTRON2
def test_detectron2_on_a_full_disk(coco, disk, tmp_path):
    """The same of `train_net.py`, also where there is no room for its logs, which fail first."""
    settings = ["TEST.EVAL_PERIOD", 0, "DATASETS.TEST", "()", "SOLVER.CHECKPOINT_PERIOD", 1]
    code, log = train_net(coco, tmp_path / "whole", *settings)
    assert code == 0, log
    size = (tmp_path / "whole/model_0000000.pth").stat().st_size
    disk.resize(size * 3 // 2)
    output = disk.folder / "out"
    code, log = train_net(coco, output, *settings)
    last = log.strip().splitlines()[-1]
    assert code == 1 and "Traceback" not in log, log
    assert f"{output}/model_0000001.pth: cannot be written (No space left on device); make" in last
    assert not half_files(output)
    assert sorted(path.name for path in output.glob("*.pth")) == ["model_0000000.pth"]
    disk.resize(8 * size)
    code, log = train_net(coco, output, *settings, options=["--resume"])
    assert code == 0 and "Starting training from iteration 1" in log, log
    disk.mount("remount", "ro")
    code, log = train_net(coco, output, *settings, options=["--resume"])
    assert code == 1 and "Read-only file system" in log.strip().splitlines()[-1], log
    disk.mount("remount", "rw")
    disk.fill()
    endless = [*settings[:-1], 10**6, "SOLVER.MAX_ITER", 10**6]
    code, log = train_net(coco, output, *endless)
    assert code == 1 and "train_net.py: [Errno 28] No space left on device; make room" in log, log


def test_cache_that_cannot_be_written(tmp_path, monkeypatch):
    """Weights of the model zoo are kept where a container may let nobody write."""
    from oln_d2 import model_zoo

    (tmp_path / "cache").write_text("no folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(InputError, match="cache/oln_d2: cannot be made .*set .* XDG_CACHE_HOME to"):
        model_zoo.get_checkpoint_url("small/oln_box_lite0_general.yaml")


def test_home_stays_as_it_is(tmp_path):
    """ONNX Runtime would report to its maker, and leave files where a container may let nobody."""
    code = "import oln_d2; oln_d2.load()"
    keep = {k: v for k, v in os.environ.items() if not k.startswith(("XDG", "ORT"))}
    env = {**keep, "HOME": str(tmp_path)}
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, check=True)
    assert not list(tmp_path.rglob("*"))


@pytest.mark.heavy
def test_home_that_cannot_be_written(coco, disk, tmp_path):
    """Matplotlib keeps a cache there; a picture must come out all the same."""
    disk.mount("remount", "ro")
    noise(50, 50).save(tmp_path / "a.png")
    arguments, _ = commands(coco, tmp_path / "out")["evaluate"]
    arguments[-2:] = ["--plot", tmp_path / "ar.png"]
    keep = {k: v for k, v in os.environ.items() if not k.startswith(("XDG", "MPL", "TORCH"))}
    env = {**keep, "HOME": str(disk.folder)}
    propose = ["propose", tmp_path / "a.png", "--output", tmp_path / "out"]
    for line in (["evaluate", *arguments], propose):
        line = [sys.executable, "-m", "oln_d2", *map(str, line)]
        done = subprocess.run(line, cwd=ROOT, env=env, capture_output=True, text=True)
        assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert (tmp_path / "ar.png").stat().st_size > 1000
