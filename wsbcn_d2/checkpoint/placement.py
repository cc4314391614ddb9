"""Where a ResNet stands in a model: its weights are the same under each parent's name."""

from collections.abc import Iterable, Mapping

import torch

from .layout import BOTTOM_UP

_PARTS = ("stem", "res2", "res3", "res4", "res5")
_PARENTS = ("roi_heads.", "backbone.", BOTTOM_UP)  # res5 of a C4 detector; plain; FPN


def place_backbone(
    state: Mapping[str, torch.Tensor], own_names: Iterable[str]
) -> dict[str, torch.Tensor]:
    """Renames a plain backbone (a classifier's, ``backbone.stem.``) to where a model has its own.

    Stem and stages that the model does not have keep their names, as does all of a state dict
    without a plain backbone.
    """
    own_names = list(own_names)
    if not any(name.startswith("backbone.stem.") for name in state):
        return dict(state)
    parents = {
        f"backbone.{part}.": f"{parent}{part}."
        for parent in _PARENTS
        for part in _PARTS
        if any(name.startswith(f"{parent}{part}.") for name in own_names)
    }
    result = {}
    for name, tensor in state.items():
        old = ".".join(name.split(".", 2)[:2]) + "."
        result[parents.get(old, old) + name[len(old) :]] = tensor
    return result
