"""Choosing a learning rate for each method on held-out data."""

from collections.abc import Callable, Sequence


def choose_rate(rates: Sequence[float], score: Callable[[float], float], count: int | None = None) -> float:
    """
    The best of a number of rates that is the same for every method, found by climbing from the middle of the set.

    The two middle rates are tried first, and then always the untried rate that is nearest to the best one so far.

    Args:
        rates: ascending.
        score: gives a rate's score; it is called once for each rate that is tried.
        count: how many rates are tried, at least 2; default: all.

    >>> tried = []
    >>> choose_rate([1, 2, 4, 8, 16], lambda rate: tried.append(rate) or -abs(rate - 8), 3)
    8
    >>> tried
    [4, 8, 16]
    """
    if len(rates) == 1:
        return rates[0]
    left = (len(rates) - 1) // 2
    scores = {index: score(rates[index]) for index in (left, left + 1)}
    while len(scores) < min(count or len(rates), len(rates)):
        best = max(scores, key=scores.get)
        untried = (index for index in range(len(rates)) if index not in scores)
        index = min(untried, key=lambda index: abs(index - best))
        scores[index] = score(rates[index])
    return rates[max(scores, key=scores.get)]
