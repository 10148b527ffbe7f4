"""A rank's share of a model: built, compared with its checkpoint, and filled with weights."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from npu_zoo.checkpoint import detect_format
from npu_zoo.core.config import EngineConfig
from npu_zoo.core.engine import Progress
from npu_zoo.core.errors import HardwareError, WeightsError
from npu_zoo.core.parallel import Ranks
from npu_zoo.core.weights import WeightLoader
from npu_zoo.engine.device import default_threads, free_memory, sharing_ranks
from npu_zoo.engine.host_memory import keep_freed_memory, return_freed_memory
from npu_zoo.engine.packing import PackedWeights, Packing
from npu_zoo.engine.speculation.layer import require_mtp, require_stored
from npu_zoo.nn.context import BuildContext
from npu_zoo.nn.kernels.table import Kernels
from npu_zoo.nn.model import CausalLM, build_on_meta
from npu_zoo.nn.quantization import Quantization, bind_quantization
from npu_zoo.registry import get_registry, load_code
from npu_zoo.weights.load import compare_shapes, load_weights


@dataclass(frozen=True)
class LoadedModel:
    """A model that is ready to compute.

    Attributes:
        parameter_bytes: of its parameters, as the checkpoint has them.
        packed: what was taken of an earlier run, or kept for later ones.
    """

    model: CausalLM
    parameter_bytes: int
    packed: PackedWeights


def load_model(
    config: EngineConfig, kernels: Kernels, device: torch.device, ranks: Ranks, progress: Progress | None = None
) -> LoadedModel:
    """Build a rank's share of the model and copy its weights in.

    Raises:
        ConfigError: the model has no layer to draft with, which the run asks for.
        WeightsError: the checkpoint is not the model's, or has to be converted first; or packed weights cannot be kept.
        HardwareError: there is not enough memory.
    """
    model = _build(config, kernels, ranks)
    loader = _open(Path(config.weights))
    scope: dict[str, Any] = {
        "optional": model.optional_tensors(),
        "ignored": model.ignored_tensors,
        "shards": model.shards(),
        "elsewhere": model.held_elsewhere(),
    }
    parameter_bytes = _compare(model, loader, scope, config)
    _check_memory(config, device, parameter_bytes)
    _set_up_torch(config, device, parameter_bytes, sharing_ranks(device, ranks))
    model.allocate(device)
    packing = Packing(config, ranks, loader, progress)
    held = packing.restore(model, parameter_bytes)
    load_weights(
        model.checkpoint_tensors(),
        loader,
        **scope,
        held=held,
        adopt=model.adopt,
        storage=model.storage_of,
        on_loaded=model.tensor_loaded,
        progress=functools.partial(progress, "loading weights") if progress else None,
    )
    model.finish_loading()
    if device.type == "cpu":
        keep_freed_memory()
    return LoadedModel(model.eval(), parameter_bytes, packing.result)


def _build(config: EngineConfig, kernels: Kernels, ranks: Ranks) -> CausalLM:
    dtype, quantization = getattr(torch, config.dtype), _quantization(config, kernels)
    length, dispatch = config.max_model_len, config.expert_dispatch
    context = BuildContext(kernels, dtype, length, quantization, ranks, dispatch, config.mtp)
    model = build_on_meta(load_code(config.model_class), config.model_config, context)
    if config.mtp:
        require_mtp(model)
    return model


def _quantization(config: EngineConfig, kernels: Kernels) -> Quantization | None:
    stored, method = config.quantization_config, config.quantization_method
    if stored is None or method is None:
        return None
    return bind_quantization(stored, method, kernels, has_experts=config.model_config.moe is not None)


def _open(directory: Path) -> WeightLoader:
    spec = detect_format(directory, get_registry().weight_formats)
    if spec.loader is None:
        raise WeightsError(f"{directory} is in the format {spec.name}, which must be converted first")
    loader: WeightLoader = load_code(spec.loader)(directory)
    return loader


def _compare(model: CausalLM, loader: WeightLoader, scope: dict[str, Any], config: EngineConfig) -> int:
    """Bytes of the parameters that the checkpoint fills.

    Raises:
        WeightsError: it is another model's.
    """
    due, directory = model.checkpoint_tensors(), Path(config.weights)
    comparison = compare_shapes(due, loader.shapes(), **scope)
    if config.mtp:
        require_stored(comparison.missing, config.model_config.num_hidden_layers, directory)
    comparison.require(directory)
    return sum(tensor.nbytes for name, tensor in due.items() if name not in comparison.absent)


def _check_memory(config: EngineConfig, device: torch.device, needed: int) -> None:
    free = free_memory(device)
    if needed > free:
        raise HardwareError(
            f"{config.model} takes {needed / 2**30:.1f} GiB in {config.dtype}, and "
            f"{free / 2**30:.1f} GiB are free on {config.hardware}; "
            "take a smaller variant or a dtype of fewer bytes; "
            f"`npu-zoo plan --model {config.model}` shows what fits"
        )


def _set_up_torch(config: EngineConfig, device: torch.device, parameter_bytes: int, sharing: int) -> None:
    """What the whole process is given for the model: determinism, and on a CPU threads and an allocator that frees."""
    if config.deterministic:
        # Operators that have no such form say so once; torch_npu hands the setting on to its own.
        torch.use_deterministic_algorithms(True, warn_only=True)
        # The cache is to stay untouched until it is used.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    if device.type == "cpu":
        threads = config.threads or default_threads(parameter_bytes * sharing) // sharing
        torch.set_num_threads(max(1, threads))
        return_freed_memory()
