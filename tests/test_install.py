"""What `pip install .` installs: the core alone, in a virtual environment of its own."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import CONFIGS, ROOT, make_coco
from test_standalone import standalone_model

from oln_d2.standalone import save_checkpoint
from oln_d2.standalone.export import export

# The constraints are those of one Python.
CONSTRAINTS = ["-c", str(ROOT / "constraints.txt")] if sys.version_info[:2] == (3, 11) else []


class Installed:
    """
    The core in `folder`/env. Commands run in `folder`, where this repository is not in sight; it
    holds coco/ (see `make_coco`), results.json, model.pth and model.onnx.
    """

    def __init__(self, folder):
        self.folder = folder
        self.env = folder / "env"
        self.bin = self.env / ("Scripts" if os.name == "nt" else "bin")
        self.gt = "coco/annotations/instances_val2017.json"

    def run(self, program, *arguments):
        hidden = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
        return subprocess.run(
            [str(self.bin / program), *map(str, arguments)],
            cwd=self.folder,
            env={name: value for name, value in os.environ.items() if name not in hidden},
            capture_output=True,
            text=True,
            timeout=300,
        )

    def python(self, code):
        done = self.run("python", "-c", code)
        assert done.returncode == 0, done.stderr
        return done.stdout.split()

    def succeeds(self, *arguments):
        """What a command prints; it must end with 0."""
        done = self.run("oln-d2", *arguments)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout


@pytest.fixture(scope="module")
def core(tmp_path_factory):
    folder = tmp_path_factory.mktemp("installed")
    # A copy, since what an earlier build left in the repository would get into this one.
    left_out = shutil.ignore_patterns(".*", "*.egg-info", "__pycache__", "build", "dist", "env")
    for name in "configs", "oln_d2":
        shutil.copytree(ROOT / name, folder / "source" / name, ignore=left_out)
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy(path, folder / "source")
    dist = folder / "dist"
    # Makes an sdist, and the wheel from it.
    check([sys.executable, "-m", "build", "--outdir", dist, folder / "source"])
    assert len(list(dist.glob("*.tar.gz"))) == 1
    (wheel,) = dist.glob("*.whl")
    check([sys.executable, "-m", "venv", folder / "env"])
    installed = Installed(folder)
    check([installed.bin / "python", "-m", "pip", "install", "-q", *CONSTRAINTS, wheel])

    make_coco(folder)
    gt = json.loads((folder / installed.gt).read_text())
    results = [
        {"image_id": a["image_id"], "category_id": 1, "bbox": a["bbox"], "score": 1 / a["id"]}
        for a in gt["annotations"]
    ]
    (folder / "results.json").write_text(json.dumps(results))
    model = standalone_model(norm="GN", min_size=96, max_size=160, rpn_pre_nms_top_n_test=100)
    save_checkpoint(model, str(folder / "model.pth"))
    export(str(folder / "model.pth"), str(folder / "model.onnx"))
    return installed


def check(command):
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_core_is_small_and_has_no_torch(core):
    """Who only evaluates must not download gigabytes; the README promises less than 400 MB."""
    code = """import importlib.util
print(*(name for name in ("torch", "torchvision", "detectron2", "onnx", "av", "cv2")
        if importlib.util.find_spec(name)))"""
    assert core.python(code) == []
    files = [path for path in core.env.rglob("*") if path.is_file() and not path.is_symlink()]
    assert sum(path.stat().st_size for path in files) < 400e6


def test_data_travel_with_the_package(core):
    """The recipes must be found by name; a type checker must see the types."""
    code = """from pathlib import Path
import oln_d2
from oln_d2 import model_zoo
print(Path(oln_d2.__file__).parent)
print(*(model_zoo.get_config_file(row["recipe"]) for row in model_zoo.rows()))"""
    package, *found = core.python(code)
    assert Path(package).is_relative_to(core.env)
    recipes = {path.relative_to(CONFIGS) for path in CONFIGS.rglob("*.yaml")}
    configs = Path(package, "configs")
    assert recipes == {path.relative_to(configs) for path in configs.rglob("*.yaml")}
    assert found and {Path(path).relative_to(configs) for path in found} <= recipes
    assert Path(package, "py.typed").is_file()
    code = """from importlib.metadata import version
