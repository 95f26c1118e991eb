from setuptools import find_namespace_packages, find_packages, setup

# pyproject.toml has the rest; it cannot say that the recipes lie beside the package in the
# repository and inside it once installed.
recipes = [f"oln_d2.configs.{folder}" for folder in find_namespace_packages("configs")]
setup(
    packages=[*find_packages(include=["oln_d2", "oln_d2.*"]), "oln_d2.configs", *recipes],
    package_dir={"oln_d2.configs": "configs"},
)
