#!/usr/bin/env python
"""Print the catalog of published checkpoints (``wsbcn://`` names for MODEL.WEIGHTS)."""

import argparse
import sys

from tabulate import tabulate

from wsbcn_d2.checkpoint.catalog.entries import CATALOG, PREFIX
from wsbcn_d2.checkpoint.catalog.fetching import OFFLINE_VARIABLE


def main(argv=None) -> int:
    """Runs the tool; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=f"Offline: put the files of --urls into a folder and set {OFFLINE_VARIABLE} to it.",
    )
    parser.add_argument("--urls", action="store_true", help="also print where the files are")
    args = parser.parse_args(argv)
    rows = [
        (f"{PREFIX}{e.name}", e.norm, e.formula, e.pixels.input_format, e.licence, e.score)
        for e in CATALOG.values()
    ]
    head = ("name", "norm", "WS formula", "input", "licence", "reported")
    print(tabulate(rows, head, tablefmt="plain", disable_numparse=True))
    if args.urls:
        for entry in CATALOG.values():
            print("\n".join([f"\n{PREFIX}{entry.name}", *(f"  {url}" for url in entry.urls)]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
