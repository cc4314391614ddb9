"""How the benchmarks measure: interleaved rounds, ratios within a round, peak memory."""

import argparse
import contextlib
import ctypes
import gc
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.utils import benchmark

Run = Callable[[], object]


class Runner:
    """Times callables by the options of the command line."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.device = torch.device(args.device)
        self.clock = time.thread_time if args.cpu_time else benchmark.timer  # waits for a GPU

    def autocast(self) -> contextlib.AbstractContextManager:
        """Context of one run: mixed precision where --amp asks for it."""
        dtype = torch.float16 if self.device.type == "cuda" else torch.bfloat16
        return torch.autocast(self.device.type, dtype=dtype, enabled=self.args.amp)

    def rounds(self, runs: dict[str, Run]) -> dict[str, benchmark.Measurement]:
        """Times of each callable, after warm-up rounds.

        Every round runs all of them one after another, so that a busy machine slows all; that is
        also why ``benchmark.Timer``, which warms up before each call and stays with one callable,
        is not what runs them.
        """
        times: dict[str, list[float]] = {name: [] for name in runs}
        for i in range(self.args.warmup + self.args.rounds):
            for name, run in runs.items():
                begin = self.clock()
                with self.autocast():
                    run()
                if i >= self.args.warmup:
                    times[name].append(self.clock() - begin)
        return {name: measurement(name, seconds) for name, seconds in times.items()}

    def memory(self, run: Run) -> dict[str, int]:
        """Bytes of tensors that one run allocates: at its ``peak``, and alive at :func:`halfway`.

        ``process`` is by how much the process grows at its peak; Linux, without a GPU.
        """
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            halfway.bytes = 0
            with self.autocast():
                run()
            torch.cuda.synchronize()
            peak = torch.cuda.max_memory_allocated() - before
            return {"peak": peak, "kept": max(halfway.bytes - before, 0), "process": 0}
        gc.collect()
        measurable = os.access("/proc/self/clear_refs", os.W_OK)
        if measurable:
            ctypes.CDLL(None).malloc_trim(0)  # else it uses again what it has not given back
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
            resident = _status("VmRSS")
        activities = [torch.profiler.ProfilerActivity.CPU]
        with (
            torch.profiler.profile(activities=activities, profile_memory=True) as profile,
            self.autocast(),
        ):
            run()
        process = _status("VmHWM") - resident if measurable else 0
        live = peak = kept = 0
        for event in sorted(profile.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
            if event.name() == "[memory]":
                live += event.nbytes()
                peak = max(peak, live)
            elif event.name() == _HALFWAY:
                kept = live
        return {"peak": peak, "kept": kept, "process": process}


_HALFWAY = "after the forward pass"


def halfway() -> None:
    """Marks the moment in a run when what is alive is what is kept for backward."""
    if torch.cuda.is_available():
        halfway.bytes = torch.cuda.memory_allocated()
    with torch.profiler.record_function(_HALFWAY):
        pass


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def measurement(name: str, values: list[float]) -> benchmark.Measurement:
    """Values (seconds, or ratios) with PyTorch's median and interquartile range."""
    return benchmark.Measurement(1, values, benchmark.utils.common.TaskSpec(name, setup=""))


def milliseconds(times: benchmark.Measurement) -> float:
    """The median."""
    return times.median * 1e3


def ratio(a: benchmark.Measurement, b: benchmark.Measurement) -> dict[str, float]:
    """Median of the ratios within a round, and half their interquartile range."""
    ratios = measurement("", [x / y for x, y in zip(a.times, b.times, strict=True)])
    return {"ratio": ratios.median, "spread": ratios.iqr / 2}


def shown(found: dict[str, float]) -> str:
    """A ratio with its spread."""
    return f"{found['ratio']:.3f}+-{found['spread']:.3f}"
