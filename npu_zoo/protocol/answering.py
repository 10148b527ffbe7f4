"""From an engine's states to the answer of a request, whole or in chunks."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from npu_zoo.core.engine import CompletionOutput, GenerationRequest, RequestOutput
from npu_zoo.engine.prompting import PromptEncoder
from npu_zoo.protocol.errors import ApiError
from npu_zoo.protocol.requests import StreamOptions
from npu_zoo.protocol.usage import UsageCounter


@dataclass(frozen=True)
class AnswerHead:
    """What stands at the head of a request's answers.

    Attributes:
        id: of the answer and all of its chunks.
        model: as the client has called it.
        stream: whether the client asked for chunks.
        include_usage, continuous_usage: whether a last chunk has the usage, and every chunk the usage so far.
    """

    id: str
    model: str
    stream: bool = False
    include_usage: bool = False
    continuous_usage: bool = False

    @classmethod
    def of(cls, id: str, model: str, stream: bool | None, options: StreamOptions | None) -> AnswerHead:
        """The head that a request asks for."""
        continuous = bool(options and options.continuous_usage_stats)
        return cls(id, model, bool(stream), continuous or bool(options and options.include_usage), continuous)


class Answering(ABC):
    """One request of a client: what an engine is to run for it, and what the client is told.

    It is fed an engine's cumulative states. An answer takes either :meth:`response` once all requests have finished, or
    :meth:`chunks` as often as states come and :meth:`last_chunks` at the end.

    Attributes:
        requests: one for each prompt; the answers to a prompt are its SamplingParams' ``n``.
        stream: whether the client asked for chunks.
        created: the time of the request in seconds since 1970.
    """

    whole: ClassVar[str]
    part: ClassVar[str]

    def __init__(self, head: AnswerHead, requests: Sequence[GenerationRequest], encoder: PromptEncoder) -> None:
        self.requests = tuple(requests)
        self.stream = head.stream
        self.created = int(time.time())
        self._head = head
        self._encoder = encoder
        self._usage = UsageCounter(encoder)
        self._latest: dict[int, RequestOutput] = {}

    @property
    def id(self) -> str:
        """Of the answer and all of its chunks."""
        return self._head.id

    def response(self, outputs: Sequence[RequestOutput]) -> dict[str, Any]:
        """The whole answer.

        Args:
            outputs: the finished states, in the order of ``requests``.

        Raises:
            ApiError: 400; an output could not keep its form.
        """
        for output in outputs:
            require_whole(output)
        choices = [self._choice(i, answer, output) for i, output in enumerate(outputs) for answer in output.outputs]
        return {**self._envelope(self.whole, choices), "usage": self._count(outputs)}

    def chunks(self, index: int, output: RequestOutput) -> list[dict[str, Any]]:
        """What is new since the last call for ``requests[index]``; any number of tokens may have come.

        Raises:
            ApiError: 400; an output could not go on in its form. What came of it before was given.
        """
        require_whole(output)
        self._latest[index] = output
        found = [choice for answer in output.outputs for choice in self._new_choices(index, answer, output)]
        return [self._chunk(choice) for choice in found]

    def last_chunks(self) -> list[dict[str, Any]]:
        """What comes after all requests have finished: the usage, where it was asked for."""
        if not self._head.include_usage:
            return []
        return [{**self._envelope(self.part, []), "usage": self._count(list(self._latest.values()))}]

    @abstractmethod
    def _choice(self, index: int, answer: CompletionOutput, output: RequestOutput) -> dict[str, Any]:
        """One answer of the whole."""

    @abstractmethod
    def _new_choices(self, index: int, answer: CompletionOutput, output: RequestOutput) -> list[dict[str, Any]]:
        """What is new of one answer."""

    def _number(self, index: int, answer: CompletionOutput) -> int:
        """An answer's place among those to all prompts."""
        return index * self.requests[index].sampling_params.n + answer.index

    def _count(self, outputs: Sequence[RequestOutput]) -> dict[str, Any]:
        return self._usage.count(outputs)

    def _chunk(self, choice: dict[str, Any]) -> dict[str, Any]:
        chunk = self._envelope(self.part, [choice])
        if self._head.include_usage:
            chunk["usage"] = self._count(list(self._latest.values())) if self._head.continuous_usage else None
        return chunk

    def _envelope(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self._head.id,
            "object": kind,
            "created": self.created,
            "model": self._head.model,
            "choices": choices,
        }


def ending(answer: CompletionOutput) -> dict[str, Any]:
    """Why an answer ended. OpenAI's API has no word for one that was called off: it was cut."""
    if answer.finish_reason == "abort":
        return {"finish_reason": "length", "stop_reason": answer.stop_reason or answer.finish_reason}
    return {"finish_reason": answer.finish_reason, "stop_reason": answer.stop_reason}


class OutputFailed(ApiError):
    """An output could not go on: what has come of it does not have the form that was asked for."""


def require_whole(output: RequestOutput) -> None:
    """Raise OutputFailed where one of a prompt's outputs could not go on."""
    for answer in output.outputs:
        if answer.finish_reason == "error":
            raise OutputFailed(400, str(answer.stop_reason), code="output_failed")
