"""Key renaming by table: every key of a source is mapped, dropped for a reason, or an error."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from ..errors import CheckpointError, shortened


@dataclass(frozen=True)
class Rule:
    """One line of a format's table.

    Attributes:
        pattern: regular expression that has to match a whole source key.
        target: new name, as a template for ``re.Match.expand`` or as a function of the match;
            None drops the key.
        reason: why a dropped key is dropped.
        value: what is done to the tensor, None for nothing.
    """

    pattern: str
    target: str | Callable[[re.Match], str] | None
    reason: str = ""
    value: Callable[[torch.Tensor], torch.Tensor] | None = None


@dataclass
class Mapped:
    """What a format's table made of a source.

    Attributes:
        state: new name -> tensor.
        sources: new name -> source key.
        dropped: source key -> reason.
        notes: what the reader should know besides.
    """

    state: dict[str, torch.Tensor] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def apply_rules(state: Mapping[str, torch.Tensor], rules: list[Rule], format_name: str) -> Mapped:
    """Renames a state dict by the first rule that matches each key.

    Tensors that no rule changes are the source's own, not copies. A key that no rule knows is an
    error, and so are two keys that get one name.
    """
    result, unknown = Mapped(), []
    for key, tensor in state.items():
        matches = ((re.fullmatch(rule.pattern, key), rule) for rule in rules)
        match, rule = next((found for found in matches if found[0]), (None, None))
        if match is None:
            unknown.append(key)
            continue
        if rule.target is None:
            result.dropped[key] = rule.reason
            continue
        name = rule.target(match) if callable(rule.target) else match.expand(rule.target)
        if name in result.state:
            raise CheckpointError(
                f"keys {result.sources[name]} and {key} both mean {name}: not one model's file"
            )
        result.state[name] = rule.value(tensor) if rule.value else tensor
        result.sources[name] = key
    if unknown:
        raise CheckpointError(
            f"{len(unknown)} keys are unknown to the {format_name} format: {shortened(unknown)}"
        )
    return result
