"""Intervals of 95 % for scores whose questions share images: answers about one image are not independent.

The variance is that of clusters (Miller, "Adding Error Bars to Evals", arXiv 2411.00640). Each question has an influence on
the estimate, which is (score - mean) / n for a mean. Influences of one image are summed before they are squared.
"""

import math
from collections import defaultdict
from collections.abc import Hashable, Iterable, Sequence


def standard_error(influences: Sequence[float], clusters: Iterable[Hashable]) -> float | None:
    """Return sqrt(G / (G - 1) sum_g (sum_{i in g} influence_i)^2) over G clusters; None for fewer than two.

    Args:
        influences: influence of each question; their sum is 0.
        clusters: cluster of each question, for example its image.
    """
    sums: dict[Hashable, float] = defaultdict(float)
    for influence, cluster in zip(influences, clusters, strict=True):
        sums[cluster] += influence
    num_clusters = len(sums)
    if num_clusters < 2:
        return None
    return math.sqrt(num_clusters / (num_clusters - 1) * sum(value**2 for value in sums.values()))


def mean_influences(values: Sequence[float]) -> list[float]:
    """Return the influence of each value on the mean of all."""
    centre = sum(values) / len(values)
    return [(value - centre) / len(values) for value in values]


def student_interval(estimate: float, error: float, num_clusters: int) -> tuple[float, float]:
    """Return the symmetric interval of a difference, with Student's quantile at ``num_clusters`` - 1 degrees of freedom.

    Args:
        estimate: the difference.
        error: result of `standard_error`.
        num_clusters: number of clusters, at least 2.
    """
    reach = _quantile(num_clusters) * error
    return estimate - reach, estimate + reach


def share_interval(share: float, error: float, num_clusters: int) -> tuple[float, float]:
    """Return Wilson's interval of a score in [0, 1], with the effective number of questions; it stays in [0, 1].

    The effective number is share (1 - share) / error^2, the number of independent right-or-wrong questions with an equal
    uncertainty. At 0 and 1, with an error of 0, it is the number of clusters. For independent questions the result is
    Wilson's own interval with Student's quantile, which tends to the normal quantile.

    Args:
        share: score in [0, 1].
        error: result of `standard_error`.
        num_clusters: number of clusters, at least 2.
    """
    spread = share * (1 - share)
    number = spread / error**2 if error > 0 and spread > 0 else num_clusters
    squared = _quantile(num_clusters) ** 2 / number
    centre = (share + squared / 2) / (1 + squared)
    half_width = math.sqrt(squared * spread + squared**2 / 4) / (1 + squared)
    return max(0.0, centre - half_width), min(1.0, centre + half_width)


def _quantile(num_clusters: int) -> float:
    from scipy.stats import t as student  # imported here because it takes 0.5 s, and few commands need it

    return float(student.ppf(0.975, num_clusters - 1))
