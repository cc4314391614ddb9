"""torchvision-style ResNet names: the authors' ImageNet files, openmmlab's mirror, torchvision.

Sources: the authors' pytorch-classification (GN+WS) and Batch-Channel-Normalization (BCN+WS)
training code, openmmlab's third-party mirror (``gn1`` for ``bn1``), torchvision's BatchNorm files.
"""

import re
from collections.abc import Mapping

import torch

from .rules import Mapped, Rule, apply_rules

_NORM = r"(?P<norm>(?:p?bn\.)?(?:weight|bias|running_mean|running_var|num_batches_tracked))"
CLASSIFIER = "classifier; a detector has none"
MOVING_SPEED = "update rate of the reference's EstBN; here it comes from MODEL.BCN.UPDATE_RATE"


def _flat(tensor):
    """The authors' group affine has shape (1, G, 1); here it is (G,)."""
    return tensor.reshape(-1) if tensor.dim() == 3 else tensor


def _norm_name(stem):
    def rename(match):
        suffix = match["norm"].replace("pbn.", "bn.")
        return f"{stem(match)}.norm.{suffix}"

    return rename


def _stage(match):
    return f"res{int(match['stage']) + 1}.{match['block']}"


def resnet_rules(prefix: str = "", target: str = "") -> list[Rule]:
    """The table for a torchvision-style ResNet, whatever the norm.

    Args:
        prefix: what stands before ``layer1`` in the source, for example ``backbone.``.
        target: put before the new names.

    Returns:
        list of Rule, without one for the classifier.
    """
    start, block = re.escape(prefix), r"layer(?P<stage>[1-4])\.(?P<block>\d+)\."

    def rule(pattern, name, norm=False):
        def rename(match):
            return target + name(match)

        return Rule(pattern, _norm_name(rename) if norm else rename, value=_flat if norm else None)

    def conv(match):
        return f"{_stage(match)}.conv{match['conv']}"

    def shortcut(match):
        return f"{_stage(match)}.shortcut"

    return [
        Rule(rf"{start}.*\.estbn_moving_speed", None, MOVING_SPEED),
        rule(rf"{start}conv1\.weight", lambda m: "stem.conv1.weight"),
        rule(rf"{start}[bg]n1\.{_NORM}", lambda m: "stem.conv1", norm=True),
        rule(rf"{start}{block}conv(?P<conv>[123])\.weight", lambda m: conv(m) + ".weight"),
        rule(rf"{start}{block}[bg]n(?P<conv>[123])\.{_NORM}", conv, norm=True),
        rule(rf"{start}{block}downsample\.0\.weight", lambda m: shortcut(m) + ".weight"),
        rule(rf"{start}{block}downsample\.1\.{_NORM}", shortcut, norm=True),
    ]


def revive_counters(mapped: Mapped, source: Mapping[str, torch.Tensor]) -> None:
    """Makes ``num_batches_tracked`` say that the estimates have been set.

    The estimated batch norm sets its estimates from the first batch while the counter is 0. Two
    kinds of source would lose their estimates that way: files older than the counter, and those
    with the reference's EstBN, which never counts.
    """
    estimated = any(key.endswith("estbn_moving_speed") for key in source)
    revived = 0
    for name in list(mapped.state):
        if not name.endswith("running_mean"):
            continue
        counter = name.removesuffix("running_mean") + "num_batches_tracked"
        if counter not in mapped.state or (estimated and int(mapped.state[counter]) == 0):
            mapped.state[counter] = torch.ones((), dtype=torch.int64)
            revived += 1
    if revived:
        mapped.notes.append(f"{revived} num_batches_tracked set to 1, as the estimates are in use")


def convert_imagenet(state: Mapping[str, torch.Tensor]) -> Mapped:
    """Renames a torchvision-style ResNet with GN, BCN or BN.

    Args:
        state: ``conv1.weight``, ``layer1.0.bn1.weight``, ... without ``module.``.

    Returns:
        Mapped, with bare Detectron2 names.

    Raises:
        CheckpointError: unknown keys.
    """
    rules = [Rule(r"fc\..*", None, CLASSIFIER), *resnet_rules()]
    mapped = apply_rules(state, rules, "ImageNet (torchvision-style)")
    revive_counters(mapped, state)
    return mapped
