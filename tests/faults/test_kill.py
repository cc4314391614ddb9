"""kill -9 at random moments of training; see killed_runs.py for what is run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from wsbcn_d2.files import PART_FILE

pytestmark = pytest.mark.slow

SCRIPT = str(Path(__file__).with_name("killed_runs.py"))
SEED = int(os.environ.get("WSBCN_KILL_SEED", "1"))
TRIALS = int(os.environ.get("WSBCN_KILL_TRIALS", "10"))


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("killed")
    done = subprocess.run(
        [sys.executable, SCRIPT, str(folder), str(TRIALS), str(SEED)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    report = json.loads(done.stdout)
    print(
        {
            "kills": len(report["trials"]),
            "within a write": sum(trial["in_write"] for trial in report["trials"]),
            "seconds": round(report["seconds"], 1),
        }
    )
    return report


def test_every_run_was_killed_and_the_next_went_on_from_the_last_whole_checkpoint(report):
    trials = report["trials"]
    assert [trial["exit"] for trial in trials] == [-9] * TRIALS
    for trial in trials:
        if trial["expected"] is None:
            assert trial["started"]["start"] == 0
            continue
        _, model, iteration = trial["expected"]  # read from the file while nothing ran
        assert trial["started"]["start"] == iteration + 1
        assert trial["started"]["model"] == model  # weights and estimates, bit for bit
        assert trial["started"]["momentum"] > 0
    # There is a checkpoint every two steps; no step that one has seen is done again.
    for trial, following in zip(trials, trials[1:], strict=False):
        if trial["done"] is not None:
            resumed = following["started"]["start"]
            assert trial["done"] <= resumed <= trial["done"] + 2


def test_kills_fell_inside_a_write(report):
    """Shown by what they left: a part of a checkpoint, of so many bytes as were let through."""
    inside = [trial for trial in report["trials"] if trial["die"]]
    if TRIALS >= 10:
        assert len(inside) >= 3
    for trial in inside:
        assert trial["in_write"] and 0 < trial["written"] == trial["die"][1] < trial["whole"]
        assert not trial["readable"]


def test_killed_and_resumed_equals_uninterrupted(report):
    assert report["exit_resumed"] == report["exit_straight"] == 0
    resumed, straight = report["resumed"], report["straight"]
    assert resumed["iteration"] == straight["iteration"] == 39
    assert resumed["rates"] == straight["rates"]  # the schedule, at every iteration
    assert len(set(straight["rates"].values())) > 10  # and it does move
    assert resumed["losses"] == straight["losses"]
    assert resumed["model"] == straight["model"]
    assert resumed["momentum"] == straight["momentum"]


def test_nothing_half_written_is_left(report):
    assert PART_FILE not in report["left"]


def test_resuming_a_step_too_early_would_show(report):
    """That equality of hashes can fail: the killed runs did pass through other weights."""
    seen = [trial["started"]["model"] for trial in report["trials"]]
    assert report["resumed"]["model"] not in seen
