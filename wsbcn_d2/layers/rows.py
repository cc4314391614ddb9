"""Four passes over an activation, a row of which is one channel of one sample.

Normalization with coefficients per (sample, channel) needs two reductions and two elementwise
maps. PyTorch has no public functions for them, but its own batch and group norms contain them as
vectorized, multi-threaded kernels; seen as one sample of N*C channels, they serve any N. That is
what the ``native`` forms do, for contiguous tensors on a CPU. Others, and ``torch.compile``, get
the same passes in ordinary operations; those kernels' own channels_last forms take the variance
as E[x^2] - E[x]^2, which a large mean ruins.

x, dy and the results have the shape (N, C, H, W), the coefficients (N, C).
"""

import torch

__all__ = ["affine_", "combine", "normalize", "row_sums"]

# Added by the native form to the variance of a row, only so that a constant one divides by
# something: far below any variance that matters, and its inverse is far from overflow.
_TINY = 1e-20


def _rows(x: torch.Tensor) -> torch.Tensor:
    n, c, h, w = x.shape
    return x.view(1, n * c, h, w)


def _spread(coefficient: torch.Tensor) -> torch.Tensor:
    return coefficient[:, :, None, None]


def normalize(
    x: torch.Tensor, native: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Centre each row and find its moments.

    The variance is that of the centred row, so a large mean costs no accuracy.

    Returns:
        (y, mean, var, factor): ``y`` is a new tensor, (x - mean) * factor; ``var`` is biased;
        a ``factor`` of None is 1.
    """
    n, c, h, w = x.shape
    if native:
        y, mean, factor = torch.native_group_norm(x, None, None, n, c, h * w, c, _TINY)
        return y, mean, factor.pow(-2), factor
    if torch.compiler.is_compiling():
        var, mean = torch.var_mean(x, dim=(2, 3), correction=0)
        return x - _spread(mean), mean, var, None
    mean = x.mean(dim=(2, 3))
    y = x - _spread(mean)
    return y, mean, torch.linalg.vector_norm(y, dim=(2, 3)).square_().div_(h * w), None


def affine_(
    y: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, native: bool
) -> torch.Tensor:
    """scale * y + shift, in the memory of ``y``."""
    if not native:
        return y.mul_(_spread(scale)).add_(_spread(shift))
    # A batch norm in evaluation, of mean 0 and variance 1, that writes to its own input.
    scale, shift = scale.reshape(-1), shift.reshape(-1)
    unused = scale.new_empty(0)
    torch.native_batch_norm(
        _rows(y), scale, shift, torch.zeros_like(scale), torch.ones_like(scale),
        False, 0.0, 0.0, out=(_rows(y), unused, unused),
    )  # fmt: skip
    return y


def row_sums(
    dy: torch.Tensor, x: torch.Tensor, mean: torch.Tensor, native: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums over each row of dy and of dy * (x - mean), each of shape (N, C)."""
    if not native:
        product = (x - _spread(mean)).mul_(dy)
        return dy.sum(dim=(2, 3)), product.sum(dim=(2, 3))
    ones = torch.ones_like(mean).view(-1)
    _, product, total = torch.ops.aten.native_batch_norm_backward.default(
        _rows(dy), _rows(x), ones, None, None, mean.view(-1), ones, True, 0.0, [False, True, True]
    )
    return total.view_as(mean), product.view_as(mean)


def combine(
    dy: torch.Tensor,
    x: torch.Tensor,
    slope: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor,
    native: bool,
) -> torch.Tensor:
    """scale * (dy - slope * x) + shift, in a new tensor."""
    # Vectorized since only one of the operands is broadcast; with two it would not be.
    out = torch.addcmul(dy, x, _spread(slope), value=-1)
    return affine_(out, scale, shift, native)
