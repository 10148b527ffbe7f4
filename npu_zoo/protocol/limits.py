"""What one request may ask for at most."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from npu_zoo.protocol.errors import ApiError
from npu_zoo.protocol.requests import ChatCompletionRequest, CompletionRequest, SamplingFields


@dataclass(frozen=True)
class ProtocolLimits:
    """What one request may ask for at most; lengths of texts are in characters.

    Attributes:
        max_n: answers to each prompt.
        max_completion_tokens: tokens of an answer; None for what the model has room for.
        max_prompts: prompts of one completion request.
        max_sequences: prompts times answers to each.
        max_stop: stop strings, and stop token ids likewise.
        max_logprobs: most likely tokens at each position.
        max_schema_bytes: of a JSON schema, a regular expression, a grammar or all choices together.
        max_tools_bytes: of all tools together.
    """

    max_n: int = 128
    max_completion_tokens: int | None = None
    max_prompts: int = 256
    max_sequences: int = 1024
    max_stop: int = 16
    max_stop_length: int = 1024
    max_logprobs: int = 20
    max_logit_bias: int = 1024
    max_messages: int = 4096
    max_tools: int = 128
    max_schema_bytes: int = 64 * 1024
    max_tools_bytes: int = 256 * 1024

    def check_sampling(self, request: SamplingFields) -> None:
        """Refuse what any request may have too much of.

        Raises:
            ApiError: 400 that names the field, what was asked and the limit.
        """
        stop = [request.stop] if isinstance(request.stop, str) else request.stop or []
        lengths = (len(text) for text in stop)
        _refuse_beyond("stop", "stop strings", len(stop), self.max_stop)
        _refuse_beyond("stop", "characters in a stop string", max(lengths, default=0), self.max_stop_length)
        if "" in stop:
            raise ApiError(400, "stop holds an empty string, which would end every answer at once", param="stop")
        _refuse_beyond("stop_token_ids", "stop token ids", len(request.stop_token_ids or ()), self.max_stop)
        _refuse_beyond("logit_bias", "tokens", len(request.logit_bias or ()), self.max_logit_bias)
        _refuse_beyond("prompt_logprobs", "tokens a position", request.prompt_logprobs or 0, self.max_logprobs)
        _refuse_beyond("n", "answers to a prompt", request.n or 1, self.max_n)

    def completion_tokens(self, asked: int | None, field: str, fallback: int | None) -> int | None:
        """The most tokens of an answer: what was asked for, else the fallback within the limit, else the limit.

        Raises:
            ApiError: 400; more was asked for than is given.
        """
        limit = self.max_completion_tokens
        if asked is not None and limit is not None:
            _refuse_beyond(field, "tokens of an answer", asked, limit)
        found = [count for count in (fallback, limit) if count is not None]
        return min(found, default=None) if asked is None else asked

    def check_chat(self, request: ChatCompletionRequest) -> None:
        """Refuse what a conversation may have too much of; raises as :meth:`check_sampling`."""
        self.check_sampling(request)
        _refuse_beyond("messages", "messages", len(request.messages), self.max_messages)
        _refuse_beyond("top_logprobs", "tokens a position", request.top_logprobs or 0, self.max_logprobs)

    def check_completion(self, request: CompletionRequest, num_prompts: int) -> None:
        """Refuse what a completion may have too much of; raises as :meth:`check_sampling`."""
        self.check_sampling(request)
        _refuse_beyond("prompt", "prompts", num_prompts, self.max_prompts)
        _refuse_beyond("n", "answers to all prompts", num_prompts * (request.n or 1), self.max_sequences)
        _refuse_beyond("logprobs", "tokens a position", request.logprobs or 0, self.max_logprobs)

    def check_tools(self, texts: Sequence[str]) -> None:
        """Refuse too many tools, given as JSON; raises as :meth:`check_sampling`."""
        _refuse_beyond("tools", "tools", len(texts), self.max_tools)
        _refuse_beyond("tools", "bytes", sum(_sizes(texts)), self.max_tools_bytes)

    def check_form(self, field: str, texts: Iterable[str]) -> None:
        """Refuse a form of output that takes too much to describe; raises as :meth:`check_sampling`."""
        _refuse_beyond(field, "bytes", sum(_sizes(texts)), self.max_schema_bytes)


def _sizes(texts: Iterable[str]) -> Iterator[int]:
    return (len(text.encode()) for text in texts)


def _refuse_beyond(field: str, things: str, asked: int, limit: int) -> None:
    if asked > limit:
        raise ApiError(400, f"{field} asks for {asked} {things}; at most {limit} are taken", param=field)
