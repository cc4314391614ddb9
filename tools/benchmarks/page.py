"""The table of costs in the main page, made from what tools/benchmark.py wrote (records/)."""

import json
from collections.abc import Callable
from pathlib import Path

from wsbcn_d2.study.summary import markdown

RECORDS = Path(__file__).parent / "records"
# Records of a column: one of each mode, where there is one.
_COLUMNS = (
    ("cpu_step", "cpu_layer", "cpu_ws", "cpu_monitor"),
    ("h200_step",),
    ("h200_step_amp",),
)


def read(folder: Path = RECORDS) -> dict[str, dict]:
    """Name of each record to its content, of a folder."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}


def costs(records: dict[str, dict]) -> str:
    """The table: ratios of medians, ± half the interquartile range of the rounds' ratios."""
    columns = [[records[name] for name in names if name in records] for names in _COLUMNS]
    columns = [{record["mode"]: record for record in column} for column in columns if column]
    lines = [
        [label, *(show(column[mode]) if mode in column else "-" for column in columns)]
        for label, mode, show in _ROWS
    ]
    return markdown(["", *map(_head, columns)], lines)


def _head(column: dict[str, dict]) -> str:
    first = next(iter(column.values()))
    kind = "AMP" if "--amp" in first["command"] else "float32"
    return f"{first['hardware']['device']}, {kind}"


def _ratio(found: dict[str, float]) -> str:
    return f"{found['ratio']:.2f} ± {found['spread']:.2f}"


def _row(record: dict, **wanted: str) -> dict:
    """The one row of a record whose entries end as they should."""
    (row,) = [r for r in record["rows"] if all(r[k].endswith(v) for k, v in wanted.items())]
    return row


def _step(what: str, name: str) -> Callable[[dict], str]:
    return lambda record: _ratio(_row(record, what=what, name=name)["time"])


def _peak(record: dict) -> str:
    rows = (_row(record, what="train", name=f"2x_{norm}_1img") for norm in ("gn_ws", "bcn_ws"))
    return ", ".join(f"{row['peak']:.3f}" for row in rows)


def _layer(key: str) -> Callable[[dict], str]:
    def show(record):
        ratios = [row[key]["ratio"] for row in record["rows"]]
        return f"{record['summary'][key]:.2f} ({min(ratios):.2f} to {max(ratios):.2f})"

    return show


def _watched(record: dict) -> str:
    shares = (_row(record, config=f"18_FPN_{norm}.yaml")["share"] for norm in ("gn", "bcn_ws"))
    return ", ".join(f"{share:.2%}" for share in shares)


_ROWS = (
    (
        "training step, 1 image, R-50-FPN Mask R-CNN: GN+WS / GN",
        "step",
        _step("train", "2x_gn_ws_1img"),
    ),
    ("the same: BCN+WS / GN", "step", _step("train", "2x_bcn_ws_1img")),
    ("peak memory of that step: GN+WS / GN, BCN+WS / GN", "step", _peak),
    ("inference, 1 image: BCN+WS / GN", "step", _step("infer", "2x_bcn_ws_1img")),
    ("the same, folded", "step", _step("infer", "2x_bcn_ws_1img folded")),
    (
        "BCN / `nn.GroupNorm` over R-50-FPN's activations, forward + backward",
        "layer",
        _layer("bcn / gn"),
    ),
    ("the same, forward alone", "layer", _layer("bcn / gn fwd")),
    (
        "bytes kept for backward, BCN / `nn.GroupNorm`, at most",
        "layer",
        lambda record: f"{record['summary']['bytes (largest)']:.3f}",
    ),
    ("released BCN / ours, forward + backward", "layer", _layer("released / bcn")),
    (
        "released WS / ours, all weights of R-50-FPN, forward + backward",
        "ws",
        lambda record: _ratio(_row(record, name="five-op formula")["time / ours"]),
    ),
    ("the channel monitor's share of a training, R-18: GN, BCN+WS", "monitor", _watched),
)
