"""From a request to an engine: :func:`check` against the matrix, :func:`resolve`, :func:`create_engine`.

Nothing here imports torch or reads a weight, so every refusal comes before both.
"""

from __future__ import annotations

import os
import re
import shlex
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from npu_zoo.checkpoint import detect_format, has_chat_template, quant_method_of, read_quantization
from npu_zoo.compiled.build import build_in_background
from npu_zoo.compiled.library import COMMAND, can_be_built
from npu_zoo.core.config import (
    _SEAL,
    DEFAULT_COLLECTIVE_TIMEOUT_S,
    DEFAULT_MAX_NUM_BATCHED_TOKENS,
    DEFAULT_MAX_NUM_SEQS,
    AttentionChoice,
    EngineArgs,
    EngineConfig,
    KernelChoice,
)
from npu_zoo.core.engine import Engine, Progress
from npu_zoo.core.errors import ConfigError, HardwareError, PluginError, UnsupportedError, UsageError, WeightsError
from npu_zoo.core.features import KINDS, Conflict, FeatureRow, Reason, Verdict
from npu_zoo.core.hardware import ITEMSIZE, chip_of
from npu_zoo.core.model_config import ModelConfig
from npu_zoo.core.parallel import Split
from npu_zoo.core.quantization import CONFIG_KEY
from npu_zoo.core.specs import EngineSpec, QuantizationSpec
from npu_zoo.fitting import cache_share, plan_request, require_fit
from npu_zoo.parallel.environment import LaunchEnvironment
from npu_zoo.parallel.numa import apply, describe, plan_binding
from npu_zoo.platforms.ascend import ascend_devices, visible_devices
from npu_zoo.platforms.detection import total_memory
from npu_zoo.platforms.environment import DETERMINISTIC, apply_presets, near_misses, presets
from npu_zoo.registry import Registry, get_registry, load_code
from npu_zoo.request import Request, bundled_directory, parse_dtype, read_request
from npu_zoo.selection import is_importable, select_attention, select_kernels
from npu_zoo.speculation import choose_speculation
from npu_zoo.splitting import choose_expert_dispatch, require_split

__all__ = ["check", "create_engine", "parse_bytes", "parse_dtype", "resolve"]


def check(args: EngineArgs, registry: Registry | None = None) -> Verdict:
    """Check a request against the feature matrix, and nothing else: no device and no weights are needed.

    Where ``weights`` are given their config.json takes part (variant, default dtype, longest sequence).

    Raises:
        UsageError: the request is malformed or names an unknown model.
        WeightsError: ``weights`` were given and their config.json cannot be read.
    """
    registry = registry or get_registry()
    request = read_request(args, registry)
    return _verdict(args, request, registry)


def resolve(args: EngineArgs, registry: Registry | None = None) -> EngineConfig:
    """Check everything that can be checked before torch is imported or a weight is read.

    Raises:
        UsageError, UnknownModelError, ConfigError: the request is malformed.
        WeightsError: weights are missing or contradict the variant; every difference is listed.
        UnsupportedError: the matrix refuses it; every failing axis is listed, with alternatives.
        HardwareError: the engine does not run there, or what it needs is not installed.
        PluginError: an operation has no kernel, or no plugin knows the checkpoint's quantization.
    """
    registry = registry or get_registry()
    request = read_request(args, registry)
    verdict = _verdict(args, request, registry)
    if not verdict.supported or verdict.row is None:
        raise UnsupportedError(verdict)
    engine = _engine(args, request, registry)
    if args.weights is None:  # before anybody is sent to download them
        _check_memory(args, request)
    weights, config = _weights(args, request, registry)
    if args.weights is not None:
        _check_memory(args, request)
    require_split(args, request, verdict.row, config)
    _check_world_size(engine, request)
    chip = chip_of(request.hardware).name
    attention = select_attention(
        registry.attention_backends,
        request.attention,
        chip,
        request.dtype,
        config,
        args.block_size,
        request.kv_cache_dtype,
    )
    method = _quantization_method(request, chip, registry)
    kernels = select_kernels(
        registry.kernels, chip, request.dtype, config, request.quantization, request.family.operations
    )
    _check_fallbacks(args, kernels)
    chosen = _Chosen(verdict.row, weights, config, engine, attention, kernels, method)
    return _engine_config(args, request, chosen)


