"""`train_net.py` as its users run it: as a process, on a small data set."""

import argparse
import json
import os
import pickle
import resource
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import NEEDS_DETECTRON2, ROOT, make_coco

from oln_d2.checks import InputError

RECIPE = "configs/cpu/oln_box_R_18_FPN_GN.yaml"
SMALL = (
    "INPUT.MIN_SIZE_TRAIN (96,) INPUT.MIN_SIZE_TEST 96 SOLVER.IMS_PER_BATCH 2 SOLVER.STEPS (1,) "
    "MODEL.RPN.PRE_NMS_TOPK_TRAIN 50 MODEL.RPN.PRE_NMS_TOPK_TEST 50 MODEL.FPN.OUT_CHANNELS 32 "
    "MODEL.ROI_BOX_HEAD.FC_DIM 32 SOLVER.MAX_ITER 4 TEST.EVAL_PERIOD 2 SOLVER.CHECKPOINT_PERIOD 2 "
    "SEED 1"
).split()


def command(output, settings, options, recipe):
    line = [
        sys.executable,
        "-W",
        "ignore",
        "train_net.py",
        "--config-file",
        recipe,
        *options,
        *SMALL,
    ]
    return [str(word) for word in [*line, "OUTPUT_DIR", output, *settings]]


def environment(data):
    return {**os.environ, "DETECTRON2_DATASETS": str(data), "OMP_NUM_THREADS": "1"}


