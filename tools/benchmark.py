#!/usr/bin/env python
"""Measure what WS and BCN cost: medians of interleaved runs, as ratios, with their spread.

    tools/benchmark.py layer                     BCN against GroupNorm over R-50-FPN's activations
    tools/benchmark.py host                      what a layer costs the CPU before a GPU starts
    tools/benchmark.py ws                        standardizing all weights of R-50-FPN
    tools/benchmark.py step CONFIG CONFIG ...    training step and inference; the first is the base
    tools/benchmark.py step CONFIG --recompute 'backbone.bottom_up.res?.*' --recompute ...
    tools/benchmark.py monitor CONFIG ...        what the channel monitor adds to a training
    tools/benchmark.py layer --device cuda --amp --output layer.json

Every round runs all candidates one after another, so that a busy machine slows all of them; a
ratio is the median over rounds of the ratio within a round, +- half its interquartile range.
Peak memory is that of live tensors allocated in a step (CPU: by the profiler's allocation events;
CUDA: by the caching allocator), above what was live before it; kept is what of them is alive after
the forward pass, for backward; process is by how much the process grows (Linux).
"""

import argparse
import json
import os
import sys

import torch
from benchmarks.host import host_mode
from benchmarks.layers import layer_mode, ws_mode
from benchmarks.runner import Runner
from benchmarks.steps import monitor_mode, step_mode

from wsbcn_d2.study.child import hardware

MODES = {
    "host": host_mode,
    "layer": layer_mode,
    "ws": ws_mode,
    "step": step_mode,
    "monitor": monitor_mode,
}


def parse(argv) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("mode", choices=MODES)
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
    parser.add_argument(
        "--recompute",
        nargs="+",
        action="append",
        default=[],
        metavar="PATTERN",
        help="step: measure every config once more, with these modules recomputed in backward",
    )
    parser.add_argument("--released", action="store_true", help="layer: time released BCN too")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, one round: a smoke test")
    parser.add_argument("--output", help="JSON file to write")
    args = parser.parse_args(argv)
    if args.mode == "step" and len(args.configs) * (1 + len(args.recompute)) < 2:
        parser.error("step mode compares two or more configs, or one with --recompute")
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


def main(argv=None) -> int:
    """Runs the tool; returns the exit status."""
    args = parse(argv)
    if args.cpu_time:
        args.threads = 1
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    about = {
        "device": hardware(args.device == "cuda"),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "load": os.getloadavg()[0],
    }
    print(" ".join(f"{key}={value}" for key, value in about.items()))
    result = MODES[args.mode](Runner(args), args)
    if args.output:
        command = ["tools/benchmark.py", *(sys.argv[1:] if argv is None else argv)]
        with open(args.output, "w") as file:
            json.dump({"command": command, "hardware": about, **result}, file, indent=1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
