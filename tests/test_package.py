"""The package as a whole: what importing it loads, its public names, their types, Windows."""

import importlib
import inspect
import os
import subprocess
import sys
import tomllib

import pytest
from conftest import ROOT, make_coco

import oln_d2

CORE = next(
    contract["source_modules"]
    for contract in tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"][
        "contracts"
    ]
    if contract["name"].startswith("The core")
)


def python(code, cwd=ROOT):
    """What code prints, in words, run by a Python of its own."""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=cwd, env=env
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.parametrize(
    "code",
    [
        "import oln_d2",
        "import oln_d2.evaluation; oln_d2.evaluation.OpenWorldRecall",
        "import contextlib, oln_d2.cli\n"
        "with contextlib.redirect_stdout(None), contextlib.suppress(SystemExit):\n"
        "    oln_d2.cli.main(['--help'])",
    ],
)
def test_imports_are_light(code):
    """Help and an import must come at once: PyTorch takes seconds, and may not be installed."""
    heavy = ["torch", "torchvision", "detectron2", "matplotlib", "onnxruntime"]
    assert python(f"{code}\nimport sys\nprint(*(m for m in {heavy} if m in sys.modules))") == []


def test_import_does_not_depend_on_the_command_line():
    """A library that looks at `sys.argv` behaves otherwise in a notebook, a test and a script."""
    # Whoever looked at them would find that they are missing.
    code = "import sys\ndel sys.argv, sys.orig_argv\nimport oln_d2, oln_d2.evaluation"
    assert python(code) == []


def test_public_names_are_listed():
    """Completion in a notebook shows what `dir` does."""
    code = "import oln_d2, oln_d2.evaluation as e\nprint(set(oln_d2.__all__) <= set(dir(oln_d2)))"
    assert python(f"{code}\nprint(set(e.__all__) <= set(dir(e)))") == ["True", "True"]
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = oln_d2.nothing


def test_type_checkers_know_the_public_names():
    """They read the imports in `if TYPE_CHECKING`, which have to be those of the lazy table."""
    source = (ROOT / "oln_d2/__init__.py").read_text()
    for name, home in oln_d2._HOMES.items():
        assert f"from {home} import {name} as {name}\n" in source


def public():
    """(name, object) of all public functions and classes of our own."""
    for module in "oln_d2", "oln_d2.evaluation", "oln_d2.standalone":
        module = importlib.import_module(module)
        for name in module.__all__:
            try:
                thing = getattr(module, name)
            except ImportError as error:
                assert "detectron2" in str(error)  # the rest needs no more than the tests do
                continue
            # What derives from Detectron2's classes has the signatures of their methods, which are
            # not annotated.
            bases = inspect.getmro(thing) if inspect.isclass(thing) else ()
            if callable(thing) and not any(b.__module__.startswith("detectron2") for b in bases):
                yield f"{module.__name__}.{name}", thing


def functions(thing):
    """(name, function) of a function, or of the methods that a class itself defines."""
    if not inspect.isclass(thing):
        yield "", thing
        return
    for name, member in vars(thing).items():
        member = getattr(member, "fget", None) or getattr(member, "func", member)
        member = getattr(member, "__func__", member)
        ours = inspect.isfunction(member) and member.__module__.startswith("oln_d2")
        if ours and (not name.startswith("_") or name in ("__init__", "__call__")):
            yield f".{name}", member


def test_public_functions_have_types():
    """An editor shows them, and a user's type checker relies on them (py.typed promises both)."""
    missing, seen = [], 0
    for name, thing in public():
        for method, function in functions(thing):
            seen += 1
            signature = inspect.signature(function)
            parameters = [p for p in signature.parameters.values() if p.name not in ("self", "cls")]
            missing += [f"{name}{method}({p.name})" for p in parameters if p.annotation is p.empty]
            if signature.return_annotation is signature.empty and method != ".__init__":
                missing.append(f"{name}{method} -> ")
    assert seen > 30 and missing == []


WINDOWS = """
import sys
for name in "fcntl", "grp", "pwd", "resource", "termios":
    sys.modules[name] = None  # to import it is then an ImportError, as on Windows
"""


def test_core_imports_without_posix_modules():
    """On Windows there are neither locks of files nor limits of memory: nothing may need them."""
    code = f"""{WINDOWS}
import importlib, pkgutil
for name in {CORE} + ["oln_d2.benchmark.evaluator", "oln_d2.commands", "oln_d2.cli"]:
    module = importlib.import_module(name)
    for found in pkgutil.iter_modules(getattr(module, "__path__", []), name + "."):
        importlib.import_module(found.name)
        print(found.name)
"""
    assert {"oln_d2.propose.run", "oln_d2.commands.train"} <= set(python(code))


def test_commands_run_without_posix_modules(tmp_path):
    """`evaluate` and `propose` do without; `benchmark`, which measures memory, may say so."""
    make_coco(tmp_path)
    code = f"""{WINDOWS}
import json
from oln_d2.cli import main
from oln_d2.standalone import build_detector, save_checkpoint
gt = "coco/annotations/instances_val2017.json"
save_checkpoint(build_detector(depth=10, norm="GN", min_size=96, max_size=160), "model.pth")
chosen = ["--weights", "model.pth", "--gt", gt, "--output", "out", "--device", "cpu"]
codes = [main(["propose", "coco/val2017", *chosen])]
codes.append(main(["evaluate", gt, "out/results.json", "--split", "voc"]))
codes.append(main(["benchmark", "evaluator", gt, "--dets", "20", "--reference-images", "2"]))
print(*codes)
"""
    *_, proposed, evaluated, measured = python(code, cwd=tmp_path)
    assert (proposed, evaluated) == ("0", "0") and measured in ("0", "2")
