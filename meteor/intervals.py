"""95 % intervals of scores whose questions share images: answers about one image are not independent.

The variance of an estimate is that of clusters (Miller, "Adding Error Bars to Evals", arXiv 2411.00640): each question has an
influence on the estimate, (score - mean) / n for a mean; influences of one image are summed before they are squared.
"""

import math
from collections import defaultdict
from collections.abc import Hashable, Iterable, Sequence


def standard_error(influences: Sequence[float], clusters: Iterable[Hashable]) -> float | None:
    """sqrt(G / (G - 1) sum_g (sum_{i in g} influence_i)^2) over G clusters; None for fewer than two.

    Args:
        influences: one a question; they sum to 0.
        clusters: of each question, for example its image.
    """
    sums: dict[Hashable, float] = defaultdict(float)
    for influence, cluster in zip(influences, clusters, strict=True):
        sums[cluster] += influence
    num_clusters = len(sums)
    if num_clusters < 2:
        return None
    return math.sqrt(num_clusters / (num_clusters - 1) * sum(value**2 for value in sums.values()))


def mean_influences(values: Sequence[float]) -> list[float]:
    """Of the mean of ``values``."""
    centre = sum(values) / len(values)
    return [(value - centre) / len(values) for value in values]


def student_interval(estimate: float, error: float, num_clusters: int) -> tuple[float, float]:
    """For differences, which may be anything: symmetric, with Student's quantile of clusters - 1 degrees of freedom."""
    reach = _quantile(num_clusters) * error
    return estimate - reach, estimate + reach


def share_interval(share: float, error: float, num_clusters: int) -> tuple[float, float]:
    """For scores in [0, 1], in which it stays: Wilson's interval with the effective number of questions.

    That is share (1 - share) / error^2, the number of independent right-or-wrong questions that would be as uncertain; at 0
    and 1, where the error is 0, the number of clusters. Independent questions give Wilson's own interval, but for
    Student's quantile, which tends to the normal one.

    Args:
        share: in [0, 1].
        error: `standard_error`.
        num_clusters: at least 2.
    """
    spread = share * (1 - share)
    number = spread / error**2 if error > 0 and spread > 0 else num_clusters
    squared = _quantile(num_clusters) ** 2 / number
    centre = (share + squared / 2) / (1 + squared)
    half_width = math.sqrt(squared * spread + squared**2 / 4) / (1 + squared)
    return max(0.0, centre - half_width), min(1.0, centre + half_width)


def _quantile(num_clusters: int) -> float:
    from scipy.stats import t as student  # half a second; most of the library does without

    return float(student.ppf(0.975, num_clusters - 1))
