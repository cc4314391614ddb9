"""Files that people do have are read, and what is left out of them is named."""

import argparse
import collections
import datetime
import json
import os
import pathlib
import pickle
import sys
import types

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from wsbcn_d2.checkpoint import CheckpointError, convert, convert_file, read_checkpoint

from .. import source_models as src

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32]
DTYPES += [torch.int16, torch.int8, torch.uint8, torch.bool, torch.complex64, torch.complex128]
DTYPES += [torch.uint16, torch.uint32, torch.uint64, torch.float8_e4m3fn, torch.float8_e5m2]


def read(data, folder, **options):
    torch.save(data, folder / "file.pth", **options)
    return read_checkpoint(str(folder / "file.pth"))


def same(got, want):
    assert list(got) == list(want)
    for name, tensor in want.items():
        assert got[name].dtype == tensor.dtype and got[name].shape == tensor.shape
        one, other = (t[name].reshape(-1).contiguous() for t in (got, want))
        assert torch.equal(one.view(torch.uint8), other.view(torch.uint8))


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_every_type_and_layout(legacy, protocol, tmp_path):
    gen = torch.Generator().manual_seed(0)
    state = {f"{d}": torch.randint(0, 2, (2, 3), generator=gen).to(d) for d in DTYPES}
    whole = torch.randn(6, 8, generator=gen)
    state |= {"view": whole[2:4], "transposed": whole.t(), "shared": whole, "scalar": whole[0, 0]}
    state |= {"strided": whole[::2, ::3], "none": torch.zeros(0, 3), "permuted": whole.t()[1:, 1:]}
    options = {"pickle_protocol": protocol, "_use_new_zipfile_serialization": not legacy}
    same(read(state, tmp_path, **options).state, state)
    parameters = {"p": nn.Parameter(whole), "frozen": nn.Parameter(whole[0], False)}
    parameters["p"].note = "attributes make torch save it in another way"
    source = read(parameters, tmp_path, **options)
    same(source.state, {k: v.data for k, v in parameters.items()})
    assert not source.state["p"].requires_grad


def test_what_torch_reads_is_what_is_read(tmp_path):
    """A model, its optimizer and schedule: as ``torch.load`` has them."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.PReLU())
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.randn(1, 3, 5, 5)).sum().backward()
    optimizer.step()
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 3)
    data = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    data["scheduler"] = schedule.state_dict()
    source = read(data, tmp_path)
    want = torch.load(tmp_path / "file.pth", weights_only=True)
    same(source.state, want["model"])
    assert source.extra["scheduler"] == want["scheduler"]
    for number, values in want["optimizer"]["state"].items():
        assert all(
            torch.equal(values[k], source.extra["optimizer"]["state"][number][k]) for k in values
        )
    assert source.extra["optimizer"]["param_groups"] == want["optimizer"]["param_groups"]


STATE = {"conv1.weight": torch.arange(6.0).view(2, 3), "bn1.bias": torch.ones(2)}


def test_safetensors(tmp_path):
    state = STATE | {"half": torch.ones(3, dtype=torch.bfloat16), "e": torch.ones(2).to(DTYPES[-1])}
    for name in ("model.safetensors", "model.pth"):  # told by its content
        save_file(state, tmp_path / name, {"format": "pt"})
        same(
            dict(sorted(read_checkpoint(str(tmp_path / name)).state.items())),
            dict(sorted(state.items())),
        )
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:-1])
    with pytest.raises(CheckpointError, match="damaged or cut short"):
        read_checkpoint(str(tmp_path / "model.safetensors"))


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_shards(kind, tmp_path):
    names, index = list(STATE), {}
    for number, name in enumerate(names):
        index[name] = f"model-{number}.{kind}"
        save = save_file if kind == "safetensors" else torch.save
        save({name: STATE[name]}, tmp_path / index[name])
    path = tmp_path / f"model.{kind}.index.json"
    path.write_text(json.dumps({"metadata": {}, "weight_map": index}))
    same(read_checkpoint(str(path)).state, STATE)
    for change, match in (
        ({"absent": index[names[0]]}, "its shards lack 1 tensors, absent first"),
        ({"x": "../model-0." + kind}, "not a file beside the index"),
        ({"x": "/etc/hostname"}, "not a file beside the index"),
        ({"x": "model-9." + kind}, "model-9.* no such file"),
    ):
        path.write_text(json.dumps({"weight_map": index | change}))
        with pytest.raises(CheckpointError, match=match):
            read_checkpoint(str(path))
    path.write_text('{"weight_map": 3}')
    with pytest.raises(CheckpointError, match="damaged or cut short"):
        read_checkpoint(str(path))


@pytest.mark.parametrize("container", ["state_dict", "model", None])
@pytest.mark.parametrize(
    "prefix",
    [
        "module.",
        "_orig_mod.",
        "model.",
        "module._orig_mod.",
        "_orig_mod.module.",
        "model._orig_mod.",
    ],
)
def test_prefixes(prefix, container, tmp_path):
    state = {prefix + name: value for name, value in STATE.items()}
    source = read({container: state, "epoch": 3} if container else state, tmp_path)
    same(source.state, STATE)
    assert any("removed from the names" in note for note in source.notes)
    # Where a part was compiled by itself
    source = read({f"body._orig_mod.{n}": v for n, v in STATE.items()}, tmp_path)
    assert set(source.state) == {f"body.{n}" for n in STATE}


@pytest.mark.parametrize("name", ["body.module.weight", "body.model.weight", "models.weight"])
def test_words_of_a_name_that_are_no_prefix_stay(name, tmp_path):
    for prefix in ("", "module."):
        source = read({prefix + name: torch.ones(2), prefix + "b": torch.ones(1)}, tmp_path)
        assert list(source.state) == [name, "b"]
    source = read({f"model.{name}": torch.ones(2), "b": torch.ones(1)}, tmp_path)
    assert list(source.state) == [f"model.{name}", "b"]  # not all of them have it


def test_which_of_several_state_dicts_is_taken(tmp_path):
    states = {key: {"a": torch.full((2,), float(i))} for i, key in enumerate(
        ("state_dict", "model", "model_state", "blobs")
    )}  # fmt: skip
    while states:
        first, state = next(iter(states.items()))
        source = read(dict(reversed(states.items())), tmp_path)
        same(source.state, state)
        assert source.container == f"under {first!r}" and set(source.extra) == set(states) - {first}
        del states[first]


class Config:
    """Some code base's own class."""

    def __init__(self):
        self.depth = 50


