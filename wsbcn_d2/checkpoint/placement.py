"""Where a ResNet stands in a model: its weights are the same under each parent's name."""

from collections.abc import Iterable, Mapping

import torch

from .layout import split_backbone


def place_backbone(
    state: Mapping[str, torch.Tensor], own_names: Iterable[str]
) -> dict[str, torch.Tensor]:
    """Renames a plain backbone (a classifier's, ``backbone.stem.``) to where a model has its own.

    So is a C4 detector's ResNet. What the model does not have keeps its name, as does all of a
    state dict without a plain backbone.
    """
    kind, names = split_backbone(state)
    if kind != "c4":
        return dict(state)
    own = split_backbone(own_names)[1]
    placed = {name: own.get(bare, name) for bare, name in names.items()}
    return {placed.get(name, name): tensor for name, tensor in state.items()}
