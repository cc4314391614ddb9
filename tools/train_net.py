#!/usr/bin/env python
"""Train or evaluate a detector; Detectron2's own command line.

    tools/train_net.py --config-file configs/shapes/mask_rcnn_R_18_FPN_bcn_ws.yaml
    tools/train_net.py --config-file CONFIG --num-gpus 4
    tools/train_net.py --config-file CONFIG --eval-only MODEL.WEIGHTS CHECKPOINT
    torchrun --nproc-per-node 2 tools/train_net.py --config-file CONFIG

Wrong input is answered with one line and exit code 2, before anything is written.
"""

import sys

from wsbcn_d2.engine import check_config, load_config
from wsbcn_d2.engine.processes import run_command
from wsbcn_d2.engine.trainer import train_net


def check(args, **job):
    """Refuse what cannot work."""
    check_config(load_config(args.config_file, args.opts), **job)


def cli() -> int:
    """Check the command line, run the job; returns the exit code."""
    return run_command(check, train_net)


if __name__ == "__main__":
    sys.exit(cli())
