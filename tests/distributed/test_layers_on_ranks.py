"""Estimates and synchronized statistics of layers on 2 and 4 processes, in float64."""

import copy

import pytest
import ranks
import torch
import torch.distributed as dist
from torch import nn
from torch.testing import assert_close

from wsbcn_d2 import BatchChannelNorm2d, EstimatedBatchNorm2d

STEPS = 6
RATE = 0.2
CHANNELS = (4, 32, 6)
EXACT = {"atol": 1e-12, "rtol": 1e-12}


def make_layers():
    return nn.ModuleList(
        [
            EstimatedBatchNorm2d(CHANNELS[0], momentum=RATE),
            BatchChannelNorm2d(CHANNELS[1], update_rate=RATE),
            EstimatedBatchNorm2d(CHANNELS[2], momentum=RATE),
        ]
    ).double()


def inputs(step, rank, world_size):
    """Decided by step and rank; ranks differ in mean and spread, which a rank alone misses."""
    generator = torch.Generator().manual_seed(100 * step + rank)
    return [
        (1 + rank) * torch.randn(2, c, 5, 7, generator=generator, dtype=torch.float64) + 3 * rank
        for c in CHANNELS
    ]


def estimates(layers):
    names = ("running_mean", "running_var", "num_batches_tracked")
    return {k: v.clone() for k, v in layers.state_dict().items() if k.endswith(names)}


def step_through(rank, world_size, batches, sync=True):
    """Estimates after each step, and whether they were the same on all ranks."""
    layers = make_layers()
    hook = ranks.estimate_sync(layers) if sync else None
    history, same = [], []
    for batch in batches:
        for layer, x in zip(layers, batch, strict=True):
            layer(x)
        if hook:
            hook.after_step()
        history.append(estimates(layers))
        same.append(ranks.same_everywhere(estimates(layers)))
    return history, same


def in_one_process(batches_of_ranks):
    """Estimates after each step of one process with the batches of all ranks together."""
    layers = make_layers()
    history = []
    for batches in zip(*batches_of_ranks, strict=True):
        for layer, parts in zip(layers, zip(*batches, strict=True), strict=True):
            layer(torch.cat(parts))
        history.append(estimates(layers))
    return history


def with_trouble(rank, step):
    """Batches some of which are empty or not finite, on some ranks or on all."""
    batch = inputs(step, rank, 0)
    if step == 0 and rank == 0:  # first batch empty on one rank
        batch[0] = batch[0][:0]
    if step == 1 and rank == 1:
        batch[0] = batch[0][:0]
    if step == 2:  # empty everywhere
        batch[0] = batch[0][:0]
    if step == 3 and rank == 1:
        batch[1][0, 3] = float("nan")
    if step <= 3:  # the last layer has its first batch late
        batch[2] = batch[2][:0]
    return batch


def layers_worker(rank, world_size):
    result = {}
    batches = [inputs(step, rank, world_size) for step in range(STEPS)]
    with ranks.counted_collectives() as calls:
        layers = make_layers()
        hook = ranks.estimate_sync(layers)
        for layer, x in zip(layers, batches[0], strict=True):
            layer(x)
        hook.after_step()
    result["collectives"] = calls
    result["synced"] = step_through(rank, world_size, batches)
    result["alone"] = step_through(rank, world_size, batches, sync=False)
    result["trouble"] = step_through(
        rank, world_size, [with_trouble(rank, step) for step in range(STEPS)]
    )
    # Different sizes: rank r has images of (4 + r) x 9.
    sizes = [[x[:, :, :4].repeat(1, 1, rank + 1, 1) for x in batch] for batch in batches]
    result["sizes"] = step_through(rank, world_size, sizes)
    result["rate 1"] = outright(batches)
    result["twice"] = twice_a_step(batches)
    result["sync"] = synchronized_bcn(rank, world_size)
    return result


def outright(batches):
    layers = make_layers()
    for module in layers.modules():
        if isinstance(module, EstimatedBatchNorm2d):
            module.momentum = 1.0
    hook = ranks.estimate_sync(layers)
    for batch in batches[:3]:
        for layer, x in zip(layers, batch, strict=True):
            layer(x)
        hook.after_step()
    return estimates(layers)