class AttributeDict(dict):
    """As mmcv's and addict's."""

    __getattr__ = dict.__getitem__


def test_objects_beside_the_weights_are_dropped_and_named(tmp_path):
    beside = {
        "args": argparse.Namespace(lr=0.1, names=["a"]),
        "cfg": Config(),
        "hyper_parameters": AttributeDict(a=AttributeDict(b=1), c=nn.ReLU),
        "simple": types.SimpleNamespace(a=1),
        "folder": pathlib.Path("output"),
        "when": datetime.datetime(2020, 1, 1),
        "array": np.arange(3),
        "arrays": [np.ones((2, 2), ">f4"), np.float32(1), np.array(["a"]), np.dtype("i8")],
        "many": collections.defaultdict(list, a=[1]),
        "counts": collections.Counter("abca"),
        "set": {1, 2},
        "bytes": (b"ab", bytearray(b"cd"), 1j, frozenset([1])),
    }
    for protocol in (2, 4):
        source = read({"state_dict": STATE, **beside}, tmp_path, pickle_protocol=protocol)
        same(source.state, STATE)
        note = next(note for note in source.notes if note.startswith("objects left out"))
        for kind in ("argparse.Namespace", ".Config", ".AttributeDict", "ReLU", "PosixPath"):
            assert kind in note
        assert source.extra["array"].tolist() == [0, 1, 2] and source.extra["counts"]["a"] == 2
        assert source.extra["many"] == {"a": [1]} and source.extra["set"] == {1, 2}
        assert source.extra["bytes"] == (b"ab", bytearray(b"cd"), 1j, frozenset([1]))
        assert source.extra["arrays"][0].tolist() == [[1, 1], [1, 1]]


def test_the_report_names_what_was_left_behind(tmp_path, capsys):
    state = {n: torch.zeros(s) for n, s in src.resnet_entries(src.Net())}
    torch.save(
        {"state_dict": state, "args": argparse.Namespace(), "mean": np.ones(3)}, tmp_path / "a"
    )
    lines = "\n".join(convert_file(str(tmp_path / "a"), None).lines())
    assert "left out: argparse.Namespace" in lines and "left behind: args, mean" in lines


def test_a_pickled_model_is_told_from_its_state(tmp_path):
    torch.save(nn.Linear(2, 2), tmp_path / "model.pth")
    with pytest.raises(CheckpointError, match="holds a torch.nn.modules.linear.Linear.*state_dict"):
        read_checkpoint(str(tmp_path / "model.pth"))
    with pytest.raises(CheckpointError, match="entry x is a argparse.Namespace, not a tensor"):
        read({**STATE, "x": argparse.Namespace()}, tmp_path)


