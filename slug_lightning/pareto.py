"""The layers that no other layer beats: high importance, low alignment."""

from __future__ import annotations

from collections.abc import Sequence


def pareto_front(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Say of each (importance, alignment) whether it is on the Pareto front.

    A point is off the front if another is at least as good on both (importance no lower, alignment no higher) and
    strictly better on one. Equal points stand or fall together.

    Args:
        points: importance (higher is better) and alignment (lower is better) of each layer.

    Returns:
        One bool a point, in the order given (SLUG, arXiv 2407.11867).

    Example:
        >>> pareto_front([(1.0, 0.5), (2.0, 0.5), (0.5, 0.1), (2.0, 0.9)])
        [False, True, True, False]
    """
    front = [False] * len(points)
    best_alignment = float("inf")  # of all points with strictly higher importance
    order = sorted(range(len(points)), key=lambda i: (-points[i][0], points[i][1]))
    start = 0
    while start < len(order):
        importance, lowest = points[order[start]]
        end = start
        while end < len(order) and points[order[end]][0] == importance:
            front[order[end]] = points[order[end]][1] == lowest < best_alignment
            end += 1
        best_alignment = min(best_alignment, lowest)
        start = end
    return front
