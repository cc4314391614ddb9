"""Whether a checkpoint is the one that a model needs: decided before anything is loaded.

Detectron2 loads what fits and warns about the rest, so that a file in foreign names, with
another norm or another weight standardization trains from noise without an error. Here these
are errors.
"""

import math
from collections.abc import Mapping

import torch
from detectron2.config import CfgNode
from detectron2.layers import FrozenBatchNorm2d
from torch import nn

from .errors import CheckpointError, shortened
from .formats.recognise import detect_format, foreign_norm_kind
from .layout import BOTTOM_UP, OPTIONAL_SUFFIX, norm_kind
from .metadata import OTHER_KINDS, Metadata


class LoadExpectation(Metadata):
    """What a model needs its weights to say of themselves; a field that is None is not checked."""

    @classmethod
    def from_model(cls, model: nn.Module, cfg: CfgNode | None = None) -> "LoadExpectation":
        """Reads a model itself, however it was built (by a config, converted by hand).

        Args:
            model: a detector or a backbone, not wrapped in DDP.
            cfg: the YAML config that it was built by, if any, for its pixels: a model on "meta"
                holds no numbers, and not every model keeps the channel order.

        Returns:
            LoadExpectation; the formula is None where standardized convs differ among themselves.
        """
        names = backbone_names(model.state_dict())
        found = {
            (module.ws_formula, module.ws_eps)
            for name, module in model.named_modules()
            if hasattr(module, "ws_formula") and f"{name}.weight".lstrip(".") in names
        }
        formula, eps = next(iter(found)) if len(found) == 1 else (None, None)
        if cfg is not None:
            mean, std, order = cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD, cfg.INPUT.FORMAT
        else:
            mean, std, order = (
                getattr(model, name, None) for name in ("pixel_mean", "pixel_std", "input_format")
            )
        return cls(
            ws_formula=formula if found else "none",
            norm=norm_kind(names),
            pixel_mean=_numbers(mean),
            pixel_std=_numbers(std),
            input_format=order,
            ws_eps=eps,
        )


def _numbers(values) -> tuple[float, ...] | None:
    return (
        None
        if values is None
        else tuple(torch.as_tensor(values, dtype=torch.float64).flatten().tolist())
    )


def backbone_names(names) -> list[str]:
    """The bottom-up network's names in a model's state dict.

    Those below ``backbone.bottom_up.``, else below ``backbone.`` and ``roi_heads.res5.``, else all
    of a bare ResNet's, else none; without a classifier's linear layer, which is a head.
    """
    names = [name for name in names if not name.startswith(("backbone.linear.", "linear."))]
    for prefixes in ((BOTTOM_UP,), ("backbone.", "roi_heads.res5.")):
        if any(name.startswith(prefixes[0]) for name in names):
            return [name for name in names if name.startswith(prefixes)]
    return names if any(name.startswith("stem.") for name in names) else []


def check_conventions(
    state: Mapping[str, torch.Tensor],
    recorded: Metadata | None,
    expected: LoadExpectation,
    path: str,
    insist: bool = False,
) -> list[str]:
    """Compares a checkpoint's own names and record, if any, with what a model expects.

    Foreign names, another norm and another WS formula are refused. With ``insist``, the latter two
    are among the warnings that are returned; what is only presumed always is.
    """
    _refuse_foreign_names(state, path)
    warnings: list[str] = []
    kind = (recorded and recorded.norm) or foreign_norm_kind(state)
    if kind and expected.norm and kind != expected.norm:
        refuse(
            f"{path} has a backbone with {kind} but the model's has {expected.norm}: choose "
            f"weights with {expected.norm}, or set MODEL.RESNETS.NORM to go with {kind}",
            warnings if insist else None,
        )
    if recorded is None:
        if expected.ws_formula not in (None, "none"):
            warnings.append(
                f"{path} does not say how its weights were standardized; the model uses "
                f"MODEL.WS.FORMULA {expected.ws_formula}, and another one costs accuracy"
            )
        return warnings
    formula = recorded.ws_formula
    if formula and expected.ws_formula and formula != expected.ws_formula:
        presumed = "ws_formula" in recorded.presumed
        refuse(
            f"{path} was {'presumably ' if presumed else ''}trained with WS formula {formula!r} "
            f"but the model has {expected.ws_formula!r}: {_mend(formula, expected.ws_formula)}",
            warnings if insist or presumed else None,
        )
    eps = (expected.ws_eps, recorded.ws_eps)
    if all(eps) and expected.ws_formula != "none" and not math.isclose(*eps, rel_tol=1e-3):
        warnings.append(f"{path}: MODEL.WS.EPS was {recorded.ws_eps}, is {expected.ws_eps}")
    for field, key in (
        ("input_format", "INPUT.FORMAT"),
        ("pixel_mean", "MODEL.PIXEL_MEAN"),
        ("pixel_std", "MODEL.PIXEL_STD"),
    ):
        was, now = getattr(recorded, field), getattr(expected, field)
        if was is not None and now is not None and not _same(was, now):
            shown = was if isinstance(was, str) else list(was)
            warnings.append(f"{path}: trained with {key} {shown}, the model has {now}")
    return warnings


