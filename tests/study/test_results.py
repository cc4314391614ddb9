"""The committed results are what the documented commands make of the committed records."""

import csv
import re
import shlex
from pathlib import Path

import pytest

from .helpers import load_tool

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "configs" / "shapes" / "results"
COMPARE = load_tool()
AP = ("bbox", "segm")


def documented_studies():
    """Name of its output folder to arguments, for every command that names committed records."""
    text = COMPARE.__doc__.replace("\\\n", " ")
    variables = dict(re.findall(r'^    (\w+)="(.*)"$', text, re.MULTILINE))
    studies = {}
    for line in re.findall(r"^    tools/compare.py (\$.*)$", text, re.MULTILINE):
        while "$" in line:
            line = re.sub(r"\$(\w+)", lambda name: variables[name[1]], line)
        # As the shell does: A{b,c}D is AbD AcD.
        line = re.sub(r"(\S*)\{(\w+),(\w+)\}(\S*)", r"\g<1>\g<2>\g<4> \g<1>\g<3>\g<4>", line)
        argv = shlex.split(line)
        studies[Path(argv[argv.index("--output") + 1]).name] = argv
    return studies


STUDIES = documented_studies()


def test_every_committed_table_has_its_command():
    tables = {path.stem for path in RESULTS.glob("*.csv")} - {"pretrain"}
    assert tables == STUDIES.keys() | {f"{name}_runs" for name in STUDIES}


@pytest.mark.parametrize("name", STUDIES)
def test_the_command_makes_the_committed_table(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    argv = [str(tmp_path) if word == f"output/{name}" else word for word in STUDIES[name]]
    assert COMPARE.main(["--report-only", *argv]) == 0
    assert "not run yet" not in (tmp_path / "report.html").read_text()
    for made, committed in (("results", name), ("runs", f"{name}_runs")):
        assert (tmp_path / f"{made}.csv").read_text() == (RESULTS / f"{committed}.csv").read_text()
    assert (tmp_path / "results.md").read_text() in capsys.readouterr().out


def intervals(name):
    """Variant and ``mean +- half width`` of each row of a committed table, box AP first."""
    with (RESULTS / f"{name}.csv").open() as file:
        for row in csv.DictReader(file):
            means = [(float(row[f"{t}_ap_mean"]), float(row[f"{t}_ap_ci95"])) for t in AP]
            yield row["variant"], [f"{mean:.1f} +- {half:.1f}" for mean, half in means]


def test_the_page_of_results_has_the_table_of_the_study():
    page = (RESULTS / "README.md").read_text()
    names = {"bn": "BN", "gn": "GN", "gn_ws": "GN+WS", "bcn": "BCN", "bcn_ws": "BCN+WS"}
    cells: dict[str, list[str]] = {}
    for variant, numbers in intervals("study"):  # one image per step, then two
        cells.setdefault(variant, []).extend(numbers)
    assert cells.keys() == names.keys()
    for variant, numbers in cells.items():
        assert f"| {names[variant]} | " + " | ".join(numbers) + " |" in page


@pytest.mark.parametrize(
    "name", ["long", "rates_seeds", "first_batch", "first_batch_2000", "finetune"]
)
def test_the_page_of_results_has_the_tables_numbers(name):
    page = (RESULTS / "README.md").read_text()
    for _, numbers in intervals(name):
        assert all(number in page for number in numbers)
