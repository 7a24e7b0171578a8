"""95 % intervals of success rates, of means over seeds, and of differences of two; and how they are written."""

import math
import re
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

Interval = tuple[float, float]

Z95 = 1.959963984540054  # quantile of the normal distribution


@lru_cache(maxsize=1000)
def student_t(degrees: float) -> float:
    """The 97.5 % quantile of Student's t, for any number of degrees of freedom from 1.

    With t = sqrt(degrees) * tan(angle), the density is cos(angle) ** (degrees - 1), which is integrated numerically.
    """
    if not degrees < 1e6:
        return Z95
    whole = math.sqrt(math.pi) / 2 * math.exp(math.lgamma(degrees / 2) - math.lgamma((degrees + 1) / 2))
    low, high = 0.0, math.atan(13 / math.sqrt(degrees))  # the quantile is 12.7 at most
    for _ in range(60):
        angle = (low + high) / 2
        y = np.cos(np.linspace(0, angle, 401)) ** (degrees - 1)
        inside = (y[0] + 4 * y[1::2].sum() + 2 * y[2:-1:2].sum() + y[-1]) * angle / 1200  # by Simpson's rule
        low, high = (angle, high) if inside < 0.95 * whole else (low, angle)
    return math.sqrt(degrees) * math.tan((low + high) / 2)


def moments(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation (of n - 1) of two or more values."""
    mean = sum(values) / len(values)
    differences = [value - mean for value in values]
    return mean, math.sqrt(sum(one * one for one in differences) / (len(values) - 1))


def unbiased(deviation: float, count: int) -> float:
    """The deviation (of n - 1) of two or more values, from that of n, which evaluations record."""
    return deviation * math.sqrt(count / (count - 1))


def of_mean(mean: float, deviation: float, count: int) -> Interval:
    """Student's t interval of a mean of two or more values."""
    half = student_t(count - 1) * deviation / math.sqrt(count)
    return mean - half, mean + half


def wilson(successes: int, episodes: int) -> Interval:
    """Wilson's interval of a success rate (Wilson, 1927), valid also for 0 and for all successes."""
    rate, n, z = successes / episodes, episodes, Z95
    centre = (rate + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    return (0.0 if successes == 0 else centre - half), (1.0 if successes == n else centre + half)


def of_auc(area: float, positives: int, negatives: int) -> Interval:
    """Interval of the area under a ROC curve, valid also for 0 and 1 (Newcombe, 2006, method 5).

    A bound is where the area is `Z95` deviations away, by the deviation that it would have if the bound were the truth.

    Args:
        positives, negatives: Samples of each class.
    """

    def deviation(true: float) -> float:
        more = ((positives + negatives) / 2 - 1) * ((1 - true) / (2 - true) + true / (1 + true))
        return math.sqrt(true * (1 - true) * (1 + more) / (positives * negatives))

    def bound(far: float) -> float:
        near = area
        for _ in range(60):
            middle = (near + far) / 2
            near, far = (middle, far) if abs(area - middle) <= Z95 * deviation(middle) else (near, middle)
        return near

    return bound(0.0), bound(1.0)


def newcombe(one: tuple[int, int], other: tuple[int, int]) -> Interval:
    """Interval of a difference of success rates, each (successes, episodes), from Wilson's of each (Newcombe, 1998)."""
    (p, (p_low, p_high)), (q, (q_low, q_high)) = ((s / n, wilson(s, n)) for s, n in (one, other))
    return p - q - math.hypot(p - p_low, q_high - q), p - q + math.hypot(p_high - p, q - q_low)


def welch(one: tuple[float, float, int], other: tuple[float, float, int]) -> Interval:
    """Interval of a difference of two means, each (mean, deviation, count of two or more) (Welch, 1947)."""
    (mean, deviation, n), (mean2, deviation2, n2) = one, other
    a, b = deviation * deviation / n, deviation2 * deviation2 / n2
    if a + b == 0:
        return mean - mean2, mean - mean2
    share = a / (a + b)
    half = student_t(1 / (share * share / (n - 1) + (1 - share) ** 2 / (n2 - 1))) * math.sqrt(a + b)
    return mean - mean2 - half, mean - mean2 + half


def measured(value: float, interval: Interval | None) -> str:
    """A value and its interval, with the decimals that have a meaning: one or two digits of the interval's half."""
    if interval is None:
        return number(value)
    half, rate = (interval[1] - interval[0]) / 2, max(map(abs, interval)) <= 1
    decimals = min(max(2 * rate, -math.floor(math.log10(half / 3))), 12) if 0 < half < 1e15 else None
    low, high = (number(bound, decimals) for bound in interval)
    return f"{number(value, decimals)} [{low}, {high}]"


def number(value: float, decimals: int | None = None) -> str:
    """A number as people write it: 1290, 0.96, -152.6, 3e-5; with so many decimals, or else three or four digits."""
    if not math.isfinite(value) or abs(value) >= 1e15 or 0 < abs(value) < 1e-4 and decimals is None:
        return re.sub(r"e([+-])0*", lambda found: "e" + found[1].strip("+"), f"{value:.3g}")
    if decimals is None:
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}" if abs(value) >= 1 else f"{value:.3g}"
    return f"{round(value, decimals) + 0.0:.{decimals}f}"


def thousands(step: float) -> str:
    """A number of steps, as in 500, 20k and 1.5M."""
    unit, letter = next(((n, x) for n, x in ((1e6, "M"), (1e3, "k")) if abs(step) >= n), (1, ""))
    return f"{step / unit:.6g}{letter}"
