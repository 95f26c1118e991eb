"""Several processes, on one machine and by gloo, as they are on several GPUs."""

import contextlib
import copy
import faulthandler
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import NEEDS_DETECTRON2, ROOT, make_coco
from test_train_net import RECIPE, SMALL

HAS_DETECTRON2 = not NEEDS_DETECTRON2.args[0]
SIZE = 96, 128
# Of the image that each process has; the second has no object.
BOXES = [
    torch.tensor([[10.0, 10, 60, 60], [40, 20, 120, 90]]),
    torch.zeros(0, 4),
    torch.tensor([[20.0, 30, 110, 80]]),
]


def in_processes(function, number, *args):
    """Runs `function(rank, number, *args)` in so many processes that know of each other."""
    torch.multiprocessing.spawn(_begin, (function, number, *args), nprocs=number)


def _begin(rank, function, number, folder, *args):
    faulthandler.enable()  # says where, should a process abort
    torch.set_num_threads(1)
    path = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", init_method=path, world_size=number, rank=rank)
    function(rank, number, folder, *args)
    dist.barrier()  # none leaves while another may still read from it
    dist.destroy_process_group()


def image(rank):
    return torch.randint(0, 256, (3, *SIZE), generator=torch.Generator().manual_seed(rank)).byte()


def standalone_model():
    """The model, and the losses of the wrapped model on a rank's image."""
    from oln_d2.standalone import build_detector
    from oln_d2.standalone.models import training_losses

    class Losses(torch.nn.Module):
        def __init__(self):
            super().__init__()
            small = {"depth": 10, "norm": "GN", "fpn_channels": 32, "representation_size": 32}
            self.model = build_detector(**small, trainable_backbone_layers=5)

        def forward(self, rank):
            target = {"boxes": BOXES[rank], "labels": torch.ones(len(BOXES[rank])).long()}
            return training_losses(self.model, [image(rank)], [target])

    return Losses(), lambda model, rank: model(rank)


def detectron2_model(recipe):
    """The same of a recipe of Detectron2."""
    from detectron2.modeling import build_model
    from detectron2.structures import Boxes, Instances, PolygonMasks
    from detectron2.utils.events import EventStorage
    from test_configs import load_config

    cfg = load_config(f"cpu/{recipe}_R_18_FPN_GN.yaml")
    cfg.merge_from_list(["MODEL.FPN.OUT_CHANNELS", 32, "MODEL.ROI_BOX_HEAD.FC_DIM", 32])

    def losses(model, rank):
        boxes = BOXES[rank]
        objects = Instances(SIZE, gt_boxes=Boxes(boxes))
        objects.gt_classes = torch.zeros(len(boxes), dtype=torch.int64)
        polygons = [[box[[0, 1, 2, 1, 2, 3, 0, 3]].double().numpy()] for box in boxes]
        objects.gt_masks = PolygonMasks(polygons)
        with EventStorage():
            return model([{"image": image(rank), "instances": objects}])

    return build_model(cfg), losses


def gradients(model, losses, rank):
    torch.manual_seed(rank)  # of the samples
    model.zero_grad()
    sum(losses(model, rank).values()).backward()
    return [p.grad.clone() for p in model.parameters() if p.requires_grad]


def compare_gradients(rank, number, folder):
    """Fails unless those of all processes together are the mean of those of each alone."""
    make = {"standalone": standalone_model}
    if HAS_DETECTRON2:
        make |= {r: lambda r=r: detectron2_model(r) for r in ("oln_box", "oln_mask")}
    # Groups of two and of three processes; in order, since all have to make each.
    groups = [dist.new_group(list(range(size))) for size in (2, 3)]
    for name, build in make.items():
        torch.manual_seed(0)
        model, losses = build()
        model.train()
        alone = gradients(copy.deepcopy(model), losses, rank)
        for size, group in zip((2, 3), groups):
            if rank >= size:
                continue
            expected = [gradient.clone() for gradient in alone]
            for gradient in expected:
                dist.all_reduce(gradient, group=group)
            # As both runtimes wrap it.
            wrapped = torch.nn.parallel.DistributedDataParallel(
                copy.deepcopy(model), broadcast_buffers=False, process_group=group
            )
            found = gradients(wrapped, losses, rank)
            for a, b in zip(found, expected, strict=True):
                torch.testing.assert_close(a, b / size, rtol=1e-5, atol=1e-5)
            moved = sum(gradient.abs().sum() for gradient in found)
            assert moved > 0.1, name
            assert any(not torch.allclose(a, b) for a, b in zip(found, alone))


@pytest.mark.heavy
def test_gradient_is_the_mean_of_the_shares(tmp_path):
    """
    On several GPUs a model would otherwise learn something else; where one of them has an image
    without an object, the others would wait for its gradients for ever.
    """
    in_processes(compare_gradients, 3, str(tmp_path))


