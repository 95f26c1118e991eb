import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "oln_d2/__init__.py").read_text()).group(1)

setup(
    name="oln-d2",
    version=VERSION,
    description="OLN, open-world object proposals without learning to classify, for Detectron2",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    # The recipes live beside the package in the repository and inside it once installed.
    packages=find_packages(include=["oln_d2", "oln_d2.*"]) + ["oln_d2.configs"],
    package_dir={"oln_d2.configs": "configs"},
    package_data={
        "oln_d2.configs": ["*.yaml", "*/*.yaml"],
        "oln_d2.model_zoo": ["zoo.json"],
    },
    # Detectron2 is not on PyPI, so it cannot be named here; README.md tells how to install it.
    install_requires=[
        "torch>=2.3",
        "torchvision>=0.18",
        "numpy>=1.23",
        "pycocotools>=2.0.6",
        "Pillow>=9.1",
        "matplotlib>=3.6",
        "tabulate>=0.9",
        "tqdm>=4.64",
        "msgspec>=0.18",
    ],
    extras_require={
        "test": ["pytest>=7", "tensorboard", "av>=14.1", "onnx>=1.15", "onnxruntime>=1.17"],
        "export": ["onnx>=1.15", "onnxruntime>=1.17"],
        "video": ["av>=14.1"],
        "benchmark": ["faster-coco-eval"],
    },
)
