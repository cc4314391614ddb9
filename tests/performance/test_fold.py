"""A folded model computes what the model computes in evaluation, from plain layers."""

import copy
import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from detectron2.layers import Conv2d, FrozenBatchNorm2d, ShapeSpec
from detectron2.modeling.backbone import FPN, BasicStem, ResNet
from detectron2.modeling.backbone.resnet import BasicBlock, BottleneckBlock
from torch import nn
from torch.testing import assert_close

from wsbcn_d2 import BatchChannelNorm2d, EstimatedBatchNorm2d, WSConv2d, fold
from wsbcn_d2.folding import lazy_state_dict, stock_state_dict

TOOLS = Path(__file__).resolve().parents[2] / "tools"


def backbone(norm, ws=True):
    """A small ResNet-FPN; the FPN runs its convolutions from plain lists."""
    stem = BasicStem(3, 32, norm=norm)
    first = BasicBlock(32, 32, norm=norm)
    second = BottleneckBlock(32, 64, bottleneck_channels=32, stride=2, norm=norm)
    model = FPN(ResNet(stem, [[first], [second]], out_features=["res2", "res3"]),
                ["res2", "res3"], 32, norm=norm)  # fmt: skip
    if ws:
        WSConv2d.convert(model, formula="unbiased_std")
    return model


def train_a_little(model):
    """Statistics and affines that are not the identity."""
    with torch.no_grad():
        for name, value in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith(("running_var", "norm.weight", "bn.weight")):
                value.uniform_(0.5, 1.5)
            elif name.endswith(("running_mean", "norm.bias", "bn.bias")):
                value.normal_(std=0.3)
    return model.eval()


def outputs(model, dtype):
    torch.manual_seed(0)
    y = model(torch.randn(2, 3, 64, 96).to(dtype))
    return y if isinstance(y, dict) else {"y": y}


def test_what_is_frozen_stays_so():
    for frozen in (True, False):
        conv = WSConv2d(8, 8, 1, norm=BatchChannelNorm2d(8, 4)).requires_grad_(not frozen)
        folded = fold(nn.Sequential(conv).eval())
        assert {p.requires_grad for p in folded.parameters()} == {not frozen}


