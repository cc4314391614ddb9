"""Gradient accumulation: one optimizer step on several micro-batches.

The paper's micro-batch setting for classification is batch 256 as 256 backward passes of one image
each. Here a data loader's batch is split, so that whatever counts steps (schedule, checkpoints,
evaluation, learning rate) is the same for every number of micro-batches; only the memory and, for
norms that look at the batch, the statistics change.

Running estimates (EstBN, BCN) move once per micro-batch. Over several processes they are averaged
after each step, which, with several micro-batches, is an approximation of second order in the
update rate (see ``sync``).
"""

import contextlib
import functools
import time
import weakref

import torch
from detectron2.engine import AMPTrainer, SimpleTrainer
from torch.nn.parallel import DistributedDataParallel

__all__ = ["accumulate", "split"]


def split(batch: list, parts: int) -> list[list]:
    """Split a batch into consecutive parts whose sizes differ by at most one.

    Raises:
        ValueError: if the batch has fewer elements than parts.
    """
    if len(batch) < parts:
        raise ValueError(
            f"SOLVER.ACCUMULATE {parts} splits batches of {len(batch)} images per process: make "
            "it at most SOLVER.IMS_PER_BATCH over the number of processes"
        )
    size, larger = divmod(len(batch), parts)
    ends = [i * size + min(i, larger) for i in range(parts + 1)]
    return [batch[a:b] for a, b in zip(ends, ends[1:], strict=False)]


def _run_step(trainer: SimpleTrainer, micro_batches: int) -> None:
    """``run_step`` of ``SimpleTrainer`` and ``AMPTrainer`` over the parts of a batch."""
    model, optimizer = trainer.model, trainer.optimizer
    assert model.training, f"[{trainer.__class__.__name__}] model was changed to eval mode!"
    casting, scaler = contextlib.nullcontext(), torch.amp.GradScaler(enabled=False)
    if isinstance(trainer, AMPTrainer):
        casting = torch.autocast("cuda", dtype=getattr(trainer, "precision", torch.float16))
        scaler = trainer.grad_scaler
    start = time.perf_counter()
    batch = next(trainer._data_loader_iter)
    data_time = time.perf_counter() - start
    optimizer.zero_grad()
    totals: dict[str, torch.Tensor] = {}
    parts = split(batch, micro_batches)
    for i, part in enumerate(parts):
        # DDP averages the gradients over processes once, with the last part.
        alone = i + 1 < len(parts) and isinstance(model, DistributedDataParallel)
        with model.no_sync() if alone else contextlib.nullcontext():
            with casting:
                losses = model(part)
            if isinstance(losses, torch.Tensor):
                losses = {"total_loss": losses}
            losses = {name: len(part) / len(batch) * loss for name, loss in losses.items()}
            scaler.scale(sum(losses.values())).backward()
        for name, loss in losses.items():
            totals[name] = totals.get(name, 0) + loss.detach()
    if hasattr(trainer, "after_backward"):  # Detectron2 main
        trainer.after_backward()
    trainer._write_metrics(totals, data_time)
    scaler.step(optimizer)
    scaler.update()


def accumulate(trainer: SimpleTrainer, micro_batches: int) -> None:
    """Make a trainer split every batch, in place; state and data loader are kept.

    Args:
        trainer: a ``SimpleTrainer`` or ``AMPTrainer``.
        micro_batches: parts of a batch; 1 leaves the trainer alone.

    Raises:
        ValueError: for a number below 1.
    """
    if micro_batches < 1:
        raise ValueError(f"SOLVER.ACCUMULATE must be positive, not {micro_batches}")
    if micro_batches > 1:
        # A proxy, as a trainer that holds on to itself would outlive its run.
        trainer.run_step = functools.partial(_run_step, weakref.proxy(trainer), micro_batches)
