"""Records of finished runs: small JSON files that can be committed and carried elsewhere."""

import contextlib
import json
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import detectron2
import numpy as np
import torch

from ..engine.curves import read_metrics
from ..engine.evaluation import has_compiled_ops
from ..files import replacing
from .plan import WEIGHTS, Run, default_of

__all__ = ["find_records", "make_record", "matching", "write_record"]

FORMAT = 1
# What counts as a result, the last part of a metric's name: of detectors, of classifiers.
_RESULTS = ("AP", "top1")
_POINTS = 50  # of a curve that is kept


def matching(run: Run, records: Iterable[dict]) -> dict | None:
    """The record of a run, if there is one: that with the same settings.

    A key that one side lacks has its default there: keys that are new since a record was
    written, and Detectron2's versions, do not make finished runs unfinished. Pre-trained weights
    that are not here, or were not known to the record, count as the same.
    """
    for record in records:
        theirs = record["settings"]
        differ = {
            key
            for key in theirs.keys() | run.settings.keys()
            if theirs.get(key, default_of(key)) != run.settings.get(key, default_of(key))
        }
        unknown = {WEIGHTS} - (theirs.keys() & run.settings.keys())
        if not differ - unknown:
            return record
    return None


def find_records(*folders: str | os.PathLike) -> list[dict]:
    """All records of some folders; files that are none are left out.

    Args:
        folders: need not exist.

    Returns:
        list[dict]: those of earlier folders first, which so take precedence in :func:`matching`.
    """
    records = []
    for path in (p for folder in folders for p in sorted(Path(folder).glob("*.json"))):
        try:
            record = json.loads(path.read_text())
        except (OSError, ValueError):
            continue
        if isinstance(record, dict) and record.get("format") == FORMAT:
            records.append(record)
    return records


def write_record(record: dict, path: str | os.PathLike) -> None:
    """Write a record so that the file is there whole or not at all."""
    text = json.dumps(record, sort_keys=True, allow_nan=False) + "\n"
    with replacing(path) as part:
        Path(part).write_text(text)


def make_record(run: Run, folder: str | os.PathLike, command: str, threads: int) -> dict:
    """The record of a run that has finished.

    Args:
        run: the run.
        folder: its output folder, with ``metrics.json`` and ``sessions.jsonl``.
        command: how to repeat it.
        threads: threads it ran on.

    Raises:
        ValueError: if the folder holds no result of the last iteration.
    """
    folder = Path(folder)
    metrics = read_metrics(str(folder / "metrics.json"))
    times = metrics.get("time", [])
    seconds = _seconds(times)
    found = [(name.rpartition("/"), series) for name, series in sorted(metrics.items())]
    results = {task: series for (task, _, metric), series in found if metric in _RESULTS}
    last = min((series[-1][0] for series in results.values()), default=-1)
    if last < run.max_iter - 1:
        raise ValueError(f"no AP of iteration {run.max_iter} in {folder / 'metrics.json'}")
    curves = {}
    for task, series in results.items():
        # COCO's AP is NaN where nothing at all was detected; as a result that is 0.
        values = [(i, 0.0 if math.isnan(ap) else ap) for i, ap in series]
        curves[task] = [[min(i + 1, run.max_iter), round(seconds(i), 1), ap] for i, ap in values]
    log = folder / "sessions.jsonl"  # a line of each process: one more after every interruption
    sessions = list(map(json.loads, log.read_text().splitlines())) if log.is_file() else []
    kind = "compiled" if has_compiled_ops() else "pure Python"
    memory = max((s["memory_mb"] for s in sessions), default=None)
    return {
        "format": FORMAT,
        "variant": run.variant,
        "config_file": run.config_file,
        "digest": run.digest,
        "settings": run.settings,
        "seed": run.seed,
        "images_per_step": run.images_per_step,
        "learning_rate": run.settings.get("SOLVER.BASE_LR", default_of("SOLVER.BASE_LR")),
        "max_iter": run.max_iter,
        "ap_columns": ["iteration", "training seconds", "AP"],
        "ap": curves,
        "final_ap": {task: curve[-1][2] for task, curve in curves.items()},
        "loss": _thin(metrics.get("total_loss", [])),
        "channels": {k: _thin(v) for k, v in metrics.items() if k.startswith("channels/")},
        "step_seconds": round(float(np.median([v for _, v in times])), 5) if times else None,
        "train_seconds": round(seconds(run.max_iter), 1),
        "wall_seconds": round(sum(s["wall_seconds"] for s in sessions), 1),
        "memory_mb": memory,
        "memory_kind": sessions[-1]["memory_kind"] if sessions else None,
        "hardware": sessions[-1]["hardware"] if sessions else platform.machine(),
        "threads": threads,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "detectron2": f"{detectron2.__version__} ({kind})",
            "platform": sys.platform,
        },
        "git": _git_revision(),
        "command": command,
        "finished": time.strftime("%Y-%m-%d", time.gmtime()),
    }


def _seconds(times: list[tuple[int, float]]):
    """Iteration to seconds spent in training steps so far, from the logged medians."""
    if not times:
        return lambda iteration: 0.0
    iterations = [-1, *(i for i, _ in times)]
    total = [0.0, *np.cumsum(np.diff(iterations) * [value for _, value in times])]
    return lambda iteration: float(np.interp(iteration, iterations, total))


def _thin(series: list[tuple[int, float]]) -> list[list[float]]:
    """Averages of consecutive points, at most ``_POINTS``; what is not finite is left out."""
    series = [(i, v) for i, v in series if math.isfinite(v)]
    chunks = np.array_split(np.array(series).reshape(-1, 2), max(1, min(_POINTS, len(series))))
    means = [chunk.mean(0) for chunk in chunks if len(chunk)]
    return [[round(float(i)), float(f"{value:.4g}")] for i, value in means]


def _git_revision() -> str:
    root = Path(__file__).resolve().parents[2]
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=10"]
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        return subprocess.check_output(command, stderr=subprocess.DEVNULL, text=True).strip()
    return "unknown"
