#!/usr/bin/env python
"""Train or evaluate a detector; Detectron2's own command line.

    tools/train_net.py --config-file configs/shapes/mask_rcnn_R_18_FPN_bcn_ws.yaml
    tools/train_net.py --config-file CONFIG --num-gpus 4
    tools/train_net.py --config-file CONFIG --eval-only MODEL.WEIGHTS CHECKPOINT
    torchrun --nproc-per-node 2 tools/train_net.py --config-file CONFIG

Wrong input is answered with one line and exit code 2, before anything is written.
"""

import sys

from wsbcn_d2.cli.train import main as cli

if __name__ == "__main__":
    sys.exit(cli())