def create_engine(config: EngineConfig, progress: Progress | None = None) -> Engine:
    """Import the engine that a config names and start it.

    Args:
        config: what :func:`resolve` made.
        progress: called with a stage's name, what is done and what there is to do, while the engine starts.

    Raises:
        PluginError: the engine cannot be imported.
        HardwareError, WeightsError: it cannot start.
    """
    apply_presets(config.environment, os.environ)
    if config.device == "cpu":
        build_in_background()
    launched = LaunchEnvironment.from_environ(os.environ)
    number = launched.local_rank if launched else 0
    for fault in apply(config.rank_bindings[number]) if config.rank_bindings else ():
        warnings.warn(fault, RuntimeWarning, stacklevel=2)
    return cast("Engine", load_code(config.engine_class)(config, progress))


def _verdict(args: EngineArgs, request: Request, registry: Registry) -> Verdict:
    matrix = request.family.matrix
    sharing = [b for b in registry.attention_backends.values() if b.kind == request.attention and b.prefix_caching]
    if request.attention == "flash" and args.block_size is not None:
        raise ConfigError(
            f"block_size={args.block_size} is for --attention paged; flash keeps a sequence contiguous, without blocks"
        )
    if not sharing:
        conflict = Conflict(
            first=("attention", request.attention),
            second=("enable_prefix_caching", True),
            reason="its keys and values are stored per sequence and cannot be shared; leave prefix caching off",
        )
        matrix = matrix.model_copy(update={"conflicts": (*matrix.conflicts, conflict)})
    verdict = matrix.check(
        request.asked,
        request.variant.size,
        request.axes,
        allow_experimental=bool(args.allow_experimental),
        options=args.model_dump(exclude_none=True),
    )
    reasons = tuple(_with_length(reason, args, request) for reason in verdict.reasons)
    return verdict.model_copy(update={"reasons": reasons})


def _with_length(reason: Reason, args: EngineArgs, request: Request) -> Reason:
    """A refusal of long sequences in the terms in which they were asked for."""
    config, asked = request.config, args.max_model_len
    if reason.axis != "long_sequence" or not request.long_sequence or config is None or asked is None:
        return reason
    limit, scaling = config.context_length, config.rope_scaling
    present = "no rope scaling" if scaling.kind == "none" else f"rope scaling {scaling.kind} {scaling.factor:g}"
    text = (
        f"max_model_len={asked} is beyond the checkpoint's {limit} positions ({present}); "
        f"{_due_scaling(config, asked)}; {reason.message}; give --max-model-len {limit} or less"
    )
    return reason.model_copy(update={"message": text})


