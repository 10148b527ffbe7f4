"""What an EngineConfig holds, from what was asked and what was chosen for it."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from npu_zoo.checkpoint import has_chat_template
from npu_zoo.compiled.library import COMMAND, can_be_built
from npu_zoo.core.config import (
    DEFAULT_COLLECTIVE_TIMEOUT_S,
    DEFAULT_MAX_NUM_BATCHED_TOKENS,
    DEFAULT_MAX_NUM_SEQS,
    AttentionChoice,
    EngineArgs,
    KernelChoice,
)
from npu_zoo.core.errors import ConfigError
from npu_zoo.core.features import FeatureRow
from npu_zoo.core.hardware import chip_of
from npu_zoo.core.model_config import ModelConfig
from npu_zoo.core.specs import EngineSpec, QuantizationSpec
from npu_zoo.fitting import cache_share
from npu_zoo.parallel.numa import describe, plan_binding
from npu_zoo.platforms.environment import DETERMINISTIC, near_misses, presets
from npu_zoo.request import Request
from npu_zoo.speculation import choose_speculation
from npu_zoo.splitting import choose_expert_dispatch


@dataclass(frozen=True)
class Chosen:
    """What was found and chosen for a request that the matrix offers.

    Attributes:
        local_ranks: how many of the request's ranks this machine runs.
    """

    row: FeatureRow
    weights: Path
    config: ModelConfig
    engine: EngineSpec
    attention: AttentionChoice
    kernels: tuple[KernelChoice, ...]
    quantization: QuantizationSpec | None
    local_ranks: int


def config_fields(args: EngineArgs, request: Request, chosen: Chosen) -> dict[str, Any]:
    """Of an :class:`~npu_zoo.core.config.EngineConfig`, all but its seal.

    Raises:
        ConfigError: two limits contradict each other, or a size is none.
    """
    return {
        **_model_fields(args, request, chosen),
        **_hardware_fields(args, request, chosen),
        **_parallel_fields(args, request, chosen),
        **_text_fields(request, chosen.config),
        **_limit_fields(args, request, chosen),
        "speculation": choose_speculation(args, chosen.config, request.split),
        "serving": request.serving,
        "row": chosen.row,
        "seed": args.seed or 0,
        "skip_tokenizer_init": bool(args.skip_tokenizer_init),
        "trust_remote_code": bool(args.trust_remote_code),
        "notes": tuple(_notes(args, request, chosen.row, chosen.kernels)),
    }


def _model_fields(args: EngineArgs, request: Request, chosen: Chosen) -> dict[str, Any]:
    family, variant = request.family, request.variant
    return {
        "model": request.model,
        "family": family.name,
        "variant": variant.name,
        "model_class": family.model,
        "engine": chosen.engine.name,
        "engine_class": chosen.engine.implementation,
        "weights": str(chosen.weights),
        "bundled": args.weights is None,
        "model_config": chosen.config,
        "quantization": request.quantization,
        "quantization_config": request.quantization_config,
        "quantization_method": chosen.quantization.method if chosen.quantization else None,
    }


def _hardware_fields(args: EngineArgs, request: Request, chosen: Chosen) -> dict[str, Any]:
    chip = chip_of(request.hardware)
    presets_of_family = request.family.environment.get(request.hardware, {})
    return {
        "hardware": request.hardware,
        "chip": chip.name,
        "device": chip.device,
        "dtype": request.dtype,
        "attention": request.attention,
        "attention_choice": chosen.attention,
        "kernels": chosen.kernels,
        "strict_kernels": bool(args.strict_kernels),
        "enforce_eager": bool(args.enforce_eager),
        "threads": args.threads,
        "deterministic": bool(args.deterministic),
        "packed_weights": args.packed_weights or "auto",
        "environment": {
            **presets(presets_of_family, chosen.attention.reads),
            **(DETERMINISTIC if args.deterministic and chip.device == "npu" else {}),
        },
    }


def _parallel_fields(args: EngineArgs, request: Request, chosen: Chosen) -> dict[str, Any]:
    split = request.split
    binding = plan_binding(args.bind or "none", request.hardware, chosen.local_ranks, os.environ)
    chip = chip_of(request.hardware)
    return {
        "tensor_parallel_size": split.tp,
        "pipeline_parallel_size": split.pp,
        "expert_parallel_size": split.ep,
        "data_parallel_size": split.dp,
        "world_size": split.world_size,
        "expert_dispatch": choose_expert_dispatch(args.expert_dispatch, split, chosen.config, chip),
        "collective_timeout": args.collective_timeout or DEFAULT_COLLECTIVE_TIMEOUT_S,
        "binding": tuple(describe(binding)),
        "rank_bindings": binding.bindings if binding.bind != "none" else (),
    }


def _text_fields(request: Request, config: ModelConfig) -> dict[str, Any]:
    family, variant = request.family, request.variant
    return {
        "chat": variant.chat,
        "prompt": variant.prompt or family.prompt,
        "reasoning": variant.reasoning,
        "tools": variant.tools,
        "fim": family.fim,
        "stop_token_ids": tuple(dict.fromkeys((*config.eos_token_id, *variant.stop_token_ids))),
    }


def _limit_fields(args: EngineArgs, request: Request, chosen: Chosen) -> dict[str, Any]:
    max_model_len = args.max_model_len or chosen.config.max_position_embeddings
    chunked, caching = args.enable_chunked_prefill is not False, args.enable_prefix_caching
    return {
        "max_model_len": max_model_len,
        "max_model_len_asked": args.max_model_len is not None,
        "max_num_seqs": args.max_num_seqs or DEFAULT_MAX_NUM_SEQS,
        "max_num_batched_tokens": _max_num_batched_tokens(args, max_model_len, chunked=chunked),
        "kv_cache_dtype": request.kv_cache_dtype,
        "kv_cache_memory": parse_bytes(args.kv_cache_memory),
        "kv_cache_fraction": cache_share(args, request.hardware),
        "prefault_kv_cache": bool(args.prefault_kv_cache),
        "enable_prefix_caching": chosen.attention.prefix_caching if caching is None else caching,
        "enable_chunked_prefill": chunked,
    }


def _max_num_batched_tokens(args: EngineArgs, max_model_len: int, *, chunked: bool) -> int:
    asked = args.max_num_batched_tokens
    if chunked:
        return asked or DEFAULT_MAX_NUM_BATCHED_TOKENS
    if asked is not None and asked < max_model_len:
        raise ConfigError(
            f"max_num_batched_tokens={asked} is below max_model_len={max_model_len}, and chunked prefill is off: "
            f"a long prompt would never fit a step; raise it to {max_model_len}, lower max_model_len, "
            "or leave chunked prefill on"
        )
    return max(asked or DEFAULT_MAX_NUM_BATCHED_TOKENS, max_model_len)


def _notes(args: EngineArgs, request: Request, row: FeatureRow, kernels: tuple[KernelChoice, ...]) -> list[str]:
    notes = []
    if args.weights is not None and request.family.prompt and not has_chat_template(args.weights):
        notes.append(f"the checkpoint brings no chat template; chats take {request.family.title}'s own")
    if args.weights is None:
        family = request.family
        real = next((v.name for v in family.variants if v.huggingface or v.modelscope), None)
        how = f"; real weights: `npu-zoo pull {family.name}:{real} --to DIR`, then --weights DIR" if real else ""
        notes.append(f"no weights were given: this is the small demo checkpoint of {family.title}{how}")
    elif args.model == request.family.name:
        notes.append(f"the weights are taken for {request.model}")
    if row.status == "experimental":
        notes.append(f"this runs an experimental row of the matrix (source: {row.source})")
    if chip_of(request.hardware).device == "npu":
        notes += [
            f"the environment has {name}, which nothing reads; {meant}?" for name, meant in near_misses(os.environ)
        ]
        notes += _contradictions(args)
    fallbacks = [choice.operation for choice in kernels if choice.fallback]
    if fallbacks:
        notes.append(f"reference kernels, not tuned for this chip: {', '.join(fallbacks)} (`npu-zoo explain` says why)")
    if chip_of(request.hardware).device == "cpu" and can_be_built():
        notes.append(f"the compiled CPU kernels are not built yet: a run builds them in the background (`{COMMAND}`)")
    return notes


def _contradictions(args: EngineArgs) -> list[str]:
    """What the user has set against a deterministic run, which stays as it is."""
    due = DETERMINISTIC if args.deterministic else {}
    return [
        f"{name}={os.environ[name]} is set and stays; a deterministic run needs {name}={value}"
        for name, value in due.items()
        if os.environ.get(name, value) != value
    ]


_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def parse_bytes(value: Any, name: str = "kv_cache_memory") -> int | None:
    """Bytes from a number or a text such as ``2GiB``, ``500 MB``; ``name`` is what messages call it.

    Raises:
        ConfigError: it is neither, or not positive.
    """
    if value is None:
        return None
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?i?)b?\s*", str(value).lower())
    size = int(float(match.group(1)) * _UNITS.get(match.group(2), 0)) if match else 0
    if size < 1:
        raise ConfigError(f"{name}={value!r} is no size; write bytes, or a number with KiB, MiB, GiB, KB, MB, GB")
    return size
