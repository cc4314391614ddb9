"""One run of a study, in this process: what the script gets, what is noted, how it ends."""

import json
import os
import resource
import signal
import sys
import time

import pytest
import torch

from wsbcn_d2.study import child

CONFIG = "some config.yaml"


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs a script of some lines as a study does; gives the status and the run's folder."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "argv", ["pytest"])
    before = signal.signal(signal.SIGTERM, lambda *_: pytest.fail("nobody lets the run end"))

    def call(text, *options, opts=("SEED", "3")):
        (tmp_path / "script.py").write_text(text)
        argv = ["--script", str(tmp_path / "script.py"), "--config-file", CONFIG]
        folder = tmp_path / "runs" / "a"
        return child.main([*argv, "--folder", str(folder), *options, "--", *opts]), folder

    yield call
    signal.signal(signal.SIGTERM, before)


def sessions(folder):
    return [json.loads(line) for line in (folder / "sessions.jsonl").read_text().splitlines()]


def test_the_script_is_told_to_go_on_and_where_to_write(run, tmp_path):
    said = tmp_path / "said"
    text = f"import json, sys; json.dump([__name__, *sys.argv], open({str(said)!r}, 'w'))"
    status, folder = run(text, opts=["A.B", "a 'b'"])
    assert status == 0
    assert json.loads(said.read_text()) == [
        *("__main__", str(tmp_path / "script.py"), "--config-file", CONFIG, "--resume"),
        *("A.B", "a 'b'", "OUTPUT_DIR", str(folder)),
    ]


@pytest.mark.parametrize(
    "end, status",
    [
        ("sys.exit()", 0),
        ("sys.exit(0)", 0),
        ("sys.exit(3)", 3),
        ("sys.exit('a message')", 1),
        ("os.kill(os.getpid(), signal.SIGTERM)", 128 + signal.SIGTERM),
    ],
)
def test_how_the_script_ends_is_the_status_and_its_session_is_noted(run, end, status):
    for count in (1, 2):
        found, folder = run(f"import os, signal, sys; {end}")
        assert found == status
        assert len(sessions(folder)) == count  # one more after every interruption


def test_a_script_that_fails_leaves_its_session_too(run, tmp_path):
    with pytest.raises(FloatingPointError):
        run("raise FloatingPointError")
    assert len(sessions(tmp_path / "runs" / "a")) == 1


def test_what_is_noted_of_a_session(run, monkeypatch):
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # in KiB, but on a Mac
    if sys.platform == "darwin":
        peak /= 2**10
    _, folder = run("import time; time.sleep(0.3)")
    (session,) = sessions(folder)
    assert session["memory_mb"] == pytest.approx(peak / 2**10, rel=0.2)
    assert session["memory_kind"] == "RSS" and session["hardware"] == child.hardware()
    assert 0.3 <= session["wall_seconds"] < 20
    assert session["wall_seconds"] == round(session["wall_seconds"], 1)


def test_it_ends_with_its_study_and_registers_what_it_is_told(run, monkeypatch, tmp_path):
    parents = []
    monkeypatch.setattr(child, "end_with_parent", parents.append)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "registers_nothing.py").write_text("import os\nos.environ['REGISTERED'] = 'yes'\n")
    monkeypatch.setenv("REGISTERED", "no")
    assert run("", "--parent", "77", "--import", "registers_nothing")[0] == 0
    assert parents == [77] and os.environ["REGISTERED"] == "yes"


def test_pictures_are_drawn_of_a_run_that_ended_well_alone(run, monkeypatch):
    drawn = []

    def draw(*args):
        drawn.append(args)
        raise RuntimeError("no OpenCV")  # which is no failure of the run

    monkeypatch.setattr(child, "_draw", draw)
    assert run("", "--pictures", "0")[0] == 0 and not drawn
    assert run("import sys; sys.exit(1)", "--pictures", "4")[0] == 1 and not drawn
    status, folder = run("", "--pictures", "4")
    assert status == 0
    assert drawn == [(CONFIG, ["SEED", "3", "OUTPUT_DIR", str(folder)], folder, 4)]


def test_what_is_drawn_are_the_trained_models_predictions(monkeypatch, tmp_path):
    import wsbcn_d2.predictor

    asked = []
    monkeypatch.setattr(child, "load_config", lambda *a: asked.append(a) or "cfg")
    monkeypatch.setattr(
        wsbcn_d2.predictor, "draw_predictions", lambda *a, **k: asked.append((a, k))
    )
    child._draw("a.yaml", ["SEED", "3"], tmp_path, 5)
    weights = str(tmp_path / "model_final.pth")
    assert asked == [
        ("a.yaml", ["SEED", "3", "MODEL.WEIGHTS", weights]),
        (("cfg", str(tmp_path / "predictions")), {"num_images": 5, "scale": 2}),
    ]


def test_memory_of_a_gpu_is_pytorchs_peak(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 3 * 2**29 + 2**18)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(time, "monotonic", lambda: 107.26)
    assert child._session(100.0) == {
        **{"wall_seconds": 7.3, "memory_mb": 1536, "memory_kind": "CUDA", "hardware": "a GPU"}
    }
    assert child.hardware(gpu=True) == child.hardware() == "a GPU"
    assert child.hardware(gpu=False).endswith(f", {os.cpu_count()} cores")


def test_a_run_without_options_draws_nothing_and_watches_nobody(run, monkeypatch):
    monkeypatch.setattr(child, "_draw", lambda *a: pytest.fail("drawn"))
    monkeypatch.setattr(child, "end_with_parent", lambda *a: pytest.fail("watched"))
    assert run("")[0] == 0
