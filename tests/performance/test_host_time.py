"""The host time of the GPU path, which tools/benchmark.py measures with the launches stubbed."""

import argparse
import contextlib
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")
sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

from benchmarks.host import host_mode, launches_stubbed
from benchmarks.runner import Runner, measurement

from wsbcn_d2 import BatchChannelNorm2d
from wsbcn_d2.layers.kernels import triton_bcn
from wsbcn_d2.layers.kernels import triton_launch as launch


@contextlib.contextmanager
def untraced():
    """Within, coverage does not watch: it would slow our Python down, and not PyTorch's C++."""
    trace = sys.gettrace()
    monitoring = getattr(sys, "monitoring", None)  # Python 3.12; coverage's from 3.14 on
    tools = [i for i in range(6) if monitoring and monitoring.get_tool(i)]
    events = {tool: monitoring.get_events(tool) for tool in tools}
    sys.settrace(None)
    for tool in events:
        monitoring.set_events(tool, 0)
    try:
        yield
    finally:
        for tool, kept in events.items():
            monitoring.set_events(tool, kept)
        sys.settrace(trace)


@pytest.mark.slow
def test_layers_cost_the_host_a_small_multiple_of_pytorchs_own(capsys):
    """What Python, autograd and the nodes in C++ take for a layer."""
    args = argparse.Namespace(
        device="cpu", cpu_time=True, warmup=2, rounds=7, amp=False, quick=False
    )
    summaries = []
    for _ in range(3):  # what else runs on the machine only adds
        with untraced():
            found = host_mode(Runner(args), args)
        summaries.append({name: value["ratio"] for name, value in found["summary"].items()})
        summary = {name: min(s[name] for s in summaries) for name in summaries[0]}
        if summary["BCN / GroupNorm"] < 1.6 and summary["WS convolution / convolution"] < 1.5:
            break
    assert [row["name"] for row in found["rows"]] == [
        "GroupNorm", "BCN", "convolution", "WS convolution"
    ]  # fmt: skip
    assert 1 < summary["BCN / GroupNorm"] < 1.6
    assert 1 < summary["WS convolution / convolution"] < 1.5
    assert "BCN / GroupNorm: " in capsys.readouterr().out


@pytest.mark.parametrize("quick, runs", [(False, 20), (True, 1)])
def test_microseconds_are_those_of_one_layer(quick, runs, capsys):
    """Of a chain of 20 layers that is run so many times a round."""

    def rounds(made):
        seconds = dict(zip(made, (0.4, 0.8, 0.2, 0.5), strict=True))
        return {name: measurement(name, [t, 1.5 * t, 2 * t]) for name, t in seconds.items()}

    found = host_mode(SimpleNamespace(rounds=rounds), argparse.Namespace(quick=quick))
    assert [row["us"] for row in found["rows"]] == pytest.approx(
        [1.5e6 * t / 20 / runs for t in (0.4, 0.8, 0.2, 0.5)]
    )
    assert found["rows"][0]["iqr"] == pytest.approx(0.2e6 / 20 / runs)
    assert found["summary"]["BCN / GroupNorm"]["ratio"] == pytest.approx(2)
    assert found["summary"]["WS convolution / convolution"]["ratio"] == pytest.approx(2.5)


def test_stubs_are_launched_directly_and_do_not_outlive_their_use(monkeypatch):
    norm, x = BatchChannelNorm2d(64), torch.randn(1, 64, 2, 2)
    forms = []
    with launches_stubbed():
        kinds = launch.code

        def noted(*args):
            forms.append(kinds(*args))
            return forms[-1]

        monkeypatch.setattr(launch, "code", noted)
        # Python launches what it has just had compiled, the nodes in C++ whatever comes after.
        for name in ("_FusedBCNBackward", "FusedBCN", "FusedBCN"):
            assert norm(x).grad_fn.name() == name
        monkeypatch.undo()
    assert len(forms) == 3 and all(form.run is not None for form in forms)
    assert triton_bcn._forward.cache_info().currsize == 0
    assert norm(x).isfinite().all()
