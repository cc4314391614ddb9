"""The report of a study: one HTML file that needs nothing else, Markdown and CSV beside it."""

import base64
import html
import io
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from ..files import replacing
from .pairs import compare_pairs, pairs_csv, pairs_table
from .plots import make_figures, png_bytes, showcase
from .summary import differences, group, markdown, runs_csv, summarize, summary_csv, table

__all__ = ["write_report"]

_TITLES = {
    "showcase": "AP over iterations, and one picture",
    "final_ap": "AP at the end",
    "ap_over_iterations": "AP over iterations",
    "ap_over_time": "AP over time",
    "loss": "Training loss",
    "channels": "Channels: how close to elimination singularities",
}
_NOTES = {
    "final_ap": "Bars: mean over seeds with its 95 % interval; dots: the seeds.",
    "ap_over_iterations": "Mean over seeds; bands: 95 % interval at each point.",
    "ap_over_time": "Seconds spent in training steps, without evaluation and start.",
    "channels": "Inactive: the norm's output is <= 0 at more than 99 % of positions. |mean| / std: "
    "0 is what batch statistics give. Error of the estimates: against the mean over the last "
    "steps. Means over the norms of each part, from sampled steps.",
}
_PAIRED = (
    "AP at the end, first variant minus second: mean over their common seeds ± half of its 95 % "
    "interval (Student's t). Shown is what lies outside of its interval; of many differences that "
    "are none, one in twenty does so by chance."
)
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 1150px; padding: 0 1em;
       color: #222; background: #fff }
h1 { font-size: 1.6em } h2 { font-size: 1.2em; margin-top: 2em }
table { border-collapse: collapse } td, th { padding: .25em .7em; border-bottom: 1px solid #ccc;
       text-align: right; white-space: nowrap } td:first-child, th:first-child { text-align: left }
