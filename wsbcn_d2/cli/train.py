"""Train or evaluate a detector, from a YAML or a Python config; Detectron2's own command line.

wsbcn-train --config-file my_config.yaml OUTPUT_DIR output KEY VALUE ...
wsbcn-train --config-file my_config.py train.output_dir=output key=value ...
"""

from argparse import Namespace

from ..engine import check_config, lazy, load_config
from ..engine.processes import is_python, run_command
from ..engine.trainer import train_net


def check(args: Namespace, **job) -> None:
    """Refuse what cannot work."""
    if is_python(args.config_file):
        lazy.check_lazy_config(lazy.load_lazy_config(args.config_file, args.opts), **job)
    else:
        check_config(load_config(args.config_file, args.opts), **job)


def train(args: Namespace) -> object:
    """One process of the job."""
    return (lazy.train_net if is_python(args.config_file) else train_net)(args)


def main() -> int:
    """Check the command line, run the job; returns the exit code."""
    return run_command(check, train)
