"""10,000 steps of random data: the estimates stay where theory says, and do not wander off.

With rate r and independent batches of n values per channel, of mean m and variance s^2:

  * the mean is an exponential average of batch means, with stationary variance
    r / (2 - r) * s^2 / n;
  * the variance estimate is one of mean squares around the old mean, whose expectation is
    s^2 + Var(mean), and whose own stationary variance is, for normal values,
    r / (2 - r) * 2 s^4 / n up to terms of second order in Var(mean) / s^2;
  * float32 adds what a step cannot move by: an estimate of size a stalls only where a step of r
    times the distance is below half a unit in the last place of a, that is within ulp(a) / (2 r).
"""

import numpy as np
import pytest
import torch

from wsbcn_d2 import BatchChannelNorm2d, EstimatedBatchNorm2d

STEPS, CHANNELS, SIDE = 10_000, 32, 4
N = SIDE * SIDE


def history(norm, bn, mean, deviation, steps=STEPS):
    """Estimates after every step: (means, variances), each (steps, C)."""
    means, variances = torch.empty(steps, CHANNELS), torch.empty(steps, CHANNELS)
    with torch.no_grad():
        for start in range(0, steps, 1000):
            data = mean + deviation * torch.randn(1000, 1, CHANNELS, SIDE, SIDE)
            for step, x in enumerate(data, start):
                norm(x)
                means[step], variances[step] = bn.running_mean, bn.running_var
    assert bn.num_batches_tracked == steps
    return means.double(), variances.double()


def check(norm, bn, mean, deviation, rate):
    means, variances = history(norm, bn, mean, deviation)
    # What the first batch, which set the estimates outright, still weighs is below 1e-4.
    burn_in = int(10 / rate)
    means, variances = means[burn_in:] - mean, variances[burn_in:]
    ulp = float(np.spacing(np.float32(mean)))
    of_chance = rate / (2 - rate) * deviation**2 / N
    var_of_mean = of_chance + (ulp / (2 * rate)) ** 2  # where rounding holds it at most
    var_of_var = rate / (2 - rate) * 2 * deviation**4 / N
    expected = deviation**2 + var_of_mean
    # Averages over all channels and steps: an estimate forgets within 1 / r steps, so there are
    # about C * steps * r / 2 independent ones. Five standard errors.
    count = CHANNELS * len(means) * rate / 2
    assert means.mean().abs() < 5 * (var_of_mean / count) ** 0.5 + ulp / rate
    margin = 5 * (var_of_var / count) ** 0.5 + 1e-6 * expected
    assert deviation**2 + of_chance - margin < variances.mean() < expected + margin
    if ulp < 1e-6 * deviation:
        # The bound is met from both sides, so it is the right one.
        assert 0.8 < means.square().mean() / var_of_mean < 1.2
        assert 0.8 < variances.var() / var_of_var < 1.25
    # No step of any channel is further out than six deviations, the last thousand included.
    assert means.abs().max() < 6 * var_of_mean**0.5
    assert (variances - expected).abs().max() < 7 * var_of_var**0.5
    # No trend: first and last quarter of the steps agree.
    quarter = len(means) // 4
    trend = (means[-quarter:].mean() - means[:quarter].mean()).abs()
    assert trend < 5 * (2 * 4 * var_of_mean / count) ** 0.5 + ulp / rate


@pytest.mark.parametrize(
    ("mean", "deviation", "rate"), [(0.3, 2.0, 0.01), pytest.param(1e4, 1.0, 0.01, id="offset")]
)
def test_estimated_batch_norm(mean, deviation, rate):
    norm = EstimatedBatchNorm2d(CHANNELS, momentum=rate)
    check(norm, norm, mean, deviation, rate)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mean", "deviation", "rate"),
    [(0.3, 2.0, 0.01), (0.0, 1e-3, 0.1), (-5.0, 1e3, 0.03), (1e4, 1.0, 0.03)],
)
def test_batch_channel_norm(mean, deviation, rate):
    norm = BatchChannelNorm2d(CHANNELS, 4, update_rate=rate)
    check(norm, norm.bn, mean, deviation, rate)