import oln_d2
print(version("oln-d2") == oln_d2.__version__)"""
    assert core.python(code) == ["True"]


def test_help(core):
    """Every command is listed, by the script and by the module."""
    shown = core.succeeds("--help")
    assert shown == core.run("python", "-m", "oln_d2", "--help").stdout
    names = {path.stem for path in (ROOT / "oln_d2/commands").glob("*.py")}
    for name in names - {"__init__", "arguments"}:
        assert re.search(rf"^    {name}\b", shown, re.MULTILINE)
        core.succeeds(name, "--help")


def test_evaluate(core):
    """The results are the annotations themselves, so all are found."""
    plot = core.folder / "plot.png"
    shown = core.succeeds("evaluate", core.gt, "results.json", "--split", "voc", "--plot", plot)
    assert "100.0" in shown and plot.is_file()


def test_visualize(core):
    """The pictures and the page must be there, whose template and script the package has."""
    images = ["--images", "coco/val2017", "--output", "pictures"]
    core.succeeds("visualize", core.gt, "results.json", *images, "--split", "voc", "--html")
    written = list((core.folder / "pictures").rglob("[!.]*.*"))
    assert {path.suffix for path in written} == {".jpg", ".html", ".js"}


def test_propose(core):
    """An exported model proposes without torch, and `evaluate` reads what it proposed."""
    chosen = ["--weights", "model.onnx", "--gt", core.gt, "--output", "proposals", "--draw"]
    core.succeeds("propose", "coco/val2017", *chosen)
    found = json.loads((core.folder / "proposals/results.json").read_text())
    assert {entry["image_id"] for entry in found} == {1, 2, 3, 4, 5}
    assert all(entry["objectness"] > 0 and entry["box_score"] > 0 for entry in found)
    core.succeeds("evaluate", core.gt, "proposals/results.json", "--split", "voc")


def test_first_minute(core):
    """Whoever installs the core proposes on photographs at once: no weights, network or torch."""
    shutil.copytree(ROOT / "examples/photos", core.folder / "photos")
    code = """import socket, sys
def refuse(*args, **kwargs):
    raise OSError("there is no network")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
from oln_d2.cli import main
sys.exit(main(["propose", "photos", "--draw", "--html"]))"""
    done = core.run("python", "-c", code)
    assert done.returncode == 0, done.stderr
    folder = core.folder / "output/propose"
    found = json.loads((folder / "results.json").read_text())
    assert {entry["image_id"] for entry in found} == {1, 2, 3, 4}
    assert len(list((folder / "pictures").glob("*.jpg"))) == 4
    audited = core.succeeds("audit", core.gt, "--images", "coco/val2017")
    assert "candidates" in audited and (core.folder / "output/audit/index.html").is_file()


def test_propose_from_python(core):
    """What the README pastes into a notebook."""
    code = """import oln_d2
(found,) = oln_d2.load("model.onnx")("coco/val2017/000000000001.jpg", top_k=7)
print(len(found), *found.boxes.shape, len(found.top(3)), found.draw().mode)
result = oln_d2.evaluate("coco/annotations/instances_val2017.json", "results.json", seen="voc")
print(type(result).__name__)"""
    assert core.python(code) == ["7", "7", "4", "3", "RGB", "OpenWorldResult"]


def test_benchmark_evaluator(core):
    """It needs no extra: where a package to compare with is missing, it says so."""
    sizes = ["--images", 3, "--dets", 20, "--reference-images", 2]
    core.succeeds("benchmark", "evaluator", core.gt, *sizes)


@pytest.mark.parametrize(
    "command",
    [
        "train --train-json {gt} --images coco/val2017 --split voc --output out",
        "quickstart --output out",
        "export model.pth out.onnx",
        "convert model.pth out",
        "propose coco/val2017 --weights model.pth --output out",
        "propose coco/val2017 --device cuda --output out",
        "propose coco/val2017 --weights model.pth --config-file oln_box_R_50_FPN.yaml --output out",
        "benchmark masks",
    ],
)
def test_missing_layer_is_one_sentence(core, command):
    """Who lacks a layer must read how to install it, and no traceback; nothing may be written."""
    done = core.run("oln-d2", *command.format(gt=core.gt).split())
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert re.search(r"install .*\.\[(torch|timm|train|export)\]|install .*detectron2\.git", line)
    assert not (core.folder / "out").exists()
    if command.startswith(("train", "quickstart")):
        assert "[train]" in line  # which includes the extra torch
    if "cuda" in command:
        assert "[timm]" in line  # of which the backbone of the model of this package is
