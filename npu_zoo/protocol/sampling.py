"""From a request's fields to SamplingParams."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from npu_zoo.core.errors import ConfigError, UsageError
from npu_zoo.core.sampling import SamplingParams, StructuredOutputs
from npu_zoo.protocol.errors import ApiError
from npu_zoo.protocol.requests import SamplingFields

_ELSEWHERE = {"max_tokens", "logprobs", "prompt_logprobs", "logit_bias", "structured_outputs"}
_ELSEWHERE |= {"prompt_logprobs_start", "prompt_logits"}  # no field of a request has them
_NAMES = tuple(field.name for field in fields(SamplingParams) if field.name not in _ELSEWHERE)


def check_defaults(defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Values of fields that a request leaves unset, if SamplingParams has all of them and takes them.

    Raises:
        ConfigError: a name is unknown or a value is out of its range.
    """
    known = {*_NAMES, "max_tokens"}
    unknown = [name for name in defaults if name not in known]
    if unknown:
        raise ConfigError(f"{unknown[0]} can have no default for requests; known are {', '.join(sorted(known))}")
    try:
        SamplingParams(**defaults)
    except UsageError as error:
        raise ConfigError(f"the defaults for requests cannot be used: {error}") from error
    return dict(defaults)


def sampling_params(
    request: SamplingFields,
    defaults: Mapping[str, Any],
    *,
    max_tokens: int,
    vocab_size: int,
    logprobs: int | None = None,
    prompt_logprobs: int | None = None,
    form: StructuredOutputs | None = None,
) -> SamplingParams:
    """How a request's tokens are chosen: as it says, else as the defaults say, else as OpenAI's API has it.

    Raises:
        ApiError: 400; a token id is outside the vocabulary, or ``min_tokens`` is above ``max_tokens``.
    """
    given = {name: getattr(request, name) for name in _NAMES if getattr(request, name) is not None}
    values = {**{name: value for name, value in defaults.items() if name in _NAMES}, **given}
    if values.get("min_tokens", 0) > max_tokens:
        message = f"min_tokens={values['min_tokens']} is above the {max_tokens} tokens that the answer may have"
        raise ApiError(400, message, param="min_tokens")
    for token_id in values.get("stop_token_ids", ()):
        _check_token_id(token_id, vocab_size, "stop_token_ids")
    return SamplingParams(
        **values,
        max_tokens=max_tokens,
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        logit_bias=_biases(request.logit_bias, vocab_size),
        structured_outputs=form,
    )


def output_room(asked: int | None, field: str, fallback: int | None, num_prompt_tokens: int, max_model_len: int) -> int:
    """How many tokens an answer may have.

    Args:
        asked: what the request says.
        field: where it says so.
        fallback: what it is otherwise, or what is left where that is less; None for what is left.

    Raises:
        ApiError: 400; more was asked for than the model has room for.
    """
    left = max_model_len - num_prompt_tokens
    if asked is None:
        return left if fallback is None else min(fallback, left)
    if asked > left:
        message = (
            f"the prompt has {num_prompt_tokens} tokens and {field} asks for {asked} more, which is "
            f"{num_prompt_tokens + asked} where the model takes {max_model_len}; "
            f"ask for at most {left} or shorten the prompt"
        )
        raise ApiError(400, message, param=field, code="context_length_exceeded")
    return asked


def _biases(given: Mapping[str, float] | None, vocab_size: int) -> dict[int, float] | None:
    if not given:
        return None
    biases = {_token_id(key): value for key, value in given.items()}
    for token_id in biases:
        _check_token_id(token_id, vocab_size, "logit_bias")
    return biases


def _token_id(key: str) -> int:
    if not (key.isascii() and key.isdigit() and len(key) < 10):
        raise ApiError(400, f"logit_bias has the key {key[:40]!r}, which is no token id", param="logit_bias")
    return int(key)


def _check_token_id(token_id: int, vocab_size: int, field: str) -> None:
    if not 0 <= token_id < vocab_size:
        raise ApiError(
            400, f"{field} holds {token_id}, which is no token id; ids are 0 to {vocab_size - 1}", param=field
        )
