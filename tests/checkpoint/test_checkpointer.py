"""Loading is never silent: what is refused, what is warned about, what goes through."""

import contextlib
import functools
import logging
import pickle

import numpy as np
import pytest
import torch
from torch import nn

from wsbcn_d2.checkpoint import (
    CheckpointError,
    LoadExpectation,
    Metadata,
    Options,
    WSBCNCheckpointer,
    convert_file,
    split_options,
    write_checkpoint,
)
from wsbcn_d2.checkpoint.checks import backbone_names
from wsbcn_d2.layers import BatchChannelNorm2d

from . import ours
from . import source_models as src


def small(norm="BCN", formula="unbiased", freeze_at=0):
    """R-18-FPN without heads: quick to build."""
    cfg = ours.config(18, norm=norm, formula=formula)
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 64
    cfg.MODEL.BACKBONE.FREEZE_AT = freeze_at
    return cfg


def model(*args, **kwargs):
    net = ours.Parts(small(*args, **kwargs), heads=False)
    for value in net.state_dict().values():  # Parts leaves memory as it finds it
        value.zero_()
    return net


@functools.lru_cache(4)
def weights(norm="BCN"):
    gen = torch.Generator().manual_seed(0)
    return {
        name: torch.rand(value.shape, generator=gen) if value.is_floating_point() else value + 7
        for name, value in model(norm).state_dict().items()
    }


def backbone_only(norm="BCN"):
    return {k.split("bottom_up.")[1]: v for k, v in weights(norm).items() if "bottom_up" in k}


def meta(**changes):
    return Metadata(**({"norm": "BCN", "ws_formula": "unbiased", "ws_eps": 1e-5} | changes))


def save(path, state, metadata=None, **extra):
    if metadata is None:
        torch.save({"model": state, **extra}, path)
    else:
        write_checkpoint(str(path), state, metadata, **extra)
    return str(path)


def same(net, state, names=None):
    own = net.state_dict()
    return all(torch.equal(own[n], state[n]) for n in names or own)


def refused(net, path, match, **kwargs):
    before = {k: v.clone() for k, v in net.state_dict().items()}
    with pytest.raises(CheckpointError, match=match) as caught:
        WSBCNCheckpointer(net, **kwargs).load(path)
    assert "\n" not in str(caught.value)
    after = net.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before), "the model was touched"


def test_whole_and_backbone_only(tmp_path):
    net = model()
    WSBCNCheckpointer(net).load(save(tmp_path / "a.pth", weights(), meta()))
    assert same(net, weights())
    net = model()
    path = save(tmp_path / "b.pth", backbone_only(), meta(), heuristics=True)
    WSBCNCheckpointer(net).load(path)
    names = [n for n in net.state_dict() if "bottom_up" in n]
    assert len(names) > 100 and same(net, weights(), names)
    # the same without the flag in the file, with it in the path
    net = model()
    path = save(tmp_path / "c.pth", backbone_only())
    WSBCNCheckpointer(net).load(path + "?matching_heuristics=True")
    assert same(net, weights(), names)
    refused(model(), path, "holds 0 of the model's 140 backbone parameters")
    refused(model(), path + "?magic=1", "unknown query magic")


def test_no_weights_no_check():
    assert WSBCNCheckpointer(model()).load("") == {}


def test_missing_backbone_parameters(tmp_path):
    state = dict(weights())
    del state["backbone.bottom_up.res3.1.conv2.weight"]
    path = save(tmp_path / "a.pth", state, meta())
    refused(model(), path, "139 of .* 140|holds 1[0-9]+ of .* missing are .*res3.1.conv2.weight")
    state = dict(weights())
    state["backbone.bottom_up.res3.1.conv2.weight"] = torch.ones(1, 2, 3, 3)
    refused(model(), save(tmp_path / "b.pth", state), r"has \(1, 2, 3, 3\) instead of \(128")
    # a detector's file without one FPN entry
    state = dict(weights())
    del state["backbone.fpn_output3.norm.bn.running_var"]
    refused(model(), save(tmp_path / "c.pth", state), "missing are backbone.fpn_output3.norm.bn")


