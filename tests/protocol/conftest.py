from __future__ import annotations

import copy
import dataclasses
import sys
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any

import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from npu_zoo.core.config import EngineArgs
from npu_zoo.core.engine import CompletionOutput, Logprob, RequestMetrics, RequestOutput
from npu_zoo.core.model_config import ReasoningFormat
from npu_zoo.dispatch import resolve
from npu_zoo.engine.detokenizer import IncrementalDetokenizer
from npu_zoo.engine.prompting import PromptEncoder
from npu_zoo.protocol.answering import Answering
from npu_zoo.protocol.openai import OpenAIProtocol
from npu_zoo.testing import unchecked_config

MODEL = "served"
USER = [{"role": "user", "content": "Say hello."}]
REASONING = ReasoningFormat(start="<think>", end="</think>")


@pytest.fixture(scope="session")
def fake() -> ModuleType:
    """What plays the engine: this module, which tests cannot import."""
    return sys.modules[__name__]


@pytest.fixture(scope="session")
def coder() -> OpenAIProtocol:
    """A model that neither calls tools nor reasons, and can fill in the middle."""
    return OpenAIProtocol(PromptEncoder(resolve(EngineArgs(model="deepseek_coder"))), [MODEL])


@pytest.fixture(scope="session")
def caller() -> OpenAIProtocol:
    """A model that calls tools."""
    return OpenAIProtocol(PromptEncoder(resolve(EngineArgs(model="deepseek_v3"))), [MODEL])


@pytest.fixture(scope="session")
def thinker() -> OpenAIProtocol:
    """A model that reasons, and calls tools."""
    config = unchecked_config(resolve(EngineArgs(model="deepseek_v3")), reasoning=REASONING)
    return OpenAIProtocol(PromptEncoder(config), [MODEL])


class Generated:
    """What an engine would generate for one answering: the state after any number of tokens of each answer.

    Args:
        texts: of each request's answers.
        finish: how all of them end.
    """

    def __init__(
        self,
        protocol: OpenAIProtocol,
        answering: Answering,
        texts: Sequence[Sequence[str]],
        *,
        finish: Any = "stop",
        opened: bool = False,
    ) -> None:
        self._tokenizer = protocol.encoder.need_tokenizer("tests")
        self._requests = answering.requests
        self._finish = finish
        self._opened = opened
        self.ids = [[self._tokenizer.encode(text, False) for text in row] for row in texts]
        self.texts = [
            [self._text_after(ids, self._requests[i].sampling_params) for ids in row] for i, row in enumerate(self.ids)
        ]

    def state(self, index: int, counts: Sequence[int]) -> RequestOutput:
        """After so many tokens of each of a request's answers; one beyond the last ends it."""
        request = self._requests[index]
        answers = [self._answer(index, number, count) for number, count in enumerate(counts)]
        return RequestOutput(
            request.request_id,
            request.prompt,
            list(request.prompt_token_ids),
            answers,
            all(answer.finish_reason for answer in answers),
            RequestMetrics(0.0, cached_tokens=3),
            prompt_logprobs=self._prompt_logprobs(request),
            reasoning_open=self._opened,
        )

    def final(self) -> list[RequestOutput]:
        return [self.state(i, [len(ids) + 1 for ids in row]) for i, row in enumerate(self.ids)]

    def every_state(self, index: int) -> Iterator[RequestOutput]:
        longest = max(len(ids) for ids in self.ids[index]) + 1
        for count in range(1, longest + 1):
            yield self.state(index, [min(count, len(ids) + 1) for ids in self.ids[index]])

    def _text_after(self, ids: list[int], params: Any) -> list[str]:
        decoder = IncrementalDetokenizer(self._tokenizer, params.skip_special_tokens)
        found = [""]
        for id_ in ids:
            decoder.append(id_)
            found.append(decoder.text)
        decoder.finish()
        return [*found, decoder.text]

    def _answer(self, index: int, number: int, count: int) -> CompletionOutput:
        ids = self.ids[index][number]
        logprobs = None
        if self._requests[index].sampling_params.logprobs is not None:
            logprobs = [self._entries(id_, i) for i, id_ in enumerate(ids[:count])]
        return CompletionOutput(
            number,
            self.texts[index][number][count],
            ids[:count],
            logprobs=logprobs,
            finish_reason=self._finish if count > len(ids) else None,
        )

    def _entries(self, token_id: int, place: int) -> dict[int, Logprob]:
        """The chosen token is the second likely one."""
        others = [(token_id + 1 + k) % 256 for k in range(2)]
        ranked = [others[0], token_id, others[1]]
        return {
            id_: Logprob(-0.25 * (place % 7) - rank, rank, self._tokenizer.token_text(id_))
            for rank, id_ in enumerate(dict.fromkeys(ranked), 1)
        }

    def _prompt_logprobs(self, request: Any) -> list[Any] | None:
        if request.sampling_params.prompt_logprobs is None:
            return None
        rest = [self._entries(id_, i) for i, id_ in enumerate(request.prompt_token_ids[1:])]
        return [None, *rest]


