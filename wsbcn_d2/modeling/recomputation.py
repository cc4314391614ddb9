"""Recomputing activations in backward instead of keeping them, for modules chosen by name."""

import contextlib
import logging
from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase

from detectron2.utils.events import EventStorage
from torch import is_grad_enabled, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from ..layers import EstimatedBatchNorm2d

__all__ = ["modules_named", "recompute"]


def recompute(model: nn.Module, patterns: Iterable[str]) -> nn.Module:
    """Make modules keep their inputs alone for backward, and run again there.

    Outputs, gradients, random numbers and running statistics are those of the model as it was, its
    state dict's names too; in evaluation and under ``no_grad`` nothing changes. Works on any model
    whose modules compute the same from the same input, under DDP and autocast, nested, and on a
    module that is used several times in a step. The mechanism is ``torch.utils.checkpoint``'s, in
    its form that needs no reentrant backward.

    Args:
        model: changed in place.
        patterns: of :func:`modules_named`. Of a list of modules, each is recomputed by itself.

    Returns:
        The model.

    Raises:
        ValueError: a pattern that fits no module; one line that names it.
    """
    names = modules_named(model, patterns)
    for name in names:
        for module in _callable_parts(model.get_submodule(name)):
            module.forward = _Recomputed(module)
    if names:
        logging.getLogger(__name__).info(f"Recomputed in backward: {', '.join(names)}")
    return model


def modules_named(model: nn.Module, patterns: Iterable[str]) -> list[str]:
    """Names of the modules that patterns fit, in the model's order.

    Args:
        model: any.
        patterns: names as ``named_modules`` gives them; ``*``, ``?`` and ``[...]`` stand for parts
            of one step of a name: ``backbone.bottom_up.res[34]`` fits two stages and none of the
            modules within them, ``backbone.bottom_up.res4.*`` the blocks of one.

    Returns:
        list[str]

    Raises:
        ValueError: a pattern that fits nothing; one line with the names that it could have gone on
            to.
    """
    steps = {name: name.split(".") for name, _ in model.named_modules() if name}
    found = set()
    for pattern in patterns:
        wanted = pattern.split(".")
        fits = {name for name, parts in steps.items() if _fits(parts, wanted)}
        if not fits:
            depth = next(
                d for d in range(len(wanted))
                if not any(_fits(parts, wanted[: d + 1]) for parts in steps.values())
            )  # fmt: skip
            near = [
                name
                for name, parts in steps.items()
                if len(parts) == depth + 1 and _fits(parts[:depth], wanted[:depth])
            ]
            what = f"there are {', '.join(near)}" if near else "nothing is below it"
            raise ValueError(
                f"{pattern!r} fits no module of the model: for {'.'.join(wanted[: depth + 1])!r} "
                f"{what}"
            )
        found |= fits
    return [name for name in steps if name in found]


def _fits(parts: list[str], wanted: list[str]) -> bool:
    return len(parts) == len(wanted) and all(map(fnmatchcase, parts, wanted))


def _callable_parts(module: nn.Module) -> list[nn.Module]:
    """The module, or where it is a list or dict of modules, which nobody calls, those."""
    if isinstance(module, (nn.ModuleList, nn.ModuleDict)):
        return [part for child in module.children() for part in _callable_parts(child)]
    return [module]


class _Recomputed:
    """Stands in for a module's ``forward``; an object, so that it is copied with the module."""

    def __init__(self, module: nn.Module):
        self.module = module

    def __call__(self, *args, **kwargs):
        forward = type(self.module).forward
        if not (self.module.training and is_grad_enabled()):
            return forward(self.module, *args, **kwargs)
        return checkpoint(
            forward,
            self.module,
            *args,
            use_reentrant=False,
            context_fn=lambda: (contextlib.nullcontext(), _second_run(self.module)),
            **kwargs,
        )


@contextlib.contextmanager
def _second_run(module: nn.Module) -> Iterator[None]:
    """What a forward leaves behind besides its result is not left behind twice.

    Heads write to the event storage, and may be called where there is none. Batch norms move their
    running statistics; this project's know by themselves when they run a second time.
    """
    norms = [m for m in module.modules() if isinstance(m, _BatchNorm)]
    norms = [m for m in norms if not isinstance(m, EstimatedBatchNorm2d)]
    before = [dict(norm._buffers) for norm in norms]
    try:
        for norm, buffers in zip(norms, before, strict=True):
            norm._buffers.update({k: b if b is None else b.clone() for k, b in buffers.items()})
        with EventStorage():
            yield
    finally:
        for norm, buffers in zip(norms, before, strict=True):
            norm._buffers.update(buffers)
