"""The committed results are what the documented commands make of the committed records."""

import csv
import importlib.util
import json
import re
import shutil
import sys
from pathlib import Path

import pytest

from wsbcn_d2.study import write_record
from wsbcn_d2.study.pages import prose

from .helpers import TOOL, load_tool, make_record

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "configs" / "shapes" / "results"
FOLDERS = sorted((ROOT / "configs").glob("*/results"))
STUDIES = sorted(path for folder in FOLDERS for path in folder.glob("*.args"))
COMPARE = load_tool()
AP = ("bbox", "segm")


def relative(path):
    return str(path.relative_to(ROOT))


@pytest.fixture(scope="module")
def tool():
    """``tools/results/update.py`` as a module; it adds the folder of its neighbour to the path."""
    before = list(sys.path)
    spec = importlib.util.spec_from_file_location(
        "update_results", TOOL.parent / "results" / "update.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.path[:] = before
    return module


def test_there_are_results():
    assert RESULTS in FOLDERS and len(STUDIES) >= 14


@pytest.mark.parametrize("folder", FOLDERS, ids=relative)
def test_every_committed_table_has_its_command(folder):
    tables = {path.stem for path in folder.glob("*.csv")}
    studies = {path.stem for path in folder.glob("*.args")}
    assert {re.sub("_(pairs|runs)$", "", table) for table in tables} == studies
    assert tables >= studies | {f"{name}_runs" for name in studies}


@pytest.mark.parametrize("study", STUDIES, ids=relative)
def test_the_committed_tables_are_made_of_records(study, tool, monkeypatch):
    monkeypatch.chdir(ROOT)
    folder = study.parent
    records = tool.records_of(folder.relative_to(ROOT), study.stem)  # an error if one is missing
    assert len(records) == len(COMPARE.plan(COMPARE.parse([f"@{study}"])))
    text = (folder / f"{study.stem}.csv").read_text()
    assert tool.summary_csv(tool.summarize(records)) == text
    assert tool.runs_csv(records) == (folder / f"{study.stem}_runs.csv").read_text()
    pairs = folder / f"{study.stem}_pairs.csv"
    if pairs.is_file():
        assert tool.pairs_csv(tool.compare_pairs(records)) == pairs.read_text()
    else:
        assert not tool.compare_pairs(records)


def test_everything_is_up_to_date(tool, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    assert tool.main(["--check"]) == 0, capsys.readouterr().out


def test_the_main_page_is_looked_at_with_all_the_others(tool, tmp_path, monkeypatch, capsys):
    for folder in ("configs/a/results", "configs/b/results"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "README.md").write_text("as it was")
    page = tmp_path / "README.md"
    page.write_text("old")
    monkeypatch.chdir(tmp_path)
    text = {"README.md": "as it was"}
    monkeypatch.setattr(tool, "made", lambda folder: ({}, {folder / k: v for k, v in text.items()}))
    monkeypatch.setattr(tool, "main_page", lambda: {Path("README.md"): "new"})
    assert tool.main(["--check", "configs/a/results"]) == 0 and capsys.readouterr().out == ""
    assert tool.main(["--check"]) == 1 and capsys.readouterr().out == "README.md: differs\n"
    assert page.read_text() == "old"
    assert tool.main([]) == 0 and capsys.readouterr().out == "README.md: written\n"
    assert page.read_text() == "new" and tool.main(["--check"]) == 0
    (tmp_path / "configs/b/results/README.md").write_text("by hand")
    assert tool.main(["--check"]) == 1
    assert capsys.readouterr().out == "configs/b/results/README.md: differs\n"


def test_figures_are_drawn_unless_it_is_a_check(tool, tmp_path, monkeypatch):
    page = "![](plots/one-loss.png) and ![](plots/one-final_ap.png)"
    records = [make_record(seed=seed) for seed in (1, 2)]
    (tmp_path / "README.md").write_text(page)
    monkeypatch.setattr(
        tool, "made", lambda folder: ({"one": records}, {folder / "README.md": page})
    )
    assert tool.main(["--check", str(tmp_path)]) == 0 and not (tmp_path / "plots").exists()
    assert tool.main([str(tmp_path)]) == 0
    made = sorted(path.name for path in (tmp_path / "plots").iterdir())
    assert made == ["one-final_ap.png", "one-loss.png"]
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in (tmp_path / "plots").iterdir())


def test_what_was_edited_by_hand_is_found_and_mended(tool, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    folder = tmp_path / "results"
    folder.mkdir()
    for name in ("README.md", "long.args", "long.csv", "long_pairs.csv", "long_runs.csv"):
        shutil.copy(RESULTS / name, folder)
    text = "\n".join(f"<!-- {kind}: long -->\n<!-- end -->\nand" for kind in ("ap", "pairs"))
    (folder / "README.md").write_text(text)
    assert tool.main(["--check", str(folder)]) == 1
    assert (folder / "README.md").read_text() == text
    assert tool.main([str(folder)]) == 0
    assert tool.main(["--check", str(folder)]) == 0
    filled = (folder / "README.md").read_text()
    assert prose(filled) == prose(text)
    (folder / "README.md").write_text(filled.replace("41.7", "41.8"))
    table = (folder / "long.csv").read_text()
    (folder / "long.csv").write_text(table.replace("41.7", "41.8"))
    capsys.readouterr()
    assert tool.main(["--check", str(folder)]) == 1
    assert capsys.readouterr().out == "".join(
        f"{folder / name}: differs\n" for name in ("long.csv", "README.md")
    )
    assert tool.main([str(folder)]) == 0
    assert (folder / "README.md").read_text() == filled
    assert (folder / "long.csv").read_text() == table


def test_a_study_without_all_of_its_records_makes_nothing(tool, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    folder = tmp_path / "results"
    folder.mkdir()
    (folder / "README.md").write_text("<!-- ap: x -->\n<!-- end -->")
    assert tool.main([str(folder)]) == 2
    assert "x.args not found" in capsys.readouterr().err
    args = (RESULTS / "long.args").read_text().replace("1 2 3", "1 2 3 99")
    args = args.replace("output/long", str(tmp_path / "out"))
    (folder / "x.args").write_text(args)
    # A run that was done here is no committed record.
    runs = COMPARE.plan(COMPARE.parse([f"@{folder / 'x.args'}"]))
    run = next(run for run in runs if run.seed == 99)
    local = make_record(run.variant, 1, 99, settings=run.settings)
    write_record(local, tmp_path / "out" / "records" / f"{run.name}.json")
    assert tool.main([str(folder)]) == 2
    assert re.match(
        r"error: .*x\.args: no record of gn_ws_1img_seed99_\w+\n", capsys.readouterr().err
    )
    assert {path.name for path in folder.iterdir()} == {"README.md", "x.args"}


def test_the_command_makes_the_committed_table(tmp_path, monkeypatch, capsys):
    """Through the documented command itself, for one of the studies."""
    monkeypatch.chdir(ROOT)
    lines = (RESULTS / "again.args").read_text().replace("output/again", str(tmp_path))
    (tmp_path / "again.args").write_text(lines + "# a comment\n")
    assert COMPARE.main(["--report-only", f"@{tmp_path / 'again.args'}"]) == 0
    assert "not run yet" not in (tmp_path / "report.html").read_text()
    for made, committed in (("results", "again"), ("runs", "again_runs"), ("pairs", "again_pairs")):
        assert (tmp_path / f"{made}.csv").read_text() == (RESULTS / f"{committed}.csv").read_text()
    assert (tmp_path / "results.md").read_text() in capsys.readouterr().out


NUMBER = re.compile(r"(?<![\w.])\d+\.\d+|\d+(?:\.\d+)? ?%|±|\+-")


def settings_of(folder):
    """Numbers of the configs, which a page may name."""
    found = set()
    for path in folder.glob("records*/*.json"):
        values = json.loads(path.read_text())["settings"].values()
        found |= {f"{value:g}" for value in values if isinstance(value, float)}
    return found


@pytest.mark.parametrize("folder", FOLDERS, ids=relative)
def test_no_result_is_typed_by_hand(folder):
    """Outside of the tables that code makes, a page names settings, and no number else."""
    page = (folder / "README.md").read_text()
    allowed = settings_of(folder) | {"95 %"}
    assert set(NUMBER.findall(prose(page))) <= allowed
    assert NUMBER.findall("GN+WS 41.7 ± 1.5, 1.4 +- 2, 3 %") == [
        "41.7",
        "±",
        "1.5",
        "1.4",
        "+-",
        "3 %",
    ]


def test_nor_on_the_main_page():
    page = (ROOT / "README.md").read_text()
    paper, versions, rate = {"1903.10520"}, {"3.10", "3.13", "2.0"}, {"0.02"}
    assert set(NUMBER.findall(prose(page))) <= paper | versions | rate


def intervals(name):
    """Variant and ``mean +- half width`` of each row of a committed table, box AP first."""
    with (RESULTS / f"{name}.csv").open() as file:
        for row in csv.DictReader(file):
            means = [(float(row[f"{t}_ap_mean"]), float(row[f"{t}_ap_ci95"])) for t in AP]
            yield row["variant"], [f"{mean:.1f} +- {half:.1f}" for mean, half in means]


@pytest.mark.parametrize(
    "name", ["study", "long", "rates_seeds", "first_batch", "first_batch_2000", "finetune"]
)
def test_the_page_of_results_has_the_tables_numbers(name):
    page = (RESULTS / "README.md").read_text()
    for _, numbers in intervals(name):
        assert all(number.replace("+-", "±") in page for number in numbers)
