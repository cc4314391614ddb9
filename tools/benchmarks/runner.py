"""How the benchmarks measure: interleaved rounds, ratios within a round, peak memory."""

import argparse
import contextlib
import math
import time
from collections.abc import Callable, Iterable

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

    def peak_bytes(self, run: Run) -> int:
        """Peak of the bytes that one run allocates and has not yet freed."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            with self.autocast():
                run()
            torch.cuda.synchronize()
            return torch.cuda.max_memory_allocated() - before
        activities = [torch.profiler.ProfilerActivity.CPU]
        with (
            torch.profiler.profile(activities=activities, profile_memory=True) as profile,
            self.autocast(),
        ):
            run()
        events = profile.profiler.kineto_results.events()
        changes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
        live = peak = 0
        for _, change in sorted(changes, key=lambda c: c[0]):
            live += change
            peak = max(peak, live)
        return peak


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


def geometric_mean(values: Iterable[float]) -> float:
    """Geometric mean of positive numbers."""
    values = list(values)
    return math.exp(sum(math.log(v) for v in values) / len(values))
