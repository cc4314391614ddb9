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


def resnet_rules(prefix: str = "", target: str = "") -> list[Rule]:
    """The table for a torchvision-style ResNet, whatever the norm, without the classifier.

    ``prefix`` stands before ``layer1`` in the source, ``target`` is put before the new names.
    """

    def rename(match):
        parts = match.groupdict()
        block = f"res{int(parts['stage']) + 1}.{parts['block']}." if "stage" in parts else "stem."
        layer = f"conv{parts['conv']}" if "conv" in parts else "shortcut"
        norm = parts.get("norm", "").replace("pbn.", "bn.")
        return f"{target}{block}{layer}.{'norm.' + norm if norm else 'weight'}"

    def rules(start, conv, norm):
        return [
            Rule(rf"{start}{conv}\.weight", rename),
            Rule(rf"{start}{norm}\.{_NORM}", rename, value=_flat),
        ]

    start = re.escape(prefix)
    block = start + r"layer(?P<stage>[1-4])\.(?P<block>\d+)\."
    return [
        Rule(rf"{start}.*\.estbn_moving_speed", None, MOVING_SPEED),
        *rules(start, "conv(?P<conv>1)", "[bg]n(?P<conv>1)"),
        *rules(block, "conv(?P<conv>[123])", "[bg]n(?P<conv>[123])"),
        *rules(block, r"downsample\.0", r"downsample\.1"),
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