@pytest.mark.parametrize("have, want", [("GN", "BCN"), ("BCN", "GN"), ("GN", "BN"), ("BN", "BCN")])
@pytest.mark.parametrize("recorded", [True, False])
def test_norm_mismatch(have, want, recorded, tmp_path):
    record = meta(norm=have) if recorded else None
    path = save(tmp_path / "a.pth", weights(have), record)
    refused(model(want), path, f"backbone with {have} but the model's has {want}")


def test_formula_mismatch(tmp_path):
    path = save(tmp_path / "a.pth", weights(), meta(ws_formula="unbiased_std"))
    refused(model(), path, "formula 'unbiased_std' but the model has 'unbiased': set MODEL.WS.FORM")
    refused(model(formula="none"), path, "use a WS backbone")
    path = save(tmp_path / "b.pth", weights(), meta(ws_formula="none"))
    refused(model(), path, "use a stock backbone")
    WSBCNCheckpointer(model(formula="none")).load(path)
    # an explicit expectation decides, and an empty one checks names only
    path = save(tmp_path / "c.pth", weights(), meta(ws_formula="biased"))
    refused(model(), path, "has 'none'", expected=LoadExpectation(ws_formula="none"))
    WSBCNCheckpointer(model(), expected=LoadExpectation()).load(path)


def warned(caplog, net, path, **kwargs):
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        WSBCNCheckpointer(net, **kwargs).load(path)
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


def test_pixel_statistics_are_warned_about(tmp_path, caplog):
    net = model()
    net.register_buffer("pixel_mean", torch.tensor([103.53, 116.28, 123.675]).view(3, 1, 1), False)
    net.register_buffer("pixel_std", torch.ones(3, 1, 1), False)
    net.input_format = "BGR"
    agreeing = meta(
        input_format="BGR", pixel_mean=(103.53, 116.28, 123.675), pixel_std=(1.0, 1.0, 1.0)
    )
    path = save(tmp_path / "a.pth", weights(), agreeing)
    assert warned(caplog, net, path) == []
    other = meta(
        input_format="RGB", pixel_mean=(123.675, 116.28, 103.53), pixel_std=(58.4, 57.1, 57.4)
    )
    path = save(tmp_path / "b.pth", weights(), other)
    text = " ".join(warned(caplog, net, path))
    assert all(k in text for k in ("INPUT.FORMAT RGB", "PIXEL_MEAN [123.675", "PIXEL_STD [58.4"))
    text = warned(caplog, model(), save(tmp_path / "c.pth", weights(), meta(ws_eps=1e-3)))
    assert len(text) == 1 and "MODEL.WS.EPS was 0.001" in text[0]
    text = warned(caplog, model(), save(tmp_path / "d.pth", weights()))
    assert len(text) == 1 and "does not say how its weights were standardized" in text[0]


def test_how_different_numbers_are_told_apart(tmp_path, caplog):
    """Rounding to float32 is no difference; a hundredth of a grey level and of an eps is one."""
    net = model()
    net.register_buffer("pixel_mean", torch.tensor([103.53, 116.28, 123.675]).view(3, 1, 1), False)
    for mean, eps, expected in (
        ((103.5301, 116.2801, 123.6751), 1.0001e-5, []),
        ((103.54, 116.28, 123.675), 1e-5, ["MODEL.PIXEL_MEAN"]),
        ((103.53, 116.28, 123.665), 1e-5, ["MODEL.PIXEL_MEAN"]),
        ((103.53, 116.28, 123.675), 1.01e-5, ["MODEL.WS.EPS"]),
        ((103.53, 116.28, 123.675), 0.99e-5, ["MODEL.WS.EPS"]),
    ):
        record = meta(pixel_mean=mean, ws_eps=eps)
        said = warned(caplog, net, save(tmp_path / "a.pth", weights(), record))
        assert len(said) == len(expected), said
        assert all(key in text for key, text in zip(expected, said, strict=True))


