"""The built wheel in an empty folder: configs, model zoo and commands are there, and work."""

import importlib.util
import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, TINY
from PIL import Image
from setuptools import __version__ as setuptools

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not importlib.util.find_spec("wheel") and int(setuptools.split(".")[0]) < 71,
        reason="a wheel needs the package wheel: pip install -e .[dev]",
    ),
]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder that the wheel is installed in, and nothing else."""
    folder = tmp_path_factory.mktemp("wheel")
    build = folder / "source"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    offline = ["--no-deps", "--no-index"]
    build.mkdir()
    for name in ("setup.py", "README.md", "LICENSE", "wsbcn_d2", "configs"):
        (build / name).symlink_to(ROOT / name)  # builds leave files beside setup.py
    wheel = ["wheel", *offline, "--no-build-isolation", "-w", folder, build]
    subprocess.run([*pip, *wheel], check=True)
    (wheel,) = folder.glob("wsbcn_d2-*.whl")
    subprocess.run([*pip, "install", *offline, "--target", folder / "site", wheel], check=True)
    return folder / "site"


@pytest.fixture
def run(site, tmp_path, tiny_shapes):
    """Runs a command in an empty folder, away from the checkout; gives its output."""
    empty = tmp_path / "empty"
    empty.mkdir()

    def call(*command, code=0):
        done = subprocess.run(
            [str(word) for word in command],
            cwd=empty,
            env={**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == code, done.stderr
        return done.stdout + done.stderr

    return call


def test_every_config_is_in_the_wheel_and_reads(site, run):
    script = """
import json, wsbcn_d2
from pathlib import Path
from wsbcn_d2 import model_zoo
folder = Path(wsbcn_d2.__file__).with_name("configs")
names = [p.relative_to(folder).as_posix() for p in folder.rglob("*.yaml")]
lazy = [p.relative_to(folder).as_posix() for p in folder.rglob("lazy/COCO*/*.py")]
for name in [*names, *lazy[:3]]:
    model_zoo.get_config(name)
print(json.dumps([wsbcn_d2.__file__, sorted(names + lazy)]))
"""
    file, names = json.loads(run(sys.executable, "-c", script).splitlines()[-1])
    assert file == str(site / "wsbcn_d2" / "__init__.py")
    configs = ROOT / "configs"
    expected = [*configs.rglob("*.yaml"), *configs.glob("lazy/COCO*/*.py")]
    assert names == sorted(path.relative_to(configs).as_posix() for path in expected)
    assert (site / "wsbcn_d2" / "py.typed").is_file()


# What the code imports, by the names of the packages; detectron2 cannot be named, see setup.py.
NEEDED = [
    *("cloudpickle", "fvcore", "hydra-core", "iopath", "matplotlib", "numpy", "omegaconf"),
    *("packaging", "Pillow", "pycocotools", "safetensors", "scipy", "tabulate", "tensorboard"),
    *("termcolor", "torch", "torchvision", "tqdm", "yacs"),
]


def test_the_wheel_names_what_it_needs(site):
    (info,) = site.glob("wsbcn_d2-*.dist-info")
    lines = (info / "METADATA").read_text().splitlines()
    needs = [line.removeprefix("Requires-Dist: ") for line in lines if "Requires-Dist: " in line]
    always = [need for need in needs if "extra ==" not in need]
    found = {re.match(r"[\w-]+", need)[0]: need for need in always}
    assert sorted(found, key=str.lower) == NEEDED
    assert all(">=" in need for need in always)
    assert found["torch"] == "torch>=2.10" and found["torchvision"] == "torchvision>=0.25"
    assert "Requires-Python: >=3.10" in lines
    assert {need.split('extra == "')[1].strip('"') for need in needs if need not in always} == {
        "vis",
        "dev",
    }
    assert any(need.startswith("opencv-python-headless") for need in needs)


def test_the_commands_train_and_predict(site, run, tmp_path):
    config = site / "wsbcn_d2" / "configs" / "shapes" / "mask_rcnn_R_18_FPN_bcn_ws.yaml"
    tiny = [*TINY, "SOLVER.MAX_ITER", "1", "SOLVER.STEPS", "()", "SOLVER.ACCUMULATE", "1"]
    tiny += ["DATASETS.TEST", "()", "OUTPUT_DIR", str(tmp_path / "output")]
    generate = (
        "from wsbcn_d2 import data; from wsbcn_d2.cli.train import main; "
        f"data.register_shapes_split('tiny', {str(tmp_path)!r}, 'train', num_images=2, "
        "image_size=(64, 80)); raise SystemExit(main())"
    )
    argv = ["--config-file", config, *tiny, "DATASETS.TRAIN", "('tiny',)"]
    run(sys.executable, "-c", generate, *argv)
    Image.fromarray(np.zeros((64, 80, 3), np.uint8)).save(tmp_path / "p.png")
    weights = ["--weights", tmp_path / "output" / "model_final.pth", "--threshold", "0.01"]
    predict = site / "bin" / "wsbcn-predict"
    run(predict, *weights, "--output", tmp_path / "found", tmp_path / "p.png")
    assert sorted(p.name for p in (tmp_path / "found").iterdir()) == ["p.png", "results.json"]


@pytest.mark.parametrize("name", ["train", "predict", "convert"])
def test_a_command_answers_wrong_input_with_one_line(site, run, name):
    wrong = {
        "train": ["--config-file", "none.yaml"],
        "predict": ["--weights", "none.pth", "--output", "out", "none.png"],
        "convert": ["none.pth", "out.pth"],
    }[name]
    output = run(site / "bin" / f"wsbcn-{name}", *wrong, code=2)
    (line,) = [line for line in output.splitlines() if "none" in line]
    assert "error" in line
