"""Activation checkpointing under DistributedDataParallel, with the estimates averaged."""

import pytest
import ranks
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from wsbcn_d2 import BatchChannelNorm2d, WSConv2d

STEPS = 3


class Model(nn.Module):
    """A stem and a head that runs on two levels, each of them one checkpointed part."""

    def __init__(self, mode):
        super().__init__()
        self.mode = mode
        norms = [BatchChannelNorm2d(8, 4, update_rate=0.3) for _ in range(2)]
        self.stem = WSConv2d(8, 8, 3, padding=1, norm=norms[0], activation=nn.Tanh())
        self.head = WSConv2d(8, 8, 3, padding=1, norm=norms[1], activation=nn.Tanh())

    def forward(self, x):
        x = self.run(self.stem, x)
        return self.run(self.head, x) + self.run(self.head, x.square())

    def run(self, part, x):
        if self.mode is None:
            return part(x)
        return checkpoint(part, x, use_reentrant=self.mode)


def train(rank, mode):
    torch.manual_seed(0)
    # Reentrant checkpointing of a part that runs twice needs DDP to know the graph.
    model = DistributedDataParallel(
        Model(mode).double(), broadcast_buffers=False, static_graph=mode is True
    )
    hook = ranks.estimate_sync(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    generator = torch.Generator().manual_seed(rank)
    for _ in range(STEPS):
        x = torch.randn(2, 8, 5, 5, generator=generator, dtype=torch.float64) + rank
        y = model(x.requires_grad_())
        (y * y.detach().cos()).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        hook.after_step()
    state = {name: value.detach().clone() for name, value in model.module.state_dict().items()}
    return {"state": state, "same": ranks.same_everywhere(state), "x": x.grad}


def worker(rank, world_size):
    return {str(mode): train(rank, mode) for mode in (None, True, False)}


@pytest.fixture(scope="module")
def results():
    return ranks.run(worker, 2)


@pytest.mark.parametrize("mode", ["True", "False"])
def test_two_processes_train_as_without(results, mode):
    for result in results:
        assert result[mode]["same"]
        assert_close(result[mode], result["None"], rtol=1e-9, atol=1e-10)
        state = result[mode]["state"]
        assert state["stem.norm.bn.num_batches_tracked"] == STEPS
        assert state["head.norm.bn.num_batches_tracked"] == 2 * STEPS