def test_an_epsilon_that_nothing_uses_is_not_warned_of(tmp_path, caplog):
    path = save(tmp_path / "a.pth", weights(), meta(ws_formula="none", ws_eps=1e-3))
    expected = LoadExpectation(ws_formula="none", norm="BCN", ws_eps=1e-5)
    assert warned(caplog, model(formula="none"), path, expected=expected) == []


def test_expectation_of_a_model_with_and_without_a_config():
    cfg = small("SyncBCN", "biased")
    cfg.MODEL.WS.EPS = 1e-4
    with torch.device("meta"):
        built = ours.Parts(cfg, heads=False)
        built.register_buffer("pixel_mean", torch.zeros(3, 1, 1))
    expected = LoadExpectation.from_model(built, cfg)
    assert (expected.ws_formula, expected.norm, expected.ws_eps) == ("biased", "BCN", 1e-4)
    assert expected.pixel_mean == (103.53, 116.28, 123.675) and expected.input_format == "BGR"
    read = LoadExpectation.from_model(model("BCN", "biased"))
    assert (read.ws_formula, read.norm, read.ws_eps) == ("biased", "BCN", 1e-5)
    stock = LoadExpectation.from_model(model("FrozenBN", "none"), small("FrozenBN", "none"))
    assert (stock.ws_formula, stock.norm, stock.ws_eps) == ("none", "BN", None)
    assert LoadExpectation.from_model(model("GN", "none")).ws_formula == "none"
    bare = LoadExpectation.from_model(ours.bottom_up(small("GN", "unbiased_std")))
    assert (bare.ws_formula, bare.norm) == ("unbiased_std", "GN")


@pytest.mark.parametrize(
    "names, kept",
    [
        (["backbone.bottom_up.stem.a", "backbone.fpn_lateral2.a", "roi_heads.res5.a"], [0]),
        (["backbone.stem.a", "roi_heads.res5.0.a", "roi_heads.box_predictor.a"], [0, 1]),
        (["backbone.stem.a", "backbone.res5.a", "backbone.linear.a"], [0, 1]),
        (["stem.a", "res5.a", "linear.a"], [0, 1]),
        (["head.a", "roi_heads.res5.a"], []),
    ],
)
def test_which_tensors_are_the_bottom_up_networks(names, kept):
    assert backbone_names(names) == [names[i] for i in kept]


def test_what_is_saved_is_checked_when_reused(tmp_path):
    net = model()
    net.load_state_dict(weights())
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    sum(p.sum() for p in net.parameters()).backward()
    optimizer.step()
    checkpointer = WSBCNCheckpointer(net, str(tmp_path), optimizer=optimizer)
    checkpointer.save("model_0000009", iteration=9)
    record = torch.load(tmp_path / "model_0000009.pth", weights_only=True)["wsbcn_d2"]
    assert record["ws_formula"] == "unbiased" and record["norm"] == "BCN"
    groups = {m.num_groups for m in net.modules() if isinstance(m, BatchChannelNorm2d)}
    assert record["bcn_groups"] == sorted(groups)
    fresh = model()
    again = torch.optim.SGD(fresh.parameters(), lr=0.5, momentum=0.9)
    resumed = WSBCNCheckpointer(fresh, str(tmp_path), optimizer=again)
    extra = resumed.resume_or_load("", resume=True)
    assert extra["iteration"] == 9 and same(fresh, net.state_dict())
    assert again.param_groups[0]["lr"] == 0.1 and len(again.state_dict()["state"]) > 0
    refused(model("BCN", "biased"), str(tmp_path / "model_0000009.pth"), "set MODEL.WS.FORMULA to")


def test_how_much_of_a_model_is_in_the_file_is_said(tmp_path, caplog):
    net, state = model(), weights()
    total = len([name for name in net.state_dict() if "num_batches_tracked" not in name])
    found = [name for name in state if name in net.state_dict() and "num_batches" not in name]
    path = save(tmp_path / "a.pth", state, meta())
    with caplog.at_level("INFO", logger="fvcore.common.checkpoint"):
        WSBCNCheckpointer(net).load(path)
    said = f"{len(found)} of the model's {total} parameters and buffers are in the file"
    assert said in [record.getMessage() for record in caplog.records]


