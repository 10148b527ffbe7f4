"""Answers of /v1/completions."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from npu_zoo.core.engine import CompletionOutput, FinishReason, GenerationRequest, RequestOutput
from npu_zoo.engine.prompting import PromptEncoder
from npu_zoo.protocol.answering import AnswerHead, Answering, ending
from npu_zoo.protocol.logprobs import Entries, TokenPlaces, completion_logprobs, prompt_logprobs
from npu_zoo.protocol.requests import CompletionRequest


@dataclasses.dataclass
class _Written:
    """What was given of one answer so far."""

    places: TokenPlaces
    text: int = 0
    tokens: int = 0
    echoed: bool = False
    finished: bool = False


class CompletionAnswering(Answering):
    """Answers of /v1/completions.

    Args:
        echo: the prompts' texts, where they stand before the completions; else None.
    """

    whole = part = "text_completion"

    def __init__(
        self,
        request: CompletionRequest,
        head: AnswerHead,
        requests: Sequence[GenerationRequest],
        encoder: PromptEncoder,
        echo: Sequence[str] | None,
    ) -> None:
        super().__init__(head, requests, encoder)
        self._asked = request
        self._echo = echo
        self._written: dict[int, _Written] = {}

    def response(self, outputs: Sequence[RequestOutput]) -> dict[str, Any]:
        """See :meth:`Answering.response`."""
        return super().response([self._shown(output) for output in outputs])

    def chunks(self, index: int, output: RequestOutput) -> list[dict[str, Any]]:
        """See :meth:`Answering.chunks`."""
        return super().chunks(index, self._shown(output))

    def _shown(self, output: RequestOutput) -> RequestOutput:
        """A state without its tokens where none was asked for; an engine computes one at least."""
        if self._asked.max_tokens != 0:
            return output
        ended: FinishReason | None = (
            None if any(answer.finish_reason is None for answer in output.outputs) else "length"
        )
        bare = [CompletionOutput(answer.index, logprobs=[], finish_reason=ended) for answer in output.outputs]
        return dataclasses.replace(output, outputs=bare)

    def _choice(self, index: int, answer: CompletionOutput, output: RequestOutput) -> dict[str, Any]:
        written = self._start(index)
        choice = self._piece(index, answer, output, written, len(answer.token_ids)) | ending(answer)
        if self._asked.prompt_logprobs is not None:
            choice["prompt_logprobs"] = prompt_logprobs(output, self._asked.prompt_logprobs)
        return choice

    def _new_choices(self, index: int, answer: CompletionOutput, output: RequestOutput) -> list[dict[str, Any]]:
        written = self._written.setdefault(self._number(index, answer), self._start(index))
        if written.finished or not (answer.text or answer.finish_reason) or not self._prompt_ready(output):
            return []
        written.places.extend(answer.token_ids)
        due = self._due(written, answer)
        found = []
        if len(answer.text) > written.text or (not written.echoed and self._echo is not None):
            found.append(self._piece(index, answer, output, written, due))
        if answer.finish_reason is not None:
            written.finished = True
            found.append(self._piece(index, answer, output, written, due) | ending(answer))
        return found

    def _prompt_ready(self, output: RequestOutput) -> bool:
        """Whether all is known of a prompt that is echoed."""
        wanted = self.requests[0].sampling_params.prompt_logprobs if self._echo is not None else None
        return wanted is None or len(output.prompt_logprobs or ()) >= len(output.prompt_token_ids)

    def _start(self, index: int) -> _Written:
        skip = self.requests[index].sampling_params.skip_special_tokens
        start = 0 if self._echo is None else len(self._echo[index])
        return _Written(TokenPlaces(self._encoder.tokenizer, skip, start))

    def _due(self, written: _Written, answer: CompletionOutput) -> int:
        """How many tokens have their whole text in what the answer has."""
        if answer.finish_reason is not None:
            return len(answer.token_ids)
        start = written.places.starts[0] if written.places.starts else 0
        given = start + len(answer.text)
        return next(
            (i for i in range(written.tokens, len(answer.token_ids)) if written.places.ends[i] > given),
            len(answer.token_ids),
        )

    def _piece(
        self, index: int, answer: CompletionOutput, output: RequestOutput, written: _Written, due: int
    ) -> dict[str, Any]:
        """What is new of an answer, up to the token ``due``."""
        echo = "" if written.echoed or self._echo is None else self._echo[index]
        choice = {
            "index": self._number(index, answer),
            "text": echo + answer.text[written.text :],
            "logprobs": self._logprobs(index, answer, output, written, due),
            "finish_reason": None,
        }
        written.echoed, written.text, written.tokens = True, len(answer.text), max(due, written.tokens)
        return choice

    def _logprobs(
        self, index: int, answer: CompletionOutput, output: RequestOutput, written: _Written, due: int
    ) -> dict[str, Any] | None:
        if self._asked.logprobs is None:
            return None
        written.places.extend(answer.token_ids)
        tokens = slice(written.tokens, due)
        ids: list[int] = list(answer.token_ids[tokens])
        logprobs: list[Entries | None] = list((answer.logprobs or [])[tokens])
        offsets = written.places.starts[tokens]
        if self._echo is not None and not written.echoed:
            before = TokenPlaces(self._encoder.tokenizer, skip_special_tokens=True, begins=True)
            before.extend(output.prompt_token_ids)
            ids, offsets = [*output.prompt_token_ids, *ids], [*before.starts, *offsets]
            logprobs = [*(output.prompt_logprobs or []), *logprobs]
        return completion_logprobs(self._encoder.tokenizer, ids, logprobs, offsets, self._asked.logprobs)
