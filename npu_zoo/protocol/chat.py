"""Answers of /v1/chat/completions."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from typing import Any

from npu_zoo.core.engine import CompletionOutput, GenerationRequest, RequestOutput
from npu_zoo.engine.prompting import PromptEncoder
from npu_zoo.protocol.answering import AnswerHead, Answering, ending
from npu_zoo.protocol.logprobs import TokenPlaces, chat_logprobs, prompt_logprobs
from npu_zoo.protocol.reading import AnswerReader, Piece
from npu_zoo.protocol.reasoning import ReasoningSplitter
from npu_zoo.protocol.requests import ChatCompletionRequest
from npu_zoo.protocol.tool_calls import CallPiece, ToolCallReader


@dataclasses.dataclass
class _Streamed:
    """What a stream has given of one answer."""

    reader: AnswerReader
    places: TokenPlaces
    tokens: int = 0


class ChatAnswering(Answering):
    """Answers of /v1/chat/completions.

    Args:
        new_tool_reader: makes what finds tool calls in an answer; None where the model was shown no tools.
    """

    whole, part = "chat.completion", "chat.completion.chunk"

    def __init__(
        self,
        request: ChatCompletionRequest,
        head: AnswerHead,
        requests: Sequence[GenerationRequest],
        encoder: PromptEncoder,
        new_tool_reader: Callable[[], ToolCallReader] | None = None,
    ) -> None:
        super().__init__(head, requests, encoder)
        self._asked = request
        self._new_tool_reader = new_tool_reader
        self._streamed: dict[int, _Streamed] = {}

    def response(self, outputs: Sequence[RequestOutput]) -> dict[str, Any]:
        """See :meth:`Answering.response`."""
        found = super().response(outputs)
        if self._asked.prompt_logprobs is not None:
            found["prompt_logprobs"] = prompt_logprobs(outputs[0], self._asked.prompt_logprobs)
        return found

    def _choice(self, index: int, answer: CompletionOutput, output: RequestOutput) -> dict[str, Any]:
        reader = self._reader(output)
        piece = reader.read(answer)
        entries = self._entries(answer, 0, len(answer.token_ids))
        return {
            "index": answer.index,
            "message": self._message(answer.index, piece),
            "logprobs": entries,
            **self._ending(answer, reader),
        }

    def _message(self, number: int, piece: Piece) -> dict[str, Any]:
        content = piece.content if piece.content or not piece.calls else None
        message: dict[str, Any] = {"role": "assistant", "content": content}
        if self._encoder.config.reasoning is not None:
            message["reasoning_content"] = piece.reasoning or None
        if piece.calls:
            message["tool_calls"] = [
                {key: value for key, value in call.items() if key != "index"}
                for call in _joined(piece.calls, self._call_id, number)
            ]
        return message

    def _new_choices(self, index: int, answer: CompletionOutput, output: RequestOutput) -> list[dict[str, Any]]:
        number, found = answer.index, []
        if number not in self._streamed:
            skip = self.requests[index].sampling_params.skip_special_tokens
            self._streamed[number] = _Streamed(self._reader(output), TokenPlaces(self._encoder.tokenizer, skip))
            found.append(_delta(number, {"role": "assistant", "content": ""}))
        streamed = self._streamed[number]
        if streamed.reader.finished:
            return found
        piece = streamed.reader.read(answer)
        if piece:
            found.append(_delta(number, self._changes(number, piece), self._due(streamed, answer)))
        if answer.finish_reason is not None:
            found.append(_delta(number, {}, self._due(streamed, answer)) | self._ending(answer, streamed.reader))
        return found

    def _changes(self, number: int, piece: Piece) -> dict[str, Any]:
        texts = {"reasoning_content": piece.reasoning, "content": piece.content}
        delta: dict[str, Any] = {name: text for name, text in texts.items() if text}
        if piece.calls:
            delta["tool_calls"] = _joined(piece.calls, self._call_id, number)
        return delta

    def _due(self, streamed: _Streamed, answer: CompletionOutput) -> dict[str, Any] | None:
        """The log-probabilities of tokens whose whole text was given by now, and which were not given yet."""
        if not self._asked.logprobs:
            return None
        streamed.places.extend(answer.token_ids)
        first, given = streamed.tokens, streamed.reader.given
        late = (i for i in range(first, len(answer.token_ids)) if streamed.places.ends[i] > given)
        streamed.tokens = len(answer.token_ids) if streamed.reader.finished else next(late, len(answer.token_ids))
        return self._entries(answer, first, streamed.tokens) if streamed.tokens > first else None

    def _entries(self, answer: CompletionOutput, first: int, last: int) -> dict[str, Any] | None:
        if not self._asked.logprobs:
            return None
        tokens, top = slice(first, last), self._asked.top_logprobs or 0
        logprobs = (answer.logprobs or [])[tokens]
        return {
            "content": chat_logprobs(self._encoder.tokenizer, answer.token_ids[tokens], logprobs, top),
            "refusal": None,
        }

    def _ending(self, answer: CompletionOutput, reader: AnswerReader) -> dict[str, Any]:
        found = ending(answer)
        if reader.num_calls and found["finish_reason"] == "stop":
            found["finish_reason"] = "tool_calls"
        return found

    def _reader(self, output: RequestOutput) -> AnswerReader:
        reasoning = self._encoder.config.reasoning
        splitter = ReasoningSplitter(reasoning, output.reasoning_open) if reasoning else None
        return AnswerReader(splitter, self._new_tool_reader() if self._new_tool_reader else None)

    def _call_id(self, number: int, call: int) -> str:
        """The same in a stream as in a whole answer, and in no other request's."""
        return "call_" + hashlib.sha256(f"{self._head.id} {number} {call}".encode()).hexdigest()[:24]


def _delta(number: int, delta: dict[str, Any], logprobs: dict[str, Any] | None = None) -> dict[str, Any]:
    return {"index": number, "delta": delta, "logprobs": logprobs, "finish_reason": None}


def _joined(pieces: Sequence[CallPiece], call_id: Callable[[int, int], str], number: int) -> list[dict[str, Any]]:
    """Pieces as OpenAI's API writes calls, those of one call put together."""
    calls: dict[int, dict[str, Any]] = {}
    for piece in pieces:
        if piece.name is not None:
            head = {"index": piece.index, "id": call_id(number, piece.index), "type": "function"}
            calls[piece.index] = {**head, "function": {"name": piece.name, "arguments": ""}}
        call = calls.setdefault(piece.index, {"index": piece.index, "function": {"arguments": ""}})
        call["function"]["arguments"] += piece.arguments
    return list(calls.values())
