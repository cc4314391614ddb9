"""One run of a study: a training script in a process of its own, watched and measured.

    python -m wsbcn_d2.study.child --script tools/train_net.py [options] -- ARGUMENTS OF THE SCRIPT

Runs the script as it is. Around it: ends when the study ends, imports the modules that register
datasets, draws predictions afterwards, and notes wall time, memory and hardware in
``sessions.jsonl``.
"""

import argparse
import importlib
import json
import logging
import os
import platform
import resource
import runpy
import signal
import sys
import threading
import time
from pathlib import Path

import torch

from ..engine import load_config

__all__ = ["hardware", "main"]


def end_with_parent(parent: int) -> None:
    """End this process as soon as its parent is another: the study was killed.

    What was trained since the last checkpoint is lost, and the cores are free for the next try,
    which would else write to the same folder at the same time.
    """

    def watch():
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def hardware(gpu: bool | None = None) -> str:
    """The GPU's name, or the processor's and its number of cores; None: the GPU's if there is."""
    if torch.cuda.is_available() if gpu is None else gpu:
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores"


def _session(started: float) -> dict:
    if torch.cuda.is_available():
        memory, kind = torch.cuda.max_memory_allocated() / 2**20, "CUDA"
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        memory, kind = peak / (2**20 if sys.platform == "darwin" else 2**10), "RSS"
    return {
        "wall_seconds": round(time.monotonic() - started, 1),
        "memory_mb": round(memory),
        "memory_kind": kind,
        "hardware": hardware(),
    }


def _draw(config_file: str, opts: list[str], folder: Path, count: int) -> None:
    # Imported late: drawing needs OpenCV, training does not.
    from ..predictor import draw_predictions

    cfg = load_config(config_file, [*opts, "MODEL.WEIGHTS", str(folder / "model_final.pth")])
    draw_predictions(cfg, str(folder / "predictions"), num_images=count, scale=2)


def main(argv: list[str]) -> int:
    """Returns the exit status of the script."""
    split = argv.index("--")
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--script", required=True)
    parser.add_argument("--parent", type=int)
    parser.add_argument("--import", dest="modules", action="append", default=[])
    parser.add_argument("--pictures", type=int, default=0)
    parser.add_argument("--config-file", required=True)
    parser.add_argument("--folder", required=True)
    args = parser.parse_args(argv[:split])
    opts = argv[split + 1 :]
    if args.parent:
        end_with_parent(args.parent)
    sys.path.insert(0, os.getcwd())
    for name in args.modules:
        importlib.import_module(name)
    folder = Path(args.folder)
    folder.mkdir(parents=True, exist_ok=True)
    opts += ["OUTPUT_DIR", str(folder)]
    started = time.monotonic()
    # Unlike the default action, this lets the session be noted.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    sys.argv = [args.script, "--config-file", args.config_file, "--resume", *opts]
    status = 0
    try:
        runpy.run_path(args.script, run_name="__main__")
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    finally:
        with (folder / "sessions.jsonl").open("a") as file:
            file.write(json.dumps(_session(started)) + "\n")
    if not status and args.pictures:
        try:
            _draw(args.config_file, opts, folder, args.pictures)
        except Exception:  # pictures are an extra; the numbers stand without them
            logging.getLogger(__name__).warning("no pictures drawn", exc_info=True)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
