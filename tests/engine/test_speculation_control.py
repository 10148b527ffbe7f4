"""When drafting is turned off and tried again, on a clock of the test's own."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest

from npu_zoo.core.config import SpeculationConfig
from npu_zoo.core.engine import CompletionOutput
from npu_zoo.core.sampling import SamplingParams
from npu_zoo.engine.scheduler import ScheduledRow
from npu_zoo.engine.sequence import Sequence
from npu_zoo.engine.speculation.control import SpeculationControl, batch_class
from npu_zoo.engine.speculation.proposer import DraftRequest, Proposer, StepResult
from npu_zoo.engine.speculation.speculator import Speculator


def steps(
    control: SpeculationControl, count: int, tokens: float, drafted_seconds: float, batch: int = 1
) -> list[tuple[bool, float | None]]:
    """Run steps as the control wants them; a plain one takes a second."""
    found = []
    for _ in range(count):
        drafts = control.wants_drafts(batch)
        seconds = drafted_seconds if drafts else 1.0
        told = control.record(batch, 3 * batch * drafts, round(tokens * batch) if drafts else batch, seconds)
        found.append((drafts, told))
    return found


def test_drafts_that_pay_go_on_beside_a_plain_step_now_and_then() -> None:
    found = steps(SpeculationControl(), 1000, tokens=2, drafted_seconds=1.2)
    drafted = sum(drafts for drafts, _ in found)
    assert 0.97 < drafted / 1000 < 1
    assert not any(told for _, told in found)


def test_drafts_that_do_not_pay_stop_and_are_tried_ever_more_seldom() -> None:
    control = SpeculationControl()
    found = steps(control, 5000, tokens=1, drafted_seconds=1.25)
    assert next(told for _, told in found if told) == pytest.approx(0.8)
    assert control.turned_off == [1]
    tried = [number for number, (_, told) in enumerate(found) if told]
    rests = [later - earlier for earlier, later in itertools.pairwise(tried)]
    assert len(rests) > 3
    assert all(later > 1.8 * earlier for earlier, later in itertools.pairwise(rests))
    assert sum(drafts for drafts, _ in found) < 100


def test_drafts_that_pay_again_are_taken_up_again() -> None:
    control = SpeculationControl()
    steps(control, 50, tokens=1, drafted_seconds=1.25)
    assert control.turned_off == [1]
    steps(control, 300, tokens=3, drafted_seconds=1.25)
    assert control.turned_off == []
    assert control.gains[1] == pytest.approx(3 / 1.25, rel=0.01)


def test_a_gain_within_the_margin_changes_nothing() -> None:
    on, off = SpeculationControl(), SpeculationControl()
    steps(on, 500, tokens=1, drafted_seconds=1.01)
    assert on.turned_off == []
    steps(off, 50, tokens=1, drafted_seconds=2)
    steps(off, 500, tokens=1, drafted_seconds=0.99)
    assert off.turned_off == [1]


def test_single_slow_steps_turn_nothing_off() -> None:
    control = SpeculationControl()
    for number in range(200):
        drafts = control.wants_drafts(1)
        slow = 100 if number % 10 == 0 else 1
        control.record(1, 3 * drafts, 2 if drafts else 1, slow * 1.0)
    assert control.turned_off == []


def test_batches_of_other_sizes_are_judged_apart() -> None:
    control = SpeculationControl()
    steps(control, 100, tokens=2, drafted_seconds=1.2, batch=1)
    steps(control, 100, tokens=2, drafted_seconds=4, batch=30)
    assert control.turned_off == [32]
    assert control.wants_drafts(1)
    assert [batch_class(batch) for batch in (1, 2, 3, 4, 5, 8, 9, 64)] == [1, 2, 4, 4, 8, 8, 16, 64]


def test_what_is_not_adaptive_always_drafts() -> None:
    control = SpeculationControl(adaptive=False)
    assert all(drafts and not told for drafts, told in steps(control, 300, tokens=1, drafted_seconds=9))


class Fixed(Proposer):
    """The same drafts for every sequence; remembers what it was told."""

    def __init__(self) -> None:
        self.seen: list[StepResult] = []

    def propose(self, requests: list[DraftRequest]) -> list[list[int]]:  # type: ignore[override]
        return [[7, 8, 9] for _ in requests]

    def observe(self, results: list[StepResult]) -> None:  # type: ignore[override]
        self.seen += results


def decoding(max_tokens: int = 100) -> Sequence:
    sequence = Sequence(0, [1, 2, 3], 2, SamplingParams(), max_tokens, 0, CompletionOutput(0))
    sequence.num_computed_tokens = 2
    return sequence


def speculator(clock: Callable[[], float], proposer: Proposer) -> Speculator:
    return Speculator(proposer, SpeculationConfig("prompt_lookup", 3), SpeculationControl(), clock)


def test_turning_off_is_said_once_and_shows(caplog: pytest.LogCaptureFixture) -> None:
    now = 0.0
    proposer = Fixed()
    engine = speculator(lambda: now, proposer)
    for _ in range(600):
        sequence = decoding()
        drafts = tuple(engine.begin_step([sequence]).get(sequence.number, ()))
        now += 1.5 if drafts else 1.0
        engine.end_step([StepResult(ScheduledRow(sequence, 2, 1 + len(drafts), drafts), (5,))])
    (told,) = caplog.messages
    assert "turned off for batches of 1: 0.67 times" in told
    assert engine.explain()["turned_off_for_batches"] == [1]
    assert engine.num_draft_tokens == 3 * engine.num_drafts
    assert 0 < engine.num_drafts < 60
    assert len(proposer.seen) == 600


def test_drafts_end_before_the_last_token_that_a_request_may_have() -> None:
    engine = speculator(lambda: 0.0, Fixed())
    sequences = [decoding(max_tokens) for max_tokens in (1, 2, 3, 4, 5)]
    found = engine.begin_step(sequences)
    assert [len(found.get(sequence.number, [])) for sequence in sequences] == [0, 0, 1, 2, 3]


def test_accepted_drafts_are_counted() -> None:
    engine = speculator(lambda: 0.0, Fixed())
    sequence = decoding()
    row = ScheduledRow(sequence, 2, 4, (7, 8, 9))
    engine.end_step([StepResult(row, (7, 8, 1))])
    assert (engine.num_drafts, engine.num_draft_tokens, engine.num_accepted_tokens) == (1, 3, 2)
