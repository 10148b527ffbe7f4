"""The figures of a level, computed from what was observed of its requests and from nothing else."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence

from pydantic import BaseModel, ConfigDict

from npu_zoo.core.errors import UsageError
from npu_zoo.evaluation.serving.observation import FailureKind, Observation

PERCENTILES = (50, 90, 99)


class Distribution(BaseModel):
    """Of a time, in milliseconds. Percentiles lie between neighbours in proportion, as numpy's do."""

    model_config = ConfigDict(frozen=True)

    count: int
    mean: float
    p50: float
    p90: float
    p99: float

    @classmethod
    def of(cls, seconds: Iterable[float | None]) -> Distribution | None:
        """Of those that are there; None where none is."""
        ordered = sorted(value * 1e3 for value in seconds if value is not None)
        if not ordered:
            return None
        p50, p90, p99 = (percentile(ordered, percent) for percent in PERCENTILES)
        return cls(count=len(ordered), mean=math.fsum(ordered) / len(ordered), p50=p50, p90=p90, p99=p99)


class Goal(BaseModel):
    """Service-level objectives, in milliseconds; one that is None is none.

    Attributes:
        ttft: longest time to the first token.
        tpot: longest time per output token after the first.
        e2e: longest time to the end of the answer.
    """

    model_config = ConfigDict(frozen=True)

    ttft: float | None = None
    tpot: float | None = None
    e2e: float | None = None

    @classmethod
    def parse(cls, text: str) -> Goal:
        """Read ``ttft:500,tpot:50,e2e:5000``.

        Raises:
            UsageError: a name is unknown or given twice, or a time is no positive number.
        """
        times: dict[str, float] = {}
        for part in text.split(","):
            name, _, value = (word.strip() for word in part.partition(":"))
            if name not in cls.model_fields or name in times:
                known = ", ".join(cls.model_fields)
                raise UsageError(f"--goodput takes times such as ttft:500,tpot:50 of {known}, each once; not {part!r}")
            times[name] = _milliseconds(name, value)
        return cls(**times)

    def is_met(self, observation: Observation) -> bool:
        """Whether a request completed within all of them; one token alone has no time per token to miss.

        Where several tokens came without text their time is not known, and not within any.
        """
        if observation.status != "completed":
            return False
        if self.tpot is not None and observation.tpot is None and observation.output_tokens > 1:
            return False
        pairs = ((getattr(observation, name), getattr(self, name)) for name in type(self).model_fields)
        return all(most is None or seconds is None or seconds * 1e3 <= most for seconds, most in pairs)


class Goodput(BaseModel):
    """Requests that met a goal.

    Attributes:
        requests: how many did.
        requests_per_s: per second of the level.
        share: of those that completed or failed.
    """

    model_config = ConfigDict(frozen=True)

    goal: Goal
    requests: int
    requests_per_s: float
    share: float


class FailureCount(BaseModel):
    """Failures of one kind with one message."""

    model_config = ConfigDict(frozen=True)

    kind: FailureKind
    message: str
    count: int


