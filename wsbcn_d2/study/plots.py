"""Figures of a study, from records alone."""

import io
import itertools
from collections.abc import Callable, Sequence

import numpy as np
from cycler import cycler
from matplotlib.figure import Figure

from .stats import mean_interval
from .summary import group, summarize, task_label, tasks_of

__all__ = ["make_figures", "png_bytes", "showcase"]

# Distinguishable with colour-blind eyes (Okabe and Ito), and a dash pattern beyond them.
_LOOKS = cycler(linestyle=("-", "--", ":")) * cycler(
    color=("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000")
)
_QUANTITIES = {
    "inactive": "share of inactive channels",
    "shift": "|mean| / std of a channel",
    "estimate_error": "error of the estimates / std",
}


def _styles(records: Sequence[dict]) -> dict[str, dict]:
    variants = dict.fromkeys(record["variant"] for record in records)
    return dict(zip(variants, _LOOKS(), strict=False))


def _text(label: str) -> str:
    """A label as Matplotlib is to show it: no formula, and never left out of the legend."""
    label = label.replace("$", r"\$")
    return f" {label}" if label.startswith("_") else label


def _draw(ax, curves: list, style: dict, label: str, *, column: int = 0, band: bool = True) -> None:
    """The mean over seeds as a line, with the 95 % interval of each point where there are two."""
    count = min(len(curve) for curve in curves)
    points = np.array([curve[:count] for curve in curves], float)
    x, y = points[:, :, column].mean(0), points[:, :, -1]
    stats = [mean_interval(list(values)) for values in y.T]
    mean = np.array([value for value, _ in stats])
    marker = "o" if count <= 12 else None
    ax.plot(x, mean, label=_text(label), marker=marker, markersize=3, linewidth=1.5, **style)
    if band and len(curves) > 1:
        half = np.array([half for _, half in stats])
        ax.fill_between(x, mean - half, mean + half, color=style["color"], alpha=0.12, linewidth=0)


def _grid(
    records: Sequence[dict],
    rows: dict,
    columns: dict,
    curve_of: Callable[[dict, object, object], list | None],
    *,
    size: tuple[float, float] = (5.2, 3.4),
    xlabel: str = "iteration",
    sharey: bool | str = False,
    from_zero: bool = True,
    **how,
) -> Figure:
    """Curves of all variants; rows and columns of axes are given by key and label.

    ``curve_of`` is the curve of a record at (row, column), if it has one. A shared y axis is
    labelled once.
    """
    styles = _styles(records)
    figure = Figure((size[0] * len(columns), size[1] * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), len(columns), squeeze=False, sharey=sharey)
    for (variant, _), members in group(records).items():
        for (i, row), (j, column) in itertools.product(enumerate(rows), enumerate(columns)):
            curves = [curve for m in members if (curve := curve_of(m, row, column))]
            if curves:
                _draw(axes[i, j], curves, styles[variant], variant, **how)
    for (i, row), (j, column) in itertools.product(enumerate(rows), enumerate(columns)):
        ax = axes[i, j]
        if not sharey or i == 0:
            ax.set_title(columns[column])
        if not sharey or i + 1 == len(rows):
            ax.set_xlabel(xlabel)
        if not sharey or j == 0:
            ax.set_ylabel(rows[row])
        if from_zero:
            ax.set_ylim(bottom=0)
        ax.grid(alpha=0.3)
    handles: dict[str, object] = {}
    for ax in axes.flat:
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    if handles:
        ncols = min(3 * len(columns), 5, len(handles))  # what fits into the width
        figure.legend(handles.values(), handles, loc="outside lower center", ncols=ncols)
    return figure


def _grid_by_images(records: Sequence[dict], rows: dict, curve_of: Callable, **how) -> Figure:
    """A grid with a column for each number of images per step."""
    counts = sorted({record["images_per_step"] for record in records})
    columns = {count: f"{count} image{'s' * (count > 1)} per step" for count in counts}

    def of_count(record, row, count):
        return curve_of(record, row) if record["images_per_step"] == count else None

    return _grid(records, rows, columns, of_count, **how)


def _at_fewest_images(records: Sequence[dict]) -> list[dict]:
    fewest = min(record["images_per_step"] for record in records)
    return [record for record in records if record["images_per_step"] == fewest]


def _ap_figure(records: Sequence[dict], column: int, xlabel: str) -> Figure:
    rows = {task: task_label(task) for task in tasks_of(record["ap"] for record in records)}
    return _grid_by_images(
        records, rows, lambda record, task: record["ap"].get(task), xlabel=xlabel, column=column
    )


