"""Norms by name, in Detectron2's own ``get_norm`` wherever it is held."""

import contextlib
import importlib
import os
import subprocess
import sys

import detectron2.layers
import detectron2.modeling
import pytest
import torch
from detectron2.layers import FrozenBatchNorm2d, NaiveSyncBatchNorm
from torch import nn

from wsbcn_d2 import (
    NORM_REGISTRY,
    BatchChannelNorm2d,
    EstimatedBatchNorm2d,
    register_norms,
    unregister_norms,
)
from wsbcn_d2.layers import bcn_groups

# Loaded for their imports of get_norm alone; those that a Detectron2 lacks are left out.
HOLDERS = [
    "detectron2.layers",
    "detectron2.layers.aspp",
    "detectron2.layers.batch_norm",
    "detectron2.layers.blocks",
    "detectron2.modeling.backbone.fpn",
    "detectron2.modeling.backbone.regnet",
    "detectron2.modeling.backbone.resnet",
    "detectron2.modeling.meta_arch.retinanet",
    "detectron2.modeling.meta_arch.semantic_seg",
    "detectron2.modeling.roi_heads.box_head",
    "detectron2.modeling.roi_heads.mask_head",
]

STOCK = {
    "BN": nn.BatchNorm2d,
    "SyncBN": nn.SyncBatchNorm,
    "FrozenBN": FrozenBatchNorm2d,
    "GN": nn.GroupNorm,
    "naiveSyncBN": NaiveSyncBatchNorm,
}


@pytest.fixture(autouse=True)
def registered():
    yield
    register_norms()


def holders():
    """Every loaded Detectron2 module that has a get_norm: name -> that function."""
    importlib.import_module("detectron2.modeling.backbone.regnet")
    return {
        name: vars(module)["get_norm"]
        for name, module in sys.modules.items()
        if name.startswith("detectron2") and "get_norm" in getattr(module, "__dict__", {})
    }


def test_every_module_that_holds_get_norm_knows_the_names():
    found = holders()
    assert set(HOLDERS) <= set(found)
    for name, get_norm in found.items():
        assert isinstance(get_norm("BCN", 64), BatchChannelNorm2d), name
        assert get_norm is detectron2.layers.get_norm, name


def test_unregistering_gives_every_module_the_stock_function_back():
    wrapped = detectron2.layers.get_norm
    unregister_norms()
    unregister_norms()  # nothing left to do
    for name, get_norm in holders().items():
        assert get_norm.__module__ == "detectron2.layers.batch_norm", name
        assert get_norm is wrapped.__wrapped__, name
        with pytest.raises(KeyError, match="BCN"):
            get_norm("BCN", 64)
    register_norms()
    for name, get_norm in holders().items():
        assert isinstance(get_norm("BCN", 64), BatchChannelNorm2d), name


def test_registering_twice_wraps_once():
    before = detectron2.layers.get_norm
    register_norms()
    assert detectron2.layers.get_norm is before
    assert not hasattr(before.__wrapped__, "__wrapped__")


