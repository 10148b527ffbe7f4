"""From the moments at which tokens arrived to the few times that the figures need."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

Event = tuple[float, Hashable, int]
"""When (monotonic seconds), which request, and how many output tokens it has by then."""


@dataclass(frozen=True)
class Run:
    """One run of a case on one engine; times in seconds on the machine's monotonic clock.

    Attributes:
        first_token: when the first token of any request arrived.
        all_started: when the last request's first token arrived.
        tokens_at_all_started: output tokens of all requests up to then.
        end: when the last token arrived.
        cached_tokens: prompt tokens that came from a prefix cache.
        token_ids: the outputs.
    """

    start: float
    first_token: float
    all_started: float
    tokens_at_all_started: int
    end: float
    output_lengths: list[int]
    cached_tokens: int
    token_ids: list[list[int]]


def summarise(start: float, events: Sequence[Event], token_ids: list[list[int]], cached_tokens: int = 0) -> Run:
    """Reduce a run's events, which are in order of time, to its :class:`Run`.

    Raises:
        ValueError: the events do not account for every request and token.
    """
    counts: dict[Hashable, int] = {}
    all_started, tokens_at_all_started = 0.0, 0
    for moment, request, count in events:
        new = request not in counts
        counts[request] = count
        # Requests that start in one step carry nearly the same time; what follows the last of them is decoding.
        if new and len(counts) == len(token_ids):
            all_started, tokens_at_all_started = moment, sum(counts.values())
    lengths = [len(ids) for ids in token_ids]
    if len(counts) != len(lengths) or sum(counts.values()) != sum(lengths):
        raise ValueError(
            f"{len(lengths)} requests returned {sum(lengths)} tokens, "
            f"but {sum(counts.values())} tokens of {len(counts)} requests were seen to arrive"
        )
    return Run(
        start, events[0][0], all_started, tokens_at_all_started, events[-1][0], lengths, cached_tokens, token_ids
    )