def twice_a_step(batches):
    """Estimates after each average, when every layer runs twice in between."""
    layers = make_layers()
    hook = ranks.estimate_sync(layers)
    history = []
    for pair in zip(batches[::2], batches[1::2], strict=True):
        for batch in pair:
            for layer, x in zip(layers, batch, strict=True):
                layer(x)
        hook.after_step()
        history.append(estimates(layers))
    return history


def bcn_and_target(statistics):
    torch.manual_seed(5)
    layer = BatchChannelNorm2d(8, num_groups=4, statistics=statistics).double()
    for parameter in layer.parameters():
        nn.init.normal_(parameter, mean=1.0)
    return layer


def whole_batch(world_size):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(2 * world_size, 8, 5, 4, generator=generator, dtype=torch.float64)
    x = x * torch.arange(1, 2 * world_size + 1).view(-1, 1, 1, 1) + 2
    target = torch.randn(x.shape, generator=generator, dtype=torch.float64)
    return x, target


def synchronized_bcn(rank, world_size):
    """SyncBCN's output and gradients; those of parameters summed over ranks, as a loss's sum is."""
    layer = bcn_and_target("sync")
    x, target = whole_batch(world_size)
    mine = slice(2 * rank, 2 * rank + 2)
    x = x[mine].clone().requires_grad_()
    y = layer(x)
    (y * target[mine]).sum().backward()
    gradients = {name: p.grad.clone() for name, p in layer.named_parameters()}
    for gradient in gradients.values():
        dist.all_reduce(gradient)
    # A rank without images takes part in the collectives all the same.
    empty_or_not = x.detach()[: 0 if rank == 0 else 2].requires_grad_()
    out = layer(empty_or_not)
    out.sum().backward()
    return {
        "y": y.detach(),
        "x": x.grad,
        **gradients,
        "with_empty": out.detach(),
    }


@pytest.fixture(scope="module", params=[2, 4])
def results(request):
    return ranks.run(layers_worker, request.param)


def assert_histories_equal(history, expected, **tolerance):
    for step, (mine, single) in enumerate(zip(history, expected, strict=True)):
        assert_close(mine, single, **tolerance, msg=lambda text, step=step: f"step {step}: {text}")


def test_estimates_are_those_of_one_process_with_all_batches(results):
    batches = [[inputs(step, r, 0) for step in range(STEPS)] for r in range(len(results))]
    expected = in_one_process(batches)
    for result in results:
        history, same = result["synced"]
        assert all(same)  # bit for bit, after every step
        assert_histories_equal(history, expected, **EXACT)


def test_one_collective_per_step_carries_all_estimates(results):
    assert [result["collectives"] for result in results] == [["all_reduce"]] * len(results)


def test_without_the_hook_ranks_drift_apart(results):
    first, second = results[0]["alone"], results[1]["alone"]
    assert not any(first[1]) and not any(second[1])
    name = "1.bn.running_mean"
    assert (first[0][-1][name] - second[0][-1][name]).abs().max() > 0.5


def test_different_image_sizes_weigh_ranks_equally(results):
    for result in results:
        history, same = result["sizes"]
        assert all(same)
    # Tiling an image changes its size and not its moments.
    batches = [
        [[x[:, :, :4] for x in inputs(step, r, 0)] for step in range(STEPS)]
        for r in range(len(results))
    ]
    assert_histories_equal(results[0]["sizes"][0], in_one_process(batches), **EXACT)


def test_empty_and_broken_batches_desynchronise_nobody(results):
    history, same = results[0]["trouble"]
    world_size = len(results)
    for result in results:
        assert all(result["trouble"][1])
        assert_histories_equal(result["trouble"][0], history, atol=0, rtol=0)
    assert all(value.isfinite().all() for state in history for value in state.values())

    # Step 0: the ranks that had a batch, pooled.
    x = torch.cat([with_trouble(rank, 0)[0] for rank in range(world_size)])
    var, mean = torch.var_mean(x, dim=(0, 2, 3), correction=0)
    assert_close(history[0]["0.running_mean"], mean, **EXACT)
    assert_close(history[0]["0.running_var"], var, **EXACT)
    # Step 2: nobody had one.
    for name in ("0.running_mean", "0.running_var", "0.num_batches_tracked"):
        assert torch.equal(history[1][name], history[2][name])
    # Step 3: one of the ranks contributed its unchanged estimate.
    old = history[2]["1.bn.running_mean"]
    means = [with_trouble(r, 3)[1].mean(dim=(0, 2, 3)) for r in range(world_size) if r != 1]
    moved = sum(RATE * (mean - old) for mean in means) / world_size
    assert_close(history[3]["1.bn.running_mean"], old + moved, **EXACT)
    # The layer without a batch so far is as constructed, and step 4 is its first.
    assert not history[3]["2.running_mean"].any() and (history[3]["2.running_var"] == 1).all()
    x = torch.cat([with_trouble(rank, 4)[2] for rank in range(world_size)])
    var, mean = torch.var_mean(x, dim=(0, 2, 3), correction=0)
    assert_close(history[4]["2.running_mean"], mean, **EXACT)
    assert_close(history[4]["2.running_var"], var, **EXACT)
    assert history[4]["2.num_batches_tracked"] == 1
    assert history[5]["2.num_batches_tracked"] == 2


