#!/usr/bin/env python
"""Train or evaluate a detector from a Python config (LazyConfig); Detectron2's own command line.

    tools/lazyconfig_train_net.py --config-file configs/lazy/.../NAME.py train.output_dir=DIR
    tools/lazyconfig_train_net.py --config-file CONFIG --num-gpus 4
    tools/lazyconfig_train_net.py --config-file CONFIG --eval-only train.init_checkpoint=CHECKPOINT
    torchrun --nproc-per-node 2 tools/lazyconfig_train_net.py --config-file CONFIG

Wrong input is answered with one line and exit code 2, before anything is written.
"""

import sys

from wsbcn_d2.cli.train import main as cli

if __name__ == "__main__":
    sys.exit(cli())
