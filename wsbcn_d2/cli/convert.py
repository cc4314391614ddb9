"""Convert a published checkpoint to Detectron2's names and say what was done with every key.

Example: {prog} R-50-GN-WS.pth.tar R-50-GN-WS.pth
"""

import argparse
import os

from ..checkpoint import FORMATS, TARGETS, Options, convert_file
from ..checkpoint.metadata import FORMULAS
from ..engine.processes import one_line_errors


@one_line_errors
def main(argv: list[str] | None = None) -> None:
    """Runs the command."""
    listing = [f"  --to {name:8} {text}" for name, text in TARGETS.items()]
    listing += [f"  {name:13} {fmt.description}" for name, fmt in FORMATS.items()]
    parser = argparse.ArgumentParser(formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.description = __doc__.format(prog=parser.prog)
    parser.epilog = "\n".join(["targets and source formats:", *listing])
    parser.add_argument("source", help="checkpoint file (.pth, .pth.tar, .pkl, .safetensors, ...)")
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
    same = args.target and os.path.exists(args.target) and os.path.exists(args.source)
    if same and os.path.samefile(args.source, args.target):
        parser.error("source and target are the same file")
    report = convert_file(args.source, args.target, options)
    print("\n".join(report.lines()))
    if args.target:
        print(f"written       {args.target}")
