"""From a checked request and cases to how each engine is started, and what the machine allows at best."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from npu_zoo.core.config import EngineArgs, EngineConfig
from npu_zoo.core.errors import ConfigError, UsageError
from npu_zoo.core.parallel import Split
from npu_zoo.evaluation.machine import floor_seconds
from npu_zoo.evaluation.peers.cases import Case, Metric, work_of
from npu_zoo.evaluation.peers.comparison import cache_tokens
from npu_zoo.evaluation.peers.engines import SUBJECT, InstalledEngine
from npu_zoo.evaluation.peers.result import CaseResult, NeededWork
from npu_zoo.evaluation.peers.table import figure_text
from npu_zoo.evaluation.peers.worker.driver import LoadOptions
from npu_zoo.evaluation.record import Machine
from npu_zoo.evaluation.work import ModelWork, Work
from npu_zoo.planning import Workload, plan_rank

KV_CACHE_LIMIT = 4 * 2**30
"""Bytes of keys and values that engines get at most unless one sequence needs more, as vLLM's CPU build by default."""
KV_CACHE_LEAST = 64 * 2**20

_GGUF = b"GGUF"


def usable_cores(threads: int) -> tuple[int, ...]:
    """The cores that all engines are pinned to.

    Raises:
        UsageError: there are fewer than threads.
    """
    cores = sorted(os.sched_getaffinity(0))
    if threads > len(cores):
        raise UsageError(f"--threads {threads}: only {len(cores)} cores may be used here")
    return tuple(cores[:threads])


def fitting_cases(cases: Sequence[Case], config: EngineConfig) -> tuple[list[Case], dict[str, str]]:
    """The cases that the model is long enough for and that can be measured on its device, and why others cannot.

    Raises:
        UsageError: there is none.
    """
    reasons = {case.name: _obstacle(case, config) for case in cases}
    skipped = {name: reason for name, reason in reasons.items() if reason}
    kept = [case for case in cases if case.name not in skipped]
    if not kept:
        told = "; ".join(f"{name} {reason}" for name, reason in skipped.items())
        raise UsageError(f"no case fits: {told}; give other or shorter ones in --cases, or a longer --max-model-len")
    return kept, skipped


def _obstacle(case: Case, config: EngineConfig) -> str:
    """Why a case cannot be measured; empty where it can."""
    if case.longest > config.max_model_len:
        return f"needs {case.longest:,} tokens, and the model takes {config.max_model_len:,}"
    if case.metric == "memory" and config.device == "npu":
        return "measures resident memory, or that of a CUDA device, and weights are in that of an NPU"
    if case.metric in ("memory", "cache") and config.world_size > 1:
        return f"measures one process, and the model is split over {config.world_size}"
    return ""


def ordinary_tokens(config: EngineConfig) -> int:
    """Ids below it are no special tokens: those of tokenizer.json's vocabulary, or else all of the model's."""
    size = config.model_config.vocab_size
    try:
        described = json.loads((Path(config.weights) / "tokenizer.json").read_bytes())
        return min(size, len(described["model"]["vocab"]))
    except (OSError, ValueError, KeyError, TypeError):
        return size


def load_options(
    engines: Sequence[InstalledEngine],
    args: EngineArgs,
    config: EngineConfig,
    cases: Sequence[Case],
    *,
    gguf: Path | None = None,
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
) -> dict[str, LoadOptions]:
    """How each engine is started: in the same dtype and sizes, as long as the longest case.

    Args:
        args: what was asked for; npu-zoo gets all of it.
        gguf: what llama.cpp runs.
        overrides: further fields of :class:`LoadOptions`, by engine.

    Raises:
        ConfigError: llama.cpp is among the engines, and ``gguf`` is no GGUF file.
    """
    longest = max(case.longest for case in cases)
    max_num_seqs = args.max_num_seqs or max(config.max_num_seqs, *(case.count for case in cases))
    common: dict[str, Any] = {
        "weights": config.weights,
        "dtype": config.dtype,
        "max_model_len": config.max_model_len if config.max_model_len_asked else longest,
        "device": config.device,
        "threads": config.threads,
        "max_num_seqs": max_num_seqs,
        "max_num_batched_tokens": args.max_num_batched_tokens or max(config.max_num_batched_tokens, max_num_seqs),
        "kv_cache_memory": config.kv_cache_memory or _cache_room(cases, config),
    }
    own: dict[str, dict[str, Any]] = {SUBJECT: {"settings": _own_settings(args, config)}}
    if any(engine.name == "llama.cpp" for engine in engines):
        own["llama.cpp"] = {"weights": str(_require_gguf(gguf))}
    for name, fields in (overrides or {}).items():
        own[name] = {**own.get(name, {}), **fields}
    return {engine.name: LoadOptions(**{**common, **own.get(engine.name, {})}) for engine in engines}


