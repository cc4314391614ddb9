"""Figures of a study, from records alone."""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from .stats import mean_interval
from .summary import TASKS, group, summarize

__all__ = ["make_figures", "png_bytes", "save_figures", "showcase"]

# Distinguishable with colour-blind eyes (Okabe and Ito), and a dash pattern beyond them.
_COLORS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000")
_DASHES = ("-", "--", ":")
_QUANTITIES = {
    "inactive": "share of inactive channels",
    "shift": "|mean| / std of a channel",
    "estimate_error": "error of the estimates / std",
}


def _styles(records: Sequence[dict]) -> dict[str, dict]:
    variants = list(dict.fromkeys(record["variant"] for record in records))
    n = len(_COLORS)
    return {
        v: {"color": _COLORS[i % n], "linestyle": _DASHES[i // n % len(_DASHES)]}
        for i, v in enumerate(variants)
    }


def _text(label: str) -> str:
    """A label as Matplotlib is to show it: no formula, and never left out of the legend."""
    label = label.replace("$", r"\$")
    return f" {label}" if label.startswith("_") else label


def _axes(rows: int, columns: int, **kwargs):
    figure = Figure(figsize=(5.2 * columns, 3.4 * rows), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **kwargs)


def _legend(figure: Figure, axes) -> None:
    handles: dict[str, object] = {}
    for ax in axes.flat:
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    if handles:
        columns = min(5, len(handles))
        figure.legend(handles.values(), handles, loc="outside lower center", ncols=columns)


def _draw(ax, members: Sequence[dict], curves: list, column: int, style: dict, label: str) -> None:
    """The mean over seeds as a line, with the 95 % interval of each point where there are two."""
    count = min(len(curve) for curve in curves)
    points = np.array([curve[:count] for curve in curves], float)
    x, y = points[:, :, column].mean(0), points[:, :, -1]
    stats = [mean_interval(list(values)) for values in y.T]
    mean = np.array([value for value, _ in stats])
    marker = "o" if count <= 12 else None
    ax.plot(x, mean, label=_text(label), marker=marker, markersize=3, linewidth=1.5, **style)
    if min(len(members), len(curves)) > 1:
        half = np.array([half for _, half in stats])
        ax.fill_between(x, mean - half, mean + half, color=style["color"], alpha=0.12, linewidth=0)


def _ap_figure(records: Sequence[dict], column: int, xlabel: str) -> Figure:
    styles, groups = _styles(records), group(records)
    images = sorted({count for _, count in groups})
    tasks = sorted({task for record in records for task in record["ap"]})
    figure, axes = _axes(len(tasks), len(images))
    for (variant, count), members in groups.items():
        for row, task in enumerate(tasks):
            curves = [m["ap"][task] for m in members if m["ap"].get(task)]
            if curves:
                ax = axes[row, images.index(count)]
                _draw(ax, members, curves, column, styles[variant], variant)
    for row, task in enumerate(tasks):
        for column_, count in enumerate(images):
            ax = axes[row, column_]
            ax.set(title=f"{count} image{'s' * (count > 1)} per step", xlabel=xlabel)
            ax.set_ylabel(TASKS.get(task, f"{task} AP"))
            ax.set_ylim(bottom=0)
            ax.grid(alpha=0.3)
    _legend(figure, axes)
    return figure


def showcase(records: Sequence[dict], strip: dict[str, np.ndarray]) -> Figure:
    """AP over iterations, with intervals, above one picture as each variant sees it.

    Args:
        records: of the variants to show; those at their fewest images per step are.
        strip: title to pixels, (height, width, 3) of uint8, from left to right.
    """
    fewest = min(record["images_per_step"] for record in records)
    records = [record for record in records if record["images_per_step"] == fewest]
    styles, tasks = _styles(records), sorted({task for r in records for task in r["ap"]})
    figure = Figure(figsize=(10, 5.6), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=(1.6, 1))
    axes = above.subplots(1, len(tasks), squeeze=False)
    for (variant, _), members in group(records).items():
        for ax, task in zip(axes[0], tasks, strict=True):
            curves = [m["ap"][task] for m in members if m["ap"].get(task)]
            # Before the first step a detector from scratch finds nothing.
            curves = [[[0, 0.0, 0.0], *curve] for curve in curves]
            if curves:
                _draw(ax, members, curves, 0, styles[variant], f"{variant} ({len(curves)})")
    for ax, task in zip(axes[0], tasks, strict=True):
        ax.set(xlabel="iteration", ylabel=TASKS.get(task, f"{task} AP"))
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
    tasks = sorted({task for row in rows for task in row.ap})
    figure, axes = _axes(1, len(tasks))
    figure.set_figheight(1.2 + 0.32 * len(rows))
    for ax, task in zip(axes[0], tasks, strict=True):
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
        ax.set_xlabel(TASKS.get(task, f"{task} AP"))
        ax.grid(axis="x", alpha=0.3)
    return figure


def _loss_figure(records: Sequence[dict]) -> Figure | None:
    styles, groups = _styles(records), group(records)
    images = sorted({count for _, count in groups})
    figure, axes = _axes(1, len(images), sharey=True)
    for (variant, count), members in groups.items():
        curves = [m["loss"] for m in members if m["loss"]]
        if curves:
            _draw(axes[0, images.index(count)], members[:1], curves, 0, styles[variant], variant)
    if not any(ax.lines for ax in axes.flat):
        return None
    for ax, count in zip(axes[0], images, strict=True):
        ax.set(title=f"{count} image{'s' * (count > 1)} per step", xlabel="iteration")
        ax.grid(alpha=0.3)
    axes[0, 0].set_ylabel("training loss")
    _legend(figure, axes)
    return figure


def _channel_figure(records: Sequence[dict]) -> Figure | None:
    """The monitor's quantities by part of the model, at the fewest images per step."""
    records = [record for record in records if record.get("channels")]
    if not records:
        return None
    fewest = min(record["images_per_step"] for record in records)
    records = [record for record in records if record["images_per_step"] == fewest]
    styles, groups = _styles(records), group(records)
    names = {name for record in records for name in record["channels"]}
    parts = sorted({name.split("/")[1] for name in names})
    kinds = [q for q in _QUANTITIES if any(f"/{q}_mean" in name for name in names)]
    figure, axes = _axes(len(kinds), len(parts), sharey="row")
    figure.set_size_inches(3.4 * len(parts), 2.8 * len(kinds))
    for (variant, _), members in groups.items():
        for row, quantity in enumerate(kinds):
            for column, part in enumerate(parts):
                key = f"channels/{part}/{quantity}_mean"
                curves = [m["channels"][key] for m in members if m["channels"].get(key)]
                if curves:
                    _draw(axes[row, column], members[:1], curves, 0, styles[variant], variant)
    for row, quantity in enumerate(kinds):
        axes[row, 0].set_ylabel(_QUANTITIES[quantity])
        for column, part in enumerate(parts):
            axes[row, column].set_ylim(bottom=0)
            axes[row, column].grid(alpha=0.3)
            axes[0, column].set_title(part.replace("_", " "))
            axes[-1, column].set_xlabel("iteration")
    _legend(figure, axes)
    return figure


def make_figures(records: Sequence[dict]) -> dict[str, Figure]:
    """The figures that the records have data for, by file name without extension."""
    figures = {
        "final_ap": _final_figure(records),
        "ap_over_iterations": _ap_figure(records, 0, "iteration"),
        "ap_over_time": _ap_figure(records, 1, "seconds of training steps"),
        "loss": _loss_figure(records),
        "channels": _channel_figure(records),
    }
    return {name: figure for name, figure in figures.items() if figure is not None}


def png_bytes(figure: Figure, dpi: int = 90) -> bytes:
    """The figure as a PNG file's contents; without date, so that equal data gives equal bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, metadata={"Software": None})
    return buffer.getvalue()


def save_figures(figures: dict[str, Figure], folder: Path) -> dict[str, bytes]:
    """Write each figure as ``folder/<name>.png``; returns the files' contents by name."""
    folder.mkdir(parents=True, exist_ok=True)
    contents = {name: png_bytes(figure) for name, figure in figures.items()}
    for name, content in contents.items():
        (folder / f"{name}.png").write_bytes(content)
    return contents