def resume_on_one_of_two(rank, number, folder, data):
    """Fails unless both processes are told that only the first has a checkpoint."""
    from detectron2.engine import defaults
    from detectron2.utils import comm

    from oln_d2.checks import InputError
    from oln_d2.engine.trainer import Trainer
    from oln_d2.model_zoo import load_config

    comm.create_local_process_group(number)
    # Detectron2 gives each process a GPU.
    defaults.create_ddp_model = torch.nn.parallel.DistributedDataParallel
    json_file = f"{data}/coco/annotations/instances_train2017.json"
    own = ["DATASETS.OWN", [["a", json_file, f"{data}/coco/train2017", "dog"]]]
    own += ["DATASETS.TRAIN", ("a",), "DATASETS.TEST", (), "MODEL.DEVICE", "cpu:0"]
    own += ["SOLVER.MAX_ITER", 2, "OUTPUT_DIR", f"{folder}/{rank}"]
    os.makedirs(f"{folder}/{rank}")
    trainer = Trainer(load_config(ROOT / RECIPE, [*SMALL, *own]))
    trainer.resume_or_load(resume=False)
    trainer.train()
    weights = [p.detach() for p in trainer.model.parameters()]
    for value in weights:
        first = value.clone()
        dist.broadcast(first, 0)
        assert torch.equal(first, value)
    with pytest.raises(InputError, match=r"would start at iterations \[2, 0\]; put OUTPUT_DIR"):
        Trainer(load_config(ROOT / RECIPE, [*SMALL, *own])).resume_or_load(resume=True)


@pytest.mark.heavy
@NEEDS_DETECTRON2
def test_resume_on_one_of_two_machines(tmp_path):
    """One machine would go on from its checkpoint and the other start anew, without a word."""
    data = make_coco(tmp_path / "data")
    in_processes(resume_on_one_of_two, 2, str(tmp_path), str(data))
    assert (tmp_path / "0/model_final.pth").exists() and not (
        tmp_path / "1/model_final.pth"
    ).exists()


def children(pid):
    """Processes that a process has started, and those of them, by number."""
    parents = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            status = (folder / "status").read_text()
        except OSError:
            continue
        if "State:\tZ" not in status:
            parents[int(folder.name)] = int(status.partition("PPid:\t")[2].split()[0])
    found, new = set(), {pid}
    while new := {child for child, parent in parents.items() if parent in new} - found:
        found |= new
    return found


def rank_of(pid):
    try:
        content = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace")
    except OSError:
        return None
    return dict(line.partition("=")[::2] for line in content.split("\0")).get("LOCAL_RANK")


def kill_one(line, env, wait_for, which):
    """Starts a command, kills one of its processes; code and log once all have ended."""
    log = Path(env["LOG"])
    with open(log, "w") as file:
        process = subprocess.Popen(
            list(map(str, line)), cwd=ROOT, env=env, stdout=file, stderr=file
        )
    try:
        while not wait_for():
            assert process.poll() is None, log.read_text()
            time.sleep(0.2)
        family = children(process.pid)
        os.kill(which(process.pid, family), signal.SIGKILL)
        code = process.wait(timeout=300)
        deadline = time.monotonic() + 300
        while any(Path(f"/proc/{pid}").exists() for pid in family):
            assert time.monotonic() < deadline, "a process hangs"
            time.sleep(0.2)
    finally:
        for pid in [process.pid, *children(process.pid)]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    return code, log.read_text()


@pytest.mark.heavy
@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="processes are looked up in /proc")
@pytest.mark.parametrize("launcher, rank", [("devices", 1), ("devices", 0), ("torchrun", 1)])
def test_process_of_a_training_dies(tmp_path, launcher, rank):
    """The others must end, with a message, instead of waiting for it for ever."""
    from test_standalone_train import TORCHRUN, options

    data = make_coco(tmp_path / "data")
    more = ["--batch-size", 2, "--epochs", 1000, "--checkpoint-every", 1]
    line = ["-m", "oln_d2", *options(data, tmp_path / "out", *more)]
    line = [*TORCHRUN, *line] if launcher == "torchrun" else [*line, "--devices", 2]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "LOG": str(tmp_path / "log.txt")}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), env.get("PYTHONPATH", "")])

    def which(pid, family):
        if launcher == "devices" and rank == 0:
            return pid
        return min(child for child in family if rank_of(child) == str(rank))

    code, log = kill_one(
        [sys.executable, "-W", "ignore", *line],
        env,
        (tmp_path / "out/checkpoint.pth").exists,
        which,
    )
    assert code != 0
    if launcher == "torchrun":  # says itself who died, and may end the other before it notices
        assert "Signal 9 (SIGKILL)" in log, log
    else:
        assert "another process has ended" in log or "terminated with code -9" in log, log
    if launcher == "devices" and rank == 0:
        assert "error: another process has ended" in log and "Traceback" not in log, log
    torch.load(tmp_path / "out/checkpoint.pth", weights_only=True)


@pytest.mark.heavy
@NEEDS_DETECTRON2
@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="processes are looked up in /proc")
def test_process_of_an_evaluation_dies(tmp_path):
    """Detectron2's processes must end with one sentence, too."""
    data = make_coco(tmp_path / "data")
    line = [sys.executable, "-W", "ignore", "train_net.py", "--config-file", RECIPE, "--eval-only"]
    line += ["--num-gpus", 2, *SMALL, "OUTPUT_DIR", tmp_path / "out", "MODEL.WEIGHTS", "gone.pth"]
    env = {**os.environ, "DETECTRON2_DATASETS": str(data), "OMP_NUM_THREADS": "1"}
    env["LOG"] = str(tmp_path / "log.txt")
    started = []

    def both_started():
        for pid in set(Path("/proc").glob("[0-9]*")):
            try:
                command = (pid / "cmdline").read_bytes()
                is_own = str(tmp_path).encode() in (pid / "environ").read_bytes()
            except OSError:
                continue
            if is_own and b"spawn_main" in command and int(pid.name) not in started:
                started.append(int(pid.name))
        return len(started) == 2

    code, log = kill_one(line, env, both_started, lambda pid, family: started[-1])
    last = log.strip().splitlines()[-1]
    assert code == 1 and last.startswith("train_net.py: a process has ended"), log
    assert "SIGKILL" in last and "Traceback" not in log
