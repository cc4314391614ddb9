"""Averaging of estimates over processes, with the processes simulated one after the other."""

import copy

import pytest
import reference
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

from wsbcn_d2 import EstimatedBatchNorm2d
from wsbcn_d2.engine.sync import EstimateSynchronizer, contribution, merge

RATE = 0.2
CHANNELS = (3, 2)


def make_ranks(count, steps_before=0):
    """The same two layers on every process, as agreed on after some steps."""
    layers = nn.ModuleList(EstimatedBatchNorm2d(c, momentum=RATE) for c in CHANNELS)
    for _ in range(steps_before):
        for layer in layers:
            layer(torch.randn(2, layer.num_features, 4, 4) * 2 + 1)
    return [copy.deepcopy(layers) for _ in range(count)]


def synchronize(ranks, monkeypatch):
    """Run every rank's EstimateSynchronizer against the sum of all contributions."""
    totals = []
    synchronizers = [EstimateSynchronizer(list(layers)) for layers in ranks]
    snapshot = [copy.deepcopy(layers.state_dict()) for layers in ranks]
    monkeypatch.setattr(dist, "get_world_size", lambda: len(ranks))
    monkeypatch.setattr(dist, "all_reduce", lambda total: totals.append(total.clone()))
    for synchronizer in synchronizers:
        synchronizer.synchronize()
    for layers, state in zip(ranks, snapshot, strict=True):
        layers.load_state_dict(state)
    total = sum(totals)
    monkeypatch.setattr(dist, "all_reduce", lambda own: own.copy_(total))
    for synchronizer in synchronizers:
        synchronizer.synchronize()
    first = ranks[0].state_dict()
    for layers in ranks[1:]:
        assert_close(layers.state_dict(), first, rtol=0, atol=0)
    return ranks[0]


def batch(layer_index, size=2, offset=0.0):
    return torch.randn(size, CHANNELS[layer_index], 4, 4).double() + offset


def run_once(ranks):
    """Run every layer of every rank on a batch of its own; returns the batches."""
    data = [[batch(i, offset=3.0 * rank) for i in (0, 1)] for rank in range(len(ranks))]
    for layers, inputs in zip(ranks, data, strict=True):
        for layer, x in zip(layers, inputs, strict=True):
            layer(x.float())
    return data


@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_the_first_batch_gives_the_moments_of_all_batches_together(world_size, monkeypatch):
    ranks = make_ranks(world_size)
    data = run_once(ranks)
    merged = synchronize(ranks, monkeypatch)
    for i, layer in enumerate(merged):
        mean, var = reference.moments(torch.cat([inputs[i] for inputs in data]))
        assert_close(layer.running_mean.double(), mean, atol=1e-5, rtol=1e-5)
        assert_close(layer.running_var.double(), var, atol=1e-4, rtol=1e-4)
        assert layer.num_batches_tracked == 1


@pytest.mark.parametrize("world_size", [2, 4])
def test_later_batches_give_the_update_by_all_batches_together(world_size, monkeypatch):
    ranks = make_ranks(world_size, steps_before=2)
    old = copy.deepcopy(ranks[0])
    data = run_once(ranks)
    merged = synchronize(ranks, monkeypatch)
    for i, layer in enumerate(merged):
        everything = torch.cat([inputs[i] for inputs in data])
        before = old[i].running_mean.double(), old[i].running_var.double()
        mean, var = reference.update(*before, everything, RATE, first=False)
        assert_close(layer.running_mean.double(), mean, atol=1e-5, rtol=1e-5)
        assert_close(layer.running_var.double(), var, atol=1e-4, rtol=1e-4)
        assert layer.num_batches_tracked == 3


def test_over_several_steps_the_processes_are_one_process_with_a_larger_batch(monkeypatch):
    ranks, (single,) = make_ranks(3), make_ranks(1)
    for step in range(4):
        data = [[batch(i, offset=step - rank) for i in (0, 1)] for rank in range(3)]
        for layers, inputs in zip(ranks, data, strict=True):
            for layer, x in zip(layers, inputs, strict=True):
                layer(x.float())
        for i, layer in enumerate(single):
            layer(torch.cat([inputs[i] for inputs in data]).float())
        merged = synchronize(ranks, monkeypatch)
        assert_close(merged.state_dict(), single.state_dict(), atol=1e-4, rtol=1e-4)


def test_a_process_with_an_empty_first_batch_contributes_nothing(monkeypatch):
    ranks = make_ranks(3)
    inputs = [batch(0), torch.zeros(0, CHANNELS[0], 4, 4), batch(0, offset=5.0)]
    for layers, x in zip(ranks, inputs, strict=True):
        layers[0](x.float())
    merged = synchronize(ranks, monkeypatch)
    mean, var = reference.moments(torch.cat(inputs))
    assert_close(merged[0].running_mean.double(), mean, atol=1e-5, rtol=1e-5)
    assert_close(merged[0].running_var.double(), var, atol=1e-4, rtol=1e-4)
    assert merged[0].num_batches_tracked == 1
    # The other layer ran nowhere: as constructed, and its next batch is its first.
    fresh = EstimatedBatchNorm2d(CHANNELS[1])
    assert_close(merged[1].state_dict(), fresh.state_dict(), rtol=0, atol=0)


