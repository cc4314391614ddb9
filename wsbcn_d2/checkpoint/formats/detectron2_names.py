"""Checkpoints that have Detectron2's names already: its model zoo's, this project's, converted."""

from collections.abc import Mapping

import torch

from .imagenet import CLASSIFIER
from .rules import Mapped, Rule, apply_rules

_RULES = [
    # Detectron2's torchvision script puts the classifier under "stem.".
    Rule(r"(?:.*\.)?(?:stem\.fc|fc1000|linear)\..*", None, CLASSIFIER),
    Rule(r".*anchor_generator\.cell_anchors.*", None, "anchors are computed, not stored"),
    Rule(r"(?:.*\.)?pixel_(?:mean|std)", None, "pixel statistics come from the config"),
    Rule(r".+", r"\g<0>"),
]


def convert_detectron2(state: Mapping[str, torch.Tensor]) -> Mapped:
    """Keeps Detectron2's names and drops what no model of today takes."""
    return apply_rules(state, _RULES, "Detectron2")