@dataclasses.dataclass
class Joined:
    """What a client puts together of one answer's chunks."""

    roles: list[str] = dataclasses.field(default_factory=list)
    content: str = ""
    reasoning: str = ""
    calls: dict[int, dict[str, str]] = dataclasses.field(default_factory=dict)
    logprobs: list[Any] = dataclasses.field(default_factory=list)
    endings: list[Any] = dataclasses.field(default_factory=list)


def join_chat(chunks: Sequence[dict[str, Any]]) -> dict[int, Joined]:
    """Every chunk is held against OpenAI's own type first."""
    found: dict[int, Joined] = {}
    for chunk in chunks:
        ChatCompletionChunk.model_validate(chunk)
        for choice in chunk["choices"]:
            answer, delta = found.setdefault(choice["index"], Joined()), choice["delta"]
            assert not answer.endings, "nothing follows the end"
            answer.roles += [delta["role"]] if "role" in delta else []
            answer.content += delta.get("content") or ""
            answer.reasoning += delta.get("reasoning_content") or ""
            answer.logprobs += (choice["logprobs"] or {"content": []})["content"]
            answer.endings += [choice["finish_reason"]] if choice["finish_reason"] else []
            for call in delta.get("tool_calls", []):
                known = answer.calls.setdefault(call["index"], {"id": "", "name": "", "arguments": ""})
                assert ("name" in call["function"]) == (known["name"] == ""), "the name comes first, and once"
                known["id"] += call.get("id", "")
                known["name"] += call["function"].get("name", "")
                known["arguments"] += call["function"]["arguments"]
    return found


def whole_chat(response: dict[str, Any]) -> dict[int, Joined]:
    """A whole answer in the same form."""
    ChatCompletion.model_validate(response)
    found = {}
    for choice in response["choices"]:
        message = choice["message"]
        calls = {i: {"id": call["id"], **call["function"]} for i, call in enumerate(message.get("tool_calls") or ())}
        found[choice["index"]] = Joined(
            [message["role"]],
            message["content"] or "",
            message.get("reasoning_content") or "",
            calls,
            (choice["logprobs"] or {"content": []})["content"],
            [choice["finish_reason"]],
        )
    return found


def checked_completion(response: dict[str, Any]) -> dict[str, Any]:
    """Held against OpenAI's own type, which does not know of the nulls that its API gives: for a prompt's first token,
    and as the finish reason of a chunk.
    """
    filled = copy.deepcopy(response)
    for choice in filled["choices"]:
        choice["finish_reason"] = choice["finish_reason"] or "stop"
        for name, instead in (("token_logprobs", 0.0), ("top_logprobs", {})):
            values = (choice["logprobs"] or {}).get(name)
            if values and values[0] is None:
                values[0] = instead
    Completion.model_validate(filled)
    return response
