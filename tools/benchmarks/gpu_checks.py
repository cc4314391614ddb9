"""What ``gpu_report.py`` checks of the kernels on a GPU.

Each check takes the device's type and says in a few words what it found. The suite runs them in
Triton's interpreter, on ``"cpu"`` and small sizes, so that what a GPU meets first has run before.
"""

import contextlib
import copy
import os
from collections.abc import Callable, Iterator

import torch
from torch import nn

from wsbcn_d2 import BatchChannelNorm2d, WSConv2d, standardize_weight
from wsbcn_d2.layers import WS_FORMULAS
from wsbcn_d2.layers.kernels import dispatch
from wsbcn_d2.layers.kernels.cuda_nodes import nodes

LAYOUTS = (torch.contiguous_format, torch.channels_last)
# Largest error allowed, relative to the largest value.
LIMITS = {torch.float32: 5e-4, torch.float16: 5e-3, torch.bfloat16: 4e-2, torch.float64: 1e-10}
# Of all gradients of a model, relative to their norm; under autocast every layer rounds.
GRADIENT_LIMITS = {None: 1e-4, torch.float16: 0.1, torch.bfloat16: 0.4}
# N, C, H, W, groups: stem, unaligned rows, RoI maps, one pixel, one group, many samples.
SHAPES = [
    (1, 64, 400, 608, 32), (2, 256, 100, 152, 32), (2, 2048, 25, 38, 32), (512, 256, 7, 7, 32),
    (100, 256, 14, 14, 32), (3, 64, 1, 1, 32), (1, 512, 13, 19, 1), (2000, 32, 3, 3, 4),
]  # fmt: skip
SMALL = [(2, 8, 9, 8, 2), (3, 8, 7, 7, 2)]
WEIGHTS = [(64, 3, 7, 7), (256, 64, 1, 1), (512, 512, 3, 3), (64, 2048, 3, 3)]
SMALL_WEIGHTS = [(4, 3, 3, 3), (6, 8, 1, 1)]


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Within, the layers run on the backend of this name."""
    before = os.environ.get("WSBCN_FUSED")
    os.environ["WSBCN_FUSED"] = name
    try:
        yield
    finally:
        os.environ.pop("WSBCN_FUSED")
        if before is not None:
            os.environ["WSBCN_FUSED"] = before


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Largest difference relative to the largest value (or 0.1); infinite for NaN."""
    found, wanted = found.detach().double().cpu(), wanted.detach().double().cpu()
    value = float((found - wanted).abs().max() / wanted.abs().max().clamp(min=0.1))
    return value if value == value else float("inf")


def hold(value: float, limit: float, what: str) -> None:
    """Raises AssertionError for an error above its limit."""
    assert value <= limit, f"{what}: error {value:.1e}, allowed {limit:.0e}"


def step(module: nn.Module, x: torch.Tensor, dy: torch.Tensor) -> list[torch.Tensor]:
    """Output, gradients of the input and the parameters, and buffers after one pass each way."""
    module.zero_grad()
    x = x.detach().requires_grad_()
    y = module(x)
    y.backward(dy.to(y.dtype))
    grads = [p.grad.clone() for p in module.parameters() if p.grad is not None]
    return [y, x.grad, *grads, *[b.clone() for b in module.buffers()]]


def bcn_kernels(device: str, shapes=SHAPES, every_type: bool = True) -> str:
    """BCN in every type and layout, training and evaluation, against float64."""
    worst = {}
    for n, c, h, w, groups in shapes:
        for layout in LAYOUTS:
            # Every type is another six kernels to compile.
            for dtype in LIMITS if every_type else [torch.float32]:
                wide = torch.float64 if dtype == torch.float64 else torch.float32
                norm = BatchChannelNorm2d(c, groups, update_rate=0.3).to(device, wide)
                for parameter in norm.parameters():
                    nn.init.normal_(parameter, 1.0, 0.3)
                # First batch, two more, evaluation twice: the first of a kind is launched by
                # Python, which compiles it, later ones by the nodes in C++ where there are any.
                for i in range(5):
                    norm.train(i < 3)
                    exact = copy.deepcopy(norm).double()
                    x = torch.randn(n, c, h, w, device=device).mul(1 + i).add(i).to(dtype)
                    x = x.contiguous(memory_format=layout)
                    dy = torch.randn_like(x)
                    with backend("triton"):
                        tensors = norm.weight, norm.bias, norm.bn.weight, norm.bn.bias
                        moving = norm.bn.running_mean, norm.bn.running_var
                        count = norm.bn.num_batches_tracked
                        assert dispatch.bcn_backend(x, *tensors, *moving, count), "no kernels"
                        found = step(norm, x, dy)
                    with backend("off"):
                        wanted = step(exact, x.double(), dy.double())
                    later = device != "cpu" and nodes() is not None and i in (1, 2, 4)
                    name = found[0].grad_fn.name()
                    assert name == "FusedBCN" or not later, f"launched by Python's {name}"
                    assert found[0].dtype == dtype and found[0].stride() == x.stride(), "layout"
                    value = max(map(error, found, wanted))
                    # The gradient of two numbers cancels but for rounding, in any form.
                    allowed = LIMITS[dtype] * (10 if c // groups * h * w == 2 else 1)
                    hold(value, allowed, f"{(n, c, h, w)} {dtype} {layout}")
                    worst[dtype] = max(worst.get(dtype, 0.0), value)
    return ", ".join(f"{str(dtype)[6:]} {value:.0e}" for dtype, value in worst.items())


def ws_kernels(device: str, shapes=WEIGHTS) -> str:
    """WS in every formula, type and layout against float64."""
    worst = {}
    for shape in shapes:
        for layout in LAYOUTS:
            for formula in WS_FORMULAS:
                for dtype in LIMITS if formula == "unbiased" else [torch.float32]:
                    weight = torch.randn(shape, device=device).mul(0.1).add(0.02).to(dtype)
                    weight = weight.contiguous(memory_format=layout).requires_grad_()
                    dy, exact = torch.randn_like(weight), weight.detach().double().requires_grad_()
                    with backend("off"):
                        wanted = standardize_weight(exact, formula=formula)
                        (gradient,) = torch.autograd.grad(wanted, exact, dy.double())
                    for _ in range(2):  # by Python, by the nodes in C++
                        with backend("triton"):
                            out = standardize_weight(weight, formula=formula)
                            (found,) = torch.autograd.grad(out, weight, dy)
                        value = max(error(out, wanted), error(found, gradient))
                        hold(value, LIMITS[dtype], f"{shape} {formula} {dtype} {layout}")
                        worst[dtype] = max(worst.get(dtype, 0.0), value)
                    later = device != "cpu" and nodes() is not None
                    name = out.grad_fn.name()
                    assert name == "FusedWS" or not later, f"launched by Python's {name}"
    return ", ".join(f"{str(dtype)[6:]} {value:.0e}" for dtype, value in worst.items())


def model_of(width: int) -> nn.Sequential:
    """Three convolutions with WS and BCN and a classifier; smooth, since rounding at the kink of a
    ReLU moves a gradient by far more than rounding does elsewhere."""
    layers = [nn.Conv2d(3, width, 3, bias=False)]
    for _ in range(3):
        norm = BatchChannelNorm2d(width, 4, update_rate=0.1)
        layers += [WSConv2d(width, width, 3, padding=1, bias=False, norm=norm), nn.SiLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))