def test_at_a_rate_of_1_every_batch_gives_the_moments_of_all_together(monkeypatch):
    ranks = make_ranks(2, steps_before=2)
    for layer in (layer for layers in ranks for layer in layers):
        layer.momentum = 1.0
    data = run_once(ranks)
    for i, layer in enumerate(synchronize(ranks, monkeypatch)):
        mean, var = reference.moments(torch.cat([inputs[i] for inputs in data]))
        assert_close(layer.running_mean.double(), mean, atol=1e-5, rtol=1e-5)
        assert_close(layer.running_var.double(), var, atol=1e-4, rtol=1e-4)


def test_a_process_with_an_empty_later_batch_contributes_its_estimates(monkeypatch):
    ranks = make_ranks(2, steps_before=1)
    old = copy.deepcopy(ranks[0][0])
    x = batch(0, offset=4.0)
    ranks[0][0](x.float())
    ranks[1][0](torch.zeros(0, CHANNELS[0], 4, 4))
    merged = synchronize(ranks, monkeypatch)[0]
    # Half of the processes moved: half of the rate.
    before = old.running_mean.double(), old.running_var.double()
    mean, var = reference.update(*before, x, RATE / 2, first=False)
    assert_close(merged.running_mean.double(), mean, atol=1e-5, rtol=1e-5)
    assert_close(merged.running_var.double(), var, atol=1e-4, rtol=1e-4)
    assert merged.num_batches_tracked == 2


def test_layers_at_their_first_and_at_later_batches_mix(monkeypatch):
    ranks = make_ranks(2, steps_before=1)
    for layers in ranks:
        layers[1] = EstimatedBatchNorm2d(CHANNELS[1], momentum=RATE)
    old = copy.deepcopy(ranks[0][0])
    data = [[batch(i, offset=3.0 * rank) for i in (0, 1)] for rank in (0, 1)]
    for layers, inputs in zip(ranks, data, strict=True):
        for layer, x in zip(layers, inputs, strict=True):
            layer(x.float())
    merged = synchronize(ranks, monkeypatch)
    everything = [torch.cat([inputs[i] for inputs in data]) for i in (0, 1)]
    before = old.running_mean.double(), old.running_var.double()
    _, later = reference.update(*before, everything[0], RATE, first=False)
    _, first = reference.moments(everything[1])
    assert_close(merged[0].running_var.double(), later, atol=1e-4, rtol=1e-4)
    assert_close(merged[1].running_var.double(), first, atol=1e-4, rtol=1e-4)
    assert [layer.num_batches_tracked.item() for layer in merged] == [2, 1]


@settings(max_examples=40, deadline=None)
@given(world_size=st.integers(1, 6), seed=st.integers(0, 2**31), seen=st.booleans())
def test_the_sum_does_not_depend_on_who_has_what(world_size, seed, seen):
    """Equal estimates everywhere stay what they are, whatever the number of processes."""
    generator = torch.Generator().manual_seed(seed)
    layer = torch.tensor([0, 0, 1])
    mean = torch.randn(3, generator=generator)
    var = torch.rand(3, generator=generator)
    count = torch.tensor([5, 7 if seen else 0])
    total = world_size * contribution(mean, var, count, layer, torch.zeros(2, dtype=torch.bool))
    merged_mean, merged_var, merged_count = merge(total, world_size, layer, 2)
    expected_mean, expected_var = mean.double(), var.double()
    if not seen:
        expected_mean[2], expected_var[2] = 0.0, 1.0
    assert_close(merged_mean, expected_mean)
    assert_close(merged_var, expected_var)
    assert torch.equal(merged_count, count)


def test_held_estimates_are_averaged_until_every_layer_has_its_own(monkeypatch):
    calls = []
    monkeypatch.setattr(dist, "get_world_size", lambda: 1)
    monkeypatch.setattr(dist, "all_reduce", lambda total: calls.append(total))
    layers = [EstimatedBatchNorm2d(c, momentum=0.0) for c in CHANNELS]
    frozen = EstimatedBatchNorm2d(4, momentum=RATE).requires_grad_(False)  # never sees a batch
    synchronizer = EstimateSynchronizer([*layers, frozen])
    layers[0](batch(0).float())
    for expected in (1, 2):  # a head may have no boxes at first
        synchronizer.synchronize()
        assert len(calls) == expected
    layers[1](batch(1).float())
    means = [layer.running_mean.clone() for layer in layers]
    for _ in range(3):
        synchronizer.synchronize()
        layers[0](batch(0).float())
    assert len(calls) == 3
    assert all(torch.equal(norm.running_mean, m) for norm, m in zip(layers, means, strict=True))
    layers[0].momentum = RATE  # and whenever they move
    for expected in (4, 5):
        synchronizer.synchronize()
        assert len(calls) == expected
    layers[0].momentum = 0.0
    for _ in range(3):
        synchronizer.synchronize()
    assert len(calls) == 6
