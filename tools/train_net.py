#!/usr/bin/env python
"""Train or evaluate a detector; Detectron2's own command line.

    tools/train_net.py --config-file configs/shapes/mask_rcnn_R_18_FPN_bcn_ws.yaml
    tools/train_net.py --config-file CONFIG --num-gpus 4
    tools/train_net.py --config-file CONFIG --eval-only MODEL.WEIGHTS CHECKPOINT
    torchrun --nproc-per-node 2 tools/train_net.py --config-file CONFIG

Wrong input is answered with one line and exit code 2, before anything is written.
"""

import logging
import sys

from detectron2.engine import default_argument_parser, default_setup, hooks
from detectron2.evaluation import verify_results
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

from wsbcn_d2.checkpoint import CheckpointError, LoadExpectation, WSBCNCheckpointer
from wsbcn_d2.data import DataError
from wsbcn_d2.engine import Trainer, UsageError, check_config, launch, load_config
from wsbcn_d2.engine.launch import world_size_of


def main(args):
    """One process of the job."""
    cfg = load_config(args.config_file, args.opts)
    default_setup(cfg, args)
    # default_setup sets up the loggers of Detectron2 and fvcore alone.
    setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name="wsbcn_d2")
    if cfg.MODEL.DEVICE == "cpu":
        logging.getLogger("wsbcn_d2").info("Running on the CPU")
    if args.eval_only:
        model = Trainer.build_model(cfg)
        expected = LoadExpectation.from_cfg(cfg)
        WSBCNCheckpointer(model, cfg.OUTPUT_DIR, expected=expected).resume_or_load(
            cfg.MODEL.WEIGHTS, resume=args.resume
        )
        results = Trainer.test(cfg, model)
        if cfg.TEST.AUG.ENABLED:
            results.update(Trainer.test_with_TTA(cfg, model))
        if comm.is_main_process():
            verify_results(cfg, results)
        return results
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=args.resume)
    if cfg.TEST.AUG.ENABLED:
        trainer.register_hooks(
            [hooks.EvalHook(0, lambda: trainer.test_with_TTA(cfg, trainer.model))]
        )
    return trainer.train()


def cli() -> int:
    """Check the command line, run the job; returns the exit code."""
    args = default_argument_parser().parse_args()
    try:
        cfg = load_config(args.config_file, args.opts)
        check_config(
            cfg, world_size=world_size_of(args), eval_only=args.eval_only, resume=args.resume
        )
        launch(main, args)
    except (UsageError, CheckpointError, DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(cli())
