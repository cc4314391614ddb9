#!/usr/bin/env python
"""Look at a data set in COCO format: what is in it, and what training would stumble over.

    tools/check_dataset.py cells/train.json cells/pictures
    tools/check_dataset.py cells/train.json cells/pictures --draw output/cells --decode

Prints a summary and every kind of fault with its first place and its mend; the exit code is 2 if
there is one. Training looks at its sets in the same way.
"""

import argparse
import sys

from wsbcn_d2.config import refusing
from wsbcn_d2.data.checks import look_at, summarize
from wsbcn_d2.data.drawing import draw_some
from wsbcn_d2.engine.processes import one_line_errors


@one_line_errors
def cli() -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("json", help="the annotation file")
    parser.add_argument("pictures", help="the folder that its file names start from")
    parser.add_argument("--draw", metavar="FOLDER", help="draw some pictures with their objects")
    parser.add_argument("--count", type=int, default=6, help="how many to draw (default: 6)")
    parser.add_argument("--decode", action="store_true", help="read every pixel; takes longer")
    parser.add_argument(
        "--picture-range",
        type=float,
        nargs=2,
        default=(),
        metavar=("LOW", "HIGH"),
        help="INPUT.PICTURE_RANGE, for pictures of more than 8 bits",
    )
    args = parser.parse_args()
    found = look_at(args.json, args.pictures, decode=args.decode)
    if found.facts.get("sizes"):
        print(summarize(found.facts))
    for note in found.notes:
        print(f"note: {note}")
    faults = [str(fault) for fault in found.serious()]
    if found.facts.get("deep") and not args.picture_range:
        low, high = found.facts["deep_range"]
        faults.append(
            f"{found.facts['deep']} pictures of more than 8 bits ({found.facts['first_deep'][0]}, "
            f"values {low:g} to {high:g}): set INPUT.PICTURE_RANGE, here --picture-range"
        )
    for fault in faults:
        print(f"error: {fault}", file=sys.stderr)
    if faults:
        return 2
    if not args.draw:
        return 0
    with refusing("", OSError):
        paths = draw_some(args.json, args.pictures, args.draw, args.count, args.picture_range)
        print("\n".join(map(str, paths)))
    return 0


if __name__ == "__main__":
    sys.exit(cli())