def training(
    device: str, amp: torch.dtype | None = None, layout=LAYOUTS[0], steps=200, width=32, size=33
) -> str:
    """Training steps; before each the readable form takes the same step from the same state."""
    model = model_of(width).to(device, memory_format=layout)
    twin, worst = copy.deepcopy(model), 0.0
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    loss = nn.CrossEntropyLoss()
    for number in range(steps):
        x = torch.randn(2, 3, size, size, device=device).contiguous(memory_format=layout)
        target = torch.randint(10, (2,), device=device)
        twin.load_state_dict(model.state_dict())
        for name, module in (("off", twin), ("triton", model)):
            module.zero_grad()
            with backend(name), torch.autocast(device, dtype=amp, enabled=amp is not None):
                value = loss(module(x).float(), target)
            with backend(name):
                value.backward()
        found, wanted = (
            torch.cat([p.grad.flatten().double() for p in module.parameters()])
            for module in (model, twin)
        )
        value = float((found - wanted).norm() / wanted.norm())
        hold(value, GRADIENT_LIMITS[amp], f"step {number}, gradients")
        worst = max(worst, value)
        for (name, found), wanted in zip(model.named_buffers(), twin.buffers(), strict=True):
            hold(
                error(found, wanted), 1e-3 if amp is None else LIMITS[amp], f"step {number}, {name}"
            )
        optimizer.step()
    return f"{steps} steps, gradients within {worst:.0e}"


def no_waiting(device: str) -> str:
    """A step in which anything that makes the host wait for the GPU is an error."""
    model, x = model_of(32).to(device), torch.randn(1, 3, 33, 33, device=device)
    with backend("triton"):
        model(x).sum().backward()  # compiles
        torch.cuda.set_sync_debug_mode("error")
        try:
            model(x).sum().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return "none"


def long_offsets(device: str, shape=(36, 256, 500, 500)) -> str:
    """The last sample of a tensor of more than 2^31 elements, alone and in its place."""
    norm = BatchChannelNorm2d(shape[1]).to(device).eval()
    if device != "cpu" and torch.cuda.mem_get_info()[0] < 24 * 2**30:
        return "not run: needs 24 GB of memory"
    with backend("triton"), torch.no_grad():
        x = torch.empty(shape, device=device, dtype=torch.float16)
        x[-1].normal_()
        hold(error(norm(x)[-1], norm(x[-1:].clone())[0]), 1e-3, "last sample")
    return "same"


def other_device(device: str) -> str:
    """A layer on a GPU that is not the current one."""
    if torch.cuda.device_count() < 2:
        return "not run: one GPU"
    conv = WSConv2d(32, 32, 3, norm=BatchChannelNorm2d(32)).to("cuda:1")
    x = torch.randn(2, 32, 9, 9, device="cuda:1")
    with backend("triton"):
        found = step(copy.deepcopy(conv), x, torch.ones(2, 32, 7, 7, device="cuda:1"))
    with backend("off"):
        wanted = step(conv, x, torch.ones(2, 32, 7, 7, device="cuda:1"))
    value = max(map(error, found, wanted))
    hold(value, 1e-3, "cuda:1")
    return f"error {value:.0e}"


CHECKS: dict[str, Callable[[str], str]] = {
    **{
        "BCN against float64, {}x{}x{}x{}, {} groups".format(*shape): (
            lambda d, i=i, shape=shape: bcn_kernels(d, [shape], every_type=i % 3 == 0)
        )
        for i, shape in enumerate(SHAPES)
    },
    "WS against float64": ws_kernels,
    "training, float32": training,
    "training, channels_last": lambda d: training(d, layout=LAYOUTS[1], steps=50),
    "training, AMP float16": lambda d: training(d, torch.float16, steps=50),
    "training, AMP bfloat16": lambda d: training(d, torch.bfloat16, steps=50),
    "waiting for the GPU": no_waiting,
    "tensors beyond 2^31 elements": long_offsets,
    "a GPU that is not the current one": other_device,
}
