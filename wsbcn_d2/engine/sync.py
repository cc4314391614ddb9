"""Averaging of running estimates over processes.

Each process's estimates move on its own micro-batch, and Detectron2 turns DDP's buffer broadcast
off, so without this they would drift apart and a checkpoint would hold those of process 0.

Because an update is linear in the batch's moments, the mean of the processes' updated estimates
is exactly the update by the mean of their moments: what a collective in every layer would have
stored, at one collective per step. The first batch is the exception: there the estimates *are*
the moments, and the pooled variance also has the variance between the processes' means. So it is
with every batch at an update rate of 1.

A process whose batch was empty contributes its unchanged estimates, or nothing before its first
batch. Where a layer runs several times between two averages (a head shared by FPN levels,
accumulated gradients), means are still exact. Each variance is around the process's own mean
instead of the common one: with two runs at rate r, whose batch means deviate from the mean over
the processes by d and e, it differs by r^2 Var(e - d) after the first average, and by
r^3 Var(d) - 2 r^2 Cov(d, e) after later ones. All processes have the same.
"""

import torch
import torch.distributed as dist

from ..layers import EstimatedBatchNorm2d

__all__ = ["EstimateSynchronizer", "contribution", "merge"]


def contribution(
    mean: torch.Tensor,
    var: torch.Tensor,
    count: torch.Tensor,
    layer: torch.Tensor,
    outright: torch.Tensor,
) -> torch.Tensor:
    """What one process adds to the sum over processes.

    Args:
        mean, var: shape (K,): the estimates of all layers, concatenated.
        count: shape (L,), int64: batches that each layer has seen. Before the step, the
            processes agreed on it.
        layer: shape (K,), int64: the layer of each channel.
        outright: shape (L,), bool: layers whose estimates start from what a batch of this step
            set: the update rate is 1, or they had seen none before.

    Returns:
        float64 vector of 3K + 3L sums-to-be, for :func:`merge`.
    """
    mean, var = mean.double(), var.double()
    seen = (count > 0).double()
    weight = seen[layer]
    moments = [weight * mean, weight * var, weight * mean.square()]
    later = (count > 1) & ~outright
    return torch.cat([*moments, seen, count.double(), later.double()])


def merge(
    total: torch.Tensor, world_size: int, layer: torch.Tensor, num_layers: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The estimates that all processes go on with.

    Args:
        total: the sum of :func:`contribution` over the processes.
        world_size: number of processes.
        layer: as for :func:`contribution`.
        num_layers: L.

    Returns:
        mean (K,), var (K,), float64, and count (L,), int64. Layers that no process has seen
        a batch of have mean 0, variance 1 and count 0, as constructed.
    """
    channels = layer.numel()
    mean, var, square = total[: 3 * channels].view(3, channels)
    seen, count, later = total[3 * channels :].view(3, num_layers)
    weight = seen.clamp(min=1)[layer]
    mean, var, square = mean / weight, var / weight, square / weight
    # Between-process variance: only where the batch set the estimates of every process.
    first = (later == 0)[layer]
    var = torch.where(first, var + (square - mean.square()).clamp(min=0), var)
    var = torch.where((seen == 0)[layer], torch.ones_like(var), var)
    # Counts differ by the empty batches alone.
    return mean, var, torch.ceil(count / world_size).long()


class EstimateSynchronizer:
    """Keeps the running estimates of a list of layers equal over all processes."""

    def __init__(self, norms: list[EstimatedBatchNorm2d]):
        """
        Args:
            norms: the layers, in the same order on every process, on one device.
        """
        self._norms = norms
        sizes = torch.tensor([norm.num_features for norm in norms])
        layer = torch.arange(len(norms)).repeat_interleave(sizes)
        self._sizes = sizes.tolist()
        self._layer = layer.to(norms[0].running_mean.device)
        # Batches that the processes agree on having seen: 0 before a layer's first average, by
        # when it may have run more than once.
        self._agreed = torch.stack([norm.num_batches_tracked for norm in norms])
        self._settled = False  # held, and equal from here on

    @torch.no_grad()
    def synchronize(self) -> None:
        """Average the estimates over the processes of the default group: one all-reduce.

        Where they are held (a rate of 0) there is none once every layer has its first batch's.
        """
        held = all(norm.momentum == 0 or not norm.updates() for norm in self._norms)
        if self._settled and held:
            return
        means = [norm.running_mean for norm in self._norms]
        variances = [norm.running_var for norm in self._norms]
        counts = [norm.num_batches_tracked for norm in self._norms]
        outright = [norm.momentum is not None and norm.momentum >= 1 for norm in self._norms]
        outright = torch.tensor(outright).to(self._layer.device, non_blocking=True)
        total = contribution(
            torch.cat(means),
            torch.cat(variances),
            torch.stack(counts),
            self._layer,
            outright | (self._agreed == 0),
        )
        dist.all_reduce(total)
        mean, var, count = merge(total, dist.get_world_size(), self._layer, len(self._norms))
        torch._foreach_copy_(means, list(mean.to(means[0].dtype).split(self._sizes)))
        torch._foreach_copy_(variances, list(var.to(variances[0].dtype).split(self._sizes)))
        torch._foreach_copy_(counts, list(count.unbind()))
        self._agreed = count
        # The processes agree on the counts, and so on this; it waits for the device while held.
        self._settled = held and all(
            seen > 0 or not norm.updates()
            for seen, norm in zip(count.tolist(), self._norms, strict=True)
        )
