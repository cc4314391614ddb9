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
import time

import torch
from detectron2.engine import AMPTrainer, SimpleTrainer
from torch.nn.parallel import DistributedDataParallel

__all__ = ["accumulate", "split"]


def split(batch: list, parts: int) -> list[list]:
    """Split a batch into consecutive parts whose sizes differ by at most one.

    Args:
        batch: at least ``parts`` elements.
        parts: how many.

    Returns:
        list of ``parts`` lists.

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


class _Accumulating:
    """``run_step`` of ``SimpleTrainer`` and ``AMPTrainer`` over the parts of a batch."""

    def run_step(self):
        assert self.model.training, f"[{type(self).__name__}] model was changed to eval mode!"
        scaler = getattr(self, "grad_scaler", None)
        start = time.perf_counter()
        batch = next(self._data_loader_iter)
        data_time = time.perf_counter() - start
        parts = split(batch, self.micro_batches)
        self.optimizer.zero_grad()
        totals: dict[str, torch.Tensor] = {}
        for i, part in enumerate(parts):
            with self._synchronizing(i + 1 == len(parts)):
                with self._casting():
                    losses = self.model(part)
                if isinstance(losses, torch.Tensor):
                    losses = {"total_loss": losses}
                share = len(part) / len(batch)
                losses = {name: share * loss for name, loss in losses.items()}
                loss = sum(losses.values())
                (loss if scaler is None else scaler.scale(loss)).backward()
            for name, loss in losses.items():
                totals[name] = totals.get(name, 0) + loss.detach()
        if hasattr(self, "after_backward"):  # Detectron2 main
            self.after_backward()
        self._write_metrics(totals, data_time)
        if scaler is None:
            self.optimizer.step()
        else:
            scaler.step(self.optimizer)
            scaler.update()

    def _synchronizing(self, last: bool):
        # DDP averages the gradients over processes once, with the last part.
        if last or not isinstance(self.model, DistributedDataParallel):
            return contextlib.nullcontext()
        return self.model.no_sync()

    def _casting(self):
        if not hasattr(self, "grad_scaler"):
            return contextlib.nullcontext()
        return torch.autocast("cuda", dtype=getattr(self, "precision", torch.float16))


class AccumulatingTrainer(_Accumulating, SimpleTrainer):
    pass


class AccumulatingAMPTrainer(_Accumulating, AMPTrainer):
    pass


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
    if micro_batches == 1:
        return
    amp = isinstance(trainer, AMPTrainer)
    trainer.__class__ = AccumulatingAMPTrainer if amp else AccumulatingTrainer
    trainer.micro_batches = micro_batches
