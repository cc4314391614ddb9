"""ImageNet backbones: random files in the source's layout, converted, loaded strictly, compared.

float32 is compared block by block, each block fed with the source's float64 input: over a whole
random network rounding grows to 2e-5 (R-50) in *any* float32 implementation, the source's own
included, so that a bound of 1e-6 says something about single blocks only.
"""

import functools

import pytest
import torch

from wsbcn_d2.checkpoint import CheckpointError, Options, convert, layout
from wsbcn_d2.checkpoint.formats import imagenet
from wsbcn_d2.checkpoint.formats.plain_bn import batch_norm_to_bcn

from .. import ours
from .. import source_models as src
from ..parity import error
from ..torchvision_names import basic_resnet

GN50 = src.Net()
BCN50 = src.Net(norm="BCN", ws="var")
NETS = {
    "R-50-GN-WS": GN50,
    "R-50-BCN-WS": BCN50,
    "X-50-GN-WS": src.Net(groups=32, width=4),
    "X-50-BCN-WS": src.Net(groups=32, width=4, norm="BCN", ws="var"),
    "R-101-GN-WS": src.Net(depth=101),
}
KEYS = {"R-50": (161, 426), "X-50": (161, 426), "R-101": (314, 834)}


@functools.lru_cache(1)
def source(net):
    """A random checkpoint, an input and the source's own float64 forward pass."""
    state = src.random_state(src.resnet_entries(net))
    image = torch.randn(
        2, 3, 64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )
    trace = []
    return state, image, src.resnet_forward(state, net, image, trace), trace


def load(net, converted, norm=None):
    """Our ResNet in float64 with a converted FPN-style state dict, strictly loaded."""
    formula = ours.FORMULA[net.ws] if net.ws else "none"
    cfg = ours.config(net.depth, net.groups, net.width, norm or net.norm, formula)
    cfg.MODEL.RESNETS.STRIDE_IN_1X1 = net.stride_in_1x1
    model = ours.bottom_up(cfg).double()
    bare = {name.removeprefix("backbone.bottom_up."): v for name, v in converted.items()}
    model.load_state_dict(bare, strict=True)
    return model


@pytest.mark.slow
@pytest.mark.rotated(2)
@pytest.mark.parametrize("name", NETS)
def test_features_equal_the_sources(name):
    net = NETS[name]
    state, image, want, trace = source(net)
    converted, report = convert({f"module.{k}": v for k, v in state.items()})
    keys_in = KEYS[name.rpartition(f"-{net.norm}")[0]][net.norm == "BCN"]
    assert (report.keys_in, len(report.mapped)) == (keys_in, keys_in - 2)
    assert set(report.dropped) == {"fc.weight", "fc.bias"} and not report.added
    assert all(key.startswith("backbone.bottom_up.") for key in converted)

    model = load(net, converted)
    with torch.no_grad():
        got = model(image)
        assert [error(g, w) < 1e-10 for g, w in zip(got.values(), want, strict=True)] == [True] * 4
        convs = 53 if net.depth == 50 else 104
        assert ours.set_formula(model, ours.WRONG[net.ws]) == convs
        assert error(model.stem(image), trace[0][2]) > 1e-3
        assert error(model(image)["res5"], want[-1]) > 1e-2
        ours.set_formula(model, ours.FORMULA[net.ws])
        model.float()
        single = {n: v.float() if v.is_floating_point() else v for n, v in state.items()}
        own = error(src.resnet_forward(single, net, image.float())[-1], want[-1])
        assert error(model(image.float())["res5"], want[-1]) < 1.5 * own
        for block, given, expected in trace:
            assert error(model.get_submodule(block)(given.float()), expected) < 1e-6, block


@pytest.mark.parametrize("net", [GN50, BCN50], ids=["GN", "BCN"])
def test_recorded_conventions(net):
    state = src.random_state(src.resnet_entries(net), dtype=torch.float32)
    meta = convert(state)[1].metadata
    assert (meta.norm, meta.ws_formula, meta.ws_eps) == (net.norm, ours.FORMULA[net.ws], 1e-5)
    assert meta.input_format == "RGB" and meta.pixel_mean == (123.675, 116.28, 103.53)
    assert meta.pixel_std == (58.395, 57.12, 57.375)


@pytest.mark.parametrize("wrapper", [None, "state_dict", "model"])
@pytest.mark.parametrize("module", ["", "module."])
def test_containers_and_openmmlab_names(wrapper, module):
    entries = list(src.resnet_entries(src.Net(norm_name="gn")))
    state = {module + name: torch.empty(shape) for name, shape in entries}
    data = {wrapper: state, "epoch": 3, "optimizer": {}} if wrapper else state
    converted, report = convert(data)
    assert len(converted) == 159 and "res2.0.shortcut.norm.bias" in str(list(converted))
    assert ("epoch" in " ".join(report.notes)) == bool(wrapper)
    plain = convert({name: torch.empty(shape) for name, shape in src.resnet_entries(GN50)})[0]
    assert list(converted) == list(plain)


