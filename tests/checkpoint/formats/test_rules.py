"""Renaming by table."""

import pytest
import torch

from wsbcn_d2.checkpoint import CheckpointError
from wsbcn_d2.checkpoint.formats.rules import Rule, apply_rules

RULES = [
    Rule(r"layer1\.kept", "first"),
    Rule(r"layer1\.(\w+)", None, "why not"),
    Rule(r"layer(?P<number>\d)\.(?P<what>w|b)", r"res\g<number>.\g<what>"),
    Rule(r"stem\.(\w+)", lambda match: match[1].upper(), value=lambda tensor: tensor + 1),
]


def test_the_first_rule_that_matches_a_whole_key_decides():
    one = torch.ones(1)
    state = {"layer2.w": one, "layer1.kept": one, "layer1.w": one, "stem.a": one}
    found = apply_rules(state, RULES, "made up")
    assert list(found.state) == ["res2.w", "first", "A"]
    assert found.state["res2.w"] is found.state["first"] is one  # no copies
    assert found.state["A"].tolist() == [2.0] and one.tolist() == [1.0]
    assert found.sources == {"res2.w": "layer2.w", "first": "layer1.kept", "A": "stem.a"}
    assert found.dropped == {"layer1.w": "why not"} and found.notes == []


@pytest.mark.parametrize("key", ["layer2.weight", "xlayer2.w", "layer2.w.b", "stem.a.b", "layer2"])
def test_a_part_of_a_key_is_not_enough(key):
    state = {"layer2.w": torch.ones(1), key: torch.ones(1)}
    with pytest.raises(CheckpointError, match=f"^1 keys are unknown to the made up format: {key}$"):
        apply_rules(state, RULES, "made up")


def test_two_keys_of_one_name():
    state = {"stem.a": torch.ones(1), "stem.A": torch.ones(1)}
    with pytest.raises(CheckpointError, match=r"^keys stem\.a and stem\.A both mean A: not one"):
        apply_rules(state, RULES, "made up")
