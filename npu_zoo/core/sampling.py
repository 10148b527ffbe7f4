"""How the tokens of a request are chosen."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from npu_zoo.core.errors import UsageError


@dataclass(frozen=True)
class StructuredOutputs:
    """What an output has to look like, under vLLM's names; exactly one is set. A request's reasoning is left free.

    Attributes:
        json: a JSON schema, as text.
        json_object: any JSON object.
        regex: a regular expression that the whole output matches.
        choice: texts of which the output is one.
        grammar: a context-free grammar in llguidance's dialect of Lark.

    Raises:
        UsageError: none or several are set, or one is empty.
    """

    json: str | None = None
    json_object: bool = False
    regex: str | None = None
    choice: tuple[str, ...] | list[str] = ()
    grammar: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "choice", _as_tuple(self.choice))
        names = [field.name for field in fields(self)]
        given = [name for name in names if getattr(self, name)]
        if len(given) != 1:
            found = f"has {' and '.join(given)}" if given else "has none of them"
            raise UsageError(f"structured_outputs takes one of {', '.join(names)}, and {found}")
        if not all(isinstance(text, str) and text for text in self.choice):
            raise UsageError("structured_outputs.choice holds an empty string or something that is no string")

    @property
    def kind(self) -> str:
        """The name of what is set."""
        return next(field.name for field in fields(self) if getattr(self, field.name))


@dataclass(frozen=True)
class SamplingParams:
    """How the tokens of one request are chosen, under vLLM's names.

    Attributes:
        n: completions per prompt.
        temperature: 0 is greedy.
        top_k: 0 or -1 keeps all tokens.
        min_p: keeps tokens of at least this share of the best token's probability.
        repetition_penalty: over prompt and output tokens (as in CTRL, arXiv:1909.05858).
        presence_penalty, frequency_penalty: over output tokens (as in OpenAI's API).
        seed: makes the request's draws independent of everything else that runs; unset takes the engine's seed.
        stop: strings that end the text and are not part of it, found across token borders too.
        logprobs: this many most likely tokens per position, the chosen one always among them.
        prompt_logprobs: the same for the prompt's tokens.
        prompt_logprobs_start: the first position of the prompt that is told of. What stands before it may come from the
            prefix cache, and is None in the output (as SGLang's ``logprob_start_len``).
        prompt_logits: give the logits too that predict the prompt's tokens from there on (from the second token, which
            is the first that is predicted) and the first output token.
        logit_bias: what is added to the logits of tokens, by id, from -100 to 100 (as in OpenAI's API).
        structured_outputs: what the output has to look like.

    Raises:
        UsageError: a value is out of its range; all such values are named at once.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] | list[str] | str = ()
    stop_token_ids: tuple[int, ...] | list[int] = ()
    max_tokens: int | None = 16
    min_tokens: int = 0
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    prompt_logprobs_start: int = 0
    prompt_logits: bool = False
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    logit_bias: Mapping[int, float] | None = None
    structured_outputs: StructuredOutputs | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop", _as_tuple(self.stop))
        object.__setattr__(self, "stop_token_ids", _as_tuple(self.stop_token_ids))
        faults = [fault for fault in _sampling_faults(self) if fault]
        if faults:
            raise UsageError("sampling parameters out of range: " + "; ".join(faults))

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """``stop`` in its normal form."""
        return tuple(self.stop)

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is always taken."""
        return self.temperature == 0.0


def _as_tuple(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, (list, tuple)) else () if value is None else (value,)


def _sampling_faults(p: SamplingParams) -> list[str]:
    def number(name: str, low: float, high: float, *, open_low: bool = False) -> str:
        value = getattr(p, name)
        real = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        inside = real and (low < value if open_low else low <= value) and value <= high
        bracket = "(" if open_low else "["
        return "" if inside else f"{name}={value!r} is not in {bracket}{low:g}, {high:g}]"

    def integer(name: str, low: int, *, high: float = math.inf, optional: bool = False) -> str:
        value = getattr(p, name)
        whole = isinstance(value, int) and not isinstance(value, bool)
        if (optional and value is None) or (whole and low <= value <= high):
            return ""
        return f"{name}={value!r} is not an integer >= {low}" + ("" if high == math.inf else f" and <= {high}")

    faults = [
        integer("n", 1),
        number("temperature", 0.0, 1e6),
        number("top_p", 0.0, 1.0, open_low=True),
        integer("top_k", -1),
        number("min_p", 0.0, 1.0),
        number("repetition_penalty", 0.0, 1e6, open_low=True),
        number("presence_penalty", -2.0, 2.0),
        number("frequency_penalty", -2.0, 2.0),
        integer("max_tokens", 1, optional=True),
        integer("min_tokens", 0),
        integer("logprobs", 0, optional=True),
        integer("prompt_logprobs", 0, optional=True),
        integer("prompt_logprobs_start", 0),
        integer("seed", -(2**63), high=2**64 - 1, optional=True),
    ]
    if not all(isinstance(s, str) and s for s in p.stop):
        faults.append("stop holds an empty string or something that is no string")
    if not all(isinstance(i, int) and i >= 0 for i in p.stop_token_ids):
        faults.append("stop_token_ids holds something that is no token id")
    if p.logit_bias is not None and not _is_bias(p.logit_bias):
        faults.append("logit_bias is no mapping from token ids to numbers from -100 to 100")
    if p.prompt_logits and p.prompt_logprobs is None:
        faults.append("prompt_logits come with prompt_logprobs, which is unset; 0 tells the prompt's own tokens alone")
    if not any(faults) and p.max_tokens is not None and p.min_tokens > p.max_tokens:
        faults.append(f"min_tokens={p.min_tokens} exceeds max_tokens={p.max_tokens}")
    return faults


def _is_bias(value: Any) -> bool:
    return isinstance(value, Mapping) and all(
        isinstance(token_id, int) and token_id >= 0 and isinstance(bias, (int, float)) and -100 <= bias <= 100
        for token_id, bias in value.items()
    )