def test_frozen_stages_and_their_counters(tmp_path, caplog):
    """FREEZE_AT leaves no counter; estimates loaded without one are not to be thrown away."""
    frozen = model(freeze_at=2)
    path = save(tmp_path / "a.pth", weights(), meta())
    assert not any("num_batches" in line for line in warned(caplog, frozen, path))
    checkpointer = WSBCNCheckpointer(frozen, str(tmp_path))
    checkpointer.save("frozen")
    thawed = model()
    assert warned(caplog, thawed, str(tmp_path / "frozen.pth")) == []
    state = thawed.state_dict()
    # 1 where Detectron2's frozen norm drops the counter (v0.6), the old one where it keeps it
    assert int(state["backbone.bottom_up.stem.conv1.norm.bn.num_batches_tracked"]) in (1, 7)
    assert int(state["backbone.bottom_up.res4.0.conv1.norm.bn.num_batches_tracked"]) == 7
    kept = [n for n in weights() if not n.endswith("num_batches_tracked")]
    assert same(thawed, weights(), kept)


@pytest.mark.parametrize("wrapper", ["state_dict", "model", None])
@pytest.mark.parametrize("module", ["", "module."])
def test_raw_author_files_are_refused_with_the_mend(wrapper, module, tmp_path):
    state = {module + n: torch.zeros(s) for n, s in list(src.resnet_entries(src.Net()))[:12]}
    path = str(tmp_path / "R-50-GN-WS.pth.tar")
    torch.save({wrapper: state, "epoch": 9} if wrapper else state, path)
    refused(model("GN"), path, "convert it first with tools/convert_checkpoint.py")


def test_caffe2_files_still_load(tmp_path, caplog, monkeypatch):
    """MSRA-style blobs into FrozenBN, group norm blobs into GN, neither into the other."""
    files = {}
    for norm, tag in (("BN", "bn"), ("GN", "gn")):
        blobs = {"fc1000_w": np.zeros(1, np.float32), "conv1_w_momentum": np.zeros(1, np.float32)}
        for name, value in backbone_only("GN").items():
            if name.endswith("num_batches_tracked"):
                continue
            name = name.replace("shortcut", "branch1").replace("stem.conv1", "conv1")
            for number, letter in ((1, "a"), (2, "b")):
                name = name.replace(f".conv{number}.", f".branch2{letter}.")
            name = name.replace("norm.weight", f"{tag}_s").replace("norm.bias", f"{tag}_b")
            name = name.removesuffix(".weight") + "_w" if name.endswith(".weight") else name
            name = name.replace(".", "_")
            if tag == "bn":
                name = name.replace("conv1_bn", "res_conv1_bn")
            blobs[name] = value.numpy()
        files[norm] = str(tmp_path / f"{norm}.pkl")
        with open(files[norm], "wb") as stream:
            pickle.dump(blobs, stream, protocol=2)
    frozen = model("FrozenBN", "none")
    monkeypatch.setattr(logging.getLogger("fvcore"), "propagate", True)
    WSBCNCheckpointer(frozen).load(files["BN"])
    # The optimizer's state is left out, and not warned of as a parameter that the model lacks.
    assert "fc1000" in caplog.text and "momentum" not in caplog.text
    name = "backbone.bottom_up.res5.1.conv2."
    assert torch.equal(frozen.state_dict()[name + "weight"], weights("GN")[name + "weight"])
    assert torch.equal(frozen.state_dict()[name + "norm.bias"], weights("GN")[name + "norm.bias"])
    WSBCNCheckpointer(model("GN", "none")).load(files["GN"])
    refused(model("BN", "none"), files["BN"], "norm.running_mean")
    refused(model("GN", "none"), files["BN"], "backbone with BN but the model's has GN")
    refused(model("BCN", "none"), files["GN"], "backbone with GN but the model's has BCN")


def test_zoo_pickles_of_arrays(tmp_path):
    path = str(tmp_path / "zoo.pkl")
    state = {k: v.numpy() for k, v in backbone_only().items()}
    with open(path, "wb") as stream:
        pickle.dump({"model": state, "__author__": "me", "matching_heuristics": True}, stream)
    net = model()
    WSBCNCheckpointer(net).load(path)
    assert same(net, weights(), [n for n in weights() if "bottom_up" in n])