def _own_settings(args: EngineArgs, config: EngineConfig) -> dict[str, Any]:
    asked = args.model_dump(exclude_none=True)
    return {**asked, "weights": None if config.bundled else config.weights}


def _require_gguf(file: Path | None) -> Path:
    if file is None:
        raise ConfigError("llama.cpp runs a GGUF file: give --gguf FILE (llama.cpp's convert_hf_to_gguf.py makes one)")
    try:
        with file.open("rb") as stream:
            magic = stream.read(len(_GGUF))
    except OSError as error:
        raise ConfigError(f"--gguf {file} cannot be read: {error.strerror or error}") from None
    if magic != _GGUF:
        raise ConfigError(f"--gguf {file} is no GGUF file; llama.cpp's convert_hf_to_gguf.py makes one of a checkpoint")
    return file


def _cache_room(cases: Sequence[Case], config: EngineConfig) -> int:
    """Bytes for the largest case's sequences all at once, within a limit."""
    per_token = ModelWork.of(config).cache_per_token
    wanted = max(cache_tokens(case.requests(1, 0)) for case in cases) * per_token
    least = max(case.longest for case in cases) * per_token
    return max(KV_CACHE_LEAST, 2 * least, min(wanted, KV_CACHE_LIMIT))


def cache_notes(cases: Sequence[Case], config: EngineConfig, room: int) -> list[str]:
    """Which cases may take more keys and values at once than an engine gets room for, in bytes."""
    per_token = ModelWork.of(config).cache_per_token
    needed = {case.name: cache_tokens(case.requests(1, 0)) * per_token for case in cases if not case.fresh}
    larger = [f"{name} {figure_text(size / 2**30)} GiB" for name, size in needed.items() if size > room]
    if not larger:
        return []
    return [
        f"an engine's cache has {figure_text(room / 2**30)} GiB, and all sequences at once may take more "
        f"({', '.join(larger)}); --kv-cache-memory sets it"
    ]


def with_floor(result: CaseResult, case: Case, config: EngineConfig, machine: Machine) -> CaseResult:
    """A result with the work that its case needs, and the best figure that the machine allows."""
    work, tokens = _least_work(case, config)
    found = NeededWork(bytes=work.bytes, operations=work.operations, tokens=tokens)
    floor, limit = best_figure(case.metric, work, tokens, machine)
    return result.model_copy(update={"work": found, "floor": floor, "limit": limit})


def renewed_floor(result: CaseResult, machine: Machine) -> CaseResult:
    """A result that has its work, with the floor of a machine that was measured anew."""
    if result.work is None:
        return result
    needed = result.work
    floor, limit = best_figure(result.metric, Work(needed.bytes, needed.operations), needed.tokens, machine)
    return result.model_copy(update={"floor": floor, "limit": limit})


def _least_work(case: Case, config: EngineConfig) -> tuple[Work, int]:
    model, requests = ModelWork.of(config), case.requests(1, 0)
    if case.metric == "cache":
        return Work(model.cache_per_token, 0), 0
    if case.metric == "start":
        return Work(weight_bytes(config), 0), 0
    if case.metric == "memory":
        held = sum(len(request.prompt) + request.max_tokens - 1 for request in requests)
        return Work(weight_bytes(config) + held * model.cache_per_token, 0), 0
    return work_of(case, model, requests)


def best_figure(metric: Metric, work: Work, tokens: int, machine: Machine) -> tuple[float | None, str]:
    """The best figure that a machine allows for some work, in the metric's unit, and what limits it."""
    if metric in ("memory", "cache"):
        return work.bytes / (2**30 if metric == "memory" else 2**10), "size"
    if machine.bandwidth is None or machine.peak is None:
        return None, ""
    seconds, limit = floor_seconds(work, machine)
    return (seconds if metric == "start" else tokens / seconds), limit


def weight_bytes(config: EngineConfig) -> int:
    """Of a model's weights in the dtype or the scheme that they are stored in."""
    quantized = config.quantization_config
    plan = plan_rank(
        config.model_config,
        config.dtype,
        Split(),
        Workload(1, 1, 1),
        weight_bits=quantized.weight_bits if quantized else None,
        group_size=quantized.group_size if quantized else None,
    )
    return plan.weights
