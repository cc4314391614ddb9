"""Running estimates under activation checkpointing: a repeated forward uses its first run's.

Checkpointing drops what a part of a model computed, and runs that part again within the backward
pass. By then the estimates have moved on, and they must neither move a second time for the same
batch nor serve the repetition as they stand. So the estimates that a run used are kept wherever
it may be repeated, which shows in one of two ways: reentrant checkpointing makes the first run
without gradients, the other kind packs the tensors that autograd saves. A training forward that
neither holds for keeps nothing and costs nothing.

A forward that runs while the autograd engine does (there is a current graph task) is a
repetition. Which first run it repeats is found by *content*: the moments of its input, to which the
nearest kept ones belong, since it computes the same again. No order of calls has to be assumed: a
head shared by levels, micro-batches whose backward passes come later, nested parts and passes that
stop early or raise are all served. Only for inputs that are bit by bit the same does the order
count (:func:`_likely_order`). All of it happens on the device, without synchronization.

What is kept goes when the parameters have changed (the next step), and the oldest beyond
:data:`KEPT` runs.
"""

import warnings
from dataclasses import dataclass

import torch
from torch import nn

__all__ = ["KEPT", "packing", "recalled", "remember", "repeats"]

#: Runs of a layer that may wait for their repetition: micro-batches times levels of a shared head.
KEPT = 64

# A repetition has its first run's moments up to rounding (nothing, where operations are
# deterministic); other batches differ by more, in the sum over channels.
_NEAR = 1e-2

_NAN, _INF = 1e30, 2e30  # finite stand-ins, which can be compared


@dataclass(eq=False)
class _Run:
    key: torch.Tensor  # (2C,): see _key
    mean: torch.Tensor  # (C,): the estimates that it used
    var: torch.Tensor
    uses: torch.Tensor  # (): how often it was repeated
    number: int  # of autograd's nodes, in this thread, at the time
    part: int | None  # which checkpointed part it ran in, if that can be told
    version: int  # of the parameters


def packing() -> tuple[int, str] | None:
    """Who packs, at present, the tensors that autograd saves (checkpointing does).

    Returns:
        A number and a name; None if nobody does.
    """
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    return None if hooks is None else (id(hooks[0]), getattr(hooks[0], "__qualname__", ""))


def repeats() -> bool:
    """Whether what runs is the repetition of a forward, as far as that can be told."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    if torch._C._current_graph_task_id() != -1:
        return True
    # Looking at a saved tensor (as drawers of graphs do) recomputes outside of a backward pass.
    by = packing()
    return by is not None and "_recomputation_hook" in by[1]


def _version(bn: nn.Module) -> int:
    return -1 if bn.weight is None or bn.weight.is_inference() else bn.weight._version


@torch.no_grad()
def _key(x: torch.Tensor) -> torch.Tensor:
    """Mean and deviation of each channel of a batch, finite."""
    x = x.detach()
    if x.dtype in (torch.float16, torch.bfloat16):
        x = x.float()
    var, mean = torch.var_mean(x, dim=(0, 2, 3), correction=0)
    return torch.cat([mean, var.sqrt()]).nan_to_num(_NAN, _INF, -_INF).clamp(-_INF, _INF)


def remember(bn: nn.Module, x: torch.Tensor) -> None:
    """Keep the estimates of a batch norm that has just moved, if the run may be repeated.

    Args:
        bn: a batch norm whose running estimates are those used for ``x``.
        x: its input, shape (N, C, H, W), not empty.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or torch.is_inference_mode_enabled():
        return
    by = packing()
    if torch.is_grad_enabled() and by is None:
        return
    version, device = _version(bn), bn.running_mean.device
    runs = [r for r in bn.__dict__.get("_runs", ()) if r.version == version]
    if len(runs) == KEPT:
        bn.__dict__["_lost"] = version
    runs = [*runs[1 - KEPT :], _Run(
        _key(x), bn.running_mean.clone(), bn.running_var.clone(), torch.zeros((), device=device),
        torch.autograd._get_sequence_nr(), None if by is None else by[0], version,
    )]  # fmt: skip
    bn.__dict__["_runs"] = runs


def recalled(bn: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
    """The estimates that the first run of a repeated forward used.

    Args:
        bn: a batch norm with running estimates.
        x: its input, shape (N, C, H, W), not empty.

    Returns:
        (mean, var), each of shape (C,); None if this is no repetition. For an input that no kept
        run had, the present estimates.
    """
    return _recall(bn, x) if repeats() else None


@torch.no_grad()
def _recall(bn: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
    runs = [r for r in bn.__dict__.get("_runs", ()) if r.key.device == x.device]
    if not runs:
        return None
    if bn.__dict__.get("_lost") == _version(bn):
        warnings.warn(
            f"more than {KEPT} runs of one layer wait for their recomputation: gradients of the "
            "oldest are those of the present estimates; call backward more often",
            stacklevel=2,
        )
        bn.__dict__["_lost"] = None
    key = _key(x)
    runs = _likely_order(runs)
    distance = (torch.stack([r.key for r in runs]) - key).abs().sum(dim=1)
    nearest = distance.min()
    uses = torch.stack([r.uses for r in runs])
    # The first of those least used, among the nearest.
    index = torch.where(distance <= nearest, uses, torch.inf).argmin().view(1)
    chosen = torch.arange(len(runs), device=x.device) == index
    for run, more in zip(runs, uses + chosen, strict=True):
        run.uses = more
    near = nearest <= _NEAR * key[len(key) // 2 :].sum()
    found = []
    for name, present in (("mean", bn.running_mean), ("var", bn.running_var)):
        kept = torch.stack([getattr(r, name) for r in runs]).index_select(0, index)[0]
        found.append(torch.where(near, kept, present))
    return found[0], found[1]


def _likely_order(runs: list[_Run]) -> list[_Run]:
    """Kept runs, those first that the current repetition begins with, if inputs are the same.

    Within a part runs are repeated in the order in which they ran, parts from the last to the
    first. In the reentrant kind the node that is executed was made just before its part ran; in
    the other kind just after some of the runs in it.
    """
    node = torch._C._current_autograd_node()
    number = -1 if node is None else node._sequence_nr()
    by = packing()
    if by is None or by[1] == "backward":
        first = [r for r in runs if r.number > number]
    else:
        before = [r.part for r in runs if r.number <= number]
        first = [r for r in runs if before and r.part == before[-1]]
    return first + [r for r in reversed(runs) if r not in first]