def test_a_module_imported_afterwards_knows_the_names(tmp_path, monkeypatch):
    (tmp_path / "late_component.py").write_text(
        "from detectron2.layers import get_norm\nmake_norm = get_norm\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    late = importlib.import_module("late_component")
    assert isinstance(late.get_norm("BCN", 64), BatchChannelNorm2d)
    unregister_norms()  # third-party modules are given back too
    assert late.get_norm is late.make_norm is detectron2.layers.batch_norm.get_norm
    assert late.get_norm.__module__ == "detectron2.layers.batch_norm"
    monkeypatch.delitem(sys.modules, "late_component")


def test_importing_the_package_is_all_it_takes(tmp_path):
    """A module before it, under another name, and one after it, in a fresh interpreter."""
    (tmp_path / "early.py").write_text("from detectron2.layers import get_norm as make_norm\n")
    (tmp_path / "late.py").write_text("from detectron2.layers.batch_norm import get_norm\n")
    code = (
        "import early, wsbcn_d2, late\n"
        "assert type(early.make_norm('BCN', 32)) is wsbcn_d2.BatchChannelNorm2d\n"
        "assert early.make_norm is late.get_norm\n"
        "print('ok')"
    )
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env={**os.environ, "PYTHONPATH": f"{tmp_path}:{':'.join(sys.path)}"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.stdout.strip() == "ok", result.stderr


def test_the_names():
    get_norm = detectron2.layers.get_norm
    assert {name for name, _ in NORM_REGISTRY} == {"BCN", "BatchBCN", "SyncBCN", "EstBN"}
    for name, statistics in (("BCN", "estimated"), ("BatchBCN", "batch"), ("SyncBCN", "sync")):
        norm = get_norm(name, 64)
        assert isinstance(norm, BatchChannelNorm2d) and norm.statistics == statistics
        assert (norm.num_channels, norm.num_groups) == (64, 32)
    norm = get_norm("EstBN", 7)
    assert type(norm) is EstimatedBatchNorm2d and norm.num_features == 7


@pytest.mark.parametrize("name", ["BCN", "BatchBCN", "SyncBCN"])
def test_the_groups_of_a_config_are_every_kinds(name):
    get_norm = detectron2.layers.get_norm
    with bcn_groups(8):
        assert get_norm(name, 64).num_groups == 8
        with bcn_groups("auto"):
            assert get_norm(name, 48).num_groups == 24
        with bcn_groups(None):
            assert get_norm(name, 64).num_groups == 32
        assert get_norm(name, 64).num_groups == 8
    assert get_norm(name, 64).num_groups == 32


def test_stock_names_keep_their_meaning():
    get_norm = detectron2.layers.get_norm
    for name, kind in STOCK.items():
        assert isinstance(get_norm(name, 32), kind), name
        assert type(get_norm(name, 32)) is type(get_norm.__wrapped__(name, 32)), name
    assert get_norm("", 32) is None and get_norm(None, 32) is None
    assert isinstance(get_norm(nn.BatchNorm2d, 32), nn.BatchNorm2d)
    assert get_norm(lambda channels: channels, 32) == 32


def test_an_unknown_name_is_refused_with_the_valid_ones():
    with pytest.raises(ValueError, match="unknown norm 'BNC'") as error:
        detectron2.layers.get_norm("BNC", 32)
    message = str(error.value)
    for name in (*STOCK, "BCN", "BatchBCN", "SyncBCN", "EstBN"):
        assert name in message, name
    # LN exists on Detectron2's main branch alone, and is offered there alone.
    stock = detectron2.layers.get_norm.__wrapped__
    try:
        stock("LN", 32)
    except KeyError:
        assert "LN" not in message
    else:
        assert "LN" in message


def test_a_name_registered_by_a_user_works_and_can_be_taken_back():
    NORM_REGISTRY.register(HalfGN)
    try:
        norm = detectron2.modeling.backbone.resnet.get_norm("HalfGN", 32)
        assert isinstance(norm, nn.GroupNorm) and norm.num_groups == 16
    finally:
        del NORM_REGISTRY._obj_map["HalfGN"]


def HalfGN(channels):
    return nn.GroupNorm(channels // 2, channels)


@pytest.mark.parametrize("name", ["BCN", "BatchBCN", "SyncBCN"])
def test_channels_that_the_groups_do_not_divide(name):
    with pytest.raises(ValueError, match="48 channels into 32 groups"):
        detectron2.layers.get_norm(name, 48)


@pytest.mark.parametrize(
    "name, kind",
    [
        *((name, nn.GroupNorm) for name in ("GN", "BCN", "BatchBCN", "SyncBCN")),
        *(("EstBN", EstimatedBatchNorm2d), ("BN", nn.BatchNorm2d)),
    ],
)
def test_a_norm_of_one_channel_by_which_detectron2_looks_at_a_kind(name, kind):
    norm = detectron2.layers.get_norm(name, 1)
    assert type(norm) is kind
    assert kind is not nn.GroupNorm or (norm.num_groups, norm.num_channels) == (1, 1)


@pytest.mark.parametrize("name, moves", [("BCN", False), ("EstBN", True)])
def test_whether_the_estimates_of_a_name_move(name, moves):
    norm = detectron2.layers.get_norm(name, 64)
    bn = norm if name == "EstBN" else norm.bn
    first, second = torch.randn(2, 1, 64, 5, 5) + 3
    norm(first)
    assert torch.allclose(bn.running_mean, first.mean((0, 2, 3)), atol=1e-5)
    before = bn.running_mean.clone()
    norm(second - 7)
    assert torch.equal(bn.running_mean, before) != moves


def test_the_groups_are_given_back_after_an_error():
    get_norm = detectron2.layers.get_norm
    with pytest.raises(RuntimeError), bcn_groups(8):
        raise RuntimeError
    assert get_norm("BCN", 64).num_groups == 32


def test_every_name_that_there_is_is_offered():
    stock = detectron2.layers.get_norm.__wrapped__
    names = ["BN", "SyncBN", "FrozenBN", "GN", "LN", "nnSyncBN", "naiveSyncBN", "naiveSyncBN_N"]
    there = []
    for name in names:
        with contextlib.suppress(KeyError):
            stock(name, 32)
            there.append(name)
    assert len(there) >= 7
    with pytest.raises(ValueError) as error:
        detectron2.layers.get_norm("BNC", 32)
    own = [name for name, _ in NORM_REGISTRY]
    offered = ", ".join([*there, *own])
    assert str(error.value) == f"unknown norm 'BNC': use one of {offered}, or '' for none"
