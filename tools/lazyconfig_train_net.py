#!/usr/bin/env python
"""Train or evaluate a detector from a Python config (LazyConfig); Detectron2's own command line.

    tools/lazyconfig_train_net.py --config-file configs/lazy/.../NAME.py train.output_dir=DIR
    tools/lazyconfig_train_net.py --config-file CONFIG --num-gpus 4
    tools/lazyconfig_train_net.py --config-file CONFIG --eval-only train.init_checkpoint=CHECKPOINT
    torchrun --nproc-per-node 2 tools/lazyconfig_train_net.py --config-file CONFIG

Wrong input is answered with one line and exit code 2, before anything is written.
"""

import sys

from wsbcn_d2.engine import lazy
from wsbcn_d2.engine.processes import run_command


def check(args, **job):
    """Refuse what cannot work."""
    lazy.check_lazy_config(lazy.load_lazy_config(args.config_file, args.opts), **job)


def cli() -> int:
    """Check the command line, run the job; returns the exit code."""
    return run_command(check, lazy.train_net)


if __name__ == "__main__":
    sys.exit(cli())
