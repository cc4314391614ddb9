#!/usr/bin/env python
"""Fold a trained model for inference: weights standardized once, batch norms into convolutions.

    tools/fold_checkpoint.py --config-file CONFIG --weights model_final.pth --output folded.pth
    tools/fold_checkpoint.py --layout lazy --config-file CONFIG --weights ... --output ...

Layouts:
  stock  (default) loads in plain Detectron2 by the same config with NORM: "GN" and the stock
         builders in place of build_ws_* and WS* names. GN and GN+WS models only.
  lazy   loads in plain Detectron2 by a LazyConfig whose norms are, instead of "BCN",
         lambda c: nn.Sequential(FrozenBatchNorm2d(c), nn.GroupNorm(32, c)). BCN models.
  fold   the state dict of wsbcn_d2.fold(model), the fastest form. To load it:
         model = wsbcn_d2.fold(build_model(cfg)); model.load_state_dict(torch.load(FILE)["model"])
"""

import argparse
import os
import sys

from detectron2.modeling import build_model

from wsbcn_d2 import fold
from wsbcn_d2.checkpoint import LoadExpectation, WSBCNCheckpointer
from wsbcn_d2.checkpoint.saving import save
from wsbcn_d2.config import WRONG_MODEL, load_config, refusing
from wsbcn_d2.engine.processes import one_line_errors
from wsbcn_d2.folding import lazy_state_dict, stock_state_dict

_LAYOUTS = {
    "stock": stock_state_dict,
    "lazy": lazy_state_dict,
    "fold": lambda model: fold(model).state_dict(),
}


@one_line_errors
def main(argv=None) -> None:
    """Runs the tool."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", required=True, help="config of the trained model")
    parser.add_argument("--weights", required=True, help="its checkpoint")
    parser.add_argument("--output", required=True, help="file to write (.pth)")
    parser.add_argument("--layout", choices=_LAYOUTS, default="stock")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="config overrides: KEY VALUE ...")
    args = parser.parse_args(argv)
    if os.path.abspath(args.output) == os.path.abspath(args.weights):
        parser.error("--output would overwrite --weights")
    cfg = load_config(args.config_file, [*args.opts, "MODEL.DEVICE", "cpu"])
    with refusing("the model cannot be built: ", *WRONG_MODEL):
        model = build_model(cfg)
    WSBCNCheckpointer(model, expected=LoadExpectation.from_model(model, cfg)).load(args.weights)
    with refusing(f"{args.weights}: ", ValueError):
        state = _LAYOUTS[args.layout](model)
    save({"model": state, "__author__": "wsbcn_d2"}, args.output)
    print(f"written {args.output}: {len(state)} tensors, layout {args.layout}")


if __name__ == "__main__":
    sys.exit(main())
