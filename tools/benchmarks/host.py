"""Host time of tools/benchmark.py: what layers cost the CPU before a GPU has anything to do.

At one or two images a step waits for launches, so that the time that Python, the dispatcher and
autograd take for each layer is what a user feels. It is measured without a GPU: on a CPU, on
activations of one pixel, for which PyTorch's own kernels do next to nothing, and with the launches
of Triton's kernels replaced by calls that do nothing.
"""

import contextlib
import importlib.util
import os
from unittest import mock

import torch
from torch import nn

from wsbcn_d2 import BatchChannelNorm2d, WSConv2d
from wsbcn_d2.layers import reparametrized_conv

from .runner import Runner, ratio, shown

_DEPTH, _CHANNELS = 20, 64


@contextlib.contextmanager
def launches_stubbed():
    """Within, the layers run on CPU tensors what they run on a GPU, but nothing is launched."""
    from wsbcn_d2.layers.kernels import cuda_nodes, triton_bcn, triton_ws
    from wsbcn_d2.layers.kernels import triton_launch as launch

    def stub(code, programs, aligned, args):
        code.run = lambda *args: None  # the direct way from here on
        code.plain = 0, 0, 0

    with (
        mock.patch.dict(os.environ, {"WSBCN_FUSED": "triton"}),
        mock.patch.object(launch, "on_gpu", lambda x: True),
        mock.patch.object(launch, "_raw_stream", lambda device: 0),
        mock.patch.object(launch._Code, "launch", stub),
        # On a GPU a standardized weight is kept until backward.
        mock.patch.object(reparametrized_conv, "recomputes", lambda *args: False),
    ):
        yield
    # What was prepared launches nothing.
    for kept in (launch.code, triton_bcn._forward, triton_bcn._backward, triton_ws._plan):
        kept.cache_clear()
    if cuda_nodes.nodes() is not None:
        cuda_nodes.nodes().forget()


def host_mode(runner: Runner, args) -> dict:
    """Norms and convolutions in a chain, forward and backward: microseconds a layer."""
    if importlib.util.find_spec("triton") is None:
        raise SystemExit("host mode needs Triton, which is not installed")
    makers = {
        "GroupNorm": lambda: nn.GroupNorm(32, _CHANNELS),
        "BCN": lambda: BatchChannelNorm2d(_CHANNELS),
        "convolution": lambda: nn.Conv2d(_CHANNELS, _CHANNELS, 1, bias=False),
        "WS convolution": lambda: WSConv2d(_CHANNELS, _CHANNELS, 1, bias=False),
    }
    torch.set_num_threads(1)
    x = torch.randn(1, _CHANNELS, 1, 1, requires_grad=True)
    dy, repeats = torch.randn_like(x), 1 if args.quick else 20

    def run(chain):
        for _ in range(repeats):
            chain(x).backward(dy)

    torch.set_flush_denormal(True)  # which memory that no kernel has written may hold
    with launches_stubbed():
        chains = {n: nn.Sequential(*[f() for _ in range(_DEPTH)]) for n, f in makers.items()}
        times = runner.rounds({n: lambda c=c: run(c) for n, c in chains.items()})
    torch.set_flush_denormal(False)
    scale = 1e6 / _DEPTH / repeats
    rows = [{"name": n, "us": t.median * scale, "iqr": t.iqr * scale} for n, t in times.items()]
    print(f"one of {_DEPTH} layers in a chain, forward + backward, launches stubbed")
    for row in rows:
        print(f"{row['name']:16} {row['us']:7.1f} us +- {row['iqr'] / 2:.1f}")
    compared = [("BCN", "GroupNorm"), ("WS convolution", "convolution")]
    summary = {f"{a} / {b}": ratio(times[a], times[b]) for a, b in compared}
    for name, found in summary.items():
        print(f"{name}: {shown(found)}")
    return {"mode": "host", "rows": rows, "summary": summary}
