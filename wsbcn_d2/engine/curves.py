"""Curves of a run: its metrics as written by Detectron2, and a plot of them."""

import json
from collections import defaultdict
from pathlib import Path

__all__ = ["plot_curves", "read_metrics"]


def read_metrics(path: str) -> dict[str, list[tuple[int, float]]]:
    """Read Detectron2's ``metrics.json``: metric name to (iteration, value) pairs in order.

    A last line cut short by a kill is left out. After a resume, the values of iterations that were
    run again replace the earlier ones.
    """
    series: dict[str, dict[int, float]] = defaultdict(dict)
    for line in Path(path).read_text().splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        iteration = row.pop("iteration")
        for name, value in row.items():
            series[name][iteration] = value
    return {name: sorted(values.items()) for name, values in series.items()}


def plot_curves(metrics: dict[str, list[tuple[int, float]]], path: str, title: str = "") -> str:
    """Plot the training losses and the test APs of one run as a PNG file; returns its path."""
    from matplotlib.figure import Figure  # without pyplot: no global state, no display

    figure = Figure(figsize=(10, 4), layout="constrained")
    losses, aps = figure.subplots(1, 2)
    for name in sorted(metrics):
        if "loss" in name:
            losses.plot(*zip(*metrics[name], strict=True), label=name, linewidth=1)
        elif name.endswith("/AP"):
            aps.plot(*zip(*metrics[name], strict=True), "o-", label=name)
    for axes, label in ((losses, "training loss"), (aps, "AP on the test set")):
        axes.set(xlabel="iteration", ylabel=label)
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(fontsize="small")
    figure.suptitle(title)
    figure.savefig(path, dpi=110)
    return path