def refuse(text: str, warnings: list[str] | None) -> None:
    """Raises a refusal, or where the user insists (``warnings`` is a list) makes it a warning."""
    if warnings is None:
        raise CheckpointError(f"{text}; to load what fits all the same, add ?insist=True to it")
    warnings.append(text)


def _same(was, now):
    if isinstance(was, str) or isinstance(now, str):
        return was == now
    # Models hold the numbers in float32.
    return len(was) == len(now) and all(abs(a - b) < 1e-3 for a, b in zip(was, now, strict=True))


def _mend(formula, current):
    if formula in OTHER_KINDS:
        return f"set MODEL.WS.KIND to {formula} (and use build_ws_... and WS... parts)"
    if current in OTHER_KINDS and formula != "none":
        return f"set MODEL.WS.KIND to ws and MODEL.WS.FORMULA to {formula}"
    if formula == "none":
        return "use a stock backbone (MODEL.BACKBONE.NAME build_resnet_...) or weights with WS"
    if current == "none":
        return f"use a WS backbone (build_ws_resnet_...) with MODEL.WS.FORMULA {formula}"
    return f"set MODEL.WS.FORMULA to {formula}"


def _refuse_foreign_names(state, path):
    try:
        found = detect_format(state)
    except CheckpointError:
        return  # not a ResNet at all: the count of loaded names decides
    if found.name in ("imagenet", "mmdet"):
        raise CheckpointError(
            f"{path} has the names of a {found.description}: convert it first with "
            f"tools/convert_checkpoint.py {path} OUTPUT.pth"
        )


def check_coverage(
    model: nn.Module,
    state: Mapping[str, torch.Tensor],
    path: str,
    warnings: list[str] | None = None,
) -> tuple[int, int]:
    """Refuses a state dict that does not fill a model's whole backbone, or nothing of the model.

    Where the checkpoint has a FPN, all of ``backbone.`` is meant, else the bottom-up network.
    ``warnings``, where the user insists, takes what would be refused.

    Returns:
        (number of the model's names that the checkpoint fills, number of the model's names).
    """
    own = {n: v for n, v in model.state_dict().items() if not n.endswith(OPTIONAL_SUFFIX)}
    fits = {n for n, v in own.items() if n in state and state[n].shape == v.shape}
    required = backbone_names(own)
    if required and any(name.startswith("backbone.fpn_") for name in state):
        required = [name for name in own if name.startswith("backbone.")]
    # Old files have no statistics; Detectron2's frozen batch norm fills in the identity.
    filled_in = {
        f"{name}.{part}"
        for name, module in model.named_modules()
        if isinstance(module, FrozenBatchNorm2d) and f"{name}.running_mean" not in state
        for part in ("running_mean", "running_var")
    }
    missing = [name for name in required if name not in fits and name not in filled_in]
    if missing or not fits:
        total = len(required) or len(own)
        shapes = [
            f"{name} has {tuple(state[name].shape)} instead of {tuple(own[name].shape)}"
            for name in missing
            if name in state
        ]
        text = (
            f"{path} holds {total - len(missing) if required else 0} of the model's {total} "
            f"backbone parameters: {'; '.join(shapes[:2]) or 'missing are ' + shortened(missing)}; "
            "choose the weights and the backbone config of one architecture"
        )
        if not fits:
            raise CheckpointError(text)
        refuse(text, warnings)
    return len(fits), len(own)