@pytest.mark.parametrize("variant", ["counter missing", "EstBN"])
def test_estimates_are_not_thrown_away(variant):
    """A counter of 0 makes the first training batch replace the estimates."""
    net = src.Net(norm="BCN", ws="var", batch="bn" if variant == "EstBN" else "pbn")
    state = src.random_state(src.resnet_entries(net), dtype=torch.float32)
    for name in list(state):
        if name.endswith("num_batches_tracked"):
            if variant == "EstBN":  # the README's class: never counts, has a rate of its own
                state[name] = torch.tensor(0)
                state[name.replace("num_batches_tracked", "estbn_moving_speed")] = torch.zeros(1)
            else:
                del state[name]
    converted, report = convert(state)
    assert len(converted) == 424
    counters = [v for k, v in converted.items() if k.endswith("num_batches_tracked")]
    assert len(counters) == 53 and all(int(v) == 1 for v in counters)
    assert any("53 num_batches_tracked set to 1" in note for note in report.notes)
    assert sum("estbn_moving_speed" in key for key in report.dropped) == 53 * (variant == "EstBN")


@pytest.mark.slow
def test_torchvision_batch_norm_into_bcn():
    net = src.Net(norm="BN", ws="")
    state, image, want, _ = source(net)
    converted, report = convert(state)
    assert report.metadata.norm == "BCN" and report.metadata.ws_formula == "none"
    assert len(report.added) == 2 * 53 and len(report.mapped) == 318 and len(converted) == 424
    model = load(net, converted, norm="BCN")
    with torch.no_grad():
        first = model.stem.conv1
        got = first.norm.bn(torch.nn.functional.conv2d(image, first.weight, None, 2, 3))
        raw = torch.nn.functional.conv2d(image, state["conv1.weight"], None, 2, 3)
        assert error(got, src.normalized(raw, state, net, "bn1")) < 1e-10
    assert float(first.norm.weight.detach().min()) == float(first.norm.weight.detach().max()) == 1
    assert int(first.norm.bn.num_batches_tracked) == 1234
    # The same file for a plain BatchNorm backbone is exact.
    kept, report = convert(state, Options(norm="BN"))
    assert report.metadata.norm == "BN" and not report.added
    with torch.no_grad():
        got = load(net, kept, norm="BN")(image)
    assert [error(g, w) < 1e-10 for g, w in zip(got.values(), want, strict=True)] == [True] * 4


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_a_batch_norms_numbers_in_a_bcn(dtype):
    """Of its type, at the channel half's start, and counted: the next batch is not the first."""
    net = src.Net(norm="BN", ws="")
    state = {n: torch.zeros(s, dtype=dtype) for n, s in src.resnet_entries(net)}
    for name in state:
        if name.endswith("num_batches_tracked"):
            state[name] = torch.tensor(7 if name.startswith("bn1.") else 0)
    converted, report = convert(state, Options(target="resnet"))
    for name, value in converted.items():
        if name.endswith("num_batches_tracked"):
            assert value.dtype == torch.int64 and int(value) == (7 if "stem" in name else 1), name
        else:
            assert value.dtype == dtype, name
    assert len(report.added) == 2 * 53
    for name in report.added:
        assert converted[name].tolist() == [float(name.endswith("weight"))] * 32, name
    with pytest.raises(CheckpointError, match="stem.conv1.norm.weight has 64 channels, which 24"):
        batch_norm_to_bcn(convert(state, Options(target="resnet", norm="BN"))[0], 24)


@pytest.mark.parametrize("have, want", [("GN", "BCN"), ("BCN", "GN"), ("BCN", "BN"), ("GN", "BN")])
def test_the_other_norm_is_refused_by_name(have, want):
    net = src.Net(norm=have, ws="var")
    state = {name: torch.zeros(shape) for name, shape in src.resnet_entries(net)}
    with pytest.raises(CheckpointError, match=rf"{have} checkpoint and {want} is wanted"):
        convert(state, Options(norm=want))


@pytest.mark.parametrize(
    "file_name, norm, formula",
    [
        ("R-50-GN-WS.pth.tar", "GN", "unbiased_std"),
        ("resnet50_gn_ws-15beedd8.pth", "GN", "unbiased_std"),
        ("resnet50_gn-9186a21c.pth", "GN", "none"),
        ("anything.pth", "GN", "unbiased_std"),
        ("rn50_bcn_ws.pth", "BCN", "unbiased"),
        ("resnet50-19c8e357.pth", "BN", "none"),
    ],
)
def test_formula_by_file_name(file_name, norm, formula):
    state = {name: torch.zeros(shape) for name, shape in src.resnet_entries(src.Net(norm=norm))}
    report = convert(state, Options(source_name=f"/folder/with-gn/{file_name}"))[1]
    assert report.metadata.ws_formula == formula and "ws_formula" in report.metadata.presumed
    assert f"{formula} (presumed)" in "\n".join(report.lines())
    report = convert(state, Options(formula="biased"))[1]
    told = report.metadata
    assert told.ws_formula == "biased" and "ws_formula" not in told.presumed
    text = "\n".join(report.lines())
    assert "biased" in text and "biased (presumed)" not in text


