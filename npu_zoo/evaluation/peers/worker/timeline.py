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
        preemptions: how often a request lost its room and was computed again.
        ended_at_all_started: requests that had their last token by ``all_started``.
        model_seconds: spent in the model's own steps up to ``all_started`` and after it; None where the engine does not
            tell. What is left of a run is scheduling, sampling and whatever else the host does.
    """

    start: float
    first_token: float
    all_started: float
    tokens_at_all_started: int
    end: float
    output_lengths: list[int]
    cached_tokens: int
    token_ids: list[list[int]]
    preemptions: int = 0
    ended_at_all_started: int = 0
    model_seconds: tuple[float, float] | None = None


def summarise(
    start: float,
    events: Sequence[Event],
    token_ids: list[list[int]],
    cached_tokens: int = 0,
    preemptions: int = 0,
    spans: Sequence[tuple[float, float]] = (),
) -> Run:
    """Reduce a run's events, which are in order of time, to its :class:`Run`.

    Raises:
        ValueError: the events do not account for every request and token.
    """
    counts: dict[Hashable, int] = {}
    at_all_started: dict[Hashable, int] = {}
    all_started = 0.0
    for moment, request, count in events:
        new = request not in counts
        counts[request] = count
        # Requests that start in one step carry nearly the same time; what follows the last of them is decoding.
        if new and len(counts) == len(token_ids):
            all_started, at_all_started = moment, dict(counts)
    lengths = [len(ids) for ids in token_ids]
    if len(counts) != len(lengths) or sum(counts.values()) != sum(lengths):
        raise ValueError(
            f"{len(lengths)} requests returned {sum(lengths)} tokens, "
            f"but {sum(counts.values())} tokens of {len(counts)} requests were seen to arrive"
        )
    return Run(
        start=start,
        first_token=events[0][0],
        all_started=all_started,
        tokens_at_all_started=sum(at_all_started.values()),
        end=events[-1][0],
        output_lengths=lengths,
        cached_tokens=cached_tokens,
        token_ids=token_ids,
        preemptions=preemptions,
        ended_at_all_started=sum(count == counts[request] for request, count in at_all_started.items()),
        model_seconds=_split(spans, all_started) if spans else None,
    )


def _split(spans: Sequence[tuple[float, float]], moment: float) -> tuple[float, float]:
    """Seconds of spans that began before a moment, and of those that began later."""
    before = sum(end - start for start, end in spans if start < moment)
    return before, sum(end - start for start, end in spans) - before
