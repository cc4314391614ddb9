"""What a ResNet or a FPN detector of a given kind must hold: names and shapes, by arithmetic.

The tables are generated from the architecture's description, never read off the checkpoint that
is being checked, so a missing, extra or transposed tensor is found before a model is built.
Names are Detectron2's, without the ``backbone.bottom_up.`` prefix for backbones.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from .errors import CheckpointError, shortened

BOTTOM_UP = "backbone.bottom_up."

_DEPTHS = {  # (bottleneck?, blocks per stage) -> depth
    (False, (2, 2, 2, 2)): 18,
    (False, (3, 4, 6, 3)): 34,
    (True, (3, 4, 6, 3)): 50,
    (True, (3, 4, 23, 3)): 101,
    (True, (3, 8, 36, 3)): 152,
}
_GROUPINGS = {  # shape[:2] of res2.0.conv2.weight -> (groups, width per group)
    (64, 64): (1, 64),
    (128, 128): (1, 128),
    (128, 4): (32, 4),
    (256, 8): (32, 8),
    (256, 4): (64, 4),
}
# What a norm of each kind holds: suffix -> channels ("C"), groups ("G") or a scalar ("1").
NORM_ENTRIES = {
    "GN": {"weight": "C", "bias": "C"},
    "BN": {
        "weight": "C",
        "bias": "C",
        "running_mean": "C",
        "running_var": "C",
        "num_batches_tracked": "1",
    },
    "BCN": {
        "weight": "G",
        "bias": "G",
        "bn.weight": "C",
        "bn.bias": "C",
        "bn.running_mean": "C",
        "bn.running_var": "C",
        "bn.num_batches_tracked": "1",
    },
}
# A counter that Detectron2's frozen norms do not keep; never a reason to refuse a file.
OPTIONAL_SUFFIX = "num_batches_tracked"


def norm_kind(names) -> str | None:
    """Tells the kind of norm from Detectron2 names.

    Args:
        names: iterable of str.

    Returns:
        "BCN", "BN" (with its frozen, synchronized and estimated relatives), "GN" (group norm or
        any other pair of per-channel weight and bias) or None where there is no norm.
    """
    suffixes = {name.partition(".norm.")[2] for name in names if ".norm." in name}
    if "bn.running_mean" in suffixes:
        return "BCN"
    if "running_mean" in suffixes:
        return "BN"
    return "GN" if "weight" in suffixes else None


@dataclass(frozen=True)
class BackboneLayout:
    """Description of one ResNet.

    Attributes:
        depth: 18, 34, 50, 101 or 152.
        blocks: blocks in res2..res5.
        bottleneck: three convs per block instead of two.
        groups, width_per_group: as in ``MODEL.RESNETS``.
        norm: "GN", "BCN" or "BN".
        norm_groups: groups of the norm, from the group affine's length (BCN only; else 32).
    """

    depth: int
    blocks: tuple[int, ...]
    bottleneck: bool
    groups: int
    width_per_group: int
    norm: str
    norm_groups: int = 32

    @property
    def name(self) -> str:
        """Short name such as ``R-50`` or ``X-101-32x4d``."""
        if self.groups == 1:
            return f"R-{self.depth}"
        return f"X-{self.depth}-{self.groups}x{self.width_per_group}d"

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Returns all names and shapes, ``num_batches_tracked`` included."""
        table = {}
        self._conv(table, "stem.conv1", 64, 3, 7)
        channels = 64
        for index, count in enumerate(self.blocks):
            out = (256 if self.bottleneck else 64) * 2**index
            width = self.groups * self.width_per_group * 2**index
            for block in range(count):
                name = f"res{index + 2}.{block}"
                if self.bottleneck:
                    self._conv(table, f"{name}.conv1", width, channels, 1)
                    self._conv(table, f"{name}.conv2", width, width // self.groups, 3)
                    self._conv(table, f"{name}.conv3", out, width, 1)
                else:
                    self._conv(table, f"{name}.conv1", out, channels, 3)
                    self._conv(table, f"{name}.conv2", out, out, 3)
                if channels != out:
                    self._conv(table, f"{name}.shortcut", out, channels, 1)
                channels = out
        return table

    def _conv(self, table, name, out, inputs, kernel):
        table[f"{name}.weight"] = (out, inputs, kernel, kernel)
        table.update(norm_shapes(f"{name}.norm", self.norm, out, self.norm_groups))


def norm_shapes(name: str, kind: str, channels: int, groups: int = 32) -> dict[str, tuple]:
    """Returns the names and shapes of one norm of a kind (a key of ``NORM_ENTRIES``)."""
    sizes = {"C": (channels,), "G": (groups,), "1": ()}
    return {f"{name}.{suffix}": sizes[what] for suffix, what in NORM_ENTRIES[kind].items()}


def infer_backbone(state: Mapping[str, torch.Tensor]) -> BackboneLayout:
    """Works out which ResNet a state dict of bare Detectron2 names belongs to.

    Args:
        state: names such as ``res2.0.conv1.weight`` -> tensors.

    Returns:
        BackboneLayout. Only names and two shapes are looked at; see `check_shapes`.

    Raises:
        CheckpointError: no known ResNet has these blocks, widths or norms.
    """
    blocks = {}
    for name in state:
        if match := re.match(r"res([2-5])\.(\d+)\.", name):
            blocks.setdefault(int(match[1]), set()).add(int(match[2]))
    counts = tuple(len(blocks.get(stage, ())) for stage in (2, 3, 4, 5))
    bottleneck = "res2.0.conv3.weight" in state
    depth = _DEPTHS.get((bottleneck, counts))
    if depth is None:
        kind = "bottleneck" if bottleneck else "basic"
        raise CheckpointError(f"no known ResNet has {counts} {kind} blocks in res2..res5")
    kind = norm_kind(state)
    if kind is None:
        raise CheckpointError("the backbone has no norm parameters: not a GN, BN or BCN ResNet")
    grouping = (1, 64)
    if bottleneck:
        conv2 = state.get("res2.0.conv2.weight")
        shape = None if conv2 is None else tuple(conv2.shape)
        grouping = _GROUPINGS.get(shape[:2]) if shape else None
        if grouping is None:
            raise CheckpointError(
                f"res2.0.conv2.weight has shape {shape}, which no known ResNet or ResNeXt has"
            )
    affine = state.get("stem.conv1.norm.weight")
    groups = affine.numel() if kind == "BCN" and affine is not None else 32
    return BackboneLayout(depth, counts, bottleneck, *grouping, kind, groups)


def check_shapes(state: Mapping[str, torch.Tensor], expected: Mapping[str, tuple]) -> None:
    """Compares a state dict with a table of names and shapes.

    Args:
        state: names -> tensors.
        expected: names -> shapes; ``num_batches_tracked`` may be missing from the state.

    Raises:
        CheckpointError: with the missing and extra names and the shapes that differ.
    """
    missing = [n for n in expected if n not in state and not n.endswith(OPTIONAL_SUFFIX)]
    extra = [n for n in state if n not in expected]
    wrong = [
        f"{n} is {tuple(state[n].shape)} instead of {tuple(shape)}"
        for n, shape in expected.items()
        if n in state and tuple(state[n].shape) != tuple(shape)
    ]
    faults = [
        f"{len(found)} {what}: {shortened(found)}"
        for what, found in (
            ("parameters are missing", missing),
            ("are not part of this architecture", extra),
            ("have the wrong shape", wrong),
        )
        if found
    ]
    if faults:
        raise CheckpointError("; ".join(faults))


def split_backbone(names) -> tuple[str, dict[str, str]]:
    """Finds the ResNet among Detectron2 names.

    Args:
        names: iterable of str, a FPN detector's, a C4 or DC5 detector's or a bare backbone's.

    Returns:
        (kind, bare name -> name as given); the kind is "fpn", "c4", "bare" or, without a ResNet,
        "". A C4 detector's ``roi_heads.res5`` counts as part of its ResNet.
    """
    names = list(names)
    for kind, prefix in (
        ("fpn", r"backbone\.bottom_up\."),
        ("c4", r"(?:backbone\.|roi_heads\.(?=res5))"),
        ("bare", ""),
    ):
        pattern = re.compile(rf"{prefix}((?:stem|res[2-5])\..+)")
        found = {match[1]: match[0] for name in names if (match := pattern.fullmatch(name))}
        if found:
            return kind, found
    return "", {}


def detector_shapes(rest: Mapping[str, torch.Tensor], layout: BackboneLayout) -> dict[str, tuple]:
    """Names and shapes of FPN, RPN, 4conv1fc box head and mask head of a two-stage detector.

    Widths that a configuration may choose (FPN channels, fc size, classes, anchors) are taken
    from one tensor each and everything else follows from them.

    Args:
        rest: a detector's parameters without the ResNet, Detectron2 names.
        layout: its ResNet.

    Returns:
        names -> shapes.

    Raises:
        CheckpointError: one of the tensors that fix the widths is missing.
    """

    def size(name, dim=0):
        if name not in rest:
            raise CheckpointError(f"the detector has no {name}")
        return rest[name].shape[dim]

    table, box, roi = {}, "roi_heads.box_head.", "roi_heads."
    kind = norm_kind(rest)

    def conv(name, out, inputs, kernel, norm=kind):
        table[f"{name}.weight"] = (out, inputs, kernel, kernel)
        table.update(norm_shapes(f"{name}.norm", norm, out) if norm else {f"{name}.bias": (out,)})

    fpn = size("backbone.fpn_lateral2.weight")
    for stage in (2, 3, 4, 5):
        bottom = (256 if layout.bottleneck else 64) * 2 ** (stage - 2)
        conv(f"backbone.fpn_lateral{stage}", fpn, bottom, 1)
        conv(f"backbone.fpn_output{stage}", fpn, fpn, 3)
    anchors = size("proposal_generator.rpn_head.objectness_logits.weight")
    conv("proposal_generator.rpn_head.conv", fpn, fpn, 3, None)
    conv("proposal_generator.rpn_head.objectness_logits", anchors, fpn, 1, None)
    conv("proposal_generator.rpn_head.anchor_deltas", 4 * anchors, fpn, 1, None)

    def count(stem):
        pattern = re.compile(re.escape(roi + stem) + r"\d+\.weight")
        return sum(pattern.fullmatch(name) is not None for name in rest)

    channels = fpn
    for index in range(count("box_head.conv")):
        out = size(f"{box}conv{index + 1}.weight")
        conv(f"{box}conv{index + 1}", out, channels, 3)
        channels = out
    channels *= 49
    for index in range(count("box_head.fc")):
        out = size(f"{box}fc{index + 1}.weight")
        table[f"{box}fc{index + 1}.weight"] = (out, channels)
        table[f"{box}fc{index + 1}.bias"] = (out,)
        channels = out
    classes = size(f"{roi}box_predictor.cls_score.weight") - 1
    boxes = size(f"{roi}box_predictor.bbox_pred.weight")
    boxes = 4 if boxes == 4 else 4 * classes  # 4: class-agnostic
    for name, out in (("cls_score", classes + 1), ("bbox_pred", boxes)):
        table[f"{roi}box_predictor.{name}.weight"] = (out, channels)
        table[f"{roi}box_predictor.{name}.bias"] = (out,)
    if any(name.startswith("roi_heads.mask_head.") for name in rest):
        width = size(f"{roi}mask_head.deconv.weight", 1)
        for index in range(count("mask_head.mask_fcn")):
            conv(f"{roi}mask_head.mask_fcn{index + 1}", width, width if index else fpn, 3)
        conv(f"{roi}mask_head.deconv", width, width, 2, None)
        conv(f"{roi}mask_head.predictor", classes, width, 1, None)
    return table
