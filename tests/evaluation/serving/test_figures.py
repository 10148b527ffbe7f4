"""The figures against what numpy makes of the same raw timestamps, written apart from them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from npu_zoo.core.errors import UsageError
from npu_zoo.evaluation.serving.figures import Distribution, Goal, LevelFigures
from npu_zoo.evaluation.serving.observation import Failure, Observation

GOAL = Goal(ttft=400, tpot=80, e2e=1500)


@st.composite
def observations(draw: st.DrawFn) -> list[Observation]:
    seen = []
    for index in range(draw(st.integers(0, 12))):
        sent = draw(st.floats(0, 5))
        gaps = draw(st.lists(st.floats(0, 0.5), max_size=8))
        arrivals = (sent + np.cumsum(gaps)).tolist()
        characters = draw(st.lists(st.integers(0, 3), min_size=len(gaps), max_size=len(gaps)))
        status = draw(st.sampled_from(["completed", "failed", "cancelled"])) if gaps else "failed"
        seen.append(
            Observation(
                index=index,
                due=draw(st.none() | st.just(sent - 0.01)),
                sent=sent,
                arrivals=tuple(arrivals),
                characters=tuple(characters),
                ended=max([sent, *arrivals]) + draw(st.floats(0, 0.1)),
                status=status,
                failure=Failure(kind="closed", message="m") if status == "failed" else None,
                prompt_tokens=draw(st.integers(1, 50)),
                output_tokens=draw(st.integers(1, 9)),
                counted_by_server=True,
            )
        )
    return seen


def raw_times(data: dict[str, Any]) -> dict[str, Any]:
    """One request's times by the definitions in the documentation, from the JSON of a record."""
    with_text = [at for at, size in zip(data["arrivals"], data["characters"], strict=True) if size > 0]
    first = with_text[0] if with_text else data["arrivals"][-1]
    last, tokens = data["arrivals"][-1], data["output_tokens"]
    tpot = (last - first) / (tokens - 1) if tokens > 1 and with_text else None
    return {"ttft": first - data["sent"], "e2e": last - data["sent"], "tpot": tpot, "itl": np.diff(with_text).tolist()}


def assert_distribution(found: Distribution | None, seconds: list[float]) -> None:
    if not seconds:
        assert found is None
        return
    assert found is not None
    milliseconds = np.array(seconds) * 1000
    expected = [milliseconds.mean(), *np.percentile(milliseconds, [50, 90, 99])]
    assert [found.mean, found.p50, found.p90, found.p99] == pytest.approx(expected, rel=1e-9, abs=1e-9)
    assert found.count == len(seconds)


@given(observations())
def test_the_figures_are_those_of_the_raw_timestamps(seen: list[Observation]) -> None:
    figures = LevelFigures.of(seen, GOAL)
    raw = [one.model_dump(mode="json") for one in seen]
    done = [data for data in raw if data["status"] == "completed"]
    times = [raw_times(data) for data in done]
    seconds = max((data["ended"] for data in raw), default=0)
    for name in ("ttft", "tpot", "e2e"):
        assert_distribution(getattr(figures, name), [t[name] for t in times if t[name] is not None])
    assert_distribution(figures.itl, [gap for t in times for gap in t["itl"]])
    assert_distribution(figures.lateness, [data["sent"] - data["due"] for data in raw if data["due"] is not None])
    output, prompt = (sum(data[f"{name}_tokens"] for data in done) for name in ("output", "prompt"))
    if seconds:
        assert figures.request_throughput == pytest.approx(len(done) / seconds)
        assert figures.output_throughput == pytest.approx(output / seconds)
        if done:
            assert figures.total_throughput == pytest.approx((output + prompt) / seconds)
    counts = [figures.sent, figures.completed, figures.failed, figures.cancelled]
    assert counts == [len(raw), *(sum(d["status"] == s for d in raw) for s in ("completed", "failed", "cancelled"))]
    assert sum(one.count for one in figures.failures) == figures.failed


@given(observations())
def test_goodput_counts_those_within_every_goal(seen: list[Observation]) -> None:
    met = 0
    for data in (one.model_dump() for one in seen if one.status == "completed"):
        times = raw_times(data)
        unknown = times["tpot"] is None and data["output_tokens"] > 1
        slow = [times["ttft"] * 1e3 > 400, unknown or (times["tpot"] or 0) * 1e3 > 80, times["e2e"] * 1e3 > 1500]
        met += not any(slow)
    goodput = LevelFigures.of(seen, GOAL).goodput
    assert goodput is not None
    assert goodput.requests == met
    judged = sum(one.status != "cancelled" for one in seen)
    assert goodput.share == pytest.approx(met / judged if judged else 0)


@given(observations())
def test_the_peak_is_the_most_that_overlap_at_a_sending(seen: list[Observation]) -> None:
    lasting = [one for one in seen if one.ended > one.sent]
    overlaps = [sum(one.sent <= at.sent < one.ended for one in lasting) for at in lasting]
    assert LevelFigures.of(lasting).peak_concurrency == max(overlaps, default=0)


def test_failures_are_counted_by_what_they_were() -> None:
    kinds = [("closed", "m"), ("status", "HTTP 429"), ("closed", "m")]
    seen = [
        Observation(index=i, sent=0, ended=1, status="failed", failure=Failure(kind=kind, message=message))
        for i, (kind, message) in enumerate(kinds)
    ]
    figures = LevelFigures.of(seen)
    assert [(one.kind, one.message, one.count) for one in figures.failures] == [
        ("closed", "m", 2),
        ("status", "HTTP 429", 1),
    ]
    assert figures.ttft is None
    assert figures.request_throughput == 0


def test_tokens_without_text_have_no_time_each_and_meet_no_goal_of_it() -> None:
    seen = Observation(
        index=0, sent=0, arrivals=(0.1, 0.2), characters=(0, 0), ended=0.2, status="completed", output_tokens=64
    )
    figures = LevelFigures.of([seen], Goal(tpot=50))
    assert figures.tpot is None
    assert figures.goodput is not None
    assert figures.goodput.requests == 0
    assert Goal(ttft=500, e2e=500).is_met(seen)
    assert Goal(tpot=50).is_met(seen.model_copy(update={"output_tokens": 1}))


def test_a_goal_is_read() -> None:
    assert Goal.parse("ttft:500, tpot:50.5") == Goal(ttft=500, tpot=50.5)


@pytest.mark.parametrize(
    "text", ["", "ttft", "ttft:", "ttft:0", "ttft:-1", "ttft:nan", "itl:5", "ttft:1,ttft:2", "e2e:inf"]
)
def test_what_is_no_goal_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--goodput"):
        Goal.parse(text)
