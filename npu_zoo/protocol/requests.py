"""Requests of OpenAI's API with vLLM's additions and our own, as checked data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from npu_zoo.protocol.fields import Items, Names, RequestModel, TokenIds, fault, form_of
from npu_zoo.protocol.messages import ChatMessage, ResponseFormat, Tool, ToolChoice, check_tool_messages

NO_EFFECT = "Taken for compatibility; no effect."
_STRUCTURED = "use structured_outputs"
_INSTEAD: Mapping[str, str] = {
    "functions": "use tools",
    "function_call": "use tool_choice",
    "audio": "this server gives text only",
    "prediction": "this server does not take predicted outputs",
    "web_search_options": "this server does not search",
    "use_beam_search": "this server samples; beam search is not offered",
    "length_penalty": "it belongs to beam search, which is not offered",
    "guided_json": f"{_STRUCTURED}.json",
    "guided_regex": f"{_STRUCTURED}.regex",
    "guided_choice": f"{_STRUCTURED}.choice",
    "guided_grammar": f"{_STRUCTURED}.grammar",
    "guided_decoding_backend": f"{_STRUCTURED}; there is one backend, llguidance",
    "guided_whitespace_pattern": f"{_STRUCTURED}.grammar",
    "bad_words": "use logit_bias with -100 for their tokens; words of several tokens cannot be kept out",
    "allowed_token_ids": f"{_STRUCTURED}, or logit_bias",
    "truncate_prompt_tokens": "prompts are not cut here; send a shorter one, which /tokenize can count",
    "spaces_between_special_tokens": "special tokens are written without spaces between them",
    "continue_final_message": "an answer is not continued in a chat; use /v1/completions with the prompt's text",
}

Stop = Annotated[
    Annotated[str, Tag("<text>")] | Annotated[Items[str], Tag("<items>")],
    Discriminator(form_of, custom_error_type="stop", custom_error_message="must be a string or a list of strings"),
]


def _prompt_form(value: Any) -> str | None:
    if isinstance(value, str):
        return "<text>"
    first = value[0] if isinstance(value, list) and value else None
    forms = {str: "<texts>", int: "<ids>", list: "<lists>"}
    return forms.get(type(first))


Prompt = Annotated[
    Annotated[str, Tag("<text>")]
    | Annotated[Items[str], Tag("<texts>"), Field(min_length=1)]
    | Annotated[TokenIds, Tag("<ids>"), Field(min_length=1)]
    | Annotated[Items[Annotated[TokenIds, Field(min_length=1)]], Tag("<lists>"), Field(min_length=1)],
    Discriminator(
        _prompt_form,
        custom_error_type="prompt",
        custom_error_message="must be a string, a list of strings, a list of token ids or of such lists, not empty",
    ),
]


def _schema_form(value: Any) -> str | None:
    return "<text>" if isinstance(value, str) else "<schema>" if isinstance(value, (dict, bool)) else None


Schema = Annotated[
    Annotated[dict[str, Any] | bool, Tag("<schema>")] | Annotated[str, Tag("<text>")],
    Discriminator(
        _schema_form, custom_error_type="schema", custom_error_message="must be a JSON schema: an object, true or false"
    ),
]


def _scalar_form(value: Any) -> str | None:
    forms = {bool: "<bool>", int: "<int>", float: "<float>", str: "<text>", type(None): "<null>"}
    return forms.get(type(value))


Scalar = Annotated[
    Annotated[bool, Tag("<bool>")]
    | Annotated[int, Tag("<int>")]
    | Annotated[float, Tag("<float>")]
    | Annotated[str, Tag("<text>")]
    | Annotated[None, Tag("<null>")],
    Discriminator(
        _scalar_form, custom_error_type="scalar", custom_error_message="must be text, a number, true, false or null"
    ),
]
TemplateKwargs = Names[Scalar]


class StreamOptions(RequestModel):
    """What a stream brings besides the answer."""

    include_usage: bool | None = Field(None, description="A last chunk with the usage of the whole request.")
    continuous_usage_stats: bool | None = Field(None, description="The usage so far in every chunk.")


class StructuredOutputsField(RequestModel):
    """What an output has to look like; exactly one of the fields."""

    json_: Schema | None = Field(None, alias="json", description="A JSON schema, or its text.")
    json_object: bool | None = Field(None, description="Any JSON object.")
    regex: str | None = Field(None, min_length=1, description="A regular expression that the whole output matches.")
    choice: Items[Annotated[str, Field(min_length=1)]] | None = Field(
        None, min_length=1, description="The output is one of these."
    )
    grammar: str | None = Field(None, min_length=1, description="A context-free grammar in llguidance's Lark.")

    @model_validator(mode="after")
    def _exactly_one(self) -> StructuredOutputsField:
        given = [name for name in ("json", "json_object", "regex", "choice", "grammar") if self._has(name)]
        if len(given) != 1:
            raise fault(
                f"must have one of json, json_object, regex, choice and grammar; given {' and '.join(given) or 'none'}"
            )
        return self

    def _has(self, name: str) -> bool:
        return self.json_ is not None if name == "json" else bool(getattr(self, name))


class SchedulingFields(RequestModel):
    """When a request runs, and how long; of our own, but for vLLM's priority."""

    priority: int | None = Field(None, ge=-(2**31), le=2**31 - 1, description="Lower ones are admitted first.")
    max_time: float | None = Field(None, gt=0, le=86400, description="Seconds after which the answer ends as it is.")


