"""Running a function in several processes over gloo."""

import contextlib
import hashlib
import multiprocessing
import os
import tempfile
import traceback
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from detectron2.utils import comm

from wsbcn_d2.engine import EstimateSync
from wsbcn_d2.engine.processes import _create_local_group

TIMEOUT = 300  # seconds; of use only against a stall


def _rank(worker, rank, world_size, folder, arguments):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=TIMEOUT),
    )
    _create_local_group(world_size)
    path = os.path.join(folder, f"{rank}.pt")
    try:
        torch.manual_seed(rank)
        result = worker(rank, world_size, *arguments)
        torch.save(result, f"{path}.part")
        os.rename(f"{path}.part", path)
    except BaseException:
        with open(f"{path}.error", "w") as stream:
            stream.write(traceback.format_exc())
        os._exit(1)  # without the good-byes of gloo, for which the others are not there
    dist.barrier()
    dist.destroy_process_group()


def run(worker, world_size, *arguments):
    """Run ``worker(rank, world_size, *arguments)`` in every rank of a gloo group on this machine.

    The processes are forks of a server that has imported everything and computed nothing.

    Args:
        worker: a function of a module; returns tensors and plain containers.
        world_size: number of processes.
        *arguments: passed on.

    Returns:
        list: what each rank's worker returned.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "detectron2.engine", "wsbcn_d2.engine"])
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            context.Process(target=_rank, args=(worker, rank, world_size, folder, arguments))
            for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        try:
            errors = []
            for rank, process in enumerate(processes):
                process.join(TIMEOUT)
                if process.exitcode != 0:
                    with contextlib.suppress(FileNotFoundError):
                        errors.append(Path(folder, f"{rank}.pt.error").read_text())
                    errors.append(f"rank {rank}: exit code {process.exitcode}")
            assert not errors, "\n".join(errors)
        finally:
            for process in processes:
                process.kill()
        return [
            torch.load(os.path.join(folder, f"{rank}.pt"), weights_only=True)
            for rank in range(world_size)
        ]


def estimate_sync(model):
    """The project's hook, ready to be called after each step."""
    hook = EstimateSync()
    hook.trainer = SimpleNamespace(model=model)
    hook.before_train()
    return hook


@contextlib.contextmanager
def counted_collectives():
    """List of the names of the collectives called within; DDP's own come from C++ and count not."""
    calls = []
    names = ("all_reduce", "all_gather", "all_gather_into_tensor", "broadcast", "reduce")
    originals = {name: getattr(dist, name) for name in names}

    def counting(name):
        def call(*args, **kwargs):
            calls.append(name)
            return originals[name](*args, **kwargs)

        return call

    for name in names:
        setattr(dist, name, counting(name))
    try:
        yield calls
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)


def same_everywhere(state):
    """Whether a state dict is bit for bit the same on every rank; a collective."""
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(state[name].detach().contiguous().numpy().tobytes())
    return len(set(comm.all_gather(digest.hexdigest()))) == 1
