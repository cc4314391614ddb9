#!/usr/bin/env python
"""Train or evaluate a detector from a Python config (LazyConfig); Detectron2's own command line.

    tools/lazyconfig_train_net.py --config-file configs/lazy/.../NAME.py train.output_dir=DIR
    tools/lazyconfig_train_net.py --config-file CONFIG --num-gpus 4
    tools/lazyconfig_train_net.py --config-file CONFIG --eval-only train.init_checkpoint=CHECKPOINT
    torchrun --nproc-per-node 2 tools/lazyconfig_train_net.py --config-file CONFIG

Wrong input is answered with one line and exit code 2, before anything is written.
"""

import logging
import sys

from detectron2.config import instantiate
from detectron2.engine import default_argument_parser, default_setup
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

from wsbcn_d2.checkpoint import CheckpointError, WSBCNCheckpointer
from wsbcn_d2.data import DataError
from wsbcn_d2.engine import UsageError, launch, lazy
from wsbcn_d2.engine.launch import world_size_of


def main(args):
    """One process of the job."""
    cfg = lazy.load_lazy_config(args.config_file, args.opts)
    default_setup(cfg, args)
    # default_setup sets up the loggers of Detectron2 and fvcore alone.
    setup_logger(cfg.train.output_dir, distributed_rank=comm.get_rank(), name="wsbcn_d2")
    if cfg.train.device == "cpu":
        logging.getLogger("wsbcn_d2").info("Running on the CPU")
    if not args.eval_only:
        return lazy.train(cfg, resume=args.resume)
    model = instantiate(cfg.model).to(cfg.train.device)
    WSBCNCheckpointer(model, cfg.train.output_dir).resume_or_load(
        cfg.train.init_checkpoint, resume=args.resume
    )
    return lazy.evaluate(cfg, model)


def cli() -> int:
    """Check the command line, run the job; returns the exit code."""
    args = default_argument_parser().parse_args()
    try:
        cfg = lazy.load_lazy_config(args.config_file, args.opts)
        lazy.check_lazy_config(cfg, world_size=world_size_of(args), eval_only=args.eval_only)
        launch(main, args)
    except (UsageError, CheckpointError, DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(cli())
