"""What others do to a model that contains these layers: right, or a clear error."""

import copy
import io
import pickle

import pytest
import torch
from detectron2.layers import Conv2d, FrozenBatchNorm2d
from torch import nn
from torch.func import functional_call
from torch.nn.utils import parametrize
from torch.testing import assert_close

from wsbcn_d2 import BatchChannelNorm2d, EstimatedBatchNorm2d, WSConv2d, fold, standardize_weight
from wsbcn_d2.layers import CWNConv2d, WNConv2d

CONVS = [WSConv2d, WNConv2d, CWNConv2d]


def conv(norm=None, kind=WSConv2d, **options):
    return kind(8, 8, 3, padding=1, norm=norm, **options)


def make(norm="BCN"):
    norms = {"BCN": lambda: BatchChannelNorm2d(8, 4), "EstBN": lambda: EstimatedBatchNorm2d(8)}
    model = nn.Sequential(conv(norms[norm](), activation=nn.Tanh()), conv(norms[norm]()))
    for parameter in model.parameters():
        nn.init.normal_(parameter, 0.5, 0.5)
    for _ in range(3):
        model(image())
    return model


def image(size=6):
    return 2 * torch.randn(2, 8, size, size) + 1


norms = pytest.mark.parametrize("norm", ["BCN", "EstBN"])


@pytest.mark.parametrize(
    "convert,name",
    [
        (nn.SyncBatchNorm.convert_sync_batchnorm, "sync"),
        (FrozenBatchNorm2d.convert_frozen_batchnorm, "frozen"),
    ],
)
def test_a_bcn_says_what_its_batch_half_has_become(convert, name):
    model, x = make().eval(), image()
    expected = model(x)
    model = convert(model)
    for layer in model:
        assert type(layer.norm) is BatchChannelNorm2d and layer.norm.statistics == name
    assert "estimated" not in repr(model).lower()
    assert_close(model(x), expected)


def test_a_batch_half_of_any_other_type_is_named():
    norm = BatchChannelNorm2d(8, 4)

    class MyNorm(EstimatedBatchNorm2d):
        pass

    assert norm.statistics == "estimated"
    norm.bn = MyNorm(8)
    assert "statistics=MyNorm" in repr(norm)
    norm.bn = nn.BatchNorm2d(8)
    assert "statistics=batch" in repr(norm)


def test_an_estimated_norm_that_was_converted_is_of_another_class():
    for convert in (
        nn.SyncBatchNorm.convert_sync_batchnorm,
        FrozenBatchNorm2d.convert_frozen_batchnorm,
    ):
        model, x = make("EstBN").eval(), image()
        expected = model(x)
        model = convert(model)
        assert "Estimated" not in repr(model)
        assert_close(model(x), expected)


def test_frozen_estimates_stay_in_training():
    model = FrozenBatchNorm2d.convert_frozen_batchnorm(make())
    before = copy.deepcopy(model.state_dict())
    model.train()
    model(image())
    assert_close(dict(model.state_dict()), dict(before), rtol=0, atol=0)


def whole(model):
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    return torch.load(stream, weights_only=False)


@norms
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), whole])
def test_copies_train_alike_and_apart(norm, copied):
    model = make(norm)
    twin = copied(model)
    state = copy.deepcopy(dict(model.state_dict()))
    xs = [image() for _ in range(2)]
    outputs = [twin(x) for x in xs]
    assert_close(dict(model.state_dict()), state, rtol=0, atol=0)
    for x, y in zip(xs, outputs, strict=True):
        assert torch.equal(model(x), y)
    assert_close(dict(model.state_dict()), dict(twin.state_dict()), rtol=0, atol=0)


@pytest.mark.parametrize("kind", CONVS)
@pytest.mark.parametrize("bias", [True, False])
def test_a_batch_norm_is_not_fused_into_a_raw_weight(kind, bias):
    model = nn.Sequential(conv(kind=kind, bias=bias), nn.BatchNorm2d(8)).eval()
    with pytest.raises(ValueError, match=r"cannot take a norm into its weight.*wsbcn_d2\.fold"):
        nn.utils.fuse_conv_bn_eval(model[0], model[1])
    x = image()
    folded = fold(nn.Sequential(Conv2d(8, 8, 1), nn.ReLU(), *model))
    assert type(folded[2]) is Conv2d and type(folded[3]) is nn.Identity
    assert_close(folded[2](x), model(x), rtol=1e-4, atol=1e-4)


