#!/usr/bin/env python
"""Measure what WS and BCN cost: medians of interleaved runs, as ratios, with their spread.

    tools/benchmark.py layer                     BCN against GroupNorm over R-50-FPN's activations
    tools/benchmark.py ws                        standardizing all weights of R-50-FPN
    tools/benchmark.py step CONFIG CONFIG ...    training step and inference; the first is the base
    tools/benchmark.py monitor CONFIG ...        what the channel monitor adds to a training
    tools/benchmark.py layer --device cuda --amp --output layer.json

Every round runs all candidates one after another, so that a busy machine slows all of them; a
ratio is the median over rounds of the ratio within a round, +- half its interquartile range.
Peak memory is that of live tensors allocated in a step (CPU: by the profiler's allocation events;
CUDA: by the caching allocator), above what was live before it.
"""

import argparse
import json
import math
import os
import platform
import statistics
import sys
import time

import torch

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))


class Runner:
    """Times callables by the options of the command line."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.device = torch.device(args.device)
        self.cuda = self.device.type == "cuda"

    def autocast(self):
        """Context of one run: mixed precision where --amp asks for it."""
        dtype = torch.float16 if self.cuda else torch.bfloat16
        return torch.autocast(self.device.type, dtype=dtype, enabled=self.args.amp)

    def once(self, run) -> float:
        """Milliseconds of one run, by device events on a GPU."""
        if self.cuda:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            with self.autocast():
                run()
            end.record()
            end.synchronize()
            return begin.elapsed_time(end)
        clock = time.thread_time if self.args.cpu_time else time.perf_counter
        begin = clock()
        with self.autocast():
            run()
        return (clock() - begin) * 1e3

    def rounds(self, runs: dict) -> dict[str, list[float]]:
        """Times of each callable, interleaved, after warm-up rounds."""
        times = {name: [] for name in runs}
        for i in range(self.args.warmup + self.args.rounds):
            for name, run in runs.items():
                elapsed = self.once(run)
                if i >= self.args.warmup:
                    times[name].append(elapsed)
        return times

    def peak_bytes(self, run) -> int:
        """Peak of the bytes that one run allocates and has not yet freed."""
        if self.cuda:
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


def ratio(numerator: list[float], denominator: list[float]) -> dict[str, float]:
    """Median of the ratios within a round, and half their interquartile range."""
    ratios = [a / b for a, b in zip(numerator, denominator, strict=True)]
    spread = 0.0
    if len(ratios) > 1:
        low, _, high = statistics.quantiles(ratios, n=4)
        spread = (high - low) / 2
    return {"ratio": statistics.median(ratios), "spread": spread}


def geometric_mean(values) -> float:
    """Geometric mean of positive numbers."""
    values = list(values)
    return math.exp(sum(math.log(v) for v in values) / len(values))


def parse(argv) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("mode", choices=("layer", "ws", "step", "monitor"))
    parser.add_argument(
        "configs", nargs="*", help="step, monitor: YAML configs; ws: one (default R-50-FPN)"
    )
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--amp", action="store_true", help="float16 on CUDA, bfloat16 on the CPU")
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--threads", type=int, help="CPU threads (default: PyTorch's)")
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="count the CPU time of one thread instead, where others use the machine",
    )
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--images", type=int, nargs="+", default=[1], help="images per batch")
    parser.add_argument("--image-size", type=int, nargs=2, default=(800, 1216), metavar=("H", "W"))
    parser.add_argument("--released", action="store_true", help="layer: time released BCN too")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, one round: a smoke test")
    parser.add_argument("--output", help="JSON file to write")
    args = parser.parse_args(argv)
    if args.mode == "step" and len(args.configs) < 2:
        parser.error("step mode compares two or more configs")
    if args.mode == "monitor" and not args.configs:
        parser.error("monitor mode needs a config")
    if args.cpu_time and args.device == "cuda":
        parser.error("--cpu-time is for --device cpu")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: no CUDA device here")
    if args.rounds < 1 or args.warmup < 0:
        parser.error("--rounds must be at least 1, --warmup at least 0")
    if args.quick:
        args.rounds, args.warmup, args.image_size = 1, 0, (96, 128)
    return args


def hardware(args: argparse.Namespace) -> dict:
    """What the numbers were measured on."""
    name = platform.processor() or platform.machine()
    if args.device == "cuda":
        name = torch.cuda.get_device_name()
    elif os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as file:
            models = [line.split(":")[1].strip() for line in file if "model name" in line]
        name = models[0] if models else name
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "load": os.getloadavg()[0],
    }


def main(argv=None) -> int:
    """Runs the tool; returns the exit status."""
    from benchmark_modes import MODES

    args = parse(argv)
    if args.cpu_time:
        args.threads = 1
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    about = hardware(args)
    print(" ".join(f"{key}={value}" for key, value in about.items()))
    result = MODES[args.mode](Runner(args), args)
    if args.output:
        command = ["tools/benchmark.py", *(sys.argv[1:] if argv is None else argv)]
        with open(args.output, "w") as file:
            json.dump({"command": command, "hardware": about, **result}, file, indent=1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
