"""Means with confidence intervals over a few seeds."""

import math
from collections.abc import Sequence

__all__ = ["mean_interval", "t_quantile"]

# 97.5 % quantiles of Student's t for 1, 2, ... 30 degrees of freedom (any statistics textbook).
_T975 = """
12.7062 4.3027 3.1824 2.7764 2.5706 2.4469 2.3646 2.3060 2.2622 2.2281
 2.2010 2.1788 2.1604 2.1448 2.1314 2.1199 2.1098 2.1009 2.0930 2.0860
 2.0796 2.0739 2.0687 2.0639 2.0595 2.0555 2.0518 2.0484 2.0452 2.0423
"""
_T975 = tuple(float(word) for word in _T975.split())
_Z975 = 1.959964


def t_quantile(degrees: int) -> float:
    """97.5 % quantile of Student's t distribution.

    Args:
        degrees: degrees of freedom, at least 1.

    Returns:
        float: right to 4 digits.
    """
    if degrees < 1:
        raise ValueError(f"Student's t needs at least 1 degree of freedom, got {degrees}")
    if degrees <= len(_T975):
        return _T975[degrees - 1]
    # First terms of the expansion around the normal quantile; exact to 1e-4 from 31 degrees on.
    z, cube, fifth = _Z975, _Z975**3, _Z975**5
    return z + (cube + z) / (4 * degrees) + (5 * fifth + 16 * cube + 3 * z) / (96 * degrees**2)


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
    variance = math.fsum((value - mean) ** 2 for value in values) / (count - 1)
    return mean, t_quantile(count - 1) * math.sqrt(variance / count)
