"""Means over a few seeds, and what two variants differ by, with confidence intervals."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from scipy.special import stdtrit

__all__ = ["Difference", "mean_interval", "paired_difference", "t_quantile"]


def t_quantile(degrees: int) -> float:
    """97.5 % quantile of Student's t distribution, with at least 1 degree of freedom."""
    if degrees < 1:
        raise ValueError(f"Student's t needs at least 1 degree of freedom, got {degrees}")
    return float(stdtrit(degrees, 0.975))


def mean_interval(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and half width of its 95 % confidence interval (Student's t).

    Args:
        values: one per seed, at least one.

    Returns:
        (mean, half width); the half width of a single value is unknown: None.
    """
    count = len(values)
    if count == 0:
        raise ValueError("no values to average")
    mean = math.fsum(values) / count
    if count == 1:
        return mean, None
    return mean, t_quantile(count - 1) * statistics.stdev(values, mean) / math.sqrt(count)


@dataclass(frozen=True)
class Difference:
    """What one variant is ahead of another by, over the seeds that both were run on.

    Attributes:
        seeds: common to both.
        mean: of the differences, one per seed.
        half: half width of the 95 % interval of that mean; None for a single seed.
    """

    seeds: tuple[int, ...]
    mean: float
    half: float | None

    @property
    def excludes_zero(self) -> bool:
        """Whether anything can be said: the interval is known, and zero lies outside."""
        return self.half is not None and abs(self.mean) > self.half

    def __str__(self) -> str:
        half = "" if self.half is None else f" ± {self.half:.1f}"
        return f"{self.mean:+.1f}{half}"


def paired_difference(
    values: Mapping[int, float], others: Mapping[int, float]
) -> Difference | None:
    """``values`` minus ``others``, paired by seed.

    What a seed gives both variants alike, as the order of the images, drops out. The two samples
    are dependent, so that an interval of each says nothing about their difference.

    Args:
        values, others: a number per seed.

    Returns:
        Difference, or None if no seed is common to both.
    """
    seeds = tuple(sorted(values.keys() & others.keys()))
    if not seeds:
        return None
    return Difference(seeds, *mean_interval([values[s] - others[s] for s in seeds]))
