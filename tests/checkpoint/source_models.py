"""The source code bases' own conventions, written down a second time and in float64.

Nothing here imports the converter. A checkpoint is described by (name, shape) pairs in the
*source's* names and filled at random; the forward passes read those names and apply the source's
own weight standardization and norms.
"""

from dataclasses import dataclass

import torch
from torch.nn import functional as F

BLOCKS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}


@dataclass(frozen=True)
class Net:
    """One source ResNet: names and conventions.

    ``norm_name`` maps conv's number to its norm's name; ``batch`` is the attribute name of BCN's
    batch half, "" for other norms.
    """

    depth: int = 50
    groups: int = 1
    width: int = 64
    norm: str = "GN"  # GN, BCN or BN
    ws: str = "std"  # std: / (std + eps); var: / sqrt(var + eps); "": no WS
    norm_name: str = "bn"
    batch: str = "pbn"
    prefix: str = ""
    stem: str = ""
    stride_in_1x1: bool = False


def standardized(weight, ws):
    """Unbiased statistics per output filter, in the weight's own dtype."""
    if not ws:
        return weight
    flat = weight.flatten(1)
    centred = flat - flat.mean(1, keepdim=True)
    if ws == "std":
        centred = centred / (flat.std(1, keepdim=True) + 1e-5)
    elif ws == "var":
        centred = centred / torch.sqrt(flat.var(1, keepdim=True) + 1e-5)
    else:
        raise AssertionError(ws)
    return centred.view_as(weight)


def norm_entries(net, name, channels):
    yield f"{name}.weight", (1, 32, 1) if net.norm == "BCN" else (channels,)
    yield f"{name}.bias", (1, 32, 1) if net.norm == "BCN" else (channels,)
    inner = f"{name}.{net.batch}" if net.norm == "BCN" else name
    if net.norm == "BCN":
        yield f"{inner}.weight", (channels,)
        yield f"{inner}.bias", (channels,)
    if net.norm != "GN":
        yield f"{inner}.running_mean", (channels,)
        yield f"{inner}.running_var", (channels,)
        yield f"{inner}.num_batches_tracked", ()


