"""The main page's table of costs says what the records of tools/benchmark.py say."""

import copy
import json
import sys

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "tools"))

from benchmarks import page

COMMANDS = {
    "cpu_step": "step",
    "cpu_layer": "layer",
    "cpu_ws": "ws",
    "cpu_monitor": "monitor",
    "h200_step": "step",
    "h200_step_amp": "step",
}


@pytest.fixture(scope="module")
def records():
    return page.read()


def cells(table):
    """Label to the cells of a row."""
    lines = [line.strip("| ").split(" | ") for line in table.splitlines()]
    return {line[0]: line[1:] for line in lines[2:]}


def test_each_record_says_how_it_was_made(records):
    assert records.keys() == COMMANDS.keys()
    for name, record in records.items():
        tool, mode, *options = record["command"]
        assert (tool, mode) == ("tools/benchmark.py", COMMANDS[name]) and mode == record["mode"]
        assert ("cuda" in options) == name.startswith("h200")
        assert ("--amp" in options) == name.endswith("amp")
        assert "--quick" not in options
        assert record["hardware"]["device"] and record["hardware"]["torch"]


def test_every_cell_follows_its_own_record(records):
    """A value of one row of one record is in one cell: changed there, it changes that one alone."""
    before = cells(page.costs(records))
    for name, row, key, label, column in (
        ("cpu_step", 1, "time", "training step", 0),
        ("cpu_step", 2, "time", "the same: BCN+WS", 0),
        ("h200_step", 1, "time", "training step", 1),
        ("h200_step_amp", 2, "time", "the same: BCN+WS", 2),
        ("h200_step", 5, "time", "inference", 1),
        ("h200_step_amp", 7, "time", "the same, folded", 2),
        ("cpu_ws", 3, "time / ours", "released WS", 0),
    ):
        changed = copy.deepcopy(records)
        changed[name]["rows"][row][key] = {"ratio": 77.125, "spread": 0.5}
        after = cells(page.costs(changed))
        differ = [(k, i) for k in after for i in range(3) if after[k][i] != before[k][i]]
        assert len(differ) == 1 and differ[0][0].startswith(label) and differ[0][1] == column
        assert after[differ[0][0]][column] == "77.12 ± 0.50"


def test_layers_are_a_mean_and_its_range(records):
    record = copy.deepcopy(records["cpu_layer"])
    record["rows"] = record["rows"][:2]
    for row, value in zip(record["rows"], (0.5, 2.0), strict=True):
        row["bcn / gn"]["ratio"] = value
    record["summary"] |= {"bcn / gn": 1.0, "bytes (largest)": 1.25}
    found = cells(page.costs({"cpu_layer": record}))
    assert ["1.00 (0.50 to 2.00)"] in found.values() and ["1.250"] in found.values()
    assert sum(row == ["-"] for row in found.values()) == 7


def test_what_was_not_measured_is_a_dash(records):
    table = page.costs({"h200_step": records["h200_step"]})
    assert table.startswith("|  | NVIDIA H200, float32 |\n")
    found = cells(table)
    assert found["released BCN / ours, forward + backward"] == ["-"]
    assert sum(row == ["-"] for row in found.values()) == 6


def test_a_record_without_the_row_is_an_error(records):
    changed = copy.deepcopy(records["cpu_ws"])
    changed["rows"] = [row for row in changed["rows"] if row["name"] != "five-op formula"]
    with pytest.raises(ValueError):
        page.costs({"cpu_ws": changed})


def test_records_are_read_from_a_folder(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({"mode": "ws"}))
    (tmp_path / "b.txt").write_text("no record")
    assert page.read(tmp_path) == {"a": {"mode": "ws"}}
