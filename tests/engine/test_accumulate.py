"""Gradient accumulation: the step of the whole batch, in micro-batches."""

import contextlib
import time

import pytest
import torch
from detectron2.engine import AMPTrainer, SimpleTrainer
from detectron2.utils.events import EventStorage
from torch import nn

from wsbcn_d2.engine.accumulate import accumulate, split


class Model(nn.Module):
    """Two losses that are means over the batch."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2).double()
        self.sizes = []

    def forward(self, batch):
        self.sizes.append(len(batch))
        y = self.layer(torch.stack(batch))
        return {"a": y.square().mean(), "b": 3 * y.sin().mean()}


class Single(Model):
    """One loss, not in a dict."""

    def forward(self, batch):
        return sum(super().forward(batch).values())


def run(kind, parts, model, size=5, trainer=SimpleTrainer, **kwargs):
    """Parameters and logged loss after two steps."""
    torch.manual_seed(1)
    model = model()
    data = [list(torch.randn(size, 3).double()) for _ in range(2)]
    t = trainer(model, data, torch.optim.SGD(model.parameters(), 0.1, momentum=0.9), **kwargs)
    if kind == "accumulate":
        accumulate(t, parts)
    with EventStorage(0) as storage:
        t.iter = 0
        t.storage = storage
        for _ in range(2):
            t.run_step()
    return torch.cat([p.detach().flatten() for p in model.parameters()]), storage, model, t


@pytest.mark.parametrize("model", [Model, Single])
@pytest.mark.parametrize("parts", [1, 2, 3, 5])
def test_the_step_is_that_of_the_whole_batch(parts, model):
    expected, whole, _, _ = run("stock", 1, model)
    actual, storage, ran, _ = run("accumulate", parts, model)
    torch.testing.assert_close(actual, expected)
    for name in ("total_loss", "a", "b"):
        if name in whole.histories():
            pair = (storage.history(name).latest(), whole.history(name).latest())
            assert pair[0] == pytest.approx(pair[1])
    assert len(ran.sizes) == 2 * parts and sum(ran.sizes) == 10
    assert max(ran.sizes) - min(ran.sizes) <= 1


class Scaler:
    """Records what a GradScaler is asked to do."""

    def __init__(self):
        self.calls = []

    def scale(self, loss):
        self.calls.append("scale")
        return loss

    def step(self, optimizer):
        self.calls.append("step")
        optimizer.step()

    def update(self):
        self.calls.append("update")

    def state_dict(self):
        return {"calls": len(self.calls)}


@pytest.mark.filterwarnings("ignore")  # autocast for CUDA is without effect here, and says so
def test_mixed_precision_scales_every_part_and_steps_once():
    expected, *_ = run("stock", 1, Model)
    scaler = Scaler()
    actual, _, _, trainer = run("accumulate", 2, Model, trainer=AMPTrainer, grad_scaler=scaler)
    torch.testing.assert_close(actual, expected)
    assert scaler.calls == ["scale", "scale", "step", "update"] * 2
    assert isinstance(trainer, AMPTrainer) and trainer.state_dict()["grad_scaler"] == {"calls": 8}


def test_processes_exchange_gradients_once_per_step(tmp_path):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        entered = []

        class DDP(nn.parallel.DistributedDataParallel):
            def no_sync(self):
                entered.append(1)
                return super().no_sync()

        expected, *_ = run("stock", 1, Model)
        actual, *_ = run("accumulate", 3, lambda: DDP(Model()))
        torch.testing.assert_close(actual, expected)
        assert len(entered) == 2 * 2
    finally:
        torch.distributed.destroy_process_group()


def test_split():
    assert split(list("abcdefg"), 3) == [["a", "b", "c"], ["d", "e"], ["f", "g"]]
    assert split([1, 2], 2) == [[1], [2]]
    with pytest.raises(ValueError, match="ACCUMULATE 3 splits batches of 2 images"):
        split([1, 2], 3)


def test_one_part_leaves_the_trainer_alone_and_none_is_refused():
    trainer = SimpleTrainer(Model(), [], None)
    accumulate(trainer, 1)
    assert type(trainer) is SimpleTrainer
    with pytest.raises(ValueError, match="ACCUMULATE must be positive, not 0"):
        accumulate(trainer, 0)


def test_a_model_in_evaluation_is_not_trained():
    model, data = Model(), [[torch.ones(3).double()] * 2]
    trainer = SimpleTrainer(model, data, torch.optim.SGD(model.parameters(), 0.1))
    accumulate(trainer, 2)
    model.eval()
    with pytest.raises(AssertionError, match="SimpleTrainer. model was changed to eval mode"):
        trainer.run_step()


def test_times_and_calls_of_a_step(monkeypatch):
    """The loader's time alone is the data's; what Detectron2's main branch does after backward."""
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    model, seen = Model(), []

    class Loader:
        def __iter__(self):
            while True:
                now[0] += 3.0
                yield [torch.ones(3).double()] * 2

    model.register_forward_hook(lambda *_: now.__setitem__(0, now[0] + 100.0))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    trainer = SimpleTrainer(model, Loader(), optimizer)
    trainer.after_backward = lambda: seen.append(model.layer.weight.grad.clone())
    trainer._write_metrics = lambda losses, data_time: seen.append((list(losses), data_time))
    accumulate(trainer, 2)
    for _ in range(2):
        trainer.run_step()
    assert seen[1] == seen[3] == (["a", "b"], 3.0)
    assert not torch.equal(seen[0], 2 * seen[2]) and len(seen) == 4
    assert torch.equal(seen[2], model.layer.weight.grad)  # of this step alone


@pytest.mark.parametrize("precision, expected", [(None, torch.float16), (torch.bfloat16, None)])
def test_mixed_precision_is_the_trainers(precision, expected, monkeypatch):
    asked = []

    def autocast(device, *, dtype):
        asked.append((device, dtype))
        return contextlib.nullcontext()

    monkeypatch.setattr(torch, "autocast", autocast)
    model = Model()
    data = [[torch.ones(3).double()] * 2]
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    trainer = AMPTrainer(model, data, optimizer, grad_scaler=Scaler())
    if precision is None:
        trainer.__dict__.pop("precision", None)  # as in v0.6
    else:
        trainer.precision = precision
    accumulate(trainer, 2)
    with EventStorage(0) as storage:
        trainer.iter, trainer.storage = 0, storage
        trainer.run_step()
    assert asked == [("cuda", expected or precision)]