def run(data, output, *settings, options=(), recipe=RECIPE):
    """The exit code of the finished process and all that it printed."""
    process = subprocess.run(
        command(output, settings, options, recipe),
        cwd=ROOT,
        env=environment(data),
        text=True,
        timeout=900,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    return process.returncode, process.stdout


def metrics(output):
    return [json.loads(line) for line in (output / "metrics.json").read_text().splitlines()]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_coco(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """The output folder and log of a finished run."""
    output = tmp_path_factory.mktemp("trained")
    code, log = run(data, output)
    assert code == 0, log
    return output, log


@NEEDS_DETECTRON2
def test_training(trained):
    """Losses, scalars, metrics, checkpoints and the table that the README promises."""
    output, log = trained
    lines = metrics(output)
    names = set().union(*lines)
    for name in (
        "loss_rpn_obj",
        "loss_rpn_loc",
        "loss_box_reg",
        "loss_box_score",
        "rpn/proposal_recall",
    ):
        assert name in names
    for name in ("rpn/centerness_target", "rpn/centerness_pred", "roi_head/iou_target"):
        assert name in names
    assert {line["iteration"] for line in lines if "box_unseen/AR@100" in line} == {1, 4}
    for group in ("unseen", "seen", "all"):
        assert {f"box_{group}/AR@10", f"box_{group}_filtered/AUC", f"box_{group}/ARs@100"} <= names
    assert "5 training images, 2 a batch: 4 iterations are 1.60 epochs" in log
    assert "AR@100" in log.replace(" ", "") and "unseen" in log
    for file in ("model_final.pth", "model_best.pth", "log.txt"):
        assert (output / file).is_file()
    assert list(output.glob("events.out.tfevents*"))
    results = json.loads(
        (output / "inference/coco_2017_voc_val/coco_instances_results.json").read_text()
    )
    assert {result["image_id"] for result in results} <= {1, 2, 3, 4, 5}


@NEEDS_DETECTRON2
def test_killed_run_resumes(data, tmp_path):
    """A run that is killed must go on from its last checkpoint, not start again."""
    output = tmp_path / "killed"
    endless = ["SOLVER.MAX_ITER", "100000", "TEST.EVAL_PERIOD", "0"]
    process = subprocess.Popen(
        command(output, endless, (), RECIPE),
        cwd=ROOT,
        env=environment(data),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        while not (output / "last_checkpoint").is_file():
            assert process.poll() is None
            time.sleep(0.1)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    last = int((output / "last_checkpoint").read_text()[len("model_") : -len(".pth")])
    code, log = run(data, output, "SOLVER.MAX_ITER", last + 3, options=["--resume"])
    assert code == 0, log
    assert f"Starting training from iteration {last + 1}" in log
    assert (output / "model_final.pth").is_file()


def start(data, output, *settings):
    return subprocess.Popen(
        command(output, settings, (), RECIPE),
        cwd=ROOT,
        env=environment(data),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def kill_after(process, path):
    """Kill a run in the middle, once the file is there."""
    try:
        while not path.is_file():
            assert process.poll() is None
            time.sleep(0.1)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert process.returncode == -signal.SIGKILL


@pytest.fixture(scope="module")
def two_sets(data, tmp_path_factory):
    """
    KEY VALUE pairs that train on two data sets of the same images, one of dogs and one of persons,
    in a folder with spaces and colons.
    """
    folder = tmp_path_factory.mktemp("two") / "my data: 1"
    folder.mkdir()
    annotations = (data / "coco/annotations/instances_train2017.json").read_text()
    (folder / "ann.json").write_text(annotations)
    where = f"'{folder}/ann.json', '{data}/coco/train2017'"
    rows = [f"['{name}', {where}, '{seen}']" for name, seen in (("a", "dog"), ("b", "person"))]
    where = f"'{data}/coco/annotations/instances_val2017.json', '{data}/coco/val2017'"
    rows.append(f"['c', {where}, 'dog']")
    own = ["DATASETS.OWN", f"[{', '.join(rows)}]", "DATASETS.TRAIN", "('a', 'b')"]
    return [*own, "DATASETS.TEST", "('c',)", "MODEL.OLN.OBJECTNESS_NEGATIVES", "False"]


@NEEDS_DETECTRON2
def test_killed_run_becomes_what_an_unbroken_one_would(data, two_sets, tmp_path):
    """
    Else a run on a machine that can be taken away is another experiment each time: other images,
    scales, samples, rates or averages after a kill. Nor may the number of workers change it.
    """
    settings = [*two_sets, "DATASETS.TRAIN_WEIGHTS", "[2.0, 1.0]", "INPUT.SCALE_JITTER"]
    settings += [
        "[0.5, 2.0]",
        "INPUT.MAX_SIZE_TRAIN",
        96,
        "SOLVER.EMA_DECAY",
        0.9,
        "SOLVER.LR_SCHEDULER_NAME",
    ]
    settings += ["WarmupCosineLR", "SOLVER.WARMUP_ITERS", 3, "DATASETS.TEST", "()"]
    settings += ["SOLVER.CHECKPOINT_PERIOD", 4, "SOLVER.MAX_ITER", 24, "DATALOADER.NUM_WORKERS"]
    code, log = run(data, tmp_path / "unbroken", *settings, 0)
    assert code == 0, log
    assert "a: 5 training images, 66.7% of those drawn" in log
    assert "b: 4 training images, 33.3% of those drawn" in log
    broken = tmp_path / "broken"
    kill_after(start(data, broken, *settings, 2), broken / "last_checkpoint")
    code, log = run(data, broken, *settings, 2, options=["--resume"])
    assert code == 0 and "Starting training from iteration 0" not in log, log
    first, second = (
        torch.load(folder / "model_final.pth", weights_only=True)
        for folder in (tmp_path / "unbroken", broken)
    )
    average, weights = first["model"], first["trainer"]["hooks"]["EMA"]["model"]
    for name, tensor in average.items():
        assert torch.equal(tensor, second["model"][name]), name
        assert torch.equal(weights[name], second["trainer"]["hooks"]["EMA"]["model"][name]), name
    assert any(not torch.equal(tensor, weights[name]) for name, tensor in average.items())
    # To half a period of the cosine, which ends near 0.
    assert metrics(tmp_path / "unbroken")[-1]["lr"] < 0.01 * 0.02


@NEEDS_DETECTRON2
def test_average_is_what_is_evaluated_and_saved(data, two_sets, tmp_path, caplog):
    """Else the numbers of a run are not those of the model that it leaves behind."""
    from oln_d2.engine.trainer import StrictCheckpointer, Trainer
    from oln_d2.model_zoo import load_config

    more = "SOLVER.EMA_DECAY 0.99 SOLVER.WARMUP_ITERS 0 SOLVER.BASE_LR 0.1 TEST.EVAL_PERIOD 0"
    cfg = load_config(
        ROOT / RECIPE, [*SMALL, *two_sets, *more.split(), "OUTPUT_DIR", str(tmp_path)]
    )
    trainer = Trainer(cfg)
    assert "c counts as unseen what training sees: person; add" in caplog.text
    trainer.resume_or_load()
    trainer.train()
    weights, average = trainer.model, Trainer.build_model(cfg)
    StrictCheckpointer(average).load(str(tmp_path / "model_final.pth"))
    results = [Trainer.test(cfg, model, Trainer.check_data(cfg)) for model in (weights, average)]
    evaluated = dict(trainer._last_eval_results["box_all"])
    assert evaluated == pytest.approx(results[1]["box_all"], nan_ok=True)
    assert evaluated != pytest.approx(results[0]["box_all"], nan_ok=True)


@NEEDS_DETECTRON2
def test_diverged_training_tells_where(data, two_sets, tmp_path):
    """Who has one bad image among thousands must be told which; what was good before must stay."""
    from detectron2.engine import HookBase

    from oln_d2.engine.trainer import Trainer
    from oln_d2.model_zoo import load_config

    class Diverge(HookBase):
        def after_step(self):
            bias = self.trainer.model.roi_heads.box_predictor.bbox_pred.bias
            torch.nn.init.constant_(bias, 3e38)

    more = ["DATASETS.TEST", (), "OUTPUT_DIR", str(tmp_path), "SOLVER.CHECKPOINT_PERIOD", 1]
    trainer = Trainer(load_config(ROOT / RECIPE, [*SMALL, *two_sets, *more]))
    trainer.resume_or_load()
    trainer.register_hooks([Diverge()])
    told = (
        r"At iteration 1, on .*00\d.jpg, .*00\d.jpg, the losses are NaN or infinite ."
        r"loss_box_score [\d.]+, loss_box_reg inf, .*lower SOLVER.BASE_LR"
    )
    with pytest.raises(FloatingPointError, match=told):
        trainer.train()
    assert [path.name for path in tmp_path.glob("*.pth")] == ["model_0000000.pth"]
    torch.nn.init.constant_(trainer.model.roi_heads.box_predictor.bbox_pred.bias, float("nan"))
    with pytest.raises(FloatingPointError, match="Weights are NaN .*model_final is not written"):
        trainer.checkpointer.save("model_final")
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000000.pth"


@NEEDS_DETECTRON2
def test_bfloat16_and_channels_last(data, two_sets, tmp_path):
    """They must train what float32 trains but for rounding, or say that the processor cannot."""
    from oln_d2.engine.trainer import Trainer
    from oln_d2.model_zoo import load_config
    from oln_d2.precision import computes_bfloat16

    losses = []
    for folder, more in (
        ("float32", ""),
        ("bfloat16", "SOLVER.AMP.DTYPE bfloat16 MODEL.CHANNELS_LAST True"),
    ):
        opts = [*SMALL, *two_sets, *more.split(), "OUTPUT_DIR", str(tmp_path / folder)]
        cfg = load_config(ROOT / RECIPE, [*opts, "DATASETS.TEST", (), "SOLVER.MAX_ITER", 2])
        (tmp_path / folder).mkdir()
        if more and not computes_bfloat16("cpu"):
            with pytest.raises(InputError, match="SOLVER.AMP.DTYPE is bfloat16"):
                Trainer(cfg)
            return
        torch.manual_seed(0)
        trainer = Trainer(cfg)
        trainer.resume_or_load()
        trainer.train()
        losses.append(metrics(tmp_path / folder)[-1])
    assert trainer.model.backbone.fpn_output2.weight.is_contiguous(
        memory_format=torch.channels_last
    )
    assert trainer._trainer.precision == torch.bfloat16
    for name in ("loss_rpn_obj", "loss_rpn_loc", "loss_box_score", "loss_box_reg"):
        assert losses[1][name] == pytest.approx(losses[0][name], rel=0.1, abs=1e-2)


@NEEDS_DETECTRON2
@pytest.mark.parametrize(
    "settings, message",
    [
        ("SOLVER.EMA_DECAY 1.0", "SOLVER.EMA_DECAY is 1.0; use a number from 0 to below 1"),
        ("SOLVER.AMP.DTYPE half", "SOLVER.AMP.DTYPE is 'half'; use bfloat16"),
        ("SOLVER.AMP.DTYPE float16", "SOLVER.AMP.DTYPE is float16, which needs a GPU"),
        ("SOLVER.AMP.ENABLED True", "by SOLVER.AMP.ENABLED. is float16, which needs a GPU"),
        ("SOLVER.EMA_DECAY 0.9 TEST.PRECISE_BN.ENABLED True", "set TEST.PRECISE_BN.ENABLED False"),
        ("INPUT.SCALE_JITTER [2.0,0.1]", "INPUT.SCALE_JITTER is .* two ascending numbers"),
    ],
)
def test_bad_settings(settings, message):
    """They must be named before the data is read, not by an assertion of PyTorch after it."""
    from oln_d2.engine.trainer import Trainer
    from oln_d2.model_zoo import load_config

    with pytest.raises(InputError, match=message):
        Trainer(load_config(ROOT / RECIPE, settings.split()))


@NEEDS_DETECTRON2
def test_mixed_precision_of_detectron2s_heads():
    """The reference detectors must pool RoIs at their places, not up to pixels beside them."""
    from detectron2.structures import Boxes

    from oln_d2.engine.trainer import Trainer
    from oln_d2.model_zoo import load_config

    recipe = ROOT / "configs/cpu/faster_rcnn_1_anchor_R_18_FPN_GN.yaml"
    pooler = Trainer.build_model(load_config(recipe)).roi_heads.box_pooler
    features = [torch.rand(1, 1, 256 // 2**i, 256 // 2**i).bfloat16() for i in range(4)]
    boxes = [Boxes(torch.tensor([[901.3, 801.7, 963.9, 842.1]]))]
    exact = pooler([feature.float() for feature in features], boxes)
    assert torch.equal(pooler(features, boxes), exact)


@NEEDS_DETECTRON2
def test_loader_of_a_subclass(data, tmp_path):
    """Detectron2's users override `build_train_loader`; such a trainer must go on training."""
    from detectron2.data import build_detection_train_loader

    from oln_d2.engine.trainer import Trainer
    from oln_d2.model_zoo import load_config

    class Own(Trainer):
        build_train_loader = staticmethod(build_detection_train_loader)

    where = str(data / "coco/annotations/instances_train2017.json"), str(data / "coco/train2017")
    own = ["DATASETS.OWN", [["own", *where, "dog"]], "DATASETS.TRAIN", ("own",)]
    own += ["DATASETS.TEST", (), "OUTPUT_DIR", str(tmp_path), "SOLVER.MAX_ITER", 2]
    trainer = Own(load_config(ROOT / RECIPE, [*SMALL, *own]))
    trainer.resume_or_load()
    trainer.train()
    assert (tmp_path / "model_final.pth").is_file()


@NEEDS_DETECTRON2
def test_checkpoints_are_written_whole(tmp_path):
    """A run that is killed while it writes must keep the checkpoint that it had."""
    from oln_d2.engine.trainer import SafeCheckpointer

    state = torch.nn.Linear(1, 1)
    checkpointer = SafeCheckpointer(torch.nn.Linear(300, 300), str(tmp_path), state=state)
    checkpointer.save("model_0000001", iteration=1)
    before = (tmp_path / "model_0000001.pth").read_bytes()
    state.state_dict = lambda: {"cannot be written": lambda: None}
    for name in ("model_0000001", "model_0000002"):
        with pytest.raises((AttributeError, pickle.PicklingError)):
            checkpointer.save(name, iteration=2)
    state.state_dict = dict
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.getsignal(signal.SIGXFSZ)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))  # as a full disk
    try:
        with pytest.raises(InputError, match=r"0000002.pth: cannot be written \(File too large"):
            checkpointer.save("model_0000002", iteration=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last_checkpoint"] + [
        "model_0000001.pth"
    ]
    assert (tmp_path / "model_0000001.pth").read_bytes() == before
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000001.pth"


@NEEDS_DETECTRON2
def test_resumed_run_keeps_the_best_checkpoint(data, trained, tmp_path):
    """A resumed run must not overwrite the best checkpoint with a worse one."""
    output = tmp_path / "resumed"
    output.mkdir()
    for name in ("model_0000001.pth", "model_best.pth"):
        (output / name).write_bytes((trained[0] / name).read_bytes())
    (output / "last_checkpoint").write_text("model_0000001.pth")
    before = (output / "model_best.pth").read_bytes()
    record = json.dumps({"metric": "box_unseen/AR@100", "value": 99.0, "iteration": 1})
    (output / "model_best.json").write_text(record)
    code, log = run(data, output, options=["--resume"])
    assert code == 0, log
    assert "not better than best score 99.0" in log
    assert (output / "model_best.pth").read_bytes() == before
    # A run that starts anew in the folder has a best of its own.
    code, log = run(data, output)
    assert code == 0, log
    assert "best score 99.0" not in log
    assert json.loads((output / "model_best.json").read_text())["value"] < 99


@NEEDS_DETECTRON2
def test_resume_refuses_another_model(data, trained, tmp_path):
    """A run must not go on from weights of which half are those of another model."""
    (tmp_path / "model_0000001.pth").write_bytes((trained[0] / "model_0000001.pth").read_bytes())
    (tmp_path / "last_checkpoint").write_text("model_0000001.pth")
    code, log = run(data, tmp_path, "MODEL.ROI_BOX_HEAD.FC_DIM", 64, options=["--resume"])
    assert code == 1
    assert "model_0000001.pth: the checkpoint of another model" in log.splitlines()[-1]


@NEEDS_DETECTRON2
def test_resume_with_a_cut_checkpoint(data, trained, tmp_path):
    """A run whose last checkpoint is not whole must go on from the one before, and say so."""
    whole = (trained[0] / "model_0000001.pth").read_bytes()
    (tmp_path / "model_0000001.pth").write_bytes(whole)
    (tmp_path / "model_0000002.pth").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "last_checkpoint").write_text("model_0000002.pth")
    code, log = run(data, tmp_path, options=["--resume"])
    assert code == 0, log
    assert "model_0000002.pth: is not complete" in log
    assert f"goes on from {tmp_path}/model_0000001.pth" in log
    assert "Starting training from iteration 2" in log
    for path in tmp_path.glob("*.pth"):
        path.write_bytes(b"")
    code, log = run(data, tmp_path, options=["--resume"])
    last = log.splitlines()[-1]
    assert code == 1 and ".pth: is empty" in last and "start without --resume" in last


@NEEDS_DETECTRON2
def test_own_data_without_code(data, tmp_path):
    """
    Who has one's own JSON must not need a script, which several processes would not know of. Paths
    may have spaces and colons.
    """
    folder = tmp_path / "my data: 1"
    (folder / "images").mkdir(parents=True)
    for image in (data / "coco/val2017").iterdir():
        (folder / "images" / image.name).write_bytes(image.read_bytes())
    annotations = (data / "coco/annotations/instances_val2017.json").read_text()
    (folder / "ann.json").write_text(annotations)
    (folder / "seen.txt").write_text("dog\nperson\n")
    where = f"'{folder}/ann.json', '{folder}/images'"
    rows = f"[['mine', {where}, '{folder}/seen.txt'], ['my_val', {where}, ['dog', 'person']]]"
    own = ["DATASETS.OWN", rows, "DATASETS.TRAIN", "('mine',)", "DATASETS.TEST", "('my_val',)"]
    code, log = run(data, tmp_path / "run", *own, "TEST.EVAL_PERIOD", 0)
    assert code == 0, log
    assert "4 training images" in log
    config = tmp_path / "run/config.yaml"
    weights = ["MODEL.WEIGHTS", tmp_path / "run/model_final.pth"]
    options = ["--eval-only", "--num-gpus", 2]
    # Where the model is evaluated, the training data need not be.
    gone = ["DATASETS.TRAIN", "('coco_2017_coco_train',)"]
    empty = tmp_path / "empty"
    code, log = run(empty, tmp_path / "again", *weights, *gone, options=options, recipe=config)
    assert code == 0, log
    assert (tmp_path / "again/inference/my_val/open_world_results.json").is_file()
    for rows, message in (
        ("[['mine', 'a.json', 'images']]", "DATASETS.OWN: ['mine', 'a.json', 'images'] is no row"),
        ("[['mine', 'a.json', 'images', 'seen.txt']]", "seen.txt: no such file"),
        (
            "[['my_val', 'a.json', 'images', 'dog']]",
            "as 'mine'; describe your own with DATASETS.OWN",
        ),
        ("mine:a.json", "DATASETS.OWN"),
    ):
        code, log = run(data, tmp_path / "bad", "DATASETS.OWN", rows, *own[2:])
        last = log.splitlines()[-1]
        assert code == 1 and last.startswith("train_net.py: ") and message in last, log
        assert len(last) < 400


@NEEDS_DETECTRON2
def test_broken_images_are_named(tmp_path):
    """After hours "image file is truncated" is of no use: which one?"""
    data = make_coco(tmp_path / "data")
    train, val = (data / f"coco/{part}2017/000000000003.jpg" for part in ("train", "val"))
    whole = train.read_bytes()
    weights = tmp_path / "weights.pth"
    torch.save({"model": {"fc.weight": torch.zeros(2, 2)}}, weights)
    train.write_bytes(whole[: len(whole) // 2])
    for workers in (0, 2):
        code, log = run(data, tmp_path, "DATALOADER.NUM_WORKERS", workers)
        last = log.splitlines()[-1]
        assert code == 1 and last.startswith(f"train_net.py: {train}: cannot be read"), log
        assert "Traceback" not in log
    train.write_bytes(whole)
    val.write_bytes(whole)  # of another size
    code, log = run(data, tmp_path, "DATALOADER.NUM_WORKERS", 1, "SOLVER.MAX_ITER", 2)
    last = log.splitlines()[-1]
    assert code == 1 and last.startswith(f"train_net.py: {val}: is ") and "fetch the image" in last


@NEEDS_DETECTRON2
def test_no_average_precision_of_persons(data, trained, tmp_path):
    """COCO's own evaluation would take "object" for the first class and print its AP."""
    weights = ["MODEL.WEIGHTS", trained[0] / "model_final.pth"]
    tests = ["DATASETS.TEST", "('coco_2017_val',)"]
    code, log = run(data, tmp_path, *weights, *tests, options=["--eval-only"])
    last = log.splitlines()[-1]
    assert code == 1 and "and the model one, object, which would be scored as 'airplane'" in last
    assert "coco_2017_voc_val" in last and len(last) < 400


@NEEDS_DETECTRON2
def test_stopped_and_in_use(data, tmp_path):
    """
    Ctrl-C must say how to go on; and of two runs in one folder the second would spoil the first.
    """
    endless = ["SOLVER.MAX_ITER", "100000", "TEST.EVAL_PERIOD", "0"]
    process = subprocess.Popen(
        command(tmp_path, endless, (), RECIPE),
        cwd=ROOT,
        env=environment(data),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        # Also where the tests run in the background, whose processes ignore it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    try:
        while not (tmp_path / "last_checkpoint").is_file():
            assert process.poll() is None
            time.sleep(0.1)
        code, log = run(data, tmp_path)
        assert code == 1 and "is in use by" in log.splitlines()[-1], log
    finally:
        process.send_signal(signal.SIGINT)
        log, _ = process.communicate(timeout=60)
    assert process.returncode in (130, -signal.SIGINT), log  # both are 130 to a shell
    assert "--resume" in log.splitlines()[-1] and "Traceback" not in log


@NEEDS_DETECTRON2
def test_best_checkpoint_of_two_data_sets(data, tmp_path):
    """With several test sets the first one's metric must choose the best checkpoint."""
    tests = "('coco_2017_voc_val','coco_2017_person_val')"
    code, log = run(data, tmp_path, "DATASETS.TEST", tests)
    assert code == 0, log
    record = json.loads((tmp_path / "model_best.json").read_text())
    assert record["metric"] == "coco_2017_voc_val/box_unseen/AR@100"
    assert (tmp_path / "model_best.pth").is_file()


@NEEDS_DETECTRON2
def test_evaluation_does_not_depend_on_the_number_of_processes(data, trained, tmp_path):
    """Several processes must find exactly what one finds, all metrics to the last bit."""
    checkpoint = torch.load(trained[0] / "model_final.pth")
    # The anchors themselves as boxes, so that there is something to find whatever was learnt.
    for name, tensor in checkpoint["model"].items():
        if "anchor_deltas" in name or "bbox_pred" in name:
            tensor.fill_(0.5 if name.endswith("anchor_deltas.bias") else 0)
    weights = tmp_path / "weights.pth"
    torch.save({"model": checkpoint["model"]}, weights)
    reports = []
    for processes in (1, 2, 3):
        output = tmp_path / str(processes)
        options = ["--eval-only", "--num-gpus", processes]
        code, log = run(data, output, "MODEL.WEIGHTS", weights, options=options)
        assert code == 0, log
        reports.append((output / "inference/coco_2017_voc_val/open_world_results.json").read_text())
    assert reports[0] == reports[1] == reports[2]
    assert json.loads(reports[0])["results"][0]["all"]["AR@1500"] > 0.05, reports[0]


@NEEDS_DETECTRON2
def test_expected_results_are_verified(data, trained, tmp_path):
    """TEST.EXPECTED_RESULTS must make the process fail when a result is off."""
    settings = ["MODEL.WEIGHTS", trained[0] / "model_final.pth", "TEST.EXPECTED_RESULTS"]
    for value, succeeds in ((50.0, True), (500.0, False)):
        expected = f"[['box_unseen','AR@100',{value},50.0]]"
        code, log = run(data, tmp_path, *settings, expected, options=["--eval-only"])
        assert (code == 0) == succeeds, log


@NEEDS_DETECTRON2
@pytest.mark.parametrize("recipe", ["oln_rpn", "faster_rcnn_1_anchor"])
def test_other_detectors_evaluate_the_same_way(data, tmp_path, recipe):
    """OLN-RPN's proposals and Faster R-CNN's detections must go through the same evaluation."""
    file = f"configs/cpu/{recipe}_R_18_FPN_GN.yaml"
    code, log = run(data, tmp_path, "SOLVER.MAX_ITER", 2, recipe=file)
    assert code == 0, log
    assert (tmp_path / "inference/coco_2017_voc_val/open_world_results.json").is_file()
    assert any("box_unseen/AR@100" in line for line in metrics(tmp_path))


@NEEDS_DETECTRON2
def test_masks_train_and_are_evaluated(data, tmp_path):
    """
    OLN-Mask must learn from the annotations' polygons, and its masks must be measured and written.
    """
    settings = ["SOLVER.MAX_ITER", 2, "MODEL.ROI_MASK_HEAD.CONV_DIM", 32]
    code, log = run(data, tmp_path, *settings, recipe="configs/cpu/oln_mask_R_18_FPN_GN.yaml")
    assert code == 0, log
    losses = metrics(tmp_path)[0]
    assert losses["loss_mask"] > 0 and losses["loss_mask_score"] > 0
    measured = metrics(tmp_path)[-1]
    assert {f"{iou}_{g}/AR@100" for iou in ("box", "mask") for g in ("unseen", "seen", "all")} <= {
        *measured
    }
    results = tmp_path / "inference/coco_2017_voc_val/coco_instances_results.json"
    detections = json.loads(results.read_text())
    assert detections and all("counts" in detection["segmentation"] for detection in detections)
    for detection in detections[:20]:  # `visualize` shows them
        c, b, m = (detection[name] for name in ("objectness", "box_score", "mask_score"))
        assert detection["score"] == pytest.approx((c * b * m) ** (1 / 3), rel=1e-4)


@NEEDS_DETECTRON2
def test_bad_input_is_one_sentence(data, trained, tmp_path):
    """Wrong files and settings must be named, without a traceback."""
    weights = ["MODEL.WEIGHTS", trained[0] / "model_final.pth"]
    other = tmp_path / "other.pth"
    torch.save({"model": {"fc.weight": torch.zeros(2, 2)}}, other)
    shape = ["MODEL.ROI_BOX_HEAD.FC_DIM", "64"]
    evaluate = ["--eval-only"]
    broken = tmp_path / "broken.yaml"
    broken.write_text("MODEL: [")
    cases = [
        (data, [], ["MODEL.WEIGHTS", tmp_path / "gone.pth"], "gone.pth: no such file"),
        (data, [], ["DATASETS.TRAIN", "('nope',)"], "no data set is registered as 'nope'"),
        (data, [], ["TEST.OPEN_WORLD_PROTOCOLS", "['xclas']"], "'xclas' is not one of xclass"),
        (data, ["--num-gpus", 2], [], "MODEL.DEVICE is cpu"),
        (data, ["--config-file", broken], [], "broken.yaml"),
        (data, evaluate, [], "MODEL.WEIGHTS is empty"),
        (data, evaluate, ["MODEL.WEIGHTS", tmp_path / "gone.pth"], "gone.pth: no such file"),
        (data, evaluate, ["MODEL.WEIGHTS", other], "other.pth: the checkpoint of another model"),
        (data, evaluate, [*weights, *shape], "fc1.weight has shape"),
        (data, [], ["MODEL.OLN.OBJECTNES_TARGET", "iou"], "OBJECTNES_TARGET"),
        (
            data,
            [],
            ["MODEL.OLN.OBJECTNESS_TARGET", "giou"],
            "MODEL.OLN.OBJECTNESS_TARGET is 'giou'",
        ),
        (tmp_path / "empty", [], [], "instances_train2017.json: no such file; the data set coco_"),
        (tmp_path / "empty", [*evaluate, "--num-gpus", 2], weights, "DETECTRON2_DATASETS names"),
        (data, ["--num-gpus", 2], ["SOLVER.IMS_PER_BATCH", 3], "which 2 processes cannot share"),
        (data, ["--num-gpus", 99], ["MODEL.DEVICE", "cuda"], "this needs 99 CUDA devices"),
        (data, [], ["MODEL.WEIGHTS", "http://127.0.0.1:9/w.pkl"], "w.pkl: cannot be fetched"),
        (data, ["--config-file", "oln_bix_R_50_FPN.yaml"], [], "near it: oln_box_R_50_FPN.yaml"),
        (data, ["--config-file", ""], [], "--config-file is missing"),
        (data, ["--num-machines", 2], [], "--num-machines 2 needs --dist-url"),
    ]
    for folder, options, settings, message in cases:
        code, log = run(folder, tmp_path / "out", *settings, options=options)
        assert code == 1, log
        last = log.strip().splitlines()[-1]
        assert last.startswith("train_net.py: ") and message in last, log
        assert "Traceback" not in log and "Starting training" not in log
        assert log.count(last) == 1, log  # once, however many processes there are


@NEEDS_DETECTRON2
def test_more_processes_than_gpus(monkeypatch):
    """Detectron2 would start its processes on GPUs that are not there, also for a CPU model."""
    from oln_d2.train_net import _check

    # The only way to have one GPU, on any machine.
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    args = argparse.Namespace(config_file=ROOT / RECIPE, opts=[], num_gpus=1, num_machines=1)
    args.eval_only = False
    _check(args)
    args.num_gpus = 2
    with pytest.raises(InputError, match="--num-gpus 2: .* MODEL.DEVICE cpu, .* finds 1 here"):
        _check(args)
    args.opts = ["MODEL.DEVICE", "cuda"]
    with pytest.raises(InputError, match="needs 2 CUDA devices, and PyTorch finds 1 here"):
        _check(args)


@NEEDS_DETECTRON2
def test_advice_is_given_once():
    """Where training diverges or memory is short, one line must say what to lower."""
    from oln_d2.modeling.rpn import DIVERGED
    from oln_d2.train_net import _reason

    for message in (
        "Loss became infinite or NaN at iteration=3!\nloss_dict = {}",
        f"NaN: {DIVERGED}",
    ):
        advice = _reason(FloatingPointError(message))
        assert advice.count("lower SOLVER.BASE_LR") == 1 and "\n" not in advice
    advice = _reason(RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"))
    assert advice.startswith("memory is short") and "SOLVER.IMS_PER_BATCH" in advice


@NEEDS_DETECTRON2
def test_resume_on_machines_that_share_no_folder(data, monkeypatch, tmp_path):
    """One machine would go on from a checkpoint and the others start anew, without a word."""
    from detectron2.utils import comm

    from oln_d2.engine.datasets import register_open_world_coco
    from oln_d2.engine.trainer import Trainer
    from oln_d2.model_zoo import load_config

    folder = data / "coco"
    register_open_world_coco(
        "one", folder / "annotations/instances_train2017.json", folder / "train2017", "voc", True
    )
    opts = ["DATASETS.TRAIN", ("one",), "DATASETS.TEST", (), "OUTPUT_DIR", str(tmp_path)]
    trainer = Trainer(load_config(ROOT / RECIPE, [*SMALL, *opts]))
    trainer.resume_or_load()
    # What a second machine without the checkpoint answers.
    monkeypatch.setattr(comm, "all_gather", lambda iteration: [iteration, iteration + 500])
    with pytest.raises(InputError, match=r"would start at iterations \[0, 500\]; put OUTPUT_DIR"):
        trainer.resume_or_load()


COUNT_READS = """
import runpy, sys
reads = []
def count(event, arguments):
    if event == "open" and str(arguments[0]).endswith("instances_val2017.json"):
        reads.append(arguments[0])
sys.addaudithook(count)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
print("reads:", len(reads))
"""


@NEEDS_DETECTRON2
def test_evaluation_reads_the_ground_truth_once(data, trained, tmp_path):
    """Minutes of every evaluation of a large data set would go into parsing the same file."""
    settings = ["MODEL.WEIGHTS", trained[0] / "model_final.pth"]
    line = command(tmp_path, settings, ["--eval-only"], RECIPE)
    line[3:3] = ["-c", COUNT_READS]
    log = subprocess.check_output(line, cwd=ROOT, env=environment(data), text=True, timeout=900)
    assert log.splitlines()[-1] == "reads: 1"
    assert (tmp_path / "inference/coco_2017_voc_val/open_world_results.json").is_file()


@NEEDS_DETECTRON2
def test_recipe_by_name(data, trained, tmp_path):
    """The names of the model zoo are documented to work from any folder, with no file there."""
    script = [sys.executable, "-W", "ignore", "-m", "oln_d2.train_net", "--eval-only"]
    script += ["--config-file", "cpu/oln_box_R_18_FPN_GN.yaml", *SMALL]
    script += ["MODEL.WEIGHTS", trained[0] / "model_final.pth"]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    process = subprocess.run(
        list(map(str, script)),
        cwd=tmp_path,
        env={**environment(data), "PYTHONPATH": path},
        text=True,
        timeout=900,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert process.returncode == 0, process.stdout
    assert list(tmp_path.glob("output/**/open_world_results.json"))


def test_without_detectron2():
    """The error must say how to install it; everything that does not need it must import."""
    program = (
        "import sys, runpy; sys.modules['detectron2'] = None\n"
        "import oln_d2, oln_d2.localization, oln_d2.data.coco, oln_d2.standalone.convert\n"
        "import oln_d2.model_zoo, oln_d2.recipes, oln_d2.quickstart\n"
        "for name in ('add_oln_config', 'register_datasets', 'register_open_world_coco', "
        "'OLNRPN', 'OpenWorldEvaluator'):\n"
        "    try:\n"
        "        getattr(oln_d2, name)\n"
        "    except ImportError as error:\n"
        "        assert 'pip install' in str(error) and 'detectron2.git' in str(error), error\n"
        "    else:\n"
        "        raise AssertionError(name)\n"
        "sys.argv = ['train_net.py', '--config-file', 'x']\n"
        "runpy.run_path('train_net.py', run_name='__main__')\n"
    )
    process = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, text=True, capture_output=True
    )
    assert process.returncode == 1
    assert "pip install 'git+https://github.com/facebookresearch/detectron2.git'" in process.stderr
    assert "Traceback" not in process.stderr


COMPONENTS = """
from detectron2.modeling import PROPOSAL_GENERATOR_REGISTRY, ROI_HEADS_REGISTRY
assert "OLNRPN" in PROPOSAL_GENERATOR_REGISTRY and "OLNROIHeads" in ROI_HEADS_REGISTRY
"""
DATA_SETS = """
from detectron2.data import DatasetCatalog, MetadataCatalog
assert "epic_kitchens_val" in DatasetCatalog.list()
json_file = MetadataCatalog.get("coco_2017_voc_train").json_file
assert json_file == os.path.expanduser("~/data/coco/annotations/instances_train2017.json")
"""


@NEEDS_DETECTRON2
@pytest.mark.parametrize(
    "program",
    [
        2 * "oln_d2.register_datasets()\n" + DATA_SETS,
        2 * "oln_d2.add_oln_config(cfg)\n" + COMPONENTS + DATA_SETS,
    ],
)
def test_registration_by_one_call(program, tmp_path):
    """Another project has to call one function, again does no harm; importing does nothing yet."""
    script = tmp_path / "script.py"
    script.write_text(
        "import os, sys\nimport oln_d2\n"
        "assert not {'torch', 'detectron2'} & set(sys.modules)\n"
        "from detectron2.config import get_cfg\n"
        "import oln_d2.engine.datasets\n"
        "from detectron2.data import DatasetCatalog\n"
        "assert 'coco_2017_voc_train' not in DatasetCatalog.list()\n"
        "os.environ['DETECTRON2_DATASETS'] = '~/data'\n"
        f"cfg = get_cfg()\n{program}"
    )
    env = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    subprocess.run([sys.executable, "-W", "ignore", script], cwd=tmp_path, env=env, check=True)


def test_broken_detectron2(tmp_path):
    """A Detectron2 that cannot be imported must be reported with its reason, when it is used."""
    (tmp_path / "detectron2").mkdir()
    (tmp_path / "detectron2/__init__.py").write_text("import no_such_fvcore")
    env = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    process = subprocess.run(
        [sys.executable, "-c", "import oln_d2\noln_d2.add_oln_config"],
        env=env,
        text=True,
        capture_output=True,
    )
    last = process.stderr.splitlines()[-1]
    assert process.returncode == 1 and "needs no_such_fvcore" in last and "pip install" in last
