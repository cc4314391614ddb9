#!/usr/bin/env python
"""Pictures, curves and a table of AP after a training run; called by tools/demo.sh.

    tools/install/demo_report.py --config-file CONFIG OUTPUT_DIR DIR

Writes into DIR.
"""

import sys
from pathlib import Path

from detectron2.engine import default_argument_parser
from tabulate import tabulate

from wsbcn_d2.engine import UsageError, load_config
from wsbcn_d2.engine.curves import plot_curves, read_metrics
from wsbcn_d2.engine.processes import one_line_errors
from wsbcn_d2.predictor import draw_predictions


@one_line_errors
def main() -> None:
    args = default_argument_parser().parse_args()
    cfg = load_config(args.config_file, args.opts)
    output = Path(cfg.OUTPUT_DIR)
    if not (output / "model_final.pth").is_file():
        raise UsageError(f"{output} holds no model_final.pth: train first, tools/train_net.py")
    cfg.defrost()
    cfg.MODEL.WEIGHTS = str(output / "model_final.pth")
    metrics = read_metrics(str(output / "metrics.json"))
    pictures = draw_predictions(cfg, str(output / "predictions"))
    curves = plot_curves(metrics, str(output / "curves.png"), Path(args.config_file).stem)
    rows = [
        [task, *(f"{metrics[f'{task}/{name}'][-1][1]:.1f}" for name in ("AP", "AP50", "AP75"))]
        for task in ("bbox", "segm")
        if f"{task}/AP" in metrics
    ]
    print(f"\n{Path(args.config_file).stem} on {cfg.DATASETS.TEST[0]}:")
    print(tabulate(rows, headers=["task", "AP", "AP50", "AP75"]))
    print(f"\nmodel       {cfg.MODEL.WEIGHTS}")
    print(f"curves      {curves}")
    print(f"pictures    {pictures[0]} and {len(pictures) - 1} more")
    print(f"tensorboard tensorboard --logdir {output}")


if __name__ == "__main__":
    sys.exit(main())
