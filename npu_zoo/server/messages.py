"""What the server's processes tell each other.

Between the front end and the engine a request has a number of its own, its key, which is never used again on a
connection. What the engine tells of a request is what is new since it last told of it: the front end rebuilds the
state, so the cost of a step is that of its new tokens.
"""

from __future__ import annotations

import pickle
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from npu_zoo.core import errors
from npu_zoo.core.engine import (
    CompletionOutput,
    EngineStats,
    FinishReason,
    GenerationRequest,
    Logprob,
    RequestMetrics,
    RequestOutput,
)
from npu_zoo.core.errors import EngineError, NpuZooError, UnsupportedError

Logprobs = list[dict[int, Logprob]]
PromptLogprobs = list[dict[int, Logprob] | None]

_TREE = [
    found
    for found in vars(errors).values()
    if isinstance(found, type) and issubclass(found, NpuZooError) and found is not UnsupportedError
]
"""The errors that are made of a message alone."""


@dataclass(frozen=True)
class EngineInfo:
    """An engine that takes requests.

    Attributes:
        pid: its process.
        model: ``family:variant``.
        max_model_len: longest prompt plus output in tokens; below the config's where memory asks for it.
        explained: see :meth:`~npu_zoo.core.engine.Engine.explain`.
    """

    pid: int
    model: str
    max_model_len: int
    explained: dict[str, Any]


@dataclass(frozen=True)
class Submit:
    """To the engine: run a request."""

    key: int
    request: GenerationRequest


@dataclass(frozen=True)
class Abort:
    """To the engine: end a request at once; its last state follows where it was unfinished."""

    key: int


@dataclass(frozen=True)
class Ready:
    """From the engine, first of all."""

    info: EngineInfo
    stats: EngineStats


@dataclass(frozen=True)
class Rejected:
    """From the engine: a request that it cannot take."""

    key: int
    error: NpuZooError


@dataclass(slots=True)
class CompletionDelta:
    """What a completion has gained; the finish reason and the sum of log-probabilities are as they stand."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: Logprobs | None = None
    cumulative_logprob: float | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None


@dataclass(slots=True)
class RequestDelta:
    """What a request has gained.

    Attributes:
        completions: those that have moved on; all of them the first time.
        metrics: as they stand; None where they have not changed.
        prompt_logprobs: new ones; None where there are none, or they were not asked for.
    """

    key: int
    completions: list[CompletionDelta]
    finished: bool
    metrics: RequestMetrics | None = None
    prompt_logprobs: PromptLogprobs | None = None
    reasoning_open: bool = False


@dataclass(frozen=True)
class Progress:
    """From the engine: what requests have gained since the last such message, and how the engine stands."""

    deltas: Sequence[RequestDelta]
    stats: EngineStats


@dataclass(frozen=True)
class Loading:
    """To the supervisor: how far a stage of the engine's start has come."""

    stage: str
    done: int
    total: int


@dataclass(frozen=True)
class Started:
    """To the supervisor: the engine takes requests."""

    info: EngineInfo


@dataclass(frozen=True)
class Failed:
    """To the supervisor: what ended a process from within.

    Attributes:
        error: what was raised on purpose, or an :class:`EngineError` that names what was raised by mistake.
        on_purpose: which of both.
    """

    error: NpuZooError
    on_purpose: bool


@dataclass(slots=True)
class _Told:
    """How much of a completion has been told."""

    text: int = 0
    token_ids: int = 0
    logprobs: int | None = None
    finished: bool = False


class DeltaEncoder:
    """Says what a request has gained since it was last asked.

    Args:
        key: the request's.
    """

    def __init__(self, key: int) -> None:
        self._key = key
        self._told: dict[int, _Told] = {}
        self._metrics: RequestMetrics | None = None
        self._prompt_logprobs: int | None = None

    def delta(self, output: RequestOutput) -> RequestDelta:
        """What ``output`` has and the one before it had not; no list of it is shared."""
        found = (self._completion_delta(completion) for completion in output.outputs)
        return RequestDelta(
            self._key,
            [delta for delta in found if delta is not None],
            output.finished,
            self._changed_metrics(output.metrics),
            self._new_prompt_logprobs(output.prompt_logprobs),
            output.reasoning_open,
        )

    def _completion_delta(self, output: CompletionOutput) -> CompletionDelta | None:
        before = self._told.get(output.index)
        count = None if output.logprobs is None else len(output.logprobs)
        now = _Told(len(output.text), len(output.token_ids), count, output.finish_reason is not None)
        if now == before:
            return None
        self._told[output.index] = now
        before = before or _Told()
        return CompletionDelta(
            output.index,
            output.text[before.text :],
            output.token_ids[before.token_ids :],
            None if output.logprobs is None else output.logprobs[before.logprobs or 0 :],
            output.cumulative_logprob,
            output.finish_reason,
            output.stop_reason,
        )

    def _changed_metrics(self, metrics: RequestMetrics) -> RequestMetrics | None:
        if metrics == self._metrics:
            return None
        self._metrics = replace(metrics)
        return self._metrics

    def _new_prompt_logprobs(self, logprobs: PromptLogprobs | None) -> PromptLogprobs | None:
        if logprobs is None or len(logprobs) == self._prompt_logprobs:
            return None
        first, self._prompt_logprobs = self._prompt_logprobs or 0, len(logprobs)
        return logprobs[first:]


def initial_output(request: GenerationRequest) -> RequestOutput:
    """A request's state before anything is told of it."""
    return RequestOutput(
        request_id=request.request_id,
        prompt=request.prompt,
        prompt_token_ids=list(request.prompt_token_ids),
        outputs=[CompletionOutput(index) for index in range(request.sampling_params.n)],
        finished=False,
        metrics=RequestMetrics(arrival_time=time.monotonic()),
    )


def apply_delta(output: RequestOutput, delta: RequestDelta) -> None:
    """Bring a request's state up to date, in place."""
    for new in delta.completions:
        _apply_completion(output.outputs[new.index], new)
    output.finished = delta.finished
    output.reasoning_open = delta.reasoning_open
    if delta.metrics is not None:
        output.metrics = delta.metrics
    if delta.prompt_logprobs is not None:
        output.prompt_logprobs = [*(output.prompt_logprobs or ()), *delta.prompt_logprobs]


def _apply_completion(output: CompletionOutput, delta: CompletionDelta) -> None:
    output.text += delta.text
    output.token_ids += delta.token_ids
    if delta.logprobs is not None:
        output.logprobs = output.logprobs or []
        output.logprobs += delta.logprobs
    output.cumulative_logprob = delta.cumulative_logprob
    output.finish_reason, output.stop_reason = delta.finish_reason, delta.stop_reason


def portable_error(error: Exception) -> NpuZooError:
    """An error that another process of the package can make again, whatever code raised it.

    Errors of the package's own tree stay what they are; a plugin's own become the nearest of the tree, and what was
    raised by mistake becomes an :class:`EngineError` that names it.
    """
    if not isinstance(error, NpuZooError):
        return EngineError(f"unexpected {type(error).__name__}: {error}")
    if type(error).__module__ == errors.__name__ and _is_picklable(error):
        return error
    kinds = [kind for kind in type(error).__mro__ if kind in _TREE]
    return kinds[0](str(error))


def _is_picklable(error: Exception) -> bool:
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # whatever a foreign attribute of it raises
        return False
    return True
