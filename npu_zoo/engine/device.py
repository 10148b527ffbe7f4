"""The device of a rank: how it is opened, its free memory, and how many threads serve a model on a CPU."""

from __future__ import annotations

import os

import torch

from npu_zoo.core.config import EngineConfig
from npu_zoo.core.errors import HardwareError
from npu_zoo.core.parallel import Ranks
from npu_zoo.platforms.detection import available_memory

_WEIGHTS_PER_THREAD = 16 * 2**20
_PRIMITIVES_KEPT = 128
_TORCH_THREADS = torch.get_num_threads()  # its own choice, which a model that runs here may lower for itself


def open_device(config: EngineConfig, number: int, ranks: int = 1) -> torch.device:
    """The device of a rank; an NPU is this process's current one then.

    Args:
        number: of the rank among those of this host.
        ranks: how many they are.

    Raises:
        HardwareError: there is none, or not one for each.
    """
    if config.device == "cpu":
        _bound_primitive_caches()
        return torch.device("cpu")
    if config.device == "npu":
        _import_torch_npu(config)
    module = torch.get_device_module(config.device)
    if not module.is_available():
        raise HardwareError(
            f"--hardware {config.hardware} was asked for, and torch sees no device of it; --hardware cpu runs here"
        )
    if ranks > module.device_count():
        raise HardwareError(
            f"{ranks} ranks of this host need {ranks} devices of {config.hardware}, and torch sees "
            f"{module.device_count()}; take a smaller --world-size, or look at what hides the others "
            "(ASCEND_RT_VISIBLE_DEVICES, CUDA_VISIBLE_DEVICES)"
        )
    if config.device == "npu":
        module.set_device(number)
    return torch.device(config.device, number)


def _import_torch_npu(config: EngineConfig) -> None:
    try:
        import torch_npu  # noqa: F401
    except (ImportError, RuntimeError) as error:
        raise HardwareError(f"torch_npu cannot be imported, so {config.hardware} is out of reach: {error}") from error


def _bound_primitive_caches() -> None:
    """Keep fewer of oneDNN's compiled products, unless the user says how many; read when the first one is made.

    Both torch and oneDNN keep 1,024 of them, one for every number of rows, which took up to 400 MiB and saved no time.
    """
    for name in ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"):
        os.environ.setdefault(name, str(_PRIMITIVES_KEPT))


def free_memory(device: torch.device) -> int:
    """Free bytes on a device."""
    if device.type != "cpu":
        return int(torch.get_device_module(device).mem_get_info(device)[0])
    return available_memory()


def default_threads(parameter_bytes: int) -> int:
    """CPU threads for a model: torch's own choice, but one per 16 MiB of weights.

    The share of a smaller model is computed sooner than threads meet at a barrier, and much sooner on a busy machine.
    """
    return max(1, min(_TORCH_THREADS, parameter_bytes // _WEIGHTS_PER_THREAD))


def sharing_ranks(device: torch.device, ranks: Ranks) -> int:
    """Ranks that share one device's memory and processors: all of a host's CPU."""
    return ranks.local_size if device.type == "cpu" else 1
