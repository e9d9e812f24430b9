"""Choosing a learning rate for each method on held-out data."""

from collections.abc import Callable, Sequence


def choose_rate(rates: Sequence[float], score: Callable[[float], float]) -> float:
    """
    The rate with the highest score, found by climbing from the middle of the set towards the better side.

    Args:
        rates: ascending. All on one side are tried only if the score keeps rising.
        score: gives a rate's score; it is called at most once per rate.

    >>> tried = []
    >>> choose_rate([1, 2, 4, 8, 16], lambda rate: tried.append(rate) or -abs(rate - 8))
    8
    >>> tried
    [4, 8, 16]
    """
    if len(rates) == 1:
        return rates[0]
    left = (len(rates) - 1) // 2
    best, other = left, left + 1
    scores = {index: score(rates[index]) for index in (best, other)}
    step = 1 if scores[other] > scores[best] else -1
    best = max(scores, key=scores.get)
    while 0 <= best + step < len(rates):
        scores[best + step] = score(rates[best + step])
        if scores[best + step] <= scores[best]:
            break
        best += step
    return rates[best]