def resnet_entries(net, classifier=True):
    """(name, shape) of every entry, in torchvision's order."""
    stem, body = net.prefix + net.stem, net.prefix
    yield f"{stem}conv1.weight", (64, 3, 7, 7)
    yield from norm_entries(net, f"{stem}{net.norm_name}1", 64)
    channels = 64
    for stage, count in enumerate(BLOCKS[net.depth]):
        width, out = net.groups * net.width * 2**stage, 256 * 2**stage
        for block in range(count):
            name = f"{body}layer{stage + 1}.{block}"
            convs = ((width, channels, 1), (width, width // net.groups, 3), (out, width, 1))
            for number, (size, inputs, kernel) in enumerate(convs, 1):
                yield f"{name}.conv{number}.weight", (size, inputs, kernel, kernel)
                yield from norm_entries(net, f"{name}.{net.norm_name}{number}", size)
            if block == 0:
                yield f"{name}.downsample.0.weight", (out, channels, 1, 1)
                yield from norm_entries(net, f"{name}.downsample.1", out)
            channels = out
    if classifier:
        yield "fc.weight", (1000, 2048)
        yield "fc.bias", (1000,)


def random_state(entries, seed=0, dtype=torch.float64):
    """Random values; convolution filters have scales over three decades, 10^U(-2.5, 0.5)."""
    gen = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in entries:
        if name.endswith("num_batches_tracked"):
            state[name] = torch.tensor(1234)
        elif len(shape) == 4:
            filters = torch.randn(shape, generator=gen, dtype=torch.float32).to(dtype)
            scale = 10 ** (torch.rand(shape[0], 1, 1, 1, generator=gen, dtype=dtype) * 3 - 2.5)
            state[name] = filters.mul_(scale)
        elif len(shape) == 2:
            state[name] = torch.randn(shape, generator=gen).to(dtype).mul_(0.01)
        elif name.endswith(("running_var", ".weight", "_s")):
            state[name] = torch.rand(shape, generator=gen, dtype=dtype) + 0.5
        else:
            state[name] = torch.randn(shape, generator=gen, dtype=dtype) * 0.3
    return state


def normalized(x, state, net, name):
    """The source's norm, in eval mode."""
    if net.norm != "GN":
        inner = f"{name}.{net.batch}." if net.norm == "BCN" else f"{name}."
        mean, var, weight, bias = (
            state[inner + part].view(1, -1, 1, 1)
            for part in ("running_mean", "running_var", "weight", "bias")
        )
        x = (x - mean) / torch.sqrt(var + 1e-5) * weight + bias
        if net.norm == "BN":
            return x
    n, c, h, w = x.shape
    grouped = x.reshape(n, 32, -1)
    mean = grouped.mean(2, keepdim=True)
    var = grouped.var(2, unbiased=False, keepdim=True)
    grouped = (grouped - mean) / torch.sqrt(var + 1e-5)
    if net.norm == "BCN":  # one weight and bias for each group
        return (grouped * state[f"{name}.weight"] + state[f"{name}.bias"]).view(n, c, h, w)
    return grouped.view(n, c, h, w) * state[f"{name}.weight"].view(1, -1, 1, 1) + state[
        f"{name}.bias"
    ].view(1, -1, 1, 1)


def resnet_forward(state, net, x, trace=None):
    """res2..res5 of the source network; ``trace`` collects (stem or block, input, output)."""

    def record(name, given, result):
        if trace is not None:
            trace.append((name, given, result))

    def conv(x, name, stride=1, padding=0, groups=1):
        weight = standardized(state[name + ".weight"], net.ws)
        return F.conv2d(x, weight, None, stride, padding, 1, groups)

    stem = net.prefix + net.stem
    given, x = x, conv(x, f"{stem}conv1", 2, 3)
    x = F.max_pool2d(normalized(x, state, net, f"{stem}{net.norm_name}1").relu(), 3, 2, 1)
    record("stem", given, x)
    features = []
    for stage, count in enumerate(BLOCKS[net.depth]):
        for block in range(count):
            name, stride = f"{net.prefix}layer{stage + 1}.{block}", 2 if block == 0 < stage else 1
            given = x
            first, second = (stride, 1) if net.stride_in_1x1 else (1, stride)
            y = conv(x, f"{name}.conv1", first)
            y = normalized(y, state, net, f"{name}.{net.norm_name}1").relu()
            y = conv(y, f"{name}.conv2", second, 1, net.groups)
            y = normalized(y, state, net, f"{name}.{net.norm_name}2").relu()
            y = normalized(conv(y, f"{name}.conv3"), state, net, f"{name}.{net.norm_name}3")
            if block == 0:
                x = conv(x, f"{name}.downsample.0", stride)
                x = normalized(x, state, net, f"{name}.downsample.1")
            x = (x + y).relu()
            record(f"res{stage + 2}.{block}", given, x)
        features.append(x)
    return features


@dataclass(frozen=True)
class Heads:
    """Names of a source detector's parts, templates with the level or number from 0."""

    lateral: tuple[str, str]  # conv, norm; {0}: 0..3
    output: tuple[str, str]
    rpn: tuple[str, str, str]
    box_conv: tuple[tuple[str, str], ...]
    fc: str
    cls: str
    reg: str
    mask_conv: tuple[tuple[str, str], ...]
    deconv: str
    logits: str
    background_first: bool
    classes: int = 80


def mmdet_heads(version):
    """mmdetection's names; version 1 has no ``roi_head.`` and keeps the background first."""
    roi = "roi_head." if version > 1 else ""
    return Heads(
        lateral=("neck.lateral_convs.{0}.conv", "neck.lateral_convs.{0}.gn"),
        output=("neck.fpn_convs.{0}.conv", "neck.fpn_convs.{0}.gn"),
        rpn=("rpn_head.rpn_conv", "rpn_head.rpn_cls", "rpn_head.rpn_reg"),
        box_conv=tuple(
            (f"{roi}bbox_head.shared_convs.{i}.conv", f"{roi}bbox_head.shared_convs.{i}.gn")
            for i in range(4)
        ),
        fc=f"{roi}bbox_head.shared_fcs.0",
        cls=f"{roi}bbox_head.fc_cls",
        reg=f"{roi}bbox_head.fc_reg",
        mask_conv=tuple(
            (f"{roi}mask_head.convs.{i}.conv", f"{roi}mask_head.convs.{i}.gn") for i in range(4)
        ),
        deconv=f"{roi}mask_head.upsample",
        logits=f"{roi}mask_head.conv_logits",
        background_first=version == 1,
    )


def head_entries(heads, mask=True):
    """(name, shape) of FPN, RPN and ROI heads."""

    def with_bias(name, shape, rows=None):
        return (f"{name}.weight", shape), (f"{name}.bias", (rows or shape[0],))

    def with_gn(names, shape):
        conv, norm = names
        return (
            (f"{conv}.weight", shape),
            (f"{norm}.weight", (shape[0],)),
            (f"{norm}.bias", (shape[0],)),
        )

    for level in range(4):
        lateral, output = (
            tuple(n.format(level, level + 1) for n in names)
            for names in (heads.lateral, heads.output)
        )
        yield from with_gn(lateral, (256, 256 * 2**level, 1, 1))
        yield from with_gn(output, (256, 256, 3, 3))
    yield from with_bias(heads.rpn[0], (256, 256, 3, 3))
    yield from with_bias(heads.rpn[1], (3, 256, 1, 1))
    yield from with_bias(heads.rpn[2], (12, 256, 1, 1))
    for names in heads.box_conv:
        yield from with_gn(names, (256, 256, 3, 3))
    yield from with_bias(heads.fc, (1024, 256 * 49))
    first = int(heads.background_first)
    yield from with_bias(heads.cls, (heads.classes + 1, 1024))
    yield from with_bias(heads.reg, (4 * (heads.classes + first), 1024))
    if mask:
        for names in heads.mask_conv:
            yield from with_gn(names, (256, 256, 3, 3))
        yield from with_bias(heads.deconv, (256, 256, 2, 2))
        yield from with_bias(heads.logits, (heads.classes + first, 256, 1, 1))


def detector_forward(state, heads, features, boxes, masks, ws="std"):
    """FPN, RPN, box and mask outputs of the source.

    Args:
        features: res2..res5. boxes: (R, 256, 7, 7). masks: (R, 256, 14, 14) or None.

    Returns:
        dict of tensors; class scores with the background last, box deltas and mask logits without
        a background, which is what "class k" means in either source.
    """
    net = Net(norm="GN")

    def conv_gn(x, names, padding):
        weight = standardized(state[names[0] + ".weight"], ws)
        return normalized(F.conv2d(x, weight, None, 1, padding), state, net, names[1])

    def plain(x, name, padding=0):
        return F.conv2d(x, state[name + ".weight"], state[name + ".bias"], 1, padding)

    out, top = {}, None
    for level in reversed(range(4)):
        lateral, output = (
            tuple(n.format(level, level + 1) for n in names)
            for names in (heads.lateral, heads.output)
        )
        inner = conv_gn(features[level], lateral, 0)
        top = inner if top is None else inner + F.interpolate(top, scale_factor=2.0, mode="nearest")
        out[f"p{level + 2}"] = conv_gn(top, output, 1)
    hidden = plain(out["p4"], heads.rpn[0], 1).relu()
    out["objectness"], out["deltas"] = plain(hidden, heads.rpn[1]), plain(hidden, heads.rpn[2])
    x = boxes
    for names in heads.box_conv:
        x = conv_gn(x, names, 1).relu()
    x = F.linear(x.flatten(1), state[heads.fc + ".weight"], state[heads.fc + ".bias"]).relu()
    scores = F.linear(x, state[heads.cls + ".weight"], state[heads.cls + ".bias"])
    deltas = F.linear(x, state[heads.reg + ".weight"], state[heads.reg + ".bias"])
    if heads.background_first:
        # Class k (0-based, without background) is row k + 1; the background is row 0.
        rows = list(range(1, heads.classes + 1))
        scores = scores[:, [*rows, 0]]
        deltas = deltas.view(len(x), -1, 4)[:, rows].flatten(1)
    out["scores"], out["boxes"] = scores, deltas
    if masks is not None:
        x = masks
        for names in heads.mask_conv:
            x = conv_gn(x, names, 1).relu()
        weight, bias = state[heads.deconv + ".weight"], state[heads.deconv + ".bias"]
        x = plain(F.conv_transpose2d(x, weight, bias, stride=2).relu(), heads.logits)
        out["masks"] = x[:, 1:] if heads.background_first else x
    return out


def caffe2_names(state):
    """The names that Caffe2 gave the same ResNet: torchvision-style GN names -> blobs."""
    blobs = {}
    for name, tensor in state.items():
        parts = name.split(".")
        if parts[0] == "fc":
            blobs["pred_w" if parts[1] == "weight" else "pred_b"] = tensor
            continue
        tail = {"weight": "s", "bias": "b"}[parts[-1]]
        if parts[0] in ("conv1", "bn1"):
            blobs["conv1_w" if parts[0] == "conv1" else f"conv1_gn_{tail}"] = tensor
            continue
        stage, block, module = int(parts[0][-1]) + 1, parts[1], parts[2]
        if module == "downsample":
            branch, is_conv = "branch1", parts[3] == "0"
        else:
            branch, is_conv = "branch2" + "abc"[int(module[-1]) - 1], module.startswith("conv")
        stem = f"res{stage}_{block}_{branch}"
        blobs[f"{stem}_w" if is_conv else f"{stem}_gn_{tail}"] = tensor
    return blobs
