"""A BatchNorm backbone's weights for a backbone with batch-channel normalization."""

from collections.abc import Mapping

import torch

from ..errors import CheckpointError
from ..layout import norm_kind


def batch_norm_to_bcn(
    state: Mapping[str, torch.Tensor], num_groups: int = 32
) -> dict[str, torch.Tensor]:
    """Puts each batch norm's affine and estimates into BCN's batch half.

    The channel half starts at its initial value (weight 1, bias 0). That is *not* the same
    function: a group normalization now follows each batch norm. The weights were also trained
    without weight standardization. Both make this a starting point for training, not for inference.

    Args:
        state: bare Detectron2 names with ``norm.weight``, ``norm.bias``, ``norm.running_mean``,
            ``norm.running_var`` and possibly ``norm.num_batches_tracked``.
        num_groups: groups of the channel half.

    Returns:
        the same with ``norm.weight``, ``norm.bias`` of shape (num_groups,) and ``norm.bn.*``;
        counters are at least 1, so that the first training batch does not replace the estimates.

    Raises:
        CheckpointError: not a batch norm backbone, or channels that the groups do not divide.
    """
    kind = norm_kind(state)
    if kind != "BN":
        raise CheckpointError(
            f"a backbone with {kind or 'no norm'} cannot become one with BCN: there are no batch "
            "statistics in it; take a BCN or a BatchNorm checkpoint"
        )
    result = {}
    for name, tensor in state.items():
        stem, is_norm, suffix = name.rpartition(".norm.")
        if not is_norm:
            result[name] = tensor
            continue
        counts = suffix == "num_batches_tracked"
        result[f"{stem}.norm.bn.{suffix}"] = tensor.clamp(min=1) if counts else tensor
        if suffix == "weight":
            if tensor.numel() % num_groups:
                raise CheckpointError(
                    f"{name} has {tensor.numel()} channels, which {num_groups} groups do not divide"
                )
            result[f"{stem}.norm.weight"] = torch.ones(num_groups, dtype=tensor.dtype)
            result[f"{stem}.norm.bias"] = torch.zeros(num_groups, dtype=tensor.dtype)
            result.setdefault(
                f"{stem}.norm.bn.num_batches_tracked", torch.ones((), dtype=torch.int64)
            )
    return result