class SamplingFields(SchedulingFields):
    """How tokens are chosen: OpenAI's fields, then vLLM's. Null is unset."""

    instead: ClassVar[Mapping[str, str]] = _INSTEAD

    temperature: float | None = Field(None, ge=0, le=2, description="0 is greedy.")
    top_p: float | None = Field(None, gt=0, le=1, description="Keeps the most likely tokens up to this sum.")
    n: int | None = Field(None, ge=1, le=2**15, description="Answers to each prompt.")
    stop: Stop | None = Field(None, description="Strings that end the text and are not part of it.")
    max_tokens: int | None = Field(None, ge=0, le=2**31 - 1, description="Most tokens of an answer.")
    seed: int | None = Field(None, ge=-(2**63), le=2**63 - 1, description="Makes an answer come again.")
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: Names[Annotated[float, Field(ge=-100, le=100)]] | None = Field(
        None, description="What is added to the logits of tokens, by id."
    )
    stream: bool | None = Field(None, description="Answer in server-sent events.")
    stream_options: StreamOptions | None = None
    user: str | None = Field(None, description=NO_EFFECT)
    metadata: dict[str, Any] | None = Field(None, description=NO_EFFECT)
    store: bool | None = Field(None, description=NO_EFFECT)
    service_tier: str | None = Field(None, description=NO_EFFECT)
    safety_identifier: str | None = Field(None, description=NO_EFFECT)
    prompt_cache_key: str | None = Field(None, description=NO_EFFECT)
    prompt_cache_retention: str | None = Field(None, description=NO_EFFECT)

    best_of: int | None = Field(None, ge=1, le=2**15, description="Must equal n where it is given.")
    top_k: int | None = Field(None, ge=-1, le=2**31 - 1, description="Keeps this many tokens; 0 and -1 keep all.")
    min_p: float | None = Field(
        None, ge=0, le=1, description="Keeps tokens of this share of the best one's probability."
    )
    repetition_penalty: float | None = Field(None, gt=0, le=100, description="Over prompt and output tokens.")
    stop_token_ids: TokenIds | None = Field(None, description="Tokens that end the text.")
    min_tokens: int | None = Field(None, ge=0, le=2**31 - 1, description="No end before this many tokens.")
    ignore_eos: bool | None = Field(None, description="Go on after the token that ends a text.")
    skip_special_tokens: bool | None = Field(None, description="Leave special tokens out of the text; true when unset.")
    include_stop_str_in_output: bool | None = Field(None, description="Keep the stop string in the text.")
    prompt_logprobs: int | None = Field(
        None, ge=0, le=2**15, description="Most likely tokens at the prompt's positions."
    )
    structured_outputs: StructuredOutputsField | None = Field(None, description="What an output has to look like.")

    @model_validator(mode="after")
    def _consistent(self) -> SamplingFields:
        if self.stream_options is not None and not self.stream:
            raise fault("is taken with stream alone, which is not true", "stream_options")
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise fault(f"is {self.best_of} where n is {self.n or 1}; answers are not ranked, so ask for n", "best_of")
        if self.prompt_logprobs is not None and self.stream:
            raise fault("is not given in streams; leave stream out", "prompt_logprobs")
        return self


