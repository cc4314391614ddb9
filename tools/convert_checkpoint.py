#!/usr/bin/env python
"""Convert a published checkpoint to Detectron2's names and say what was done with every key.

Example: tools/convert_checkpoint.py R-50-GN-WS.pth.tar R-50-GN-WS.pth
"""

import argparse
import os
import sys

from wsbcn_d2.checkpoint import FORMATS, TARGETS, CheckpointError, Options, convert_file
from wsbcn_d2.checkpoint.metadata import FORMULAS


def main(argv=None) -> int:
    """Runs the tool; returns the exit status."""
    listing = [f"  --to {name:8} {text}" for name, text in TARGETS.items()]
    listing += [f"  {name:13} {fmt.description}" for name, fmt in FORMATS.items()]
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="\n".join(["targets and source formats:", *listing]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", help="checkpoint file (.pth, .pth.tar, .pkl)")
    parser.add_argument("target", nargs="?", help="file to write; without it, only the report")
    parser.add_argument("--to", choices=TARGETS, default="fpn", help="names (default: fpn)")
    parser.add_argument("--format", choices=FORMATS, help="source format, if not to be detected")
    parser.add_argument(
        "--norm",
        choices=("GN", "BCN", "BN"),
        help="norm that the result must have; BN files become BCN unless --norm BN",
    )
    parser.add_argument("--formula", choices=FORMULAS, help="WS formula of the weights")
    args = parser.parse_args(argv)
    options = Options(target=args.to, format=args.format, norm=args.norm, formula=args.formula)
    if args.target and os.path.exists(args.target) and os.path.samefile(args.source, args.target):
        parser.error("source and target are the same file")
    try:
        report = convert_file(args.source, args.target, options)
    except (CheckpointError, OSError) as err:
        print(f"convert_checkpoint: {err}", file=sys.stderr)
        return 1
    print("\n".join(report.lines()))
    if args.target:
        print(f"written       {args.target}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