def showcase(records: Sequence[dict], strip: dict[str, np.ndarray]) -> Figure:
    """AP over iterations, with intervals, above one picture as each variant sees it.

    Args:
        records: of the variants to show; those at their fewest images per step are.
        strip: title to pixels, (height, width, 3) of uint8, from left to right.
    """
    records = _at_fewest_images(records)
    styles, tasks = _styles(records), tasks_of(record["ap"] for record in records)
    figure = Figure(figsize=(10, 5.6), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=(1.6, 1))
    axes = above.subplots(1, len(tasks), squeeze=False)
    for (variant, _), members in group(records).items():
        for ax, task in zip(axes[0], tasks, strict=True):
            # Before the first step a detector from scratch finds nothing.
            curves = [[[0, 0.0, 0.0], *m["ap"][task]] for m in members if m["ap"].get(task)]
            if curves:
                _draw(ax, curves, styles[variant], f"{variant} ({len(curves)})")
    for ax, task in zip(axes[0], tasks, strict=True):
        ax.set(xlabel="iteration", ylabel=task_label(task))
        ax.set_ylim(bottom=0)
        ax.grid(alpha=0.3)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    above.legend(handles, labels, loc="outside right center", title="variant (seeds)")
    for ax, (title, pixels) in zip(below.subplots(1, len(strip)), strip.items(), strict=True):
        ax.imshow(pixels, interpolation="antialiased")
        ax.set_title(_text(title), fontsize="medium")
        ax.set_axis_off()
    return figure


def _final_figure(records: Sequence[dict]) -> Figure:
    """Final AP: mean and interval, and every seed as a dot."""
    styles, groups, rows = _styles(records), group(records), summarize(records)
    tasks = tasks_of(row.ap for row in rows)
    figure = Figure((5.2 * len(tasks), 1.2 + 0.32 * len(rows)), layout="constrained")
    for ax, task in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks, strict=True):
        for place, row in enumerate(rows):
            if task not in row.ap:
                continue
            mean, half = row.ap[task]
            color = styles[row.variant]["color"]
            members = groups[row.variant, row.images_per_step]
            ax.barh(place, mean, xerr=half, color=color, alpha=0.5, capsize=3)
            dots = [m["final_ap"][task] for m in members]
            ax.plot(dots, [place] * len(dots), ".", color="black", markersize=5)
        labels = [_text(f"{row.variant}, {row.images_per_step} img") for row in rows]
        ax.set_yticks(range(len(rows)), labels, fontsize="small")
        ax.invert_yaxis()
        ax.set_xlim(left=0)
        ax.set_xlabel(task_label(task))
        ax.grid(axis="x", alpha=0.3)
    return figure


def _rate_figure(records: Sequence[dict]) -> Figure | None:
    """Final AP over learning rates, of the variants that were trained at several."""
    curves: dict[str, dict[float, list[dict]]] = {}
    for record in _at_fewest_images(records):
        words = [word for word in record["variant"].split() if not word.startswith("BASE_LR=")]
        rates = curves.setdefault(" ".join(words), {})
        rates.setdefault(record["learning_rate"], []).append(record["final_ap"])
    curves = {variant: rates for variant, rates in curves.items() if len(rates) > 1}
    if not curves:
        return None
    tasks, ticks = tasks_of(r["final_ap"] for r in records), sorted(set().union(*curves.values()))
    figure = Figure((5.2 * len(tasks), 3.4), layout="constrained")
    for ax, task in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks, strict=True):
        for (variant, rates), style in zip(curves.items(), _LOOKS(), strict=False):
            found = {rate: [ap[task] for ap in rates[rate] if task in ap] for rate in sorted(rates)}
            x = [rate for rate, values in found.items() if values]
            stats = [mean_interval(found[rate]) for rate in x]
            look = {"marker": "o", "markersize": 3, "capsize": 3, "label": _text(variant), **style}
            ax.errorbar(x, [mean for mean, _ in stats], [half or 0 for _, half in stats], **look)
        ax.set(xscale="log", xlabel="learning rate", ylabel=task_label(task))
        ax.set_xticks(ticks, [f"{rate:g}" for rate in ticks])
        ax.minorticks_off()
        ax.set_ylim(bottom=0)
        ax.grid(alpha=0.3)
        ax.legend()
    return figure


def _loss_figure(records: Sequence[dict]) -> Figure | None:
    if not any(record["loss"] for record in records):
        return None
    how = {"sharey": True, "from_zero": False, "band": False}
    rows = {"loss": "training loss"}
    return _grid_by_images(records, rows, lambda record, row: record[row], **how)


def _channel_figure(records: Sequence[dict]) -> Figure | None:
    """The monitor's quantities by part of the model, at the fewest images per step."""
    records = [record for record in records if record.get("channels")]
    if not records:
        return None
    records = _at_fewest_images(records)
    names = {name for record in records for name in record["channels"]}
    parts = sorted({name.split("/")[1] for name in names})
    return _grid(
        records,
        {q: label for q, label in _QUANTITIES.items() if any(f"/{q}_mean" in n for n in names)},
        {part: part.replace("_", " ") for part in parts},
        lambda record, quantity, part: record["channels"].get(f"channels/{part}/{quantity}_mean"),
        size=(3.4, 2.8),
        sharey="row",
        band=False,
    )


def make_figures(records: Sequence[dict]) -> dict[str, Figure]:
    """The figures that the records have data for, by file name without extension."""
    figures = {
        "final_ap": _final_figure(records),
        "ap_over_iterations": _ap_figure(records, 0, "iteration"),
        "ap_over_time": _ap_figure(records, 1, "seconds of training steps"),
        "ap_over_learning_rate": _rate_figure(records),
        "loss": _loss_figure(records),
        "channels": _channel_figure(records),
    }
    return {name: figure for name, figure in figures.items() if figure is not None}


def png_bytes(figure: Figure) -> bytes:
    """The figure as a PNG file's contents; without date, so that equal data gives equal bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=90, metadata={"Software": None})
    return buffer.getvalue()
