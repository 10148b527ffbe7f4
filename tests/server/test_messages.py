"""What is told of requests step by step rebuilds their states, however many steps are told at once."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from npu_zoo.core.engine import CompletionOutput, GenerationRequest, Logprob, RequestMetrics, RequestOutput
from npu_zoo.core.errors import EngineError, NpuZooError, PromptError, UnsupportedError, WeightsError, WorkerError
from npu_zoo.core.features import Reason, Verdict
from npu_zoo.core.sampling import SamplingParams
from npu_zoo.server.channel import frame, read_frame
from npu_zoo.server.messages import DeltaEncoder, apply_delta, initial_output, portable_error

TEXTS = st.text(alphabet="aé🐍\n", max_size=5)
TOKENS = st.lists(st.integers(0, 100_000), max_size=3)
ENTRIES = st.builds(lambda i, p: {i: Logprob(p, 1, "t")}, st.integers(0, 9), st.floats(-9, 0))
FINISH = st.none() | st.tuples(st.sampled_from(["stop", "length", "abort"]), st.none() | st.just("END") | st.just(7))


@st.composite
def histories(draw: st.DrawFn) -> tuple[SamplingParams, list[RequestOutput], list[bool]]:
    """A request's cumulative states from step to step, and after which of them it is told."""
    params = SamplingParams(n=draw(st.integers(1, 3)), logprobs=draw(st.none() | st.just(1)))
    wants_prompt = draw(st.booleans())
    output = RequestOutput(
        "r", None, [1, 2], [CompletionOutput(i) for i in range(params.n)], False, RequestMetrics(0.5)
    )
    output.prompt_logprobs = [] if wants_prompt else None
    output.reasoning_open = draw(st.booleans())
    for completion in output.outputs:
        completion.logprobs = None if params.logprobs is None else []
    states = []
    for _ in range(draw(st.integers(1, 6))):
        for completion in output.outputs:
            if completion.finish_reason is None:
                grow(draw, completion)
        output.finished = all(completion.finish_reason for completion in output.outputs)
        output.metrics.preemptions += draw(st.integers(0, 1))
        if output.prompt_logprobs is not None:
            output.prompt_logprobs += draw(st.lists(st.none() | ENTRIES, max_size=2))
        states.append(copy.deepcopy(output))
    return params, states, draw(st.lists(st.booleans(), min_size=len(states), max_size=len(states)))


def grow(draw: st.DrawFn, completion: CompletionOutput) -> None:
    completion.text += draw(TEXTS)
    completion.token_ids += draw(TOKENS)
    if completion.logprobs is not None:
        completion.logprobs += draw(st.lists(ENTRIES, max_size=2))
        completion.cumulative_logprob = draw(st.floats(-99, 0))
    completion.finish_reason, completion.stop_reason = draw(FINISH) or (None, None)


def travel(message: Any) -> Any:
    return read_frame(io.BytesIO(frame([message])).read)[0]


@given(histories())
def test_deltas_rebuild_the_cumulative_state(history: tuple[SamplingParams, list[RequestOutput], list[bool]]) -> None:
    params, states, told = history
    encoder, rebuilt = DeltaEncoder(3), initial_output(GenerationRequest("r", (1, 2), params))
    for state, tell in zip(states, [*told[:-1], True], strict=True):
        if tell:
            delta = travel(encoder.delta(state))
            assert delta.key == 3
            apply_delta(rebuilt, delta)
            assert rebuilt == state
    again = encoder.delta(states[-1])
    assert (again.completions, again.metrics, again.prompt_logprobs) == ([], None, None)


def test_what_is_told_of_a_step_does_not_grow_with_what_was_told_before() -> None:
    completions = [CompletionOutput(index, logprobs=[]) for index in range(8)]
    output = RequestOutput("r", "x" * 100_000, [5] * 100_000, completions, False, RequestMetrics(0.0))
    encoder, sizes = DeltaEncoder(0), []
    for step in range(500):
        for completion in completions[: 8 if not step else 1]:
            completion.text += "word "
            completion.token_ids.append(7)
            assert completion.logprobs is not None
            completion.logprobs.append({7: Logprob(-0.5, 1, "word ")})
        sizes.append(len(pickle.dumps(encoder.delta(output))))
    assert max(sizes[1:]) < 600
    assert sizes[1] == sizes[-1]


class FamilyError(WeightsError):
    def __init__(self, first: str, second: str) -> None:
        super().__init__(f"{first} and {second}")


REASON = Reason(axis="dtype", value="float16", supported=("bfloat16",), message="no float16")
VERDICT = Verdict(supported=False, model="m", request={"dtype": "float16"}, reasons=(REASON,))


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (PromptError("too long"), PromptError),
        (WorkerError("rank 1 died", 1, "here"), WorkerError),
        (UnsupportedError(VERDICT), UnsupportedError),
        (FamilyError("this", "that"), WeightsError),
        (ValueError("by mistake"), EngineError),
    ],
)
def test_errors_travel_as_what_they_are(error: Exception, kind: type[NpuZooError]) -> None:
    found = travel(portable_error(error))
    assert type(found) is kind
    assert str(error) in str(found)
    if isinstance(error, WorkerError):
        assert (found.rank, found.host) == (1, "here")


def test_an_error_that_cannot_be_pickled_keeps_its_class_and_text() -> None:
    error = WorkerError("rank 1 died")
    error.lock = open  # type: ignore[attr-defined]
    error.stream = (number for number in ())  # type: ignore[attr-defined]
    found = travel(portable_error(error))
    assert (type(found), str(found)) == (WorkerError, "rank 1 died")
