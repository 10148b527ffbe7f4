"""Questions for the log-probabilities of given tokens, and for texts."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import JsonValue

from npu_zoo.core.engine import GenerationRequest, Logprob, RequestOutput
from npu_zoo.core.errors import EngineError
from npu_zoo.core.sampling import SamplingParams
from npu_zoo.evaluation.accuracy.tasks import Logits

if TYPE_CHECKING:
    import numpy

_TIES = 4
"""How many of a position's most likely tokens are looked at; in bfloat16 several may be equally likely."""
_numbers = itertools.count()


@dataclass(frozen=True)
class LogitSink:
    """Where the logits of one request of a sample go.

    Attributes:
        part: which of the sample's requests it is.
    """

    logits: Logits
    task: str
    sample_id: str
    part: int = 0

    @property
    def name(self) -> str:
        """Tells the request from others."""
        return f"{self.task}/{self.sample_id}/{self.part}"

    def put(self, logits: numpy.ndarray[Any, Any] | None) -> None:
        """Keep what an output brought."""
        if logits is None:
            raise TypeError("the engine returned no prompt_logits, which were asked for")
        self.logits.put(self.task, self.sample_id, logits, self.part)


class Score:
    """The log-probability of a continuation of a context, and whether greedy decoding would give it.

    The answer is ``[logprob, is_greedy]``, or ``[logprob]``.

    Args:
        context: at least one token; comes from the prefix cache where it can.
        continuation: the tokens that are scored, at least one.
        sink: takes the logits of the continuation's first positions; None where they are not asked for.
        greedy: whether to say if it is greedy, which takes a fifth of a small model's time.
    """

    def __init__(
        self,
        context: Sequence[int],
        continuation: Sequence[int],
        sink: LogitSink | None = None,
        *,
        greedy: bool = True,
    ) -> None:
        self.context, self.continuation = tuple(context), tuple(continuation)
        self._sink, self._greedy = sink, greedy
        self.key = _key("score" if greedy else "sum", [*self.context, -1, *self.continuation], sink)

    @property
    def tokens(self) -> tuple[int, ...]:
        """Context and continuation."""
        return self.context + self.continuation

    def prepare(self) -> Sequence[GenerationRequest]:
        """One request, and a second where the logits of all positions would be too many."""
        whole = _request(self.tokens, self._params(logits=self._kept == len(self.continuation)))
        if 0 < self._kept < len(self.continuation):
            return [whole, _request(self.tokens[: len(self.context) + self._kept], self._params(logits=True))]
        return [whole]

    def answer(self, outputs: Sequence[RequestOutput]) -> JsonValue:
        """The sum over the continuation, and whether each of its tokens was the most likely one, where that is asked.

        Raises:
            EngineError: the sum is no number.
        """
        scored = (outputs[0].prompt_logprobs or [])[len(self.context) :]
        found = [(token, entry or {}) for token, entry in zip(self.continuation, scored, strict=True)]
        total = sum(entry[token].logprob for token, entry in found)
        require_probability(total, f"request {outputs[0].request_id}")
        if self._sink is not None:
            logits = outputs[-1].prompt_logits
            self._sink.put(None if logits is None else logits[: self._kept])
        return [total, all(_is_greedy(token, entry) for token, entry in found)] if self._greedy else [total]

    @property
    def _kept(self) -> int:
        """How many positions' logits are kept."""
        return 0 if self._sink is None else min(len(self.continuation), self._sink.logits.positions)

    def _params(self, *, logits: bool) -> SamplingParams:
        return SamplingParams(
            temperature=0.0,
            max_tokens=1,
            ignore_eos=True,
            prompt_logprobs=_TIES if self._greedy else 0,
            prompt_logprobs_start=len(self.context),
            prompt_logits=logits,
        )


class Completion:
    """A text that follows a prompt.

    Args:
        finish: makes the answer of the text.
        ends: what ``finish`` cuts the text at; texts that are cut elsewhere are other answers.
        sink: takes the logits of the first token; None where they are not asked for.
    """

    def __init__(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        finish: Callable[[str], str] = str,
        sink: LogitSink | None = None,
        ends: Sequence[str] = (),
    ) -> None:
        self.prompt, self.params = tuple(prompt), params
        self._finish, self._sink = finish, sink
        self.key = _key(f"{params!r} {list(ends)!r}", self.prompt, sink)

    def prepare(self) -> Sequence[GenerationRequest]:
        """One request."""
        if self._sink is None:
            return [_request(self.prompt, self.params)]
        start = len(self.prompt)
        return [
            _request(
                self.prompt,
                dataclasses.replace(self.params, prompt_logprobs=0, prompt_logprobs_start=start, prompt_logits=True),
            )
        ]

    def answer(self, outputs: Sequence[RequestOutput]) -> JsonValue:
        """The text."""
        if self._sink is not None:
            self._sink.put(outputs[0].prompt_logits)
        return self._finish(outputs[0].outputs[0].text)


def require_probability(logprob: float, request: str) -> None:
    """Refuse what is no log-probability, as a model gives it whose sums overflow.

    Raises:
        EngineError: it is NaN or above all numbers.
    """
    if math.isnan(logprob) or logprob == math.inf:
        raise EngineError(
            f"{request}: the model gives a log-probability of {logprob}, so its logits are no numbers; try another "
            "--dtype (float32 has the widest range), and look whether the checkpoint is damaged"
        )


def _is_greedy(token: int, entry: Mapping[int, Logprob]) -> bool:
    """Whether greedy decoding takes a token: of those that are equally likely, the first."""
    own = entry[token].logprob
    return all(other.logprob < own or (other.logprob == own and token <= name) for name, other in entry.items())


def _request(tokens: Sequence[int], params: SamplingParams) -> GenerationRequest:
    return GenerationRequest(f"eval-{next(_numbers)}", list(tokens), params)


def _key(what: str, tokens: Sequence[int], sink: LogitSink | None) -> str:
    digest = hashlib.sha256(",".join(map(str, tokens)).encode()).hexdigest()
    return f"{what} {digest}" if sink is None else f"{sink.name} {what} {digest}"