class LevelFigures(BaseModel):
    """What a level says of a server. Times and tokens are those of completed requests; every request is counted.

    Attributes:
        sent: requests: completed, failed and cancelled ones.
        failures: by kind and message, the most frequent first.
        seconds: from the start to the end of the last response.
        request_throughput: completed requests per second.
        output_throughput: output tokens per second.
        total_throughput: prompt and output tokens per second; None where the server does not count prompts.
        prompt_tokens: of completed requests.
        asked_prompt_tokens: that the same requests' prompts were made for; None where prompts were given.
        asked_output_tokens: the same requests' ``max_tokens``; None where one has none.
        counted_by_server: whether all tokens are the server's count; else events with text are counted where it is not.
        tokens_per_event: output tokens per event with text; above 1, inter-token latencies are those of events.
        peak_concurrency: most requests under way at once.
        ttft: time to the first token.
        tpot: time per output token after the first, of requests with several and with text.
        itl: times between events with text, of all requests together.
        e2e: time to the end of the answer.
        lateness: how much later than due requests were sent; None in a closed loop.
        goodput: None without a goal.
    """

    model_config = ConfigDict(frozen=True)

    sent: int
    completed: int
    failed: int
    cancelled: int
    failures: tuple[FailureCount, ...]
    seconds: float
    request_throughput: float
    output_throughput: float
    total_throughput: float | None
    prompt_tokens: int | None
    output_tokens: int
    asked_prompt_tokens: int | None
    asked_output_tokens: int | None
    counted_by_server: bool
    tokens_per_event: float | None
    peak_concurrency: int
    ttft: Distribution | None
    tpot: Distribution | None
    itl: Distribution | None
    e2e: Distribution | None
    lateness: Distribution | None
    goodput: Goodput | None

    @classmethod
    def of(cls, observations: Sequence[Observation], goal: Goal | None = None) -> LevelFigures:
        """The figures of a level's requests."""
        done = [one for one in observations if one.status == "completed"]
        failed = [one for one in observations if one.status == "failed"]
        seconds = max((one.ended for one in observations), default=0.0)
        prompt_tokens, output_tokens = total(one.prompt_tokens for one in done), sum(one.output_tokens for one in done)
        events = sum(len(one.text_arrivals) for one in done)
        return cls(
            sent=len(observations),
            completed=len(done),
            failed=len(failed),
            cancelled=len(observations) - len(done) - len(failed),
            failures=count_failures(failed),
            seconds=seconds,
            request_throughput=_rate(len(done), seconds),
            output_throughput=_rate(output_tokens, seconds),
            total_throughput=None if prompt_tokens is None else _rate(prompt_tokens + output_tokens, seconds),
            prompt_tokens=prompt_tokens,
            output_tokens=output_tokens,
            asked_prompt_tokens=total(one.asked_prompt_tokens for one in done),
            asked_output_tokens=total(one.max_tokens for one in done),
            counted_by_server=all(one.counted_by_server for one in done),
            tokens_per_event=output_tokens / events if events else None,
            peak_concurrency=peak_concurrency(observations),
            ttft=Distribution.of(one.ttft for one in done),
            tpot=Distribution.of(one.tpot for one in done),
            itl=Distribution.of(gap for one in done for gap in one.itl),
            e2e=Distribution.of(one.e2e for one in done),
            lateness=Distribution.of(one.lateness for one in observations),
            goodput=goodput_of(goal, observations, seconds) if goal else None,
        )


def percentile(ordered: Sequence[float], percent: float) -> float:
    """The value of ascending ones that a percentage of them does not exceed, between neighbours in proportion."""
    place = percent / 100 * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def goodput_of(goal: Goal, observations: Sequence[Observation], seconds: float) -> Goodput:
    """How many requests met a goal; cancelled ones neither met nor missed it."""
    met = sum(goal.is_met(one) for one in observations)
    judged = sum(one.status != "cancelled" for one in observations)
    return Goodput(goal=goal, requests=met, requests_per_s=_rate(met, seconds), share=met / judged if judged else 0.0)


def count_failures(failed: Iterable[Observation]) -> tuple[FailureCount, ...]:
    """Failures by kind and message, the most frequent first."""
    counts = Counter((one.failure.kind, one.failure.message) for one in failed if one.failure)
    return tuple(
        FailureCount(kind=kind, message=message, count=count) for (kind, message), count in counts.most_common()
    )


def peak_concurrency(observations: Iterable[Observation]) -> int:
    """Most requests that were under way at once; one that ends as another begins is not."""
    edges = sorted(edge for one in observations for edge in ((one.sent, 1), (one.ended, -1)))
    running = peak = 0
    for _, change in edges:
        running += change
        peak = max(peak, running)
    return peak


def total(counts: Iterable[int | None]) -> int | None:
    """Their sum; None where one is missing, or none is there."""
    found = list(counts)
    known = [count for count in found if count is not None]
    return sum(known) if known and len(known) == len(found) else None


def _rate(count: int, seconds: float) -> float:
    return count / seconds if seconds else 0.0


def _milliseconds(name: str, value: str) -> float:
    try:
        time = float(value)
    except ValueError:
        time = math.nan
    if not (time > 0 and math.isfinite(time)):
        raise UsageError(f"--goodput {name}:{value} is no time in milliseconds, such as {name}:500")
    return time
