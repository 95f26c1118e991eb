"""`evaluate` and `benchmark evaluator`, as users run them, and `oln_d2.evaluate`."""

import copy
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import oln_d2
from oln_d2.checks import InputError
from oln_d2.cli import main
from oln_d2.evaluation import GroundTruth, read_results

CASE = json.loads((Path(__file__).parent / "data/evaluator/rand_small.json").read_text())
SEEN = "c1,c2,c3"


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Ground truth and results of a public case in the current folder."""
    monkeypatch.chdir(tmp_path)
    dump("gt.json", CASE["gt"])
    dump("results.json", CASE["dt"])
    return tmp_path


def dump(path, content):
    Path(path).write_text(json.dumps(content))


def python(*args):
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    return subprocess.run(
        [sys.executable, *args], capture_output=True, text=True, timeout=120, env=env
    )


def command(*args):
    return python("-m", "oln_d2", *args)


def test_newcomer(files):
    """The one command of the README would not give the published numbers, a table and a picture."""
    done = command(
        "evaluate",
        "gt.json",
        "results.json",
        "--seen",
        SEEN,
        "--json",
        "out.json",
        "--plot",
        "ar.png",
    )
    assert done.returncode == 0, done.stderr
    assert "Protocol xclass" in done.stdout and "6 images, 240 detections" in done.stdout
    assert done.stdout.splitlines()[2].split()[:2] == ["unseen", "11"]
    assert f"{100 * CASE['expected']['AR@100']:.2f}" in done.stdout.splitlines()[2]
    (entry,) = json.loads(Path("out.json").read_text())["results"]
    assert (entry["file"], entry["protocol"]) == ("results.json", "xclass")
    for name, value in CASE["expected"].items():
        if name in entry["unseen"]:
            assert entry["unseen"][name] == pytest.approx(value, abs=1e-12)
    assert entry["unseen"]["ARs@100"] == pytest.approx(CASE["expected"]["AR_s@100"], abs=1e-12)
    assert {"seen", "all"} <= set(entry)
    assert Path("ar.png").read_bytes()[:4] == b"\x89PNG"
    assert "%|" not in done.stderr  # no progress bar where nobody watches


def test_comparison(files, capsys):
    """Files, protocols and extras would be mixed up, or undefined values be numbers."""
    dump("other.json", CASE["dt"][::2])
    gt = copy.deepcopy(CASE["gt"])
    gt["annotations"] = [a for a in gt["annotations"] if a["category_id"] > 3]
    dump("gt.json", gt)
    Path("seen.txt").write_text("c1\nc2\n c3 \n")
    status = main(
        "evaluate gt.json results.json other.json --seen seen.txt --protocol both --k 100,10 "
        "--json out.json --plot ar.svg --per-category --bootstrap 20 --seed 1".split()
    )
    out = capsys.readouterr().out
    assert status == 0
    results = json.loads(Path("out.json").read_text())["results"]
    assert [(r["file"], r["protocol"]) for r in results] == [
        (file, protocol)
        for file in ("results.json", "other.json")
        for protocol in ("xclass", "filtered")
    ]
    for r in results:
        assert [name for name in r["unseen"] if name.startswith("AR@")] == ["AR@10", "AR@100"]
        assert r["seen"]["AR@10"] is None and r["bootstrap"]["seen"]["AR@10"] == [None, None]
        low, high = r["bootstrap"]["unseen"]["AR@10"]
        assert low < r["unseen"]["AR@10"] < high
        assert set(r["per_category"]) <= {"c4", "c5", "c6"}
        assert f"{r['file']}, {r['protocol']}" in out
    assert "n/a" in out and "95 % confidence" in out and "c4" in out
    assert Path("ar.svg").read_text().startswith("<?xml")


def test_python(files, monkeypatch):
    """The numbers in a notebook would not be those of the command."""
    monkeypatch.setenv("HOME", os.getcwd())
    result = oln_d2.evaluate("gt.json", "results.json", seen=SEEN)
    assert result["unseen"]["AR@100"] == pytest.approx(CASE["expected"]["AR@100"], abs=1e-12)
    gt = GroundTruth.load("gt.json", SEEN)
    entries = [
        {**e, "score": np.float64(e["score"]), "bbox": np.array(e["bbox"])} for e in CASE["dt"]
    ]
    read = read_results("results.json", gt)
    for results in ("results.json", "~/results.json", read, CASE["dt"], entries):
        assert oln_d2.evaluate(gt, results).to_dict()["unseen"] == result["unseen"]
    few = oln_d2.evaluate(gt, "results.json", protocol="filtered", max_dets=100)
    assert few.protocol == "filtered" and few.ks == (1, 10, 20, 30, 50, 100)
    assert oln_d2.evaluate(gt, entries, ks=[2000]).max_dets == 2000


@pytest.mark.parametrize(
    "settings, results, message",
    [
        ({}, "results.json", "gt.json: seen is missing"),
        ({"seen": SEEN, "ks": [0]}, "none.json", "k has to be between 1"),
        ({"seen": SEEN, "iou_type": "mask"}, CASE["dt"], "results: entry 0: has no 'segmentation'"),
        ({"seen": SEEN}, [{**CASE["dt"][0], "image_id": 99}], "results: entry 0: image_id 99"),
        ({"seen": SEEN}, [{**CASE["dt"][0], "image_id": 1e300}], "image_id 1e.300 is not an int"),
        ({"seen": SEEN}, [{"image_id": 1, "score": 1}], "results: entry 0: has neither 'bbox'"),
        ({"seen": SEEN}, [{**CASE["dt"][0], "score": "high"}], "results: entry 0: score: Expected"),
        ({"seen": SEEN}, [CASE], "results: entry 0: .*missing required field"),
        ({"seen": SEEN}, [1], "results: not a list of COCO's result entries"),
    ],
)
def test_python_bad_input(files, settings, results, message):
    """A mistake in a notebook would give numbers, or a traceback that does not name it."""
    with pytest.raises(InputError, match=message):
        oln_d2.evaluate("gt.json", results, **settings)
    with pytest.raises(InputError, match="leave out `seen`"):
        oln_d2.evaluate(GroundTruth(CASE["gt"], SEEN), "results.json", seen=SEEN)


def test_evaluator_moved():
    """Who imports the evaluator from where it was documented would not find it."""
    with pytest.raises(ImportError, match="`from oln_d2 import OpenWorldEvaluator`"):
        from oln_d2.evaluation import OpenWorldEvaluator  # noqa: F401


def change_gt(**changes):
    return {**copy.deepcopy(CASE["gt"]), **changes}


def change_annotation(**changes):
    gt = copy.deepcopy(CASE["gt"])
    gt["annotations"][4].update(changes)
    return gt


def change_entry(**changes):
    entries = copy.deepcopy(CASE["dt"])
    entries[7].update(changes)
    return entries


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("gt.json", None, "gt.json: no such file"),
        ("gt.json", json.dumps(CASE["gt"])[:-99], "gt.json: not complete"),
        ("gt.json", change_gt(categories=[]), "gt.json: field 'categories' is empty"),
        ("gt.json", CASE["dt"], "gt.json: holds a JSON list"),
        ("gt.json", change_annotation(area=-1), "gt.json: annotations[4]: area -1"),
        ("gt.json", change_annotation(bbox=[1, 2, math.nan, 4]), "gt.json: annotations[4]: bbox"),
        ("gt.json", change_annotation(image_id=99), "gt.json: annotations[4]: image_id 99"),
        ("results.json", None, "results.json: no such file; give detections"),
        ("results.json", json.dumps(CASE["dt"])[:-99], "results.json: entry 239: not complete"),
        ("results.json", CASE["gt"], "results.json: does not hold a list"),
        (
            "results.json",
            change_entry(image_id=99),
            "results.json: entry 7: image_id 99 is not in gt.json",
        ),
        ("results.json", change_entry(score=math.nan), "results.json: entry 7: NaN"),
        ("results.json", change_entry(bbox=[0, 0, math.inf, 1]), "results.json: entry 7: Infinity"),
        (
            "results.json",
            change_entry(bbox=[5, 5, -2, 1]),
            "results.json: entry 7: box [5.0, 5.0, -2.0",
        ),
        ("results.json", change_entry(bbox=[5, 5, 2]), "results.json: entry 7: bbox"),
        (
            "results.json",
            [
                {**e, "bbox": [300 + i, 200, 500 + i % 99, 400]}
                for i, e in enumerate(CASE["dt"][:99])
            ],
            "results.json: entry 0: bbox [300.0, 200.0, 500.0, 400.0] reaches beyond its image",
        ),
    ],
)
def test_bad_files(files, capsys, name, content, message):
    """Bad input would give numbers or a traceback, or leave half a result behind."""
    if content is None:
        Path(name).unlink()
    elif isinstance(content, str):
        Path(name).write_text(content)
    else:
        dump(name, content)
    status = main(
        f"evaluate gt.json results.json --seen {SEEN} --json out.json --plot ar.png".split()
    )
    captured = capsys.readouterr()
    assert status == 2
    assert captured.err.startswith(f"error: {message}") and captured.err.count("\n") == 1
    assert captured.out == ""
    assert not {p.name for p in files.iterdir()} - {"gt.json", "results.json"}


@pytest.mark.parametrize(
    "args, message",
    [
        ("--seen c1,dog", "gt.json: field 'categories' has no category named 'dog'"),
        ("--split voc", "gt.json: field 'categories' has no category named 'airplane'"),
        ("--seen vco", "gt.json: field 'categories' has no category named 'vco' (seen cat"),
        ("--seen none.txt", "none.txt: no such file"),
        (f"--seen {SEEN} --k 0,10", "k has to be between 1"),
        (f"--seen {SEEN} --k 10 --max-dets 5", "k has to be between 1"),
        (f"--seen {SEEN} --max-dets 0", "k has to be between 1"),
        (f"--seen {SEEN} --bootstrap 0", "bootstrap is 0"),
        (
            f"--seen {SEEN} --iou mask",
            "gt.json: the annotation with id 1 has no usable 'segmentation'",
        ),
        (f"--seen {SEEN} --bootstrap 5 --seed -1", "seed is -1"),
        (f"--seen {SEEN} --plot ar.nonsense", "ar.nonsense: its ending has to be one of"),
        (f"--seen {SEEN} --plot ar", "ar: its ending has to be one of"),
        (f"--seen {SEEN} --json nowhere/out.json", "nowhere/out.json: is a folder, or its folder"),
        (f"--seen {SEEN} --json .", ".: is a folder"),
        (f"--seen {SEEN} --json results.json", "results.json: is one of the files to be read"),
    ],
)
def test_bad_arguments(files, capsys, args, message):
    """A mistake in the command would be found after the work, or not at all."""
    assert main(f"evaluate gt.json results.json {args}".split()) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"error: {message}") and captured.err.count("\n") == 1
    assert {p.name for p in files.iterdir()} == {"gt.json", "results.json"}


def test_misspelt_split(files):
    """In Python, who wrote vco for voc would read about categories only."""
    with pytest.raises(oln_d2.InputError, match="nor is it a split: these are voc, person, coco"):
        oln_d2.evaluate("gt.json", "results.json", seen="vco")
    with pytest.raises(oln_d2.InputError) as error:
        oln_d2.evaluate("gt.json", "results.json", seen=f"{SEEN},dog")
    assert "a split: " not in str(error.value)


def test_exit_code(files):
    """A script would go on after a failed evaluation."""
    done = command("evaluate", "gt.json", "none.json", "--seen", SEEN)
    assert done.returncode == 2 and done.stdout == ""
    assert (
        done.stderr == "error: none.json: no such file; give detections in COCO's results format\n"
    )
    assert command("evaluate", "gt.json", "results.json").returncode == 2


def test_help_and_commands_without_detectron2(files):
    """Help would take seconds, or scoring a file need an installation of Detectron2."""
    done = command("evaluate", "--help")
    assert done.returncode == 0 and "examples:" in done.stdout and "--per-category" in done.stdout
    code = (
        "import sys; sys.modules['detectron2'] = None\n"
        "from oln_d2.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "assert not {'numpy', 'torch', 'matplotlib'} & set(sys.modules)\n"
        f"status = main(['evaluate', 'gt.json', 'results.json', '--seen', '{SEEN}'])\n"
        "assert not {'torch', 'matplotlib'} & set(sys.modules)\n"
        "from oln_d2 import evaluate\n"
        "try: from oln_d2 import OpenWorldEvaluator\n"
        "except ImportError as error: assert 'git+https' in str(error)\n"
        "else: status = 1\n"
        "sys.exit(status)\n"
    )
    done = python("-c", code)
    assert done.returncode == 0, done.stderr


def test_benchmark(files):
    """The published speed could not be measured again, or would be that of other numbers."""
    done = command(
        *"benchmark evaluator gt.json --split c1,c2,c3 --dets 40 --reference-images 3".split()
    )
    assert done.returncode == 0, done.stderr
    rows = [
        line
        for line in done.stdout.splitlines()
        if line.startswith(("pycocotools", "faster-coco-eval, "))
    ]
    assert len(rows) >= 2
    assert all(float(row.split()[-1]) < 1e-12 for row in rows)


def test_version():
    """Who reports a bug must be able to say of which version, without Python."""
    assert command("--version").stdout == f"oln-d2 {oln_d2.__version__}\n"


def test_names_in_place_of_a_split(files, capsys):
    """Who gives names of categories to --split must be told where they belong."""
    with pytest.raises(SystemExit):
        main(["evaluate", "gt.json", "results.json", "--split", SEEN])
    assert f"'{SEEN}' is none of voc, person" in (error := capsys.readouterr().err)
    assert "--seen" in error
