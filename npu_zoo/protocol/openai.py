"""OpenAI's API over one model, without its transport."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any, cast

from npu_zoo.core.engine import GenerationRequest
from npu_zoo.core.errors import ConfigError
from npu_zoo.core.sampling import SamplingParams, StructuredOutputs
from npu_zoo.engine.prompting import PromptEncoder
from npu_zoo.protocol.answering import AnswerHead, Answering
from npu_zoo.protocol.bodies import validate_request
from npu_zoo.protocol.chat import ChatAnswering
from npu_zoo.protocol.completions import CompletionAnswering
from npu_zoo.protocol.errors import ApiError, api_error
from npu_zoo.protocol.limits import ProtocolLimits
from npu_zoo.protocol.logprobs import token_text
from npu_zoo.protocol.messages import template_messages
from npu_zoo.protocol.requests import (
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    SamplingFields,
    SimpleChatRequest,
    TokenizeRequest,
)
from npu_zoo.protocol.sampling import check_defaults, output_room, sampling_params
from npu_zoo.protocol.structured import check_form, form_field, structured_outputs
from npu_zoo.protocol.tools import blamed_tool, offered_tools

COMPLETION_TOKENS = 16
"""Most tokens of a completion that does not say, as in OpenAI's API; a chat's answer gets what is left of the model."""


class OpenAIProtocol:
    """Turns requests of OpenAI's API into an engine's, and says what comes of them.

    Args:
        served_model_names: what requests may call the model; the first is the one that it goes by.
        defaults: values of SamplingParams' fields that requests leave unset; those of OpenAI's API where it has none.

    Raises:
        ConfigError: no name is given, or a default is none that a request could have.
    """

    def __init__(
        self,
        encoder: PromptEncoder,
        served_model_names: Sequence[str],
        limits: ProtocolLimits | None = None,
        defaults: Mapping[str, Any] | None = None,
    ) -> None:
        self.encoder = encoder
        self.served_model_names = tuple(served_model_names)
        if not self.served_model_names:
            raise ConfigError("the model is served under no name; give one at least")
        self.limits = limits or ProtocolLimits()
        self.defaults = check_defaults(defaults or {})
        self._created = int(time.time())

    def chat_completion(self, request: ChatCompletionRequest, request_id: str) -> Answering:
        """POST /v1/chat/completions.

        Raises:
            ApiError: 400 with what is wrong; 404 where no such model is served.
        """
        self._check_model(request.model)
        self.limits.check_chat(request)
        tools = offered_tools(request, self.encoder.config, self.limits)
        form = structured_outputs(request, self.limits)
        if tools is not None:
            form = tools.form(form, self.limits)
        check_form(form, "tools" if tools else form_field(request), self.encoder, blamed_tool if tools else None)
        prompt = self._render(request, tools.shown if tools else ())
        field = "max_tokens" if request.max_completion_tokens is None else "max_completion_tokens"
        params = self._sampling(
            request,
            len(prompt),
            asked=getattr(request, field),
            field=field,
            fallback=None,
            logprobs=(request.top_logprobs or 0) if request.logprobs else None,
            form=form,
        )
        head = _head("chatcmpl", request_id, request.model, request)
        generation = _generation(request, request_id, prompt, params)
        return ChatAnswering(request, head, [generation], self.encoder, tools.new_reader if tools else None)

    def completion(self, request: CompletionRequest, request_id: str) -> Answering:
        """POST /v1/completions; raises as :meth:`chat_completion`."""
        self._check_model(request.model)
        prompts = _prompts(request)
        self.limits.check_completion(request, len(prompts))
        form = check_form(structured_outputs(request, self.limits), form_field(request), self.encoder)
        generations, echo = [], []
        for number, prompt in enumerate(prompts):
            ids = self._encode(request, prompt)
            params = self._completion_sampling(request, len(ids), form)
            name = request_id if len(prompts) == 1 else f"{request_id}-{number}"
            text = prompt if isinstance(prompt, str) else None
            generations.append(_generation(request, name, ids, params, text))
            echo.append(self._text_of(prompt) if request.echo else "")
        head = _head("cmpl", request_id, request.model, request)
        return CompletionAnswering(request, head, generations, self.encoder, echo if request.echo else None)

    def simple_chat(self, request: SimpleChatRequest, request_id: str) -> Answering:
        """POST /chat: a conversation of the one prompt; raises as :meth:`chat_completion`."""
        given = request.model_dump(exclude={"prompt"}, exclude_unset=True, by_alias=True)
        message = {"role": "user", "content": request.prompt}
        model = request.model or self.served_model_names[0]
        chat = validate_request(ChatCompletionRequest, {**given, "model": model, "messages": [message]})
        return self.chat_completion(chat, request_id)

    def models(self) -> dict[str, Any]:
        """GET /v1/models."""
        return {"object": "list", "data": [self._model(name) for name in self.served_model_names]}

    def model(self, name: str) -> dict[str, Any]:
        """GET /v1/models/NAME.

        Raises:
            ApiError: 404; no such model is served.
        """
        self._check_model(name)
        return self._model(name)

    def tokenize(self, request: TokenizeRequest) -> dict[str, Any]:
        """POST /tokenize; raises as :meth:`chat_completion`."""
        self._check_model(request.model)
        tokenizer = self.encoder.need_tokenizer("tokenize")
        ids = self._tokens(request)
        found: dict[str, Any] = {"count": len(ids), "max_model_len": self.encoder.max_model_len, "tokens": ids}
        if request.return_token_strs:
            found["token_strs"] = [token_text(tokenizer, id_) for id_ in ids]
        return found

    def detokenize(self, request: DetokenizeRequest) -> dict[str, Any]:
        """POST /detokenize; raises as :meth:`chat_completion`."""
        self._check_model(request.model)
        size = self.encoder.config.model_config.vocab_size
        strange = next((token_id for token_id in request.tokens if token_id >= size), None)
        if strange is not None:
            message = f"tokens holds {strange}, which is no token id; ids are 0 to {size - 1}"
            raise ApiError(400, message, param="tokens")
        return {"prompt": self._text_of(request.tokens)}

    def _tokens(self, request: TokenizeRequest) -> list[int]:
        try:
            if request.messages is None:
                tokenizer = self.encoder.need_tokenizer("tokenize")
                return tokenizer.encode(request.prompt or "", request.add_special_tokens is not False)
            return self.encoder.render_chat(
                template_messages(request.messages),
                add_generation_prompt=request.add_generation_prompt is not False,
                tools=[tool.model_dump(exclude_none=True) for tool in request.tools or ()],
                template_kwargs=request.chat_template_kwargs,
            )
        except Exception as error:
            raise _blamed(error, "prompt" if request.messages is None else "messages") from error

    def _render(self, request: ChatCompletionRequest, tools: Sequence[dict[str, Any]]) -> list[int]:
        try:
            ids = self.encoder.render_chat(
                template_messages(request.messages),
                add_generation_prompt=request.add_generation_prompt is not False,
                tools=tools,
                template_kwargs=request.chat_template_kwargs,
            )
            return self.encoder.check(ids)
        except Exception as error:
            raise _blamed(error, "messages") from error

    def _encode(self, request: CompletionRequest, prompt: str | list[int]) -> list[int]:
        try:
            if request.suffix is None:
                return self.encoder.encode(prompt)
            if not isinstance(prompt, str):
                raise ApiError(400, "suffix needs the prompt as text, not as token ids", param="suffix")
            return self.encoder.check(self.encoder.render_fim(prompt, request.suffix))
        except Exception as error:
            raise _blamed(error, "prompt" if request.suffix is None else "suffix") from error

    def _completion_sampling(
        self, request: CompletionRequest, num_prompt_tokens: int, form: StructuredOutputs | None
    ) -> SamplingParams:
        return self._sampling(
            request,
            num_prompt_tokens,
            asked=1 if request.max_tokens == 0 else request.max_tokens,
            field="max_tokens",
            fallback=COMPLETION_TOKENS,
            logprobs=request.logprobs,
            prompt_logprobs=request.logprobs if request.echo else None,
            form=form,
        )

    def _sampling(
        self,
        request: SamplingFields,
        num_prompt_tokens: int,
        *,
        asked: int | None,
        field: str,
        fallback: int | None,
        logprobs: int | None,
        prompt_logprobs: int | None = None,
        form: StructuredOutputs | None = None,
    ) -> SamplingParams:
        fallback = self.limits.completion_tokens(asked, field, self.defaults.get("max_tokens", fallback))
        room = output_room(asked, field, fallback, num_prompt_tokens, self.encoder.max_model_len)
        wanted = [count for count in (prompt_logprobs, request.prompt_logprobs) if count is not None]
        return sampling_params(
            request,
            self.defaults,
            max_tokens=room,
            vocab_size=self.encoder.config.model_config.vocab_size,
            logprobs=logprobs,
            prompt_logprobs=max(wanted, default=None),
            form=form,
        )

    def _text_of(self, prompt: str | list[int]) -> str:
        if isinstance(prompt, str):
            return prompt
        try:
            return self.encoder.need_tokenizer("text of token ids").decode(prompt, skip_special_tokens=True)
        except Exception as error:
            raise _blamed(error, "prompt") from error

    def _check_model(self, name: str | None) -> None:
        if name is not None and name not in self.served_model_names:
            served = ", ".join(self.served_model_names)
            message = f"no model {name[:200]!r} is served here; served: {served}"
            raise ApiError(404, message, param="model", code="model_not_found")

    def _model(self, name: str) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": self._created,
            "owned_by": "npu-zoo",
            "root": self.encoder.config.model,
            "parent": None,
            "max_model_len": self.encoder.max_model_len,
        }


def _head(prefix: str, request_id: str, model: str, request: SamplingFields) -> AnswerHead:
    return AnswerHead.of(f"{prefix}-{request_id}", model, request.stream, request.stream_options)


def _generation(
    request: SamplingFields, request_id: str, ids: Sequence[int], params: SamplingParams, text: str | None = None
) -> GenerationRequest:
    return GenerationRequest(
        request_id, ids, params, prompt=text, priority=request.priority or 0, max_time=request.max_time
    )


def _prompts(request: CompletionRequest) -> list[str | list[int]]:
    """The prompts one by one."""
    prompt = request.prompt
    if isinstance(prompt, str):
        return [prompt]
    if isinstance(prompt[0], int):
        return [prompt]
    return list(cast("list[str | list[int]]", prompt))


def _blamed(error: Exception, field: str) -> ApiError:
    """The error with the field that it came of, where it says none itself."""
    found = api_error(error)
    if found.param is None and found.status < 500:
        found.param = field
    return found
