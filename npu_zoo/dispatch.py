"""From a request to an engine: :func:`check` against the matrix, :func:`resolve`, :func:`create_engine`.

Nothing here imports torch or reads a weight, so every refusal comes before both.
"""

from __future__ import annotations

import os
import warnings
from typing import cast

from npu_zoo.compiled.build import build_in_background
from npu_zoo.config_fields import Chosen, config_fields, parse_bytes
from npu_zoo.core.config import _SEAL, EngineArgs, EngineConfig, KernelChoice
from npu_zoo.core.engine import Engine, Progress
from npu_zoo.core.errors import ConfigError, HardwareError, UnsupportedError, UsageError
from npu_zoo.core.features import KINDS, Conflict, Reason, Verdict
from npu_zoo.core.hardware import ITEMSIZE, chip_of
from npu_zoo.core.model_config import ModelConfig
from npu_zoo.core.parallel import Split
from npu_zoo.core.specs import EngineSpec
from npu_zoo.fitting import plan_request, require_fit
from npu_zoo.matching import match_quantization, match_weights
from npu_zoo.parallel.environment import LaunchEnvironment
from npu_zoo.parallel.numa import apply
from npu_zoo.platforms.ascend import ascend_devices, visible_devices
from npu_zoo.platforms.detection import total_memory
from npu_zoo.platforms.environment import apply_presets
from npu_zoo.registry import Registry, get_registry, load_code
from npu_zoo.request import Request, parse_dtype, read_request
from npu_zoo.selection import is_importable, select_attention, select_kernels
from npu_zoo.splitting import require_split

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
    weights, config = match_weights(args, request, registry)
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
    method = match_quantization(request, chip, registry)
    kernels = select_kernels(
        registry.kernels, chip, request.dtype, config, request.quantization, request.family.operations
    )
    _check_fallbacks(args, kernels)
    chosen = Chosen(verdict.row, weights, config, engine, attention, kernels, method, _local_ranks(request))
    return EngineConfig(**config_fields(args, request, chosen), seal=_SEAL)


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
