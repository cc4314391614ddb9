"""tools/train_net.py with two CPU processes: 2 ranks x 1 image against 1 rank x 2 images."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

pytestmark = pytest.mark.slow

SCRIPT = str(Path(__file__).with_name("train_net_cases.py"))
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
STEM = "backbone.bottom_up.stem.conv1.norm.bn."
ESTIMATES = ("running_mean", "running_var", "num_batches_tracked")


def train(folder, cases, *arguments, torchrun=False):
    """Final weights by case."""
    command = [sys.executable, *(TORCHRUN if torchrun else [])]
    command += [SCRIPT, str(folder), ",".join(cases), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return {
        case: torch.load(folder / case / "model_final.pth", weights_only=True)["model"]
        for case in cases
    }


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    cases = ("start", "gn", "fixed", "sync", "bcn")
    return train(tmp_path_factory.mktemp("one"), cases)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    cases = ("gn", "fixed", "sync", "bcn", "bcn_alone")
    return train(tmp_path_factory.mktemp("two"), cases, torchrun=True)


def weights(state):
    return {k: v for k, v in state.items() if not k.endswith(ESTIMATES)}


def assert_same_training(two, one, atol=1e-10):
    assert two.keys() == one.keys()
    moved = {name: (one[name] - value).abs().max() for name, value in two.items()}
    worst = max(moved, key=moved.get)
    assert moved[worst] < atol, f"{worst}: {moved[worst]}"


@pytest.mark.parametrize("case", ["gn", "fixed", "sync"])
def test_two_ranks_train_as_one_with_both_images(two, one, case):
    assert_same_training(weights(two[case]), weights(one[case]))


def test_training_moved_the_weights_by_far_more_than_the_tolerance(one):
    start = weights(one["start"])
    for case in ("fixed", "bcn"):
        moved = [(weights(one[case])[k] - v).abs().max() for k, v in start.items()]
        assert max(moved) > 1e-4


def test_estimates_of_two_ranks_are_those_of_both_images(two, one):
    """Of the stem, that is: deeper layers saw what their rank's own estimates made of an image."""
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        assert_close(two["bcn"][STEM + name], one["bcn"][STEM + name], atol=1e-10, rtol=1e-10)
    deep = "backbone.bottom_up.res5.1.conv2.norm.bn.running_mean"
    assert (two["bcn"][deep] - one["bcn"][deep]).abs().max() > 1e-6


def test_unsynchronized_estimates_are_those_of_one_image(two, one):
    name = STEM + "running_mean"
    assert (two["bcn_alone"][name] - one["bcn"][name]).abs().max() > 1e-3


def test_num_gpus_starts_processes_without_cuda(tmp_path, one):
    state = train(tmp_path, ("gn",), "--num-gpus", "2")
    assert_same_training(weights(state["gn"]), weights(one["gn"]))
