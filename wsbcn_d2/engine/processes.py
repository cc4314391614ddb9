"""Starting a job and its processes: Detectron2's launcher, or torchrun's environment."""

import functools
import logging
import os
import sys
import tempfile
from argparse import Namespace
from collections.abc import Callable

import torch
import torch.distributed as dist
from detectron2.engine import default_argument_parser, default_setup
from detectron2.engine import launch as launch_detectron2
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

from ..checkpoint import CheckpointError
from ..config import UsageError
from ..data import DataError
from ..safe_yaml import read_yaml

__all__ = [
    "is_python",
    "launch",
    "one_line_errors",
    "run_command",
    "set_up_process",
    "world_size_of",
]

_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


def _under_torchrun() -> bool:
    return all(name in os.environ for name in _TORCHRUN)


def world_size_of(args: Namespace) -> int:
    """Number of processes of the job that the command line (or torchrun) asks for."""
    if _under_torchrun():
        return int(os.environ["WORLD_SIZE"])
    return args.num_gpus * args.num_machines


def launch(main: Callable[[Namespace], object], args: Namespace) -> object:
    """Run ``main(args)`` in every process of the job.

    Under torchrun (or Slurm setting the same variables) this process is one of them: the process
    group is made here, over NCCL with CUDA and gloo without. Otherwise ``--num-gpus`` processes
    are started: by Detectron2's own launcher, or here where there is no CUDA, which that of
    v0.6 insists on.

    Args:
        main: takes ``args``.
        args: of :func:`detectron2.engine.default_argument_parser`.

    Returns:
        What ``main`` returned where it ran in this process, else None.
    """
    if _under_torchrun():
        local = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
        return _run_rank(*local, main, args)
    if torch.cuda.is_available() or world_size_of(args) == 1:
        return launch_detectron2(
            main,
            args.num_gpus,
            num_machines=args.num_machines,
            machine_rank=args.machine_rank,
            dist_url=args.dist_url,
            args=(args,),
        )
    with tempfile.TemporaryDirectory() as folder:
        url = args.dist_url
        if url == "auto" or args.num_machines == 1:  # no port that another job could hold
            url = f"file://{folder}/rendezvous"
        size = args.num_gpus
        torch.multiprocessing.spawn(_run_rank, (size, main, args, url), nprocs=size)


def _run_rank(
    local_rank: int,
    local_size: int,
    main: Callable[[Namespace], object],
    args: Namespace,
    url: str | None = None,
) -> object:
    """One process of the job: as torchrun's environment says, or those that meet at an address."""
    place = {}
    if url:
        rank = args.machine_rank * local_size + local_rank
        place = {"init_method": url, "rank": rank, "world_size": world_size_of(args)}
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank)
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo", **place)
    try:
        _create_local_group(local_size)
        comm.synchronize()
        return main(args)
    finally:
        dist.destroy_process_group()


def _create_local_group(local_size: int) -> None:
    """Tell ``detectron2.utils.comm`` which processes share this machine."""
    if hasattr(comm, "create_local_process_group"):  # Detectron2 main
        comm.create_local_process_group(local_size)
        return
    machine = dist.get_rank() // local_size
    for i in range(dist.get_world_size() // local_size):
        group = dist.new_group(list(range(i * local_size, (i + 1) * local_size)))
        if i == machine:
            comm._LOCAL_PROCESS_GROUP = group


def one_line_errors(command: Callable[..., object]) -> Callable[..., int]:
    """Make a command answer wrong input with one line on stderr and the exit code 2.

    Otherwise the code is what the command returns if that is an int, else 0.
    """

    @functools.wraps(command)
    def run(*args, **kwargs) -> int:
        try:
            result = command(*args, **kwargs)
        except (UsageError, CheckpointError, DataError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        return result if isinstance(result, int) else 0

    return run


@one_line_errors
def run_command(check: Callable[..., None], main: Callable[[Namespace], object]) -> None:
    """A training script: read Detectron2's command line, check the job, run it.

    ``--num-gpus 0`` is one process on the CPU.

    Args:
        check: is given the command line's ``args`` and the keyword arguments of
            :func:`wsbcn_d2.engine.checks.check_setup`; raises for what cannot work.
        main: is run in every process of the job, with ``args``.
    """
    args = default_argument_parser().parse_args()
    if args.num_gpus < 0 or args.num_machines < 1:
        raise UsageError(
            f"--num-gpus {args.num_gpus} --num-machines {args.num_machines}: say how many, "
            "--num-gpus 0 for the CPU"
        )
    if args.num_gpus == 0:
        args.num_gpus = 1
        cpu = ["train.device=cpu"] if is_python(args.config_file) else ["MODEL.DEVICE", "cpu"]
        args.opts = [*args.opts, *cpu]
    check(args, world_size=world_size_of(args), eval_only=args.eval_only, resume=args.resume)
    launch(main, args)


def is_python(config_file: str) -> bool:
    """Whether a config is of Python (LazyConfig), or the YAML that a run of such a one saved."""
    try:
        return config_file.endswith(".py") or "model" in read_yaml(config_file)
    except (OSError, ValueError):
        return False  # refused, with its reason, where it is read


def set_up_process(cfg: object, args: Namespace, output_dir: str, device: str) -> None:
    """Detectron2's ``default_setup``, and this project's log with Detectron2's and fvcore's."""
    default_setup(cfg, args)
    setup_logger(output_dir, distributed_rank=comm.get_rank(), name="wsbcn_d2")
    if device == "cpu":
        logging.getLogger("wsbcn_d2").info("Running on the CPU")