def test_models_without_a_backbone(tmp_path):
    net = nn.Linear(2, 2)
    path = save(tmp_path / "a.pth", {"weight": torch.ones(2, 2)})
    WSBCNCheckpointer(net).load(path)
    assert float(net.weight.detach().sum()) == 4
    path = save(tmp_path / "b.pth", {"other": torch.ones(2, 2)})
    refused(net, path, "holds 0 of")


def test_bad_contents(tmp_path):
    for content, match in (
        ({"model": {"a": 3}}, "Unsupported type"),
        ({"model": {}}, "no state dict"),
        ({"model": weights(), "wsbcn_d2": "yes"}, "is str, no dict"),
        ({"model": weights(), "wsbcn_d2": {"ws_formula": "mine"}}, "formula 'mine' is unknown"),
    ):
        torch.save(content, tmp_path / "a.pth")
        refused(model(), str(tmp_path / "a.pth"), match)


def test_what_was_presumed_warns_and_what_was_said_refuses(tmp_path, caplog):
    """A plain GN file, recorded as usual for GN files, into the model that it is right for."""
    state = {n: v for n, v in weights("GN").items() if "bottom_up" in n}
    presumed = meta(norm="GN", ws_formula="unbiased_std", presumed=("ws_formula",))
    path = save(tmp_path / "a.pth", state, presumed)
    net = model("GN", "none")
    text = warned(caplog, net, path)
    assert "was presumably trained with WS formula 'unbiased_std'" in text[0]
    assert same(net, weights("GN"), list(state))
    path = save(tmp_path / "b.pth", state, meta(norm="GN", ws_formula="unbiased_std"))
    refused(model("GN", "none"), path, "was trained with WS formula .*insist=True")
    # From a foreign file: its name is a hint, --formula is a fact, GN into its right model works.
    names = {n: torch.zeros(s) for n, s in src.resnet_entries(src.Net()) if not n.startswith("fc.")}
    torch.save(names, tmp_path / "resnet50.pth")
    for formula, error in ((None, False), ("unbiased_std", True)):
        target = str(tmp_path / "converted.pth")
        convert_file(str(tmp_path / "resnet50.pth"), target, Options(formula=formula))
        net = ours.Parts(ours.config(50, formula="none"), heads=False)
        with pytest.raises(CheckpointError) if error else contextlib.nullcontext():
            WSBCNCheckpointer(net).load(target)


INSIST = {
    "GN into GN+WS": (dict(norm="GN", ws_formula="none"), "GN", "GN", "unbiased_std"),
    "another formula": (dict(ws_formula="biased"), "BCN", "BCN", "unbiased"),
    "another norm": (dict(norm="GN", ws_formula=None), "GN", "BCN", "unbiased"),
}


@pytest.mark.parametrize("case", INSIST)
def test_one_way_to_insist(case, tmp_path, caplog):
    record, have, want, formula = INSIST[case]
    path = save(tmp_path / "a.pth", weights(have), meta(**record))
    refused(model(want, formula), path, r"add \?insist=True")
    refused(model(want, formula), path + "?insist=False", r"add \?insist=True")
    net = model(want, formula)
    text = warned(caplog, net, path + "?insist=True")
    assert text and same(net, weights(have), ["backbone.bottom_up.res3.1.conv2.weight"])


def fpn(norm="GN", levels=(2, 3, 4, 5)):
    """Names of a FPN without norms, as Detectron2's zoo has them."""
    state = {n: v for n, v in weights(norm).items() if "bottom_up" in n}
    for level in levels:
        state[f"backbone.fpn_lateral{level}.weight"] = torch.rand(256, 64 * 2 ** (level - 2), 1, 1)
        state[f"backbone.fpn_output{level}.weight"] = torch.rand(256, 256, 3, 3)
        for part in ("lateral", "output"):
            state[f"backbone.fpn_{part}{level}.bias"] = torch.rand(256)
    return state