def _due_scaling(config: ModelConfig, asked: int) -> str:
    """What config.json would have to name for sequences of the asked length, which is beyond its own."""
    unscaled, scaling = config.unscaled_length, config.rope_scaling
    if scaling.kind == "yarn" and asked <= unscaled * scaling.factor:
        return f"the scaling would do, but config.json states max_position_embeddings {config.max_position_embeddings}"
    factor = -(-asked * 100 // unscaled) / 100  # rounded up
    return (
        f"it would take rope scaling of its {unscaled} unscaled positions by a factor of at least {factor:.10g} "
        "(linear, dynamic or yarn), which config.json does not name"
    )


def _weights(args: EngineArgs, request: Request, registry: Registry) -> tuple[Path, ModelConfig]:
    directory = Path(args.weights) if args.weights else bundled_directory(request.variant)
    config = request.config
    if directory is None or config is None:
        raise WeightsError(_how_to_get_weights(request))
    differences = _differences(request, config)
    if differences:
        listed = "\n  ".join(differences)
        way_out = _owners_of(config.architecture, request, registry)
        raise WeightsError(f"{directory} is not {request.model}:\n  {listed}\n{way_out}")
    _check_quantization(request, directory, config, registry.quantization_methods)
    detect_format(directory, registry.weight_formats)
    return directory, config


def _check_quantization(
    request: Request, directory: Path, config: ModelConfig, methods: Mapping[str, QuantizationSpec]
) -> None:
    """Refuse a checkpoint that is quantized in a way that is not read, or in another one than was asked for."""
    raw, stored = config.extra.get(CONFIG_KEY), request.quantization_config
    if raw and stored is None:
        raise WeightsError(_how_to_convert(request, directory, raw, methods))
    scheme = stored.scheme if stored else "none"
    if request.quantization != scheme:
        holds = f"is quantized in {scheme}" if stored else "is not quantized"
        raise WeightsError(
            f"--quantization {request.quantization} was asked for, and the checkpoint in {directory} {holds}; "
            "leave --quantization unset to take it as it is, or name a checkpoint that is stored as asked"
        )


def _quantization_method(request: Request, chip: str, registry: Registry) -> QuantizationSpec | None:
    """The registered method of the checkpoint's scheme; None where it is plain."""
    if request.quantization_config is None:
        return None
    spec, names = registry.quantization_methods.get(request.quantization), ", ".join(registry.quantization_methods)
    if spec is None:
        raise PluginError(
            f"no plugin registers the quantization method {request.quantization}; registered: {names or 'none'}"
        )
    if chip not in spec.chips and "any" not in spec.chips:
        raise HardwareError(f"quantization {spec.name} is for {', '.join(spec.chips)}, not {chip}")
    return spec


def _differences(request: Request, config: ModelConfig) -> list[str]:
    """In what a checkpoint contradicts the variant that was named."""
    family, variant = request.family, request.variant
    found = []
    if config.architecture not in family.architectures:
        named = config.architecture or "none"
        found.append(f"architecture: {named}, and {family.name} loads {', '.join(family.architectures)}")
    elif variant.config and config.architecture != variant.config.architecture:
        found.append(f"architecture: {config.architecture}, not {variant.config.architecture}")
    return found + (config.differences(variant.config) if variant.config else [])


def _owners_of(architecture: str, request: Request, registry: Registry) -> str:
    if architecture in request.family.architectures:
        return f"name the variant that it is, or take --model {request.family.name}:custom"
    owners = [name for name, family in registry.families.items() if architecture in family.architectures]
    return f"families that load {architecture or 'it'}: {', '.join(owners) or 'none is registered'}"


def _how_to_convert(request: Request, directory: Path, quantized: Any, methods: Mapping[str, QuantizationSpec]) -> str:
    method = quant_method_of(quantized)
    text = f"{directory} is quantized, which {request.model} does not load"
    is_known = any(spec.quant_method == method for spec in methods.values())
    why = f": {_why_unread(quantized, methods)}" if is_known else ""
    text += f" (quant_method {method}{why}); " if method else "; "
    command = request.family.conversions.get(method)
    if command is None:
        return text + "use an unquantized checkpoint"
    source, target = shlex.quote(str(directory)), shlex.quote(f"{directory}-bf16")
    return f"{text}convert it first:\n  {command.format(source=source, target=target)}\nthen --weights {target}"


def _why_unread(quantized: Any, methods: Mapping[str, QuantizationSpec]) -> str:
    try:
        read_quantization(quantized, methods)
    except ValueError as error:
        return str(error)
    return ""


def _check_memory(args: EngineArgs, request: Request) -> None:
    """Refuse what the machine cannot hold at all, before anybody downloads or reads it."""
    config, present = request.config, total_memory()
    if config is None:
        return
    if request.hardware != "cpu":
        require_fit(args, request, config)
        return
    copies = request.split.dp if config.moe is None else 1  # replicas share the experts, which are most of a model
    needed, stored = config.num_parameters * ITEMSIZE[request.dtype] * copies, str(request.dtype)
    if request.quantization != "none":
        needed = plan_request(args, request, config, Split()).weights * copies
        stored = f"{request.quantization} with {request.dtype}"
    if needed > present:
        raise HardwareError(
            f"{request.model} takes {needed / 2**30:,.0f} GiB for its {config.num_parameters / 1e9:,.1f} billion "
            f"parameters in {stored}, and this machine has {present / 2**30:,.0f} GiB of memory; take a smaller "
            f"variant (`npu-zoo list`), or hardware that `npu-zoo matrix {request.family.name}` names"
        )


def _how_to_get_weights(request: Request) -> str:
    variant, family = request.variant, request.family
    lines = [
        f"{request.model} needs weights: --weights DIR, a directory with config.json, *.safetensors and tokenizer.json"
    ]
    if variant.huggingface or variant.modelscope:
        either = "; --source modelscope takes ModelScope" if variant.huggingface and variant.modelscope else ""
        lines.append(f"download them: npu-zoo pull {request.model} --to DIR{either}")
    demo = next((v.name for v in family.variants if v.bundled), None)
    if demo:
        lines.append(f"--model {family.name}:{demo} runs without weights")
    return "\n".join(lines)


_NPU_MODULES = ("torch_npu",)


def _engine(args: EngineArgs, request: Request, registry: Registry) -> EngineSpec:
    name = args.engine or "native"
    engine = registry.engines.get(name)
    if engine is None:
        raise UsageError(f"unknown engine '{name}'; registered: {', '.join(registry.engines) or 'none'}")
    chip = chip_of(request.hardware).name
    if chip not in engine.chips and "any" not in engine.chips:
        raise HardwareError(
            f"engine {name} does not run on {request.hardware} (chip {chip}) in this version; it runs on "
            f"{', '.join(engine.chips)}. The matrix supports the request: `npu-zoo check` shows its row"
        )
    on_npu = chip_of(request.hardware).device == "npu"
    missing = [module for module in (*engine.requires, *(_NPU_MODULES if on_npu else ())) if not is_importable(module)]
    if missing:
        extra, where = ("npu", f" on {request.hardware}") if on_npu else ("run", "")
        raise HardwareError(f"engine {name} needs {', '.join(missing)}{where}: pip install 'npu-zoo[{extra}]'")
    if on_npu:
        visible_devices(os.environ, len(ascend_devices()) or None)
    return engine


def _check_world_size(engine: EngineSpec, request: Request) -> None:
    asked = {kind: int(getattr(request.split, kind)) for kind in KINDS}
    lacking = [f"--{kind} {size}" for kind, size in asked.items() if size > 1 and kind not in engine.parallelism]
    if lacking:
        raise HardwareError(
            f"engine {engine.name} shares a model by {', '.join(engine.parallelism)} alone in this version, and the "
            f"request has {', '.join(lacking)}"
        )
    most = engine.max_world_size.get(chip_of(request.hardware).name)
    if most and request.world_size > most:
        raise HardwareError(
            f"engine {engine.name} runs on at most {most} device(s) of {request.hardware} in this version, "
            f"and the request takes {request.world_size}"
        )


def _local_ranks(request: Request) -> int:
    """The ranks of this machine: all of them, or those that a launcher has started here.

    Raises:
        ConfigError: the launcher's environment does not fit the request.
        HardwareError: the machine has fewer devices.
    """
    split = request.split
    launched = LaunchEnvironment.from_environ(os.environ, {"tp": split.tp, "pp": split.pp, "dp": split.dp})
    count = launched.local_world_size if launched else request.world_size
    present = len(ascend_devices()) if chip_of(request.hardware).device == "npu" else 0
    if present and count > present:
        raise HardwareError(
            f"{count} ranks would run on this machine, and it shows {present} devices; several nodes share a run by "
            "`npu-zoo launch --nnodes N`, or lower --tp, --pp or --dp"
        )
    return count


def _check_fallbacks(args: EngineArgs, kernels: tuple[KernelChoice, ...]) -> None:
    fallbacks = [choice for choice in kernels if choice.fallback]
    if args.strict_kernels and fallbacks:
        listed = "; ".join(f"{c.operation} ({', '.join(c.passed_over) or 'no other kernel'})" for c in fallbacks)
        raise HardwareError(f"--strict-kernels: these operations would fall back to the reference: {listed}")


@dataclass(frozen=True)
class _Chosen:
    """What was found and chosen for a request that the matrix offers."""

    row: FeatureRow
    weights: Path
    config: ModelConfig
    engine: EngineSpec
    attention: AttentionChoice
    kernels: tuple[KernelChoice, ...]
    quantization: QuantizationSpec | None


def _engine_config(args: EngineArgs, request: Request, chosen: _Chosen) -> EngineConfig:
    return EngineConfig(
        **_model_fields(args, request, chosen),
        **_hardware_fields(args, request, chosen),
        **_parallel_fields(args, request, chosen),
        **_text_fields(request, chosen.config),
        **_limit_fields(args, request, chosen),
        speculation=choose_speculation(args, chosen.config, request.split),
        serving=request.serving,
        row=chosen.row,
        seed=args.seed or 0,
        skip_tokenizer_init=bool(args.skip_tokenizer_init),
        trust_remote_code=bool(args.trust_remote_code),
        notes=tuple(_notes(args, request, chosen.row, chosen.kernels)),
        seal=_SEAL,
    )


def _model_fields(args: EngineArgs, request: Request, chosen: _Chosen) -> dict[str, Any]:
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


def _hardware_fields(args: EngineArgs, request: Request, chosen: _Chosen) -> dict[str, Any]:
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


def _parallel_fields(args: EngineArgs, request: Request, chosen: _Chosen) -> dict[str, Any]:
    split = request.split
    binding = plan_binding(args.bind or "none", request.hardware, _local_ranks(request), os.environ)
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


def _limit_fields(args: EngineArgs, request: Request, chosen: _Chosen) -> dict[str, Any]:
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
