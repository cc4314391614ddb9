"""Caffe2 blob names (Detectron, Detectron2's first backbones, the authors' ``.pkl`` backbones).

Renaming is Detectron2's own ``convert_c2_detectron_names``, the code that reads these files
there; this module adds the module prefixes, the reasons for what is dropped, and the folding of
the stem's convolution bias that MSRA's files carry.
"""

import re
from collections.abc import Mapping

import torch
from detectron2.checkpoint import c2_model_loading

from ..errors import CheckpointError
from .imagenet import CLASSIFIER
from .rules import Mapped, Rule, apply_rules

_DROPPED = [
    Rule(r".*_momentum", None, "optimizer state"),
    Rule(r"(?:pred|fc1000)_[wb]", None, CLASSIFIER),
    Rule(r"lr|weight_order|model_iter", None, "bookkeeping of the training program"),
]
_BACKBONE = re.compile(r"(?:stem|res[2-5])\..+")
_RESNET = re.compile(r"(?:^|\.)(?:stem|res[2-5])\.")
_DETECTOR = [
    Rule(r"(?:stem|res[2-5])\..+", r"backbone.bottom_up.\g<0>"),
    Rule(r"fpn_(?:lateral|output)[2-5]\..+", r"backbone.\g<0>"),
    Rule(r"proposal_generator\.rpn_head\.(?:conv|objectness_logits|anchor_deltas)\..+", r"\g<0>"),
    Rule(r"box_head\.(?:conv|fc)\d\..+", r"roi_heads.\g<0>"),
    Rule(r"mask_head\.(?:mask_fcn\d|deconv|predictor)\..+", r"roi_heads.\g<0>"),
    Rule(r"(?:cls_score|bbox_pred)\..+", r"roi_heads.box_predictor.\g<0>"),
]


def is_affine(names) -> bool:
    """Tells MSRA's folded batch norm (``_bn_s``, ``_bn_b`` without statistics) by its names."""
    names = set(names)
    return any(n.endswith("_bn_s") for n in names) and not any(n.endswith("_bn_rm") for n in names)


def _fold_biases(mapped):
    """A convolution's bias c before a batch norm: its mean becomes m - c.

    MSRA's affine files have a bias in the stem, files of others in any convolution; most are 0.
    """
    for name in [n for n in mapped.state if n.endswith(".bias") and ".norm." not in n]:
        stem = name.removesuffix("bias")
        if f"{stem}norm.weight" not in mapped.state or not _RESNET.search(name):
            continue
        bias, source = mapped.state.pop(name), mapped.sources.pop(name)
        mapped.dropped[source] = "bias of a convolution, taken up by the norm after it"
        mean = f"{stem}norm.running_mean"
        if mean in mapped.state and mapped.state[mean].shape == bias.shape:
            mapped.state[mean] = mapped.state[mean] - bias
        elif bool(bias.any()):
            raise CheckpointError(f"{source} is not zero and no batch norm follows to take it up")


def _add_identity_statistics(mapped, eps=1e-5):
    """An affine layer as a batch norm: mean 0 and variance 1 - eps make it exactly s x + b."""
    affine = [n for n in mapped.state if n.endswith(".norm.weight") and _RESNET.search(n)]
    for name in affine:
        scale, stem = mapped.state[name], name.removesuffix("weight")
        mapped.state[stem + "running_mean"] = torch.zeros_like(scale)
        mapped.state[stem + "running_var"] = torch.full_like(scale, 1 - eps)
        mapped.state[stem + "num_batches_tracked"] = torch.ones((), dtype=torch.int64)
    mapped.notes.append(
        "batch norms were folded into affine layers: their statistics are set to the identity"
    )


def convert_caffe2(state: Mapping[str, torch.Tensor]) -> Mapped:
    """Renames Caffe2 blobs; a detector's background class is moved or cut by Detectron2's rules.

    ``conv1_w``, ``res2_0_branch2a_gn_s``, ... get bare names for a backbone, a FPN detector's for a
    detector; what means nothing in either is an error.
    """
    kept = apply_rules(state, [*_DROPPED, Rule(r"[^.]+", r"\g<0>")], "Caffe2")
    try:
        renamed, sources = c2_model_loading.convert_c2_detectron_names(dict(kept.state))
    except (AssertionError, ValueError, IndexError) as err:
        raise CheckpointError(f"Detectron2 cannot rename these Caffe2 blobs: {err!r}") from err
    for name in renamed:  # Detectron's class-agnostic masks have no row for the background
        if name.startswith("mask_head.predictor.") and len(kept.state[sources[name]]) == 1:
            renamed[name] = kept.state[sources[name]]
    backbone_only = all(_BACKBONE.fullmatch(name) for name in renamed)
    table = [Rule(_BACKBONE.pattern, r"\g<0>")] if backbone_only else _DETECTOR
    known = re.compile("|".join(rule.pattern for rule in table))
    unknown = [sources[name] for name in renamed if not known.fullmatch(name)]
    if unknown:
        raise CheckpointError(f"Caffe2 blobs of no known meaning: {', '.join(unknown[:4])}")
    mapped = apply_rules(renamed, table, "Caffe2")
    mapped.sources = {name: sources[middle] for name, middle in mapped.sources.items()}
    mapped.dropped.update(kept.dropped)
    # Slices are views of the whole: own storage, or a saved file would carry the background.
    mapped.state = {name: tensor.clone() for name, tensor in mapped.state.items()}
    if is_affine(state):
        _add_identity_statistics(mapped)
    _fold_biases(mapped)
    return mapped
