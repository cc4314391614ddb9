"""Slow formulas in float64, written out from the paper: what the tests hold the package against.

Plain operations on plain tensors, so that autograd differentiates them; nothing here imports the
package or calls a normalization of PyTorch.
"""

import torch


def standardize_weight(weight, formula, eps):
    """One filter after the other, as the three formulas are written."""
    filters = []
    for w in weight:
        n = w.numel()
        m = w.sum() / n
        sum_of_squares = ((w - m) ** 2).sum()
        if formula == "biased":
            filters.append((w - m) / (sum_of_squares / n + eps) ** 0.5)
        elif formula == "unbiased":
            filters.append((w - m) / (sum_of_squares / (n - 1) + eps) ** 0.5)
        elif formula == "unbiased_std":
            filters.append((w - m) / ((sum_of_squares / (n - 1)) ** 0.5 + eps))
        else:
            raise AssertionError(formula)
    return torch.stack(filters)


def moments(x):
    """Mean and biased variance of every channel of (N, C, H, W)."""
    means, variances = [], []
    for c in range(x.shape[1]):
        values = x[:, c].flatten()
        mean = values.sum() / values.numel()
        means.append(mean)
        variances.append(((values - mean) ** 2).sum() / values.numel())
    return torch.stack(means), torch.stack(variances)


def update(mean, var, x, rate, first):
    """The estimates after one batch: (mean, var)."""
    batch_mean, batch_var = moments(x.detach())
    if first:
        return batch_mean, batch_var
    around_old = torch.stack(
        [((x[:, c].detach() - mean[c]) ** 2).mean() for c in range(x.shape[1])]
    )
    return mean + rate * (batch_mean - mean), var + rate * (around_old - var)


def batch_affine(x, mean, var, weight, bias, eps):
    """weight (x - mean) / sqrt(var + eps) + bias, channel by channel."""
    channels = [
        weight[c] * (x[:, c] - mean[c]) / (var[c] + eps) ** 0.5 + bias[c] for c in range(x.shape[1])
    ]
    return torch.stack(channels, dim=1)


def channel_norm(x, groups, weight, bias, eps):
    """Group normalization with one weight and bias per group, sample by sample."""
    size = x.shape[1] // groups
    samples = []
    for sample in x:
        parts = []
        for g in range(groups):
            part = sample[g * size : (g + 1) * size]
            mean = part.sum() / part.numel()
            var = ((part - mean) ** 2).sum() / part.numel()
            parts.append(weight[g] * (part - mean) / (var + eps) ** 0.5 + bias[g])
        samples.append(torch.cat(parts))
    return torch.stack(samples)
