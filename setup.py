"""Packaging. Does not import torch or wsbcn_d2, so that pip can read it in an empty environment."""

import re
from pathlib import Path

from setuptools import find_packages, setup

# What wsbcn_d2 imports itself, then what Detectron2 needs at run time (its own list without the
# formatter it pins). Detectron2 itself is missing on purpose: it has no release that pip could
# resolve. `tools/install/install_detectron2.py` installs it and wsbcn_d2 checks for it on import.
# tools/install/env_check.py reads these lists, so they stay plain literals.
REQUIRES = [
    "torch>=2.10",
    "torchvision>=0.25",
    "fvcore>=0.1.5",
    "iopath>=0.1.7",
    "pycocotools>=2.0.6",
    "numpy>=1.23",
    "Pillow>=9.1",
    "cloudpickle>=2.0",
    "safetensors>=0.4.2",
    "hydra-core>=1.1",
    "matplotlib>=3.5",
    "omegaconf>=2.1",
    "packaging>=21.0",
    "scipy>=1.9",
    "tabulate>=0.8",
    "tensorboard>=2.8",
    "termcolor>=1.1",
    "tqdm>=4.30",
    "yacs>=0.1.8",
]
# Detectron2's visualizer imports cv2 and leaves the choice of the package to the user; so do we.
VIS = ["opencv-python-headless>=4.5"]
DEV = [
    "pytest>=7.4",
    "pytest-cov>=7.0",
    "pytest-xdist>=3.3",
    "hypothesis>=6.80",
    "ruff>=0.6",
    "onnx>=1.16",
    "onnxscript>=0.1",
    "onnxruntime>=1.18",
    "wheel>=0.37",
]

ROOT = Path(__file__).resolve().parent
VERSION = re.search(
    r'^__version__ = "([^"]+)"', (ROOT / "wsbcn_d2/__init__.py").read_text("utf-8"), re.MULTILINE
).group(1)
README = ROOT / "README.md"

setup(
    name="wsbcn_d2",
    version=VERSION,
    description="Weight standardization and batch-channel normalization for Detectron2",
    long_description=README.read_text("utf-8") if README.is_file() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    # The configs go along, as wsbcn_d2/configs, where wsbcn_d2.model_zoo finds them.
    packages=[*find_packages(include=["wsbcn_d2*"]), "wsbcn_d2.configs"],
    package_dir={"wsbcn_d2.configs": "configs"},
    package_data={
        "wsbcn_d2": ["py.typed", "**/*.cpp", "**/*.h"],
        "wsbcn_d2.configs": ["**/*.yaml", "**/*.py"],
    },
    entry_points={
        "console_scripts": [
            "wsbcn-train = wsbcn_d2.cli.train:main",
            "wsbcn-predict = wsbcn_d2.cli.predict:main",
            "wsbcn-convert = wsbcn_d2.cli.convert:main",
        ]
    },
    python_requires=">=3.10",
    install_requires=REQUIRES,
    extras_require={"vis": VIS, "dev": DEV + VIS},
)
