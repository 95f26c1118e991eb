"""What is installed."""

import subprocess
import sys

from conftest import CONFIGS, ROOT


def test_recipes_travel_with_the_package(tmp_path):
    """Whoever installs a wheel must have the recipes of the README, and find them by name."""
    command = [sys.executable, "setup.py", "-q", "build", "--build-base", tmp_path]
    subprocess.run([*map(str, command)], cwd=ROOT, check=True, capture_output=True)
    installed = tmp_path / "lib/oln_d2/configs"
    recipes = {path.relative_to(CONFIGS) for path in CONFIGS.rglob("*.yaml")}
    assert recipes and recipes == {
        path.relative_to(installed) for path in installed.rglob("*.yaml")
    }
    code = """from oln_d2 import model_zoo
print(*(model_zoo.get_config_file(row["recipe"]) for row in model_zoo.rows()))"""
    command = [sys.executable, "-c", code]
    found = subprocess.run(
        command, cwd=tmp_path / "lib", check=True, capture_output=True, text=True
    )
    found = found.stdout.split()
    assert found and all(path.startswith(str(installed)) for path in found)
