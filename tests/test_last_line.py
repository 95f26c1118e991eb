"""How commands end that are stopped, or for which the machine lacks something."""

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT
from test_propose import noise, weights  # noqa: F401
from torch.utils.data import DataLoader, Dataset

from oln_d2.checks import interrupted, reason
from oln_d2.cli import REMEDIES


def start(*arguments, **options):
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", "oln_d2", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": ""},
        # Also where the tests run in the background, whose processes ignore Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        **options,
    )


def press_ctrl_c(process, begun):
    """Once `begun()` says so. Returns the exit code and what was printed last."""
    try:
        while not begun():
            assert process.poll() is None, process.communicate()
            time.sleep(0.05)
        for _ in range(6):  # Python drops one that comes while a module is imported
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                error = process.communicate(timeout=20)[1]
                break
    finally:
        process.kill()
    assert "Traceback" not in error, error
    # A shell says 130 of both: Python ends by the signal itself where code made at run time had it.
    code = 130 if process.returncode == -signal.SIGINT else process.returncode
    return code, error.strip().split("\n")[-1]


def test_propose_stopped_goes_on(weights, tmp_path):  # noqa: F811
    """What is done must not be lost, and the last line must say how to go on."""
    (tmp_path / "photos").mkdir()
    for i in range(60):
        noise(100, 90, seed=i).save(tmp_path / f"photos/{i}.png")
    command = ["propose", tmp_path / "photos", "--weights", weights, "--batch-size", 1]
    command += ["--output", tmp_path / "out", "--device", "cpu"]
    journal = tmp_path / "out/journal.jsonl"
    ended = press_ctrl_c(
        start(*command), lambda: journal.exists() and b"boxes" in journal.read_bytes()
    )
    assert ended == (130, "stopped; the same command goes on")
    out, _ = (process := start(*command)).communicate()
    assert process.returncode == 0
    new = int(out.split(", ")[1].split()[0])
    assert out.startswith("Proposals for 60 images") and 0 < new < 60


def test_quickstart_stopped(tmp_path):
    """The same for the first command that a user tries."""
    command = ["quickstart", "--engine", "standalone", "--output", tmp_path / "out"]
    ended = press_ctrl_c(start(*command), (tmp_path / "out/oln_box/csv").exists)
    assert ended == (130, "stopped; the same command goes on")


def test_evaluate_stopped(tmp_path):
    """A traceback of a command that a user ends looks like a mistake."""
    content = {"images": [{"id": 1, "height": 9, "width": 9}], "annotations": []}
    (tmp_path / "gt.json").write_text(
        json.dumps({**content, "categories": [{"id": 1, "name": "a"}]})
    )
    os.mkfifo(tmp_path / "d.json")  # never comes to an end
    process = start("evaluate", tmp_path / "gt.json", tmp_path / "d.json", "--seen", "a")
    with open(tmp_path / "d.json", "w"):
        assert press_ctrl_c(process, lambda: True) == (130, "stopped")


def test_stopped_while_a_checkpoint_is_written():
    """torch.save then ends in an error of its own, which would be a traceback and exit code 1."""

    class Stopped(io.BytesIO):
        def write(self, data):
            if self.tell():
                raise KeyboardInterrupt
            return super().write(data)

    with pytest.raises(RuntimeError) as error:
        torch.save({"a": torch.zeros(100_000)}, Stopped())
    assert interrupted(error.value) and not interrupted(RuntimeError())


@pytest.mark.parametrize("arguments", [["--help"], ["evaluate", "--help"]])
def test_nobody_reads(arguments):
    """`oln-d2 --help | head` must not end in a message about a pipe."""
    process = start(*arguments)
    process.stdout.close()
    assert (process.stderr.read(), process.wait()) == ("", 141)


class Dies(Dataset):
    def __len__(self):
        return 1

    def __getitem__(self, index):
        os.kill(os.getpid(), signal.SIGBUS)  # as for want of shared memory


def test_killed_workers():
    """Its remedy is not what PyTorch's long message leads to in a container."""
    with pytest.raises(RuntimeError) as error:
        next(iter(DataLoader(Dies(), num_workers=1)))
    sentence = reason(error.value, *REMEDIES)
    assert sentence.startswith("a process has ended (DataLoader worker (pid")
    assert "--shm-size" in sentence and len(sentence) < 400 and "\n" not in sentence


@pytest.mark.parametrize("take", [lambda: np.zeros(1 << 56), lambda: torch.zeros(1 << 56)])
def test_memory(take):
    """Too large a batch must lead to a smaller one, not to a traceback."""
    with pytest.raises((MemoryError, RuntimeError)) as error:
        take()
    assert reason(error.value, *REMEDIES).startswith("memory is short (")


def test_mistakes_are_not_hidden():
    """Of a mistake in the package a report needs the traceback."""
    assert reason(RuntimeError("shape mismatch"), *REMEDIES) is None
    assert reason(KeyError("a"), *REMEDIES) is None
    denied = PermissionError(13, "Permission denied", "a.json")
    assert reason(denied, *REMEDIES) == "a.json: Permission denied"
