"""Single layers of tools/benchmark.py: norms over activations, standardization of weights."""

from pathlib import Path
from statistics import geometric_mean

import torch
from detectron2.modeling import build_model
from torch import nn

from wsbcn_d2 import BatchChannelNorm2d, WSConv2d, standardize_weight
from wsbcn_d2.engine import load_config

from .runner import Run, Runner, milliseconds, ratio, shown

_R50_FPN = "configs/COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_2x_gn_ws_1img.yaml"


class ReleasedBCN(nn.Module):
    """BCN as in the authors' README: what it costs, with the update rate that moves it."""

    def __init__(self, channels: int, groups: int = 32, rate: float = 0.01, eps: float = 1e-5):
        super().__init__()
        self.groups, self.eps = groups, eps
        self.bn_weight = nn.Parameter(torch.ones(1, channels, 1, 1))
        self.bn_bias = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.weight = nn.Parameter(torch.ones(1, groups, 1))
        self.bias = nn.Parameter(torch.zeros(1, groups, 1))
        self.register_buffer("mean", torch.zeros(1, channels, 1, 1))
        self.register_buffer("var", torch.ones(1, channels, 1, 1))
        self.register_buffer("moving_speed", torch.full((1,), rate))

    def forward(self, x):
        with torch.no_grad():
            speed = self.moving_speed.item()
            batch_mean = x.mean(dim=(0, 2, 3), keepdim=True)
            batch_var = (x - self.mean).square().mean(dim=(0, 2, 3), keepdim=True)
            self.mean += speed * (batch_mean - self.mean)
            self.var += speed * (batch_var - self.var)
            mean, deviation = self.mean.clone(), (self.var + self.eps).sqrt()
        y = (x - mean) / deviation * self.bn_weight + self.bn_bias
        y = y.reshape(1, x.shape[0] * self.groups, -1)
        y = torch.batch_norm(y, None, None, None, None, True, 0.0, self.eps, False)
        y = y.view(x.shape[0], self.groups, -1) * self.weight + self.bias
        return y.view(x.shape)


def r50_fpn_shapes(height: int, width: int) -> list[tuple[int, int, int]]:
    """(C, H, W) of every distinct activation of R-50-FPN that a norm sees."""
    shapes = [(64, height // 2, width // 2)]
    for level, channels in zip((4, 8, 16, 32), (64, 128, 256, 512), strict=True):
        size = height // level, width // level
        for c in dict.fromkeys((channels, 4 * channels, 256)):
            shapes.append((c, *size))
    return shapes


def saved_bytes(module: nn.Module, x: torch.Tensor) -> int:
    """Bytes of the distinct tensors that the module keeps for backward."""
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        module(x)
    return sum(kept.values())


def layer_mode(runner: Runner, args) -> dict:
    """Norms over the activations of R-50-FPN."""
    makers = {"gn": lambda c: nn.GroupNorm(32, c), "bcn": BatchChannelNorm2d, "bn": nn.BatchNorm2d}
    compared = {
        "bcn / gn fwd": ("bcn fwd", "gn fwd"),
        "bcn / gn": ("bcn", "gn"),
        "bcn / bn": ("bcn", "bn"),
    }
    if args.released:
        makers["released"] = ReleasedBCN
        compared["released / bcn"] = ("released", "bcn")
    rows = []
    print("forward and backward, or forward alone (fwd); bytes kept, bcn / gn; time of gn")
    for images in args.images:
        for shape in r50_fpn_shapes(*args.image_size):
            x = torch.randn(images, *shape, device=args.device)
            if args.channels_last:
                x = x.contiguous(memory_format=torch.channels_last)
            norms = {name: make(shape[0]).to(args.device) for name, make in makers.items()}
            times = runner.rounds(_layer_runs(norms, x.requires_grad_()))
            ms = {name: milliseconds(time) for name, time in times.items()}
            ratios = {key: ratio(times[a], times[b]) for key, (a, b) in compared.items()}
            with runner.autocast():
                kept = saved_bytes(norms["bcn"], x) / saved_bytes(norms["gn"], x)
            rows.append({"shape": [images, *shape], "ms": ms, **ratios, "bytes": kept})
            name = "x".join(map(str, rows[-1]["shape"]))
            parts = "  ".join(f"{key} {shown(found)}" for key, found in ratios.items())
            print(f"{name:18}  {parts}  bytes {kept:.3f}  ({ms['gn']:.3g} ms)", flush=True)
    summary = {key: geometric_mean(row[key]["ratio"] for row in rows) for key in compared}
    summary["bytes (largest)"] = max(row["bytes"] for row in rows)
    bcn, gn = (sum(row["ms"][name] for row in rows) for name in ("bcn", "gn"))
    summary["bcn / gn, sum of times"] = bcn / gn
    print("geometric means: " + ", ".join(f"{k} {v:.3f}" for k, v in summary.items()))
    return {"mode": "layer", "rows": rows, "summary": summary}


def _layer_runs(norms: dict[str, nn.Module], x: torch.Tensor) -> dict[str, Run]:
    dy = torch.randn_like(x)

    def both(norm):
        y = norm(x)
        y.backward(dy.to(y.dtype))
        x.grad = None

    forward = {f"{name} fwd": lambda n=norm: n(x) for name, norm in norms.items()}
    return forward | {name: lambda n=norm: both(n) for name, norm in norms.items()}


def five_ops(weight: torch.Tensor, eps: float = 1e-5) -> torch.Tensor:
    """WS as the authors released it, whose view() takes contiguous weights alone."""
    mean = weight.mean(dim=1, keepdim=True).mean(dim=2, keepdim=True).mean(dim=3, keepdim=True)
    weight = weight - mean
    deviation = weight.reshape(weight.shape[0], -1).std(dim=1).view(-1, 1, 1, 1) + eps
    return weight / deviation.expand_as(weight)


def ws_mode(runner: Runner, args) -> dict:
    """Standardizing every weight of a model, forward and backward."""
    config = args.configs[0] if args.configs else str(Path(__file__).parents[2] / _R50_FPN)
    model = build_model(load_config(config, ["MODEL.DEVICE", args.device]))
    weights = [m.weight.requires_grad_() for m in model.modules() if isinstance(m, WSConv2d)]
    if args.quick:
        weights = weights[:3]
    if args.channels_last:
        weights = [w.detach().to(memory_format=torch.channels_last) for w in weights]
        weights = [w.requires_grad_() for w in weights]
    grads = [torch.randn_like(w) for w in weights]
    size = sum(w.numel() for w in weights) / 1e6
    print(f"{len(weights)} weights, {size:.1f} M numbers; ratios: time / ours, fwd+bwd")

    def run(function):
        for weight, grad in zip(weights, grads, strict=True):
            function(weight).backward(grad)
            weight.grad = None

    functions = {
        formula: lambda w, f=formula: standardize_weight(w, formula=f)
        for formula in ("unbiased", "biased", "unbiased_std")
    }
    functions |= {"five-op formula": five_ops, "copy": torch.clone}
    times = runner.rounds({name: lambda f=f: run(f) for name, f in functions.items()})
    rows = []
    for name, time in times.items():
        ms, found = milliseconds(time), ratio(time, times["unbiased"])
        rows.append({"name": name, "ms": ms, "time / ours": found})
        print(f"{name:18}  time / ours {shown(found)}  ({ms:.3g} ms)")
    return {"mode": "ws", "rows": rows}
