#!/usr/bin/env python
"""Check the kernels on this machine's GPU, time them, and write what came out as one table.

    tools/gpu_check.sh [--output gpu_check.md] [--quick]

Every kernel against float64, 200 training steps against the readable forms, mixed precision,
channels_last, no waiting for the GPU, tensors of more than 2^31 elements, each in a process of its
own; two GPUs where there are two; the benchmarks; compute-sanitizer where it is installed. At most
ten minutes; what there was no time for is said.

Exit code 0: all is well; 1: a check failed; 2: no GPU here, or no Triton.
"""

import argparse
import importlib.util
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from gpu_checks import CHECKS

from wsbcn_d2.files import replacing
from wsbcn_d2.layers.kernels import cuda_nodes

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 590.0  # seconds
_COCO = "configs/COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_2x"
_STEP = ["step", *(f"{_COCO}_{kind}_1img.yaml" for kind in ("gn", "gn_ws", "bcn_ws"))]
BENCHMARKS = {
    "benchmark: step, float32": [*_STEP, "--rounds", "25", "--warmup", "8"],
    "benchmark: step, AMP": [*_STEP, "--amp", "--rounds", "25", "--warmup", "8"],
    "benchmark: layer, float32": ["layer", "--rounds", "10"],
    "benchmark: layer, AMP": ["layer", "--amp", "--rounds", "10"],
    "benchmark: WS": ["ws", "--rounds", "10"],
}


class Row(tuple):
    """(name, "ok" | "FAILED" | "not run", what came out, seconds)."""


def one(name: str, run: Callable[[], str]) -> Row:
    """Run a check, and whatever goes wrong is its result."""
    began = time.monotonic()
    try:
        found, result = run(), "ok"
        if found.startswith("not run"):
            result, found = "not run", found.removeprefix("not run").lstrip(": ")
    except Exception as error:  # a table with a failure in it is what is wanted
        result, found = "FAILED", f"{type(error).__name__}: {error}"
    row = Row((name, result, " ".join(found.split())[:400], time.monotonic() - began))
    print(f"{name}: {row[1]} {row[2]} ({row[3]:.0f} s)", flush=True)
    return row


def command(args: list[str], deadline: float, keep: Callable[[str], bool]) -> str:
    """Lines that a command prints and ``keep`` likes.

    Raises:
        AssertionError: if it fails, with its last line.
    """
    left = deadline - time.monotonic()
    if left < 20:
        return "not run: out of time"
    try:
        done = subprocess.run(args, cwd=ROOT, capture_output=True, text=True, timeout=left)
    except subprocess.TimeoutExpired:
        return "not run: out of time"
    lines = (done.stdout + done.stderr).strip().splitlines()
    assert done.returncode == 0, lines[-1] if lines else f"exit code {done.returncode}"
    return "; ".join(line.strip() for line in done.stdout.splitlines() if keep(line)) or "ran"


def apart(name: str, deadline: float) -> str:
    """One of CHECKS in a process of its own: most of its time compiles, and a kernel that goes
    astray must not spoil the others."""
    args = [sys.executable, __file__, "--check", name]
    return command(args, deadline, lambda line: True).split("; ")[-1]


def all_apart(deadline: float) -> list[Row]:
    """Every check, as many at a time as there are cores."""
    cuda_nodes.nodes()  # built once, not by each
    with ThreadPoolExecutor(min(len(CHECKS), os.cpu_count() or 1)) as pool:
        return list(pool.map(lambda name: one(name, lambda: apart(name, deadline)), CHECKS))


def two_processes(deadline: float) -> str:
    """Two training steps of the demo's model on two GPUs."""
    if torch.cuda.device_count() < 2:
        return "not run: one GPU"
    config = "configs/shapes/mask_rcnn_R_18_FPN_bcn_ws.yaml"
    options = ["SOLVER.MAX_ITER", "2", "TEST.EVAL_PERIOD", "0", "OUTPUT_DIR", "output/gpu_check"]
    train = [sys.executable, "tools/train_net.py", "--num-gpus", "2", "--config-file", config]
    return command([*train, *options], deadline, lambda line: False)


def sanitizer(deadline: float) -> str:
    """NVIDIA's compute-sanitizer on the kernels."""
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        return "not run: compute-sanitizer is not installed"
    args = [tool, "--error-exitcode", "9", sys.executable, __file__, "--sanitized"]
    return command(args, deadline, lambda line: "ERROR SUMMARY" in line)


def about() -> list[str]:
    """What the table is about."""
    import triton

    card = torch.cuda.get_device_properties(0)
    kind = f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"
    return [
        f"{torch.cuda.device_count()} x {card.name}, {card.total_memory / 2**30:.0f} GB; "
        f"torch {torch.__version__}, {kind}, Triton {triton.__version__}, "
        f"Python {sys.version.split()[0]}"
    ]


def table(head: list[str], rows: list[Row]) -> str:
    """The Markdown page."""
    lines = [*head, "", "| check | result | found | seconds |", "|---|---|---|---|"]
    for name, result, found, seconds in rows:
        lines.append(f"| {name} | {result} | {found.replace('|', '/')} | {seconds:.0f} |")
    return "\n".join(lines) + "\n"


def parse(argv) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", default="gpu_check.md", help="Markdown file to write")
    parser.add_argument("--quick", action="store_true", help="no benchmarks, no other programs")
    parser.add_argument("--sanitized", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--check", choices=CHECKS, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv=None) -> int:
    """Runs the tool; returns the exit status."""
    args, deadline = parse(argv), time.monotonic() + LIMIT
    if not torch.cuda.is_available():
        print("gpu_check: PyTorch finds no GPU on this machine", file=sys.stderr)
        return 2
    if importlib.util.find_spec("triton") is None:
        print("gpu_check: Triton is not installed: pip install triton", file=sys.stderr)
        return 2
    # Convolutions in reduced precision would hide the layers' own errors.
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.deterministic = True
    torch.manual_seed(0)
    if args.sanitized:
        return run_sanitized()
    if args.check:
        print(CHECKS[args.check]("cuda"))
        return 0
    rows = all_apart(deadline)
    if not args.quick:
        rows.append(one("a training step on two GPUs", lambda: two_processes(deadline)))
        for name, options in BENCHMARKS.items():
            args_ = [sys.executable, "tools/benchmark.py", *options, "--device", "cuda"]
            rows.append(one(name, lambda a=args_: command(a, deadline, lambda line: "+-" in line)))
        rows.append(one("compute-sanitizer", lambda: sanitizer(deadline)))
    page = table(about(), rows)
    with replacing(args.output) as path:
        Path(path).write_text(page)
    print(f"\n{page}\nwritten to {args.output}")
    return int(any(row[1] == "FAILED" for row in rows))


def run_sanitized() -> int:
    """The kernels alone, on few shapes, for a program that makes them a hundred times slower."""
    from gpu_checks import SMALL, SMALL_WEIGHTS, bcn_kernels, ws_kernels

    print(bcn_kernels("cuda", SMALL), ws_kernels("cuda", SMALL_WEIGHTS))
    return 0


if __name__ == "__main__":
    sys.exit(main())
