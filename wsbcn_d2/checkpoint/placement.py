"""Where a ResNet stands in a model: its weights are the same under each parent's name."""

from collections.abc import Iterable, Mapping

import torch

from .layout import BOTTOM_UP

_PARTS = ("stem", "res2", "res3", "res4", "res5")
_PARENTS = (BOTTOM_UP, "backbone.", "roi_heads.")  # FPN; plain; res5 of a C4 detector


def place_backbone(
    state: Mapping[str, torch.Tensor], own_names: Iterable[str]
) -> dict[str, torch.Tensor]:
    """Renames a plain backbone (a classifier's, ``backbone.stem.``) to where a model has its own.

    Returns:
        ``state`` with stem and stages renamed; unchanged if it has no plain backbone, or none of
        the model's names is meant.
    """
    own_names = list(own_names)
    if not any(name.startswith("backbone.stem.") for name in state):
        return dict(state)
    parents = {}
    for part in _PARTS:
        for parent in _PARENTS:
            if any(name.startswith(f"{parent}{part}.") for name in own_names):
                parents[f"backbone.{part}."] = f"{parent}{part}."
                break
    result = {}
    for name, tensor in state.items():
        old = ".".join(name.split(".", 2)[:2]) + "."
        result[parents.get(old, old) + name[len(old) :]] = tensor
    return result