@pytest.mark.parametrize("levels", [(2, 3, 4, 5), (3, 4, 5)], ids=["zoo", "RetinaNet"])
def test_insisting_on_another_fpn(levels, tmp_path, caplog):
    """A zoo FPN into FPN.NORM GN; a RetinaNet, which has no level 2, into Mask R-CNN."""
    state = fpn(levels=levels)
    path = save(tmp_path / "a.pth", state)
    refused(model("GN", "none"), path, "missing are backbone.fpn_.*insist=True")
    net = model("GN", "none")
    assert len(warned(caplog, net, path + "?insist=True")) >= 1
    assert same(net, state, [n for n in state if n.endswith(".weight")])
    # There is nothing to insist on where nothing fits.
    path = save(tmp_path / "b.pth", {"surprise.weight": torch.ones(1)})
    refused(model("GN"), path + "?insist=True", "holds 0 of")


def test_options_of_a_path(tmp_path):
    assert split_options("") == ("", set())
    assert split_options("a.pth") == ("a.pth", set())
    assert split_options("wsbcn://x/y?insist=True") == ("wsbcn://x/y", {"insist"})
    both = split_options("a.pth?insist=True&matching_heuristics=True")
    assert both == ("a.pth", {"insist", "matching_heuristics"})
    assert split_options("a.pth?insist=False") == ("a.pth", set())
    for path in ("a.pth?", "a.pth?x", "a.pth?insists=True", "https://x/a.pth?download=1"):
        with pytest.raises(CheckpointError, match="unknown query.*known are insist"):
            split_options(path)
    for name in ("a?b.pth", "a#b.pth", "a?insist=True", "a b%20.pth"):
        path = save(tmp_path / name, weights(), meta())
        assert split_options(path) == (path, set())
        for end in ("", "?insist=True"):
            net = model()
            WSBCNCheckpointer(net).load(path + end)
            assert same(net, weights())


def test_one_line_for_contents_of_any_kind(tmp_path):
    for content, match in (
        ({"model": {1: torch.ones(1)}}, "keys are not names"),
        ({"model": {"a\nb\x1b[31m": 3}}, "Unsupported type"),
        ({"model": {"a": torch.ones(1).expand(10**9)}}, "too little data"),
        ({"model": weights(), "wsbcn_d2": {"ws_eps": "x"}}, "ws_eps is 'x'"),
        ({"model": weights(), "wsbcn_d2": {"ws_eps": float("nan")}}, "ws_eps is 'nan'"),
        ({"model": weights(), "wsbcn_d2": {"pixel_mean": [1, "a"]}}, "pixel_mean is"),
        ({"model": weights(), "wsbcn_d2": {"pixel_std": 3}}, "pixel_std is '3'"),
        ({"model": weights(), "wsbcn_d2": {"input_format": 3}}, "input_format is '3'"),
        ({"model": weights(), "wsbcn_d2": {"norm": ["GN"]}}, "norm is"),
        ({"model": weights(), "wsbcn_d2": {"ws_formula": [1]}}, "ws_formula is"),
        ({"model": weights(), "wsbcn_d2": {"presumed": "ws_formula"}}, "presumed is"),
        ([weights()], "holds a list"),
        (torch.ones(2), "holds a Tensor"),
    ):
        torch.save(content, tmp_path / "a.pth")
        for path in ("a.pth", "a.pth?insist=True", "a.pth?matching_heuristics=True"):
            refused(model(), str(tmp_path / path), match)


def test_records_may_lack_any_field(tmp_path):
    """Each missing one is unknown, which is no reason to refuse."""
    whole = meta().as_dict()
    for key in whole:
        record = {k: v for k, v in whole.items() if k != key}
        torch.save({"model": weights(), "wsbcn_d2": record}, tmp_path / "a.pth")
        WSBCNCheckpointer(model()).load(str(tmp_path / "a.pth"))
    torch.save({"model": weights(), "wsbcn_d2": {"of a later version": 1}}, tmp_path / "a.pth")
    WSBCNCheckpointer(model()).load(str(tmp_path / "a.pth"))
