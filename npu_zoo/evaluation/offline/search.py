"""The largest batch that holds a limit, with few tries."""

from __future__ import annotations

from collections.abc import Callable


def largest_batch(holds: Callable[[int], bool], most: int) -> int:
    """The largest batch that holds, if every smaller one of a batch that holds does too.

    Grows twofold, then halves the gap. Where the limit is crossed more than once, as noise may have it, the answer is
    a batch that was tried and held, and the next larger one was tried and did not.

    Args:
        holds: tries one batch; never asked twice for the same.
        most: the largest to try, at least 0.

    Returns:
        0 where not even one sequence holds.
    """
    good, bad = 0, most + 1
    while good < most:
        batch = min(max(1, 2 * good), most)
        if not holds(batch):
            bad = batch
            break
        good = batch
    while bad - good > 1:
        middle = (good + bad) // 2
        if holds(middle):
            good = middle
        else:
            bad = middle
    return good