class ChatCompletionRequest(SamplingFields):
    """POST /v1/chat/completions."""

    model: str
    messages: Items[ChatMessage] = Field(min_length=1)
    max_completion_tokens: int | None = Field(
        None, ge=1, le=2**31 - 1, description="OpenAI's newer name of max_tokens."
    )
    logprobs: bool | None = Field(None, description="Log-probabilities of the answer's tokens.")
    top_logprobs: int | None = Field(None, ge=0, le=2**15, description="So many of the most likely tokens beside them.")
    tools: Items[Tool] | None = None
    tool_choice: ToolChoice | None = Field(None, description="auto when unset.")
    parallel_tool_calls: bool | None = Field(None, description="Whether an answer may hold several calls.")
    response_format: ResponseFormat | None = None
    reasoning_effort: str | None = Field(None, description=NO_EFFECT)
    verbosity: str | None = Field(None, description=NO_EFFECT)
    modalities: Items[Literal["text"]] | None = Field(None, description="Text is all there is.")
    add_generation_prompt: bool | None = Field(
        None, description="Open the answer's turn in the prompt; true when unset."
    )
    chat_template_kwargs: TemplateKwargs | None = Field(None, description="Variables of the chat template's own.")

    @model_validator(mode="after")
    def _of_chat(self) -> ChatCompletionRequest:
        if self.top_logprobs and not self.logprobs:
            raise fault("is taken with logprobs alone, which is not true", "top_logprobs")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise fault("must be at least 1, not 0", "max_tokens")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise fault("contradicts max_tokens; give one of them", "max_completion_tokens")
        if self.tool_choice not in (None, "none") and not self.tools:
            raise fault("is taken with tools alone, and there are none", "tool_choice")
        check_tool_messages(self.messages)
        return self


class CompletionRequest(SamplingFields):
    """POST /v1/completions."""

    model: str
    prompt: Prompt
    suffix: str | None = Field(None, description="Text after the hole that is to be filled; the prompt is before it.")
    echo: bool | None = Field(None, description="Put the prompt before the completion.")
    logprobs: int | None = Field(
        None, ge=0, le=2**15, description="So many of the most likely tokens at each position."
    )

    @model_validator(mode="after")
    def _of_completions(self) -> CompletionRequest:
        if self.max_tokens == 0 and not self.echo:
            raise fault("must be at least 1 without echo, not 0", "max_tokens")
        return self


class SimpleChatRequest(SamplingFields):
    """POST /chat: one question without a conversation around it."""

    prompt: str = Field(min_length=1)
    model: str | None = None


class TokenizeRequest(RequestModel):
    """POST /tokenize: a text, or a conversation as the chat template writes it."""

    model: str | None = None
    prompt: str | None = None
    messages: Items[ChatMessage] | None = Field(None, min_length=1)
    tools: Items[Tool] | None = None
    add_special_tokens: bool | None = Field(None, description="Begin as the checkpoint asks for; true when unset.")
    add_generation_prompt: bool | None = Field(None, description="Open the answer's turn; true when unset.")
    chat_template_kwargs: TemplateKwargs | None = Field(None, description="Variables of the chat template's own.")
    return_token_strs: bool | None = Field(None, description="Each token's text too.")

    @model_validator(mode="after")
    def _one_of_both(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise fault("or messages is required, and not both", "prompt")
        if self.tools and self.messages is None:
            raise fault("is taken with messages alone, and there are none", "tools")
        check_tool_messages(self.messages or ())
        return self


class DetokenizeRequest(RequestModel):
    """POST /detokenize."""

    model: str | None = None
    tokens: TokenIds
