"""The harness's arguments of generation as sampling parameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from npu_zoo.core.errors import UsageError
from npu_zoo.core.sampling import SamplingParams

MAX_GEN_TOKS = 256
"""The most tokens of an answer where a task does not say, as the harness has it for transformers."""

_SAMPLING = (
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "seed",
)
_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_TAKEN = ("until", *_LENGTHS, "do_sample", "temperature", *_SAMPLING)
_WITHOUT_EFFECT: Mapping[str, Any] = {"num_beams": 1, "num_return_sequences": 1, "use_cache": True}
"""Arguments that tasks give to transformers, with the only values that mean nothing else here."""


def generation_params(gen_kwargs: Mapping[str, Any]) -> tuple[SamplingParams, list[str]]:
    """The sampling parameters, and the texts that end an answer.

    Raises:
        UsageError: an argument is unknown here, or out of its range; names it.
    """
    from lm_eval.models.utils import normalize_gen_kwargs

    _refuse_unknown(gen_kwargs)
    kwargs = normalize_gen_kwargs(dict(gen_kwargs), MAX_GEN_TOKS)
    until = kwargs.get("until") or []
    sampled = {name: kwargs[name] for name in _SAMPLING if kwargs.get(name) is not None}
    params = SamplingParams(
        temperature=_temperature(kwargs),
        max_tokens=kwargs["max_gen_toks"],
        **sampled,
    )
    return params, [until] if isinstance(until, str) else list(until)


def _temperature(kwargs: Mapping[str, Any]) -> float:
    """Transformers draws at temperature 1 where a task says ``do_sample`` and nothing of a temperature."""
    if not kwargs["do_sample"]:
        return 0.0
    return float(kwargs.get("temperature", 1.0))


def _refuse_unknown(gen_kwargs: Mapping[str, Any]) -> None:
    unknown = [
        f"{name}={value!r}"
        for name, value in gen_kwargs.items()
        if name not in _TAKEN and not (name in _WITHOUT_EFFECT and _WITHOUT_EFFECT[name] == value)
    ]
    if unknown:
        raise UsageError(
            f"the task asks for generation with {', '.join(unknown)}, which has no meaning here; known are "
            f"{', '.join(_TAKEN)}"
        )
