#!/usr/bin/env python
"""Make the committed results anew from the committed records: tables, pages, figures.

    tools/results/update.py [--check] [FOLDER ...]

A folder of results (all of configs/*/results by default) has a NAME.args per study: arguments of
tools/compare.py. Of each are made NAME.csv, NAME_runs.csv and, if variants share seeds,
NAME_pairs.csv; of the README.md beside them, and of the main one, the tables between its comments;
and the figures that a page shows as plots/NAME-FIGURE.png, which --check leaves out, since their
bytes depend on Matplotlib.
"""

import argparse
import re
import sys
from pathlib import Path

from wsbcn_d2.config import UsageError, refusing
from wsbcn_d2.engine.processes import one_line_errors
from wsbcn_d2.files import replacing
from wsbcn_d2.study.pages import fill_page
from wsbcn_d2.study.pairs import compare_pairs, pairs_csv
from wsbcn_d2.study.plots import make_figures, png_bytes
from wsbcn_d2.study.summary import runs_csv, summarize, summary_csv

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import compare  # a command beside this folder
from benchmarks import page as benchmarks


def records_of(folder, name):
    """The committed records of a study, all of them; a run without one is an error."""
    path = folder / f"{name}.args"
    if not path.is_file():
        raise UsageError(f"{path} not found: a page asks for the table of that study")
    finished, missing = compare.recorded_runs(compare.parse([f"@{path}"]))
    if missing:
        raise UsageError(f"{path}: no record of {missing[0]}")
    return finished


def made(folder):
    """Name of each study of a folder to its records; path to text of what the results should be."""
    studies = {p.stem: records_of(folder, p.stem) for p in sorted(folder.glob("*.args"))}
    files = {}
    for name, records in studies.items():
        files[folder / f"{name}.csv"] = summary_csv(summarize(records))
        if pairs := compare_pairs(records):
            files[folder / f"{name}_pairs.csv"] = pairs_csv(pairs)
        files[folder / f"{name}_runs.csv"] = runs_csv(records)
    page = folder / "README.md"
    files[page] = fill_page(page.read_text(), lambda name: records_of(folder, name))
    return studies, files


def main_page(page=Path("README.md")):
    """The same for the page that names studies as SET/NAME, and shows the benchmarks' records."""

    def records(name):
        if name == "benchmarks":
            return benchmarks.read()
        kind, _, study = name.partition("/")
        return records_of(Path("configs", kind, "results"), study)

    return {page: fill_page(page.read_text(), records, {"costs": benchmarks.costs})}


@one_line_errors
def main(argv=None) -> int:
    """Runs the tool; returns the exit status: 1 if --check finds a difference, 2 for an error."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="*", metavar="FOLDER")
    parser.add_argument("--check", action="store_true", help="write nothing, say what differs")
    args = parser.parse_args(argv)
    folders = map(Path, args.folders) if args.folders else Path("configs").glob("*/results")
    differ = []
    with refusing("", OSError, ValueError):
        for folder in folders:
            studies, files = made(folder)
            differ += [path for path, text in files.items() if update(path, text, args.check)]
            shown = re.findall(r"plots/(\w+)-(\w+)\.png", files[folder / "README.md"])
            for name, figure in [] if args.check else shown:
                content = png_bytes(make_figures(studies[name])[figure])
                write(folder / "plots" / f"{name}-{figure}.png", content)
        if not args.folders:
            differ += [p for p, text in main_page().items() if update(p, text, args.check)]
    for path in differ:
        print(f"{path}: {'differs' if args.check else 'written'}")
    return 1 if args.check and differ else 0


def update(path, text, check):
    """Whether a file is not what it should be; without ``check`` it is made so."""
    if path.is_file() and path.read_text() == text:
        return False
    if not check:
        write(path, text.encode())
    return True


def write(path, content):
    with replacing(path) as part:
        Path(part).write_bytes(content)


if __name__ == "__main__":
    sys.exit(main())