@pytest.mark.parametrize(
    "groups, width, name",
    [
        *((1, 64, "R-50"), (1, 128, "R-50"), (32, 4, "X-50-32x4d")),
        *((32, 8, "X-50-32x8d"), (64, 4, "X-50-64x4d"), (16, 4, None), (1, 32, None)),
    ],
)
def test_widths_that_are_known(groups, width, name):
    net = src.Net(groups=groups, width=width)
    state = {n: torch.empty(s, device="meta") for n, s in src.resnet_entries(net, classifier=False)}
    backbone = {n: v for n, v in imagenet.convert_imagenet(state).state.items()}
    if name is None:
        with pytest.raises(CheckpointError, match="which no known ResNet or ResNeXt has"):
            layout.infer_backbone(backbone)
        return
    found = layout.infer_backbone(backbone)
    assert (found.name, found.groups, found.width_per_group) == (name, groups, width)
    layout.check_shapes(backbone, found.shapes())


RGB = [
    'INPUT.FORMAT: "RGB"',
    "MODEL.PIXEL_MEAN: [123.675, 116.28, 103.53]",
    "MODEL.PIXEL_STD: [58.395, 57.12, 57.375]",
]


@pytest.mark.parametrize(
    "net, options, lines",
    [
        (
            src.Net(groups=32, width=4),
            Options(),
            [
                'MODEL.BACKBONE.NAME: "build_ws_resnet_fpn_backbone"',
                *("MODEL.RESNETS.DEPTH: 50", 'MODEL.RESNETS.NORM: "GN"'),
                "MODEL.RESNETS.STRIDE_IN_1X1: False",
                *("MODEL.RESNETS.NUM_GROUPS: 32", "MODEL.RESNETS.WIDTH_PER_GROUP: 4"),
                *('MODEL.WS.FORMULA: "unbiased_std"', *RGB),
            ],
        ),
        (
            src.Net(width=128),
            Options(formula="none"),
            [
                'MODEL.BACKBONE.NAME: "build_resnet_fpn_backbone"',
                *("MODEL.RESNETS.DEPTH: 50", 'MODEL.RESNETS.NORM: "GN"'),
                "MODEL.RESNETS.STRIDE_IN_1X1: False",
                *("MODEL.RESNETS.NUM_GROUPS: 1", "MODEL.RESNETS.WIDTH_PER_GROUP: 128", *RGB),
            ],
        ),
        (
            src.Net(norm="BN", ws=""),
            Options(formula="biased"),
            [
                'MODEL.BACKBONE.NAME: "build_ws_resnet_fpn_backbone"',
                *("MODEL.RESNETS.DEPTH: 50", 'MODEL.RESNETS.NORM: "BCN"'),
                *("MODEL.RESNETS.STRIDE_IN_1X1: False", 'MODEL.WS.FORMULA: "biased"', *RGB),
            ],
        ),
    ],
    ids=["X-50 GN+WS", "wide GN", "BN into BCN"],
)
def test_the_config_that_fits(net, options, lines):
    state = {n: torch.zeros(s) for n, s in src.resnet_entries(net)}
    assert convert(state, options)[1].config_lines() == lines


def test_what_is_presumed_is_called_so(capsys):
    state = {n: torch.zeros(s) for n, s in src.resnet_entries(GN50)}
    lines = convert(state)[1].lines()
    assert "WS formula    unbiased_std (presumed), eps 1e-05" in lines
    assert "channel order RGB (presumed)" in lines and "norm          GN" in lines
    assert "pixel std     (58.395, 57.12, 57.375) (presumed)" in lines
    lines = convert(state, Options(formula="biased"))[1].lines()
    assert "WS formula    biased, eps 1e-05" in lines


@pytest.mark.parametrize("blocks", [(2, 2, 2, 2), (3, 4, 6, 3)])
def test_basic_block_resnets(blocks):
    """R-18 and R-34, from a description of torchvision's BasicBlock."""
    state = basic_resnet(blocks)
    converted, report = convert({name: torch.zeros(shape) for name, shape in state.items()})
    depth = 18 if blocks[0] == 2 else 34
    assert report.layout.depth == depth
    cfg = ours.config(depth)
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 64
    expected = ours.bottom_up(cfg).state_dict()
    assert {k.removeprefix("backbone.bottom_up."): v.shape for k, v in converted.items()} == {
        k: v.shape for k, v in expected.items()
    }