def test_a_new_weight_or_bias_is_taken():
    layer = conv(bias=False)
    layer.weight, layer.bias = nn.Parameter(torch.randn(8, 8, 3, 3)), nn.Parameter(torch.ones(8))
    x = image()
    assert_close(
        layer(x),
        nn.functional.conv2d(x, standardize_weight(layer.weight), layer.bias, padding=1),
        rtol=1e-4,
        atol=1e-4,
    )


def test_fuse_modules_refuses():
    model = nn.Sequential(conv(), nn.BatchNorm2d(8)).eval()
    with pytest.raises((NotImplementedError, AssertionError), match="WSConv2d"):
        torch.ao.quantization.fuse_modules(model, [["0", "1"]])


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight + weight.flip(1)


@pytest.mark.parametrize("kind", CONVS)
@pytest.mark.parametrize("training", [True, False])
def test_a_parametrized_weight_is_what_is_standardized(kind, training):
    layer, x = conv(kind=kind).train(training), image().requires_grad_()
    raw = layer.weight
    plain = copy.deepcopy(layer)
    plain.weight = nn.Parameter(Doubled()(raw.detach()))
    parametrize.register_parametrization(layer, "weight", Doubled())
    y, expected = layer(x), plain(x)
    assert_close(y, expected)
    y.square().sum().backward()
    (wanted,) = torch.autograd.grad(expected.square().sum(), plain.weight)
    assert_close(raw.grad, 2 * wanted + wanted.flip(1), rtol=1e-3, atol=1e-3)
    folded = fold(nn.Sequential(layer, nn.BatchNorm2d(8)))
    assert_close(folded(x), expected / (1 + 1e-5) ** 0.5, rtol=1e-4, atol=1e-4)
    assert parametrize.is_parametrized(layer)


@pytest.mark.parametrize("register", [nn.utils.weight_norm, nn.utils.spectral_norm])
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_a_weight_made_by_a_hook(register):
    layer, x = conv(), image()
    register(layer)
    layer(x).square().sum().backward()  # in training, which spectral_norm's vectors move in
    layer.eval()
    y = layer(x)
    expected = nn.functional.conv2d(x, standardize_weight(layer.weight), layer.bias, padding=1)
    assert_close(y, expected, rtol=1e-4, atol=1e-4)
    assert all(p.grad is not None for p in layer.parameters())
    with pytest.raises(ValueError, match="weight of .* is made by a hook"):
        fold(nn.Sequential(layer, nn.BatchNorm2d(8)))


@norms
def test_functional_call(norm):
    model = make(norm)
    twin = copy.deepcopy(model)
    state = {k: v.detach().clone() for k, v in twin.state_dict().items()}
    with torch.no_grad():
        for value in [*model.parameters(), *model.buffers()]:
            value.add_(1)  # none of which may be used
    before = copy.deepcopy(dict(model.state_dict()))
    x = image()
    weights = {k: v.requires_grad_() if v.is_floating_point() and "running" not in k else v
               for k, v in state.items()}  # fmt: skip
    y = functional_call(model, weights, (x,))
    expected = twin(x)
    assert torch.equal(y, expected)
    y.square().sum().backward()
    expected.square().sum().backward()
    for name, parameter in twin.named_parameters():
        assert_close(weights[name].grad, parameter.grad)
    for name, buffer in twin.named_buffers():
        assert torch.equal(weights[name], buffer)
    assert_close(dict(model.state_dict()), before, rtol=0, atol=0)


@norms
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_models_of_another_precision(norm, dtype):
    model = make(norm)
    x = image()
    expected = copy.deepcopy(model).eval()(x)
    other = copy.deepcopy(model).to(dtype)
    y = other.eval()(x.to(dtype))
    assert y.dtype == dtype
    tolerance = 1e-4 if dtype == torch.float64 else 0.1
    assert_close(y.float(), expected, rtol=tolerance, atol=tolerance)
    leaf = x.to(dtype).requires_grad_()
    other.train()(leaf).square().mean().backward()
    assert leaf.grad.isfinite().all() and leaf.grad.dtype == dtype
    assert other[0].norm.state_dict()[
        next(k for k in other[0].norm.state_dict() if k.endswith("num_batches_tracked"))
    ] == 4  # fmt: skip
    assert_close(other.float().eval()(x), expected, rtol=0.1, atol=0.1)


@norms
def test_channels_last(norm):
    model, x = make(norm), image()
    twin = copy.deepcopy(model).to(memory_format=torch.channels_last)
    last = x.contiguous(memory_format=torch.channels_last)
    for _ in range(2):
        y = twin(last)
        assert y.is_contiguous(memory_format=torch.channels_last)
        assert_close(y, model(x), rtol=1e-4, atol=1e-4)
    assert_close(dict(twin.named_buffers()), dict(model.named_buffers()), rtol=1e-4, atol=1e-4)