def mmengine_history(monkeypatch):
    """mmengine's HistoryBuffer: arrays, and a table of its own methods."""
    module = types.ModuleType("mmengine.logging.history_buffer")

    class HistoryBuffer:
        def __init__(self):
            self._log_history, self._count_history = np.ones(4), np.ones(4, np.int64)
            self._statistics_methods = {"mean": HistoryBuffer.mean}

        def mean(self):
            return 0

    for method in (HistoryBuffer, HistoryBuffer.mean):
        method.__module__ = module.__name__
        method.__qualname__ = method.__qualname__.partition("<locals>.")[2]
    module.HistoryBuffer = HistoryBuffer
    for name in ("mmengine", "mmengine.logging", module.__name__):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return HistoryBuffer()


@pytest.mark.parametrize("protocol", [2, 4])
def test_mmdetection_3(protocol, tmp_path, monkeypatch):
    """meta.cfg in place of meta.config, a message_hub, an optimizer, EMA weights."""
    heads = src.mmdet_heads(3)
    net = src.Net(prefix="backbone.", norm_name="gn")
    state = {n: torch.zeros(s) for n, s in src.resnet_entries(net, classifier=False)}
    state |= {n: torch.zeros(s) for n, s in src.head_entries(heads, mask=False)}
    data = {
        "meta": {"cfg": "model = dict(conv_cfg=dict(type='ConvWS'))", "epoch": 12, "iter": 9},
        "state_dict": state | {"data_preprocessor.mean": torch.zeros(3, 1, 1)},
        "message_hub": {"log_scalars": {"train/loss": mmengine_history(monkeypatch)}},
        "ema_state_dict": {"steps": torch.tensor(3)},
        "param_schedulers": [{"_step_count": 1}],
    }
    torch.save(data, tmp_path / "a.pth", pickle_protocol=protocol)
    for name in ("mmengine", "mmengine.logging", "mmengine.logging.history_buffer"):
        monkeypatch.delitem(sys.modules, name)
    source = read_checkpoint(str(tmp_path / "a.pth"))
    converted, report = convert(source)
    assert len(converted) == 207 and set(report.dropped) == {"data_preprocessor.mean"}
    assert report.metadata.ws_formula == "unbiased_std" and not set(report.metadata.presumed) & {
        "ws_formula"
    }, "its own config says so"
    assert any("mmengine.logging.history_buffer.HistoryBuffer" in n for n in source.notes)


@pytest.mark.parametrize("depth", [50, 101])
def test_detectron2s_deeplab_backbones(depth, tmp_path):
    """R-52.pkl and R-103.pkl: a stem of three convolutions, batch norms, arrays."""
    net = src.Net(depth=depth, norm="BN", ws="")
    from wsbcn_d2.checkpoint.layout import BackboneLayout

    state, _ = convert(
        {n: torch.zeros(s) for n, s in src.resnet_entries(net)}, options("resnet", "BN")
    )
    state = {n: v.numpy() for n, v in state.items() if not n.startswith("stem.")}
    for number, (inputs, out) in enumerate(((3, 64), (64, 64), (64, 128)), 1):
        state[f"stem.conv{number}.weight"] = np.ones((out, inputs, 3, 3), np.float32)
        for part in ("weight", "bias", "running_mean", "running_var"):
            state[f"stem.conv{number}.norm.{part}"] = np.ones(out, np.float32)
    state["res2.0.conv1.weight"] = np.ones((64, 128, 1, 1), np.float32)
    state["res2.0.shortcut.weight"] = np.ones((256, 128, 1, 1), np.float32)
    state |= {"stem.fc.weight": np.ones((1000, 2048), np.float32)}
    path = tmp_path / "R-103.pkl"
    path.write_bytes(pickle.dumps({"model": state, "__author__": "x", "matching_heuristics": True}))
    converted, report = convert(read_checkpoint(str(path)), options("resnet", "BN"))
    assert report.layout == BackboneLayout(depth, 1, 64, "BN", deeplab=True)
    assert set(report.dropped) == {"stem.fc.weight"} and "stem.conv3.weight" in converted
    bcn, report = convert(read_checkpoint(str(path)))
    assert report.metadata.norm == "BCN"
    assert "backbone.bottom_up.stem.conv3.norm.bn.weight" in bcn
    state["stem.conv3.weight"] = np.ones((64, 64, 3, 3), np.float32)
    with pytest.raises(CheckpointError, match="stem.conv3.weight is .* instead of"):
        convert(state)


def options(target, norm=None):
    from wsbcn_d2.checkpoint import Options

    return Options(target=target, norm=norm)


def test_names_of_local_files_are_no_urls(tmp_path):
    for name in ("a#b.pth", "a?b.pth", "a?insist=True", "a b%20.pth"):
        torch.save(STATE, tmp_path / name)
        same(read_checkpoint(str(tmp_path / name)).state, STATE)
        assert os.path.isfile(tmp_path / name)
