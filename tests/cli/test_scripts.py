"""The shell scripts of tools/, with an interpreter that notes what it is asked to run."""

import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# Serves as an environment that has everything; fails where a file named FAIL says so.
PYTHON = """#!/bin/sh
case "$1" in
    -c) case "$2" in *sys.executable*) echo "$0" ;; esac; exit 0 ;;
    */env_check.py) shift; echo "$@" >>{folder}/extras; exit 0 ;;
esac
echo "${{OMP_NUM_THREADS:-}}|$*" >>{folder}/asked
! grep -qxF -e "$2" {folder}/FAIL 2>/dev/null
"""


@pytest.fixture
def script(tmp_path):
    """Runs a script of a copy of tools/; gives exit code, and commands with their threads."""
    root = tmp_path / "a checkout"
    shutil.copytree(ROOT / "tools", root / "tools", ignore=shutil.ignore_patterns("__pycache__"))
    python = tmp_path / "python3"
    python.write_text(PYTHON.format(folder=shlex.quote(str(tmp_path))))
    python.chmod(0o755)
    unset = ("OMP_NUM_THREADS", "WSBCN_TEST_WORKERS")
    env = {key: value for key, value in os.environ.items() if key not in unset}

    def call(name, *words, **more):
        for left in ("asked", "extras"):
            (tmp_path / left).unlink(missing_ok=True)
        done = subprocess.run(
            ["bash", str(root / "tools" / name), *words],
            env={**env, "WSBCN_PYTHON": str(python), **more},
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        asked = tmp_path / "asked"
        lines = asked.read_text().splitlines() if asked.exists() else []
        commands = [line.partition("|")[2].split() for line in lines]
        return done.returncode, commands, [line.partition("|")[0] for line in lines]

    call.root, call.fail = root, tmp_path / "FAIL"
    call.extras = lambda: (tmp_path / "extras").read_text().strip()
    return call


DEMO = "configs/shapes/mask_rcnn_R_18_FPN_bcn_ws.yaml"


@pytest.mark.parametrize("words", [[], ["out"], ["out", "SEED", "3"]])
def test_the_demo_trains_and_reports(script, words):
    output, *rest = words or ["output/demo"]
    train = ["tools/train_net.py", "--config-file", DEMO, "--resume", "OUTPUT_DIR", output, *rest]
    report = ["tools/install/demo_report.py", "--config-file", DEMO, "OUTPUT_DIR", output, *rest]
    assert script("demo.sh", *words) == (0, [train, report], ["", ""])
    assert script.extras() == "vis"
    (script.root / output).mkdir(parents=True)
    (script.root / output / "model_final.pth").touch()
    assert script("demo.sh", *words) == (0, [report], [""])


def test_a_training_that_fails_is_not_reported(script):
    script.fail.write_text("--config-file\n")
    code, commands, _ = script("demo.sh")
    assert code == 1 and [command[0] for command in commands] == ["tools/train_net.py"]
    code, commands, _ = script("pretrain_demo.sh")
    assert code == 1 and [command[0] for command in commands] == ["tools/train_net.py"]


def test_the_demo_of_pre_training(script):
    classifier = "configs/shapes/classifier_R_18_bcn_ws.yaml"
    detector = "configs/shapes/mask_rcnn_R_18_FPN_bcn_ws_finetune.yaml"
    weights = ["MODEL.WEIGHTS", "out/classifier/model_final.pth"]
    train = ["tools/train_net.py", "--config-file"]
    first = [*train, classifier, "--resume", "OUTPUT_DIR", "out/classifier", "SEED", "3"]
    second = [*train, detector, "--resume", "OUTPUT_DIR", "out/detector", *weights, "SEED", "3"]
    report = ["tools/install/demo_report.py", "--config-file", detector]
    report += ["OUTPUT_DIR", "out/detector", *weights, "SEED", "3"]
    assert script("pretrain_demo.sh", "out", "SEED", "3")[:2] == (0, [first, second, report])
    for name, left in (("classifier", [second, report]), ("detector", [report])):
        (script.root / "out" / name).mkdir(parents=True)
        (script.root / "out" / name / "model_final.pth").touch()
        assert script("pretrain_demo.sh", "out", "SEED", "3")[:2] == (0, left)


RUFF = ["-m", "ruff", "check", "."]
TEST = ["-m", "pytest", "-q", "-n"]


def test_the_tests(script):
    """Linter first; coverage is held against its threshold where all of them run."""
    coverage = ["--cov=wsbcn_d2", "--cov-report=term-missing:skip-covered", "--cov-fail-under=97"]
    (script.root / ".cache").mkdir()
    left = script.root / ".cache" / "coverage.killed"
    left.touch()
    whole = [*TEST, "2", "--dist", "worksteal", *coverage]
    assert script("test.sh") == (0, [RUFF, whole], ["", "1"]) and not left.exists()
    assert script.extras() == "vis dev"
    some = [*TEST, "5", "--dist", "worksteal", "tests/layers", "-x"]
    more = {"WSBCN_TEST_WORKERS": "5", "OMP_NUM_THREADS": "3"}
    assert script("test.sh", "tests/layers", "-x", **more) == (0, [RUFF, some], ["3", "3"])
    script.fail.write_text("ruff\n")
    assert script("test.sh")[:2] == (1, [RUFF])
    script.fail.write_text("pytest\n")
    assert script("test.sh")[:2] == (1, [RUFF, whole])


def test_the_tests_with_another_detectron2(script):
    assert script("test_compat.sh") == (2, [], [])
    assert script("test_compat.sh", "", "-x") == (0, [[*TEST, "2", "-x"]], ["1"])
    assert script("test_compat.sh", "nowhere", WSBCN_PYTHON="") == (2, [], [])


def test_the_gpu_check(script):
    page = ["tools/benchmarks/gpu_report.py", "--output", "x.md"]
    assert script("gpu_check.sh", "--output", "x.md") == (0, [page], [""])
    script.fail.write_text("--output\n")
    assert script("gpu_check.sh", "--output", "x.md")[0] == 1