.scroll { overflow-x: auto } img { max-width: 100% } .note { color: #666; font-size: .9em }
.grid td { padding: 2px; text-align: center; border: 0 } .grid img { width: 190px }
code, pre { background: #f4f4f4; padding: .1em .3em } pre { overflow-x: auto; padding: .7em }
.failed { color: #a00 }
"""
_GAP = 8  # between truth and prediction in draw_predictions's pictures


def _row(cells: Iterable, tag: str = "td") -> str:
    """A line of a table, of cells in HTML."""
    return "<tr>" + "".join(f"<{tag}>{cell}</{tag}>" for cell in cells) + "</tr>\n"


def _table(head: Iterable[str], lines: Iterable[Iterable]) -> str:
    rows = "".join(_row(html.escape(str(cell)) for cell in line) for line in lines)
    head = _row(map(html.escape, head), "th")
    return f'<div class="scroll"><table>{head}{rows}</table></div>\n'


def _image(content: bytes, kind: str, alt: str) -> str:
    data = base64.b64encode(content).decode()
    return f'<img alt="{html.escape(alt)}" src="data:image/{kind};base64,{data}">'


def _halves(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Ground truth and prediction of one picture by ``draw_predictions``."""
    pixels = np.asarray(Image.open(path).convert("RGB"))
    width = (pixels.shape[1] - _GAP) // 2
    return pixels[:, :width], pixels[:, width + _GAP :]


def _jpeg(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


def _find_pictures(records: Sequence[dict], root: Path) -> dict[tuple[str, int], dict[str, Path]]:
    """Of each variant and number of images per step, the pictures of the first run that has any."""
    columns = {}
    for key, members in group(records).items():
        for record in members:
            found = sorted((root / "runs").glob(f"*_{record['digest']}/predictions/*.png"))
            if found:
                columns[key] = {path.name: path for path in found}
                break
    return columns


def _showcase(records: Sequence[dict], root: Path, name: str) -> Figure:
    found = _find_pictures(records, root).items()
    halves = {variant: _halves(paths[name]) for (variant, _), paths in found if name in paths}
    if not halves:
        raise ValueError(f"no run here has a picture {name}")
    strip = {"ground truth": next(iter(halves.values()))[0]}
    return showcase(records, strip | {variant: shown for variant, (_, shown) in halves.items()})


def _pictures(records: Sequence[dict], root: Path) -> str:
    """A table of pictures: one line per validation image, a column per variant."""
    found = _find_pictures(records, root)
    if not found:
        return '<p class="note">None: the runs were recorded on another machine.</p>\n'
    columns = [f"{variant}, {images} img" for variant, images in found]
    lines = [_row(map(html.escape, ["ground truth", *columns]), "th")]
    for name in sorted(set.intersection(*map(set, found.values()))):
        halves = [_halves(paths[name]) for paths in found.values()]
        pixels = [halves[0][0], *(prediction for _, prediction in halves)]
        lines.append(_row(_image(_jpeg(x), "jpeg", name) for x in pixels))
    return f'<div class="scroll"><table class="grid">{"".join(lines)}</table></div>\n'


def _provenance(records: Sequence[dict], command: str) -> str:
    def distinct(values):
        return "; ".join(dict.fromkeys(str(value) for value in values))

    hours = sum(record["wall_seconds"] for record in records) / 3600
    lines = {
        "runs": len(records),
        "seeds": distinct(sorted(record["seed"] for record in records)),
        "run time": f"{hours:.2f} hours, summed over runs that may share the machine",
        "hardware": distinct(f"{r['hardware']}, {r['threads']} thread(s) per run" for r in records),
        "memory": distinct(r["memory_kind"] for r in records if r["memory_kind"]),
        **{
            name: distinct(record["versions"].get(name) for record in records)
            for name in ("python", "torch", "detectron2")
        },
        "git": distinct(record["git"] for record in records),
        "dates": distinct(sorted(record["finished"] for record in records)),
    }
    return f"<pre>{html.escape(command)}</pre>\n" + _table(("", ""), lines.items())


def write_report(
    records: Sequence[dict],
    root: str | os.PathLike,
    *,
    title: str,
    command: str,
    missing: Sequence[str] = (),
    strip: str = "",
) -> Path:
    """Write the report and what it is made of below ``root``.

    report.html holds all; results.md the tables of AP and of paired differences, results.csv,
    pairs.csv and runs.csv the numbers, plots/*.png the figures.

    Args:
        records: of finished runs, in the order in which variants are to appear.
        root: the study's folder; pictures are taken from its runs.
        title: heading.
        command: the command line, for the reader to repeat.
        missing: lines about runs that have no result.
        strip: file name of the picture to show below the curves in plots/showcase.png.

    Returns:
        Path: of the HTML file.

    Raises:
        ValueError: without any record, or if no run has the picture.
    """
    if not records:
        raise ValueError("no run has finished: nothing to report")
    root = Path(root)
    rows, pairs = summarize(records), compare_pairs(records)
    parts = [
        f"<h1>{html.escape(title)}</h1>\n",
        _table(*table(rows)),
        '<p class="note">AP: mean ± half of the 95 % interval over seeds (Student\'s t). Learning '
        "rate and iterations follow the images per step by the linear rule, so that every run of "
        "a schedule sees the same images. Step time is the median; memory the peak.</p>\n",
    ]
    if pairs:
        parts.append(f"<h2>Differences, paired by seed</h2>\n{_table(*pairs_table(pairs))}")
        parts.append(f'<p class="note">{html.escape(_PAIRED)}</p>\n')
    if missing:
        items = "".join(f"<li>{html.escape(text)}</li>" for text in missing)
        parts.append(f'<p class="failed">Without a result:</p><ul class="failed">{items}</ul>\n')
    figures = make_figures(records)
    if strip:
        figures = {"showcase": _showcase(records, root, strip)} | figures
    plots = root / "plots"
    plots.mkdir(parents=True, exist_ok=True)
    for name, figure in figures.items():
        content = png_bytes(figure)
        (plots / f"{name}.png").write_bytes(content)
        parts.append(f"<h2>{_TITLES[name]}</h2>\n{_image(content, 'png', _TITLES[name])}\n")
        parts.append(f'<p class="note">{html.escape(_NOTES.get(name, ""))}</p>\n')
    parts.append(f"<h2>Predictions</h2>\n{_pictures(records, root)}")
    parts.append("<h2>Where the configs differ</h2>\n" + _table(*differences(records)))
    parts.append(f"<h2>Provenance</h2>\n{_provenance(records, command)}")
    page = (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head>\n"
        f"<body>\n{''.join(parts)}</body></html>\n"
    )
    files = {"results.md": markdown(*table(rows)), "results.csv": summary_csv(rows)}
    if pairs:
        files["results.md"] += f"\n{markdown(*pairs_table(pairs))}"
        files["pairs.csv"] = pairs_csv(pairs)
    for name, text in {**files, "runs.csv": runs_csv(records), "report.html": page}.items():
        with replacing(root / name) as part:
            Path(part).write_text(text)
    return root / "report.html"
