"""What the machine is, and what it can do: read bandwidth and matrix peak, measured; and floors from both."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from npu_zoo.compiled.library import obstacle
from npu_zoo.core.config import EngineConfig
from npu_zoo.evaluation.record import Machine
from npu_zoo.evaluation.work import Work
from npu_zoo.platforms.detection import total_memory
from npu_zoo.testing.validation.measuring import versions as device_versions

if TYPE_CHECKING:
    import torch

READ_BYTES = 2**30
"""Read by one measurement: far beyond any cache of a processor."""

MATRIX_SHAPES = ((256, 2048, 512), (2048, 2048, 5504), (2048, 5504, 2048), (4096, 4096, 4096))
"""Rows, inputs and outputs of the products that the peak is taken from."""

DEVICE_SHAPE = (8192, 8192, 8192)
"""A further one on a device, whose units the others do not fill for long enough."""

REPETITIONS = 7
_INSTRUCTIONS = (
    "avx2",
    "avx512f",
    "avx512_vnni",
    "avx512_bf16",
    "amx_bf16",
    "amx_int8",
    "asimd",
    "asimddp",
    "bf16",
    "i8mm",
    "sve",
)


def describe_machine(hardware: str = "cpu", threads: int | None = None) -> Machine:
    """The machine as it says it is, with nothing measured."""
    flags = {*_cpuinfo("flags").split(), *_cpuinfo("Features").split()}
    return Machine(
        hardware=hardware,
        cpu=_cpuinfo("model name") or platform.processor() or platform.machine(),
        instructions=tuple(name for name in _INSTRUCTIONS if name in flags),
        cores=len(os.sched_getaffinity(0)),
        threads=threads,
        memory_gib=round(total_memory() / 2**30, 1),
        system=f"{platform.system()} {platform.release()}",
        python=platform.python_version(),
        devices={} if hardware == "cpu" else device_versions(),
    )


def measure_machine(config: EngineConfig, *, divisor: int = 1) -> Machine:
    """The machine with what it was measured to do in a request's dtype, on its device and with its threads.

    The best of several kernels and repetitions, since anything else that runs can only make them slower. What one
    device does is multiplied by their number; ranks on a CPU share one machine, which gets the threads of all of them.

    Args:
        divisor: makes the work smaller, for a check of the code rather than of the machine.
    """
    import torch

    threads = config.threads or torch.get_num_threads()
    count, before = config.world_size, torch.get_num_threads()
    if config.device == "cpu":
        threads, count = min(threads * count, max(threads, len(os.sched_getaffinity(0)))), 1
        torch.set_num_threads(threads)
    dtype, device = getattr(torch, config.dtype), torch.device(config.device)
    described = describe_machine(config.hardware, threads if config.device == "cpu" else config.threads)
    try:
        measured: dict[str, Any] = {
            "bandwidth": count * read_bandwidth(READ_BYTES // divisor, device),
            "peak": count * matrix_peak(dtype, device, divisor),
        }
    finally:
        torch.set_num_threads(before)
    if config.device == "cuda":
        measured["devices"] = {"device": torch.cuda.get_device_name(), "cuda": str(torch.version.cuda)}
    return described.model_copy(update=measured)


def better_machine(known: Machine | None, measured: Machine) -> Machine:
    """A machine with the higher of two measurements of each kind, since what else runs can only lower one."""
    if known is None:
        return measured
    best = {
        name: max(getattr(known, name) or 0.0, getattr(measured, name) or 0.0) or None for name in ("bandwidth", "peak")
    }
    return measured.model_copy(update=best)


def measure_apart(config: EngineConfig, cores: Sequence[int] = (), *, divisor: int = 1) -> Machine:
    """:func:`measure_machine` in a process of its own, which is gone afterwards and leaves this one without torch.

    Args:
        cores: that it is bound to; all that may be used where there are none.
    """
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor

    context = multiprocessing.get_context("spawn")
    usable = os.sched_getaffinity(0)
    with ProcessPoolExecutor(
        1, mp_context=context, initializer=os.sched_setaffinity, initargs=(0, cores or usable)
    ) as pool:
        machine = pool.submit(measure_machine, config, divisor=divisor).result()
    return machine.model_copy(update={"cores": len(usable)})


def read_bandwidth(size: int, device: torch.device) -> float:
    """Bytes that are read per second from so many of them."""
    import torch

    if device.type != "cpu":
        data = torch.ones(size // 8, dtype=torch.int64, device=device)
        return size / best_seconds(data.max, device)
    data_bytes = _huge_ones(size)
    data = data_bytes.view(torch.int64)
    readers: list[Callable[[], object]] = [data.max, data_bytes.all]
    if not obstacle():
        from npu_zoo.nn.kernels.compiled.reading import read

        readers.append(partial(read, data))
    return size / min(best_seconds(reader, device) for reader in readers)


def _huge_ones(size: int) -> torch.Tensor:
    """Bytes of one, in huge pages where weights are."""
    import torch

    if obstacle():
        return torch.ones(size, dtype=torch.uint8)
    from npu_zoo.nn.kernels.compiled.memory import Slabs

    return Slabs().take(size).fill_(1)


def matrix_peak(dtype: torch.dtype, device: torch.device, divisor: int = 1) -> float:
    """Multiplications and additions per second of the fastest of :data:`MATRIX_SHAPES`.

    On a CPU the zoo's own product is one of the kernels, where it is built.
    """
    import torch

    best = 0.0
    for shape in (*MATRIX_SHAPES, *(() if device.type == "cpu" else (DEVICE_SHAPE,))):
        rows, inner, columns = (size // divisor for size in shape)
        left = torch.randn(rows, inner, device=device).to(dtype)
        weight = torch.randn(columns, inner, device=device).to(dtype)
        products: list[Callable[[], object]] = [partial(torch.nn.functional.linear, left, weight)]
        if device.type == "cpu" and dtype == torch.bfloat16 and not obstacle():
            from npu_zoo.nn.kernels.compiled.linear import PanelLinear

            products.append(partial(PanelLinear.apply, left, PanelLinear.pack(weight)))
        seconds = min(best_seconds(product, device) for product in products)
        best = max(best, 2 * rows * inner * columns / seconds)
    return best


def best_seconds(work: Callable[[], object], device: torch.device) -> float:
    """The least time of :data:`REPETITIONS` calls, each until its device has done it."""
    import torch

    def wait() -> None:
        if device.type != "cpu":
            getattr(torch, device.type).synchronize()

    def seconds() -> float:
        start = time.perf_counter()
        work()
        wait()
        return time.perf_counter() - start

    return min(seconds() for _ in range(REPETITIONS))


def floor_seconds(work: Work, machine: Machine) -> tuple[float, str]:
    """The least time that a machine needs for some work, and what limits it: ``memory`` or ``compute``.

    Raises:
        ValueError: the machine was not measured.
    """
    if machine.bandwidth is None or machine.peak is None:
        raise ValueError("the machine was not measured, so no floor can be told")
    return max((work.bytes / machine.bandwidth, "memory"), (work.operations / machine.peak, "compute"))


def _cpuinfo(key: str) -> str:
    file = Path("/proc/cpuinfo")
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.split(":")[0].strip() == key), "")