@pytest.mark.parametrize("dtype,rtol", [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize("norm", ["BCN", "BatchBCN", "GN", "BN", "EstBN", "FrozenBN"])
def test_the_same_outputs(norm, dtype, rtol):
    model = train_a_little(backbone(norm)).to(dtype)
    before = copy.deepcopy(model.state_dict())
    folded = fold(model)
    with torch.no_grad():
        expected, found = outputs(model, dtype), outputs(folded, dtype)
    for name in expected:
        error = (found[name] - expected[name]).abs().max() / expected[name].abs().max()
        assert error <= rtol, name
    for module in folded.modules():
        assert not isinstance(module, (WSConv2d, BatchChannelNorm2d, EstimatedBatchNorm2d))
        assert not isinstance(module, nn.BatchNorm2d)
    if norm == "BCN":
        assert sum(isinstance(m, nn.GroupNorm) for m in folded.modules()) == 11
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_folding_rounds_once():
    """float32 numbers of a batch norm, put together in float64."""
    norm = BatchChannelNorm2d(64, 4)
    conv = Conv2d(8, 64, 3, bias=True, norm=norm)
    with torch.no_grad():
        for value in (*norm.bn.parameters(), norm.bn.running_mean):
            value.normal_()
        norm.bn.running_var.copy_(10 ** torch.linspace(-7, 1, 64))
    folded = fold(nn.Sequential(conv))[0]
    scale = (norm.bn.running_var.double() + norm.bn.eps).rsqrt() * norm.bn.weight.double()
    bias = norm.bn.bias.double() - norm.bn.running_mean.double() * scale
    bias += conv.bias.double() * scale
    weight = conv.weight.double() * scale.view(-1, 1, 1, 1)
    assert torch.equal(folded.weight, weight.float()) and torch.equal(folded.bias, bias.float())


def test_the_epsilons_of_both_halves_are_kept():
    norm = BatchChannelNorm2d(8, 4, eps=0.3)
    norm.bn.eps = 0.1
    conv = WSConv2d(3, 8, 3, norm=norm, ws_eps=0.2)
    model = train_a_little(nn.Sequential(conv)).double()
    with torch.no_grad():
        assert_close(outputs(fold(model), torch.float64), outputs(model, torch.float64))


def test_a_frozen_stage():
    model = train_a_little(backbone("BCN"))
    model.bottom_up.freeze(2)
    assert any(isinstance(m, FrozenBatchNorm2d) for m in model.modules())
    folded = fold(model)
    assert not any(isinstance(m, FrozenBatchNorm2d) for m in folded.modules())
    for name, value in outputs(model, torch.float32).items():
        assert_close(outputs(folded, torch.float32)[name], value, rtol=1e-4, atol=1e-4)


def test_a_training_model_is_folded_as_in_evaluation():
    model = train_a_little(backbone("BCN")).train()
    folded = fold(model)
    assert model.training and not folded.training
    expected = outputs(copy.deepcopy(model).eval(), torch.float32)
    for name, value in outputs(folded, torch.float32).items():
        assert_close(value, expected[name], rtol=1e-4, atol=1e-4)


def test_sequences_shared_norms_and_tied_weights():
    norm = BatchChannelNorm2d(8, 4)
    convs = [Conv2d(3, 8, 3, norm=norm, bias=True), Conv2d(8, 8, 3, norm=norm)]
    tied = [nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)]
    tied[1].weight = tied[0].weight
    tower = [tied[0], BatchChannelNorm2d(8, 2), nn.ReLU(), tied[1], nn.BatchNorm2d(8)]
    model = train_a_little(nn.Sequential(*convs, *tower)).double()
    folded = fold(model)
    assert folded[0].norm is folded[1].norm
    assert type(folded[3]) is nn.GroupNorm and type(folded[6]) is nn.Identity
    with torch.no_grad():
        assert_close(outputs(folded, torch.float64), outputs(model, torch.float64))


def test_a_convolution_with_several_norms_stays():
    conv = nn.Conv2d(3, 8, 3)
    levels = nn.ModuleList(nn.Sequential(conv, BatchChannelNorm2d(8, 4)) for _ in range(2))
    train_a_little(levels)
    folded = fold(levels)
    x = torch.randn(1, 3, 6, 6)
    for level, ours in zip(levels, folded, strict=True):
        assert isinstance(ours[1], BatchChannelNorm2d)
        assert_close(ours(x), level(x))


def test_no_statistics_to_fold():
    with pytest.raises(ValueError, match="running statistics"):
        fold(Conv2d(3, 8, 3, norm=nn.BatchNorm2d(8, track_running_stats=False)))


def test_gn_and_ws_load_into_stock_models_exactly():
    model = train_a_little(backbone("GN"))
    stock = backbone("GN", ws=False).eval()
    stock.load_state_dict(stock_state_dict(model))
    for name, value in outputs(model, torch.float32).items():
        assert torch.equal(outputs(stock, torch.float32)[name], value)


@pytest.mark.parametrize("norm", ["BCN", "BN"])
def test_batch_norms_do_not_fit_stock_configs(norm):
    with pytest.raises(ValueError, match=r"biases \(.*only models of GN and WS"):
        stock_state_dict(backbone(norm))


def test_bcn_loads_into_stock_models_by_callable_norms():
    model = train_a_little(backbone("BCN")).double()
    stock = backbone(
        lambda channels: nn.Sequential(FrozenBatchNorm2d(channels), nn.GroupNorm(32, channels)),
        ws=False,
    )
    missing, unexpected = stock.load_state_dict(lazy_state_dict(model), strict=False)
    assert not unexpected
    assert all("num_batches_tracked" in name for name in missing)
    stock.double().eval()
    for name, value in outputs(model, torch.float64).items():
        assert_close(outputs(stock, torch.float64)[name], value, rtol=1e-5, atol=1e-5)


def tool(name, monkeypatch):
    monkeypatch.syspath_prepend(str(TOOLS))
    spec = importlib.util.spec_from_file_location(name, TOOLS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_the_tool_writes_what_stock_detectron2_loads(tmp_path, monkeypatch, capsys):
    from detectron2.checkpoint import DetectionCheckpointer
    from detectron2.modeling import build_model

    from wsbcn_d2.engine import load_config

    main = tool("fold_checkpoint", monkeypatch).main
    root = TOOLS.parent / "configs/shapes"
    config = str(root / "mask_rcnn_R_18_FPN_gn_ws.yaml")
    model = build_model(load_config(config, ["MODEL.DEVICE", "cpu"]))
    train_a_little(model)
    DetectionCheckpointer(model, str(tmp_path)).save("model")
    files = ["--weights", str(tmp_path / "model.pth"), "--output", str(tmp_path / "folded.pth")]
    assert main(["--config-file", config, *files]) == 0
    stock = build_model(
        load_config(str(root / "mask_rcnn_R_18_FPN_gn.yaml"), ["MODEL.DEVICE", "cpu"])
    )
    loaded = DetectionCheckpointer(stock).load(str(tmp_path / "folded.pth"))
    assert not loaded.get("matching_heuristics")
    x = torch.randn(1, 3, 64, 64)
    stock.eval()
    for name, value in model.backbone(x).items():
        assert_close(stock.backbone(x)[name], value, rtol=1e-4, atol=1e-4)
    bcn = str(root / "mask_rcnn_R_18_FPN_bcn_ws.yaml")
    model = build_model(load_config(bcn, ["MODEL.DEVICE", "cpu"]))
    DetectionCheckpointer(model, str(tmp_path)).save("model")
    assert main(["--config-file", bcn, *files]) == 2
    assert "only models of GN and WS" in capsys.readouterr().err


@pytest.mark.slow
def test_the_benchmark_runs(tmp_path, monkeypatch, capsys):
    import json

    main = tool("benchmark", monkeypatch).main
    output = tmp_path / "layer.json"
    assert main(["layer", "--quick", "--released", "--output", str(output)]) == 0
    result = json.loads(output.read_text())
    assert len(result["rows"]) == 11
    assert set(result["summary"]) >= {"bcn / gn", "released / bcn", "bcn / gn, sum of times"}
    assert main(["ws", "--quick", "--cpu-time"]) == 0
    assert "five-op formula" in capsys.readouterr().out
    config = str(TOOLS.parent / "configs" / "shapes" / "mask_rcnn_R_18_FPN_bcn_ws.yaml")
    assert main(["monitor", config, "--quick", "--output", str(output)]) == 0
    (row,) = json.loads(output.read_text())["rows"]
    assert row["share"] == pytest.approx((row["time"]["ratio"] - 1) * 0.08)
    recomputed = ["--recompute", "backbone.bottom_up.res?.*", "roi_heads.*_head"]
    assert main(["step", config, "--quick", *recomputed, "--output", str(output)]) == 0
    plain, less = json.loads(output.read_text())["rows"]
    assert plain["kept"] == plain["peak"] == 1 and plain["kept bytes"] <= plain["peak bytes"]
    assert less["kept"] < 0.7 and less["name"].endswith(" ".join(recomputed[1:]))


def test_shape_spec_is_kept():
    folded = fold(backbone("BCN"))
    assert folded.output_shape()["p2"] == ShapeSpec(channels=32, stride=4)
