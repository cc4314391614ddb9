"""Starting the processes of a job: Detectron2's launcher, or torchrun's environment."""

import os
from argparse import Namespace
from collections.abc import Callable

import torch
import torch.distributed as dist
from detectron2.engine import launch as launch_detectron2
from detectron2.utils import comm

__all__ = ["launch", "world_size_of"]

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
    group is made here, over NCCL with CUDA and gloo without. Otherwise Detectron2's own launcher
    starts ``--num-gpus`` processes.

    Args:
        main: takes ``args``.
        args: of :func:`detectron2.engine.default_argument_parser`.

    Returns:
        What ``main`` returned where it ran in this process, else None.
    """
    if not _under_torchrun():
        return launch_detectron2(
            main,
            args.num_gpus,
            num_machines=args.num_machines,
            machine_rank=args.machine_rank,
            dist_url=args.dist_url,
            args=(args,),
        )
    local_rank = int(os.environ["LOCAL_RANK"])
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank)
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    try:
        _create_local_group(int(os.environ["LOCAL_WORLD_SIZE"]))
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