def test_a_rate_of_one_keeps_the_variance_between_ranks(results):
    x = torch.cat([inputs(2, rank, 0)[1] for rank in range(len(results))])
    var, mean = torch.var_mean(x, dim=(0, 2, 3), correction=0)
    for result in results:
        assert_close(result["rate 1"]["1.bn.running_mean"], mean, **EXACT)
        assert_close(result["rate 1"]["1.bn.running_var"], var, **EXACT)


def test_sync_bcn_is_bcn_on_the_whole_batch(results):
    layer = bcn_and_target("batch")
    x, target = whole_batch(len(results))
    x.requires_grad_()
    y = layer(x)
    (y * target).sum().backward()
    assert_close(torch.cat([r["sync"]["y"] for r in results]), y.detach(), **EXACT)
    assert_close(torch.cat([r["sync"]["x"] for r in results]), x.grad, atol=1e-11, rtol=1e-11)
    for name, parameter in layer.named_parameters():
        for result in results:
            assert_close(result["sync"][name], parameter.grad, atol=1e-11, rtol=1e-11)


def test_sync_bcn_takes_a_rank_without_images(results):
    layer = bcn_and_target("batch")
    x, _ = whole_batch(len(results))
    expected = layer(x[2:])
    assert len(results[0]["sync"]["with_empty"]) == 0
    others = torch.cat([result["sync"]["with_empty"] for result in results[1:]])
    assert_close(others, expected.detach(), **EXACT)


def test_the_first_step_needs_more_than_the_mean_of_variances():
    """That the comparison above can tell: the plain mean of the ranks' estimates is far off."""
    batches = [[inputs(step, r, 0) for step in range(STEPS)] for r in range(2)]
    pooled = in_one_process(batches)[0]
    alone = [in_one_process([batches[r]])[0] for r in range(2)]
    name = "1.bn.running_var"
    plain = (copy.copy(alone[0][name]) + alone[1][name]) / 2
    assert (pooled[name] - plain).abs().min() > 1


def test_two_runs_between_averages_differ_by_the_documented_second_order_alone(results):
    """As with accumulated gradients, or a head that runs on several levels."""
    world_size = len(results)
    layers = make_layers()  # one process, which goes on from where all agree
    for step in range(STEPS // 2):
        first, second = (
            [inputs(2 * step + k, rank, world_size) for rank in range(world_size)] for k in (0, 1)
        )
        for parts in (first, second):
            for layer, xs in zip(layers, zip(*parts, strict=True), strict=True):
                layer(torch.cat(xs))
        found = [result["twice"][step] for result in results]
        assert all(torch.equal(f[k], v) for f in found for k, v in found[0].items())
        expected = estimates(layers)
        for i, prefix in enumerate(("0.", "1.bn.", "2.")):
            d, e = (torch.stack([p[i].mean((0, 2, 3)) for p in parts]) for parts in (first, second))
            d, e = d - d.mean(0), e - e.mean(0)
            if step == 0:
                error = RATE**2 * (e - d).square().mean(0)
            else:
                error = RATE**3 * d.square().mean(0) - 2 * RATE**2 * (d * e).mean(0)
            assert_close(found[0][prefix + "running_mean"], expected[prefix + "running_mean"])
            assert_close(
                found[0][prefix + "running_var"] - expected[prefix + "running_var"], error,
                atol=1e-10, rtol=1e-8,
            )  # fmt: skip
            assert found[0][prefix + "num_batches_tracked"] == 2 * step + 2
            if step == 0:  # of a pooled variance that is mostly between the ranks
                between = d.square().mean(0)
                assert (error < 0.02 * between).all()
        layers.load_state_dict({**layers.state_dict(), **found[0]})
