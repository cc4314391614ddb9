"""Recomputed modules: the same numbers, fewer of them kept, each forward counted once."""

import copy
import pickle

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from torch import nn
from torch.testing import assert_close

from wsbcn_d2.modeling.recomputation import modules_named, recompute

STAGES = ["backbone.bottom_up.res[2345]"]
HEADS = ["roi_heads.box_head", "roi_heads.mask_head", "proposal_generator"]


def step(model, batch):
    """Losses, gradients, buffers and logged scalars of one training step."""
    torch.manual_seed(3)
    with EventStorage() as storage:
        losses = model.train()(batch)
    sum(losses.values()).backward()  # outside of the storage, as in a loop of one's own
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    scalars = {k: len(v.values()) for k, v in storage.histories().items()}
    return losses, grads, dict(model.named_buffers()), scalars


def norms(name):
    return [
        f"MODEL.{part}.NORM {name}" for part in ("RESNETS", "FPN", "ROI_BOX_HEAD", "ROI_MASK_HEAD")
    ]


def tiny(tiny_cfg, norm):
    keys = [w for text in norms(norm) for w in text.split()]
    return build_model(tiny_cfg(*keys))


NORMS = ["GN", "BN", "SyncBN", "naiveSyncBN", "BCN", "EstBN", "BatchBCN"]
NESTED = ["backbone", "backbone.bottom_up.res?", "backbone.*.res4.0"]


@pytest.mark.parametrize(
    "norm,patterns",
    [*((norm, [*STAGES, *HEADS]) for norm in NORMS), ("BN", NESTED), ("BCN", NESTED)],
    ids=[*NORMS, "BN nested", "BCN nested"],
)
def test_a_step_is_the_same(tiny_cfg, make_batch, norm, patterns):
    plain = tiny(tiny_cfg, "BN" if norm == "SyncBN" else norm)
    if norm == "SyncBN":  # built where there is no GPU, whose forward this form insists on
        plain = nn.SyncBatchNorm.convert_sync_batchnorm(plain)
        plain.apply(lambda m: isinstance(m, nn.SyncBatchNorm) and m.eval())
    ours = recompute(copy.deepcopy(plain), patterns)
    assert ours.state_dict().keys() == plain.state_dict().keys()
    for _ in range(2):  # the second is no first batch
        batch = make_batch(64, 64)
        expected, found = step(plain, batch), step(ours, batch)
        for one, other in zip(expected[:3], found[:3], strict=True):
            assert_close(dict(other), dict(one), rtol=1e-5, atol=1e-6)
        assert found[3] == expected[3]


def kept_bytes(model, batch):
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    torch.manual_seed(3)
    with EventStorage(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        losses = model.train()(batch)
    del losses
    return sum(size for pointer, size in kept.items() if pointer not in parameters)


def test_less_is_kept(tiny_cfg, make_batch):
    model = tiny(tiny_cfg, "GN")
    plain = kept_bytes(model, make_batch())
    stages = kept_bytes(recompute(copy.deepcopy(model), STAGES), make_batch())
    more = kept_bytes(recompute(copy.deepcopy(model), [*STAGES, *HEADS]), make_batch())
    assert stages < 0.75 * plain and more < 0.75 * stages


class Counted(nn.Linear):
    def __init__(self):
        super().__init__(3, 3)
        self.runs = 0

    def forward(self, x):
        self.runs += 1
        return super().forward(x).relu()


def test_nothing_is_run_twice_without_need():
    model = recompute(nn.Sequential(Counted(), Counted()), ["0"])
    x = torch.randn(2, 3)
    model(x).sum().backward()
    assert [m.runs for m in model] == [2, 1]
    with torch.no_grad():
        model(x)
    model.eval()(x).sum().backward()
    assert [m.runs for m in model] == [4, 3]


@pytest.mark.parametrize("how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_recomputes_itself(how):
    model = recompute(nn.Sequential(Counted(), Counted()), ["*"])
    twin = how(model)
    twin(torch.randn(2, 3)).sum().backward()
    assert [m.runs for m in twin] == [2, 2] and [m.runs for m in model] == [0, 0]
    assert model[0].weight.grad is None and twin[0].weight.grad is not None


def test_the_parts_of_a_list_are_recomputed():
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.branches = nn.ModuleList(
                [Counted(), nn.ModuleDict({"a": Counted()}), nn.ModuleList()]
            )

        def forward(self, x):
            return self.branches[0](x) + self.branches[1]["a"](x)

    model = recompute(Branches(), ["branches"])
    model(torch.randn(2, 3)).sum().backward()
    assert model.branches[0].runs == model.branches[1]["a"].runs == 2


def test_names_and_patterns():
    model = nn.Sequential(nn.Sequential(nn.ReLU(), nn.Linear(1, 1)), nn.Sequential(nn.ReLU()))
    assert modules_named(model, []) == []
    assert modules_named(model, ["1", "0.*"]) == ["0.0", "0.1", "1"]
    assert modules_named(model, ["*.0", "0.0"]) == ["0.0", "1.0"]


@pytest.mark.parametrize(
    "pattern,message",
    [
        ("2", "'2' fits no module of the model: for '2' there are 0, 1"),
        ("0.7", "'0.7' fits no module of the model: for '0.7' there are 0.0, 0.1"),
        ("*.2.weight", "'*.2.weight' fits no module of the model: for '*.2' there are 0.0, 0.1, 1"),
        ("0.1.x", "'0.1.x' fits no module of the model: for '0.1.x' nothing is below it"),
        ("", "'' fits no module of the model: for '' there are 0, 1"),
    ],
)
def test_a_pattern_that_fits_nothing_is_an_error_of_one_line(pattern, message):
    model = nn.Sequential(nn.Sequential(nn.ReLU(), nn.Linear(1, 1)), nn.Sequential(nn.ReLU()))
    with pytest.raises(ValueError) as error:
        recompute(model, ["0", pattern])
    assert str(error.value).startswith(message) and "\n" not in str(error.value)
    assert "forward" not in vars(model[0])
