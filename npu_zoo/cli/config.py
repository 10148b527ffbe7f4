"""``config show``: what all layers together ask for, and where each value came from."""

from __future__ import annotations

import json
from typing import Any

import typer

from npu_zoo.cli.help import ZooCommand, ZooGroup
from npu_zoo.cli.options import JsonFlag, request_options
from npu_zoo.cli.output import print_json
from npu_zoo.core.config import (
    DEFAULT_COLLECTIVE_TIMEOUT_S,
    DEFAULT_KV_CACHE_FRACTION,
    DEFAULT_MAX_NUM_BATCHED_TOKENS,
    DEFAULT_MAX_NUM_SEQS,
    DEFAULT_MTP_TOKENS,
    DEFAULT_NUM_SPECULATIVE_TOKENS,
    DEFAULT_PROMPT_LOOKUP,
)
from npu_zoo.settings import Settings

DEFAULTS: dict[str, str] = {
    "model": "none; every request names one",
    "weights": "the bundled checkpoint, where the variant has one",
    "hardware": "detected",
    "dtype": "the checkpoint's, or else what the matrix offers",
    "tensor_parallel_size": "world_size / (pipeline_parallel_size x data_parallel_size)",
    "pipeline_parallel_size": "1",
    "expert_parallel_size": "1",
    "data_parallel_size": "1",
    "world_size": "the parallel sizes' product, or else the smallest that the matrix offers",
    "attention": "paged, where the matrix offers it",
    "quantization": "the checkpoint's; none for one that is not quantized",
    "kv_cache_dtype": "auto",
    "serving": "offline",
    "engine": "native",
    "allow_experimental": "false",
    "block_size": "the backend's choice",
    "max_model_len": "the checkpoint's; the engine lowers it to what its memory holds",
    "max_num_seqs": str(DEFAULT_MAX_NUM_SEQS),
    "max_num_batched_tokens": str(DEFAULT_MAX_NUM_BATCHED_TOKENS),
    "kv_cache_memory": "what kv_cache_fraction gives",
    "kv_cache_fraction": ", ".join(f"{share} on {device}" for device, share in DEFAULT_KV_CACHE_FRACTION.items()),
    "prefault_kv_cache": "false; devices' memory is always taken at the start",
    "enable_prefix_caching": "true, where the backend can share blocks",
    "enable_chunked_prefill": "true",
    "expert_dispatch": "auto: all_gather, or between replicas what the hardware is best at",
    "collective_timeout": str(DEFAULT_COLLECTIVE_TIMEOUT_S),
    "speculative_method": "none",
    "num_speculative_tokens": f"{DEFAULT_NUM_SPECULATIVE_TOKENS}; mtp: {DEFAULT_MTP_TOKENS}, and up to 3",
    "adaptive_speculation": "true",
    "prompt_lookup_min": str(DEFAULT_PROMPT_LOOKUP[0]),
    "prompt_lookup_max": str(DEFAULT_PROMPT_LOOKUP[1]),
    "seed": "0",
    "threads": "torch's choice",
    "bind": "none",
    "enforce_eager": "false; only NPUs have graphs",
    "strict_kernels": "false",
    "deterministic": "false",
    "packed_weights": "auto: taken where an earlier run kept them",
    "skip_tokenizer_init": "false",
    "trust_remote_code": "false",
}
"""What an unset field of EngineArgs comes to, or what decides it."""

group = typer.Typer(cls=ZooGroup, help="Show the configuration.", rich_markup_mode=None)


@group.command(cls=ZooCommand)
@request_options(engine=True, sampling={})
def show(
    settings: Settings,
    origin: bool = typer.Option(False, "--origin", help="Tell where each value came from."),
    as_json: JsonFlag = False,
) -> None:
    """Show the settings after all layers: defaults < file < environment < options.

    The output is a configuration file in YAML; null is unset, and the remark beside it says what that comes to.
    """
    values = settings.args.model_dump(mode="json")
    defaults = {key: DEFAULTS[key] for key, value in values.items() if value is None}
    if as_json:
        shown: dict[str, Any] = {"settings": values, "defaults": defaults, "sampling": dict(settings.sampling)}
        print_json({**shown, "origins": dict(settings.origins)} if origin else shown)
        return
    lines = [(f"{key}: {_yaml(value)}", _remark(key, settings, origin=origin)) for key, value in values.items()]
    if settings.sampling:
        lines.append(("sampling:", ""))
        lines += [
            (f"  {name}: {_yaml(value)}", _remark(f"sampling.{name}", settings, origin=origin))
            for name, value in settings.sampling.items()
        ]
    width = max(len(text) for text, _ in lines)
    for text, where in lines:
        print(f"{text:<{width}}  # {where}" if where else text)


def _remark(key: str, settings: Settings, *, origin: bool) -> str:
    """What stands beside a value: what an unset one comes to, or where it is from."""
    if getattr(settings.args, key, "") is None:
        return f"default: {DEFAULTS[key]}"
    return settings.origins[key] if origin else ""


def _yaml(value: Any) -> str:
    """A scalar or list, as YAML reads JSON; plain words without quotes."""
    plain = isinstance(value, str) and value.replace("_", "").isalnum() and not value[0].isdigit()
    words = ("true", "false", "null", "yes", "no", "on", "off", "y", "n")
    return value if plain and value.lower() not in words else json.dumps(value, ensure_ascii=False)
