from __future__ import annotations

import copy
import gc
import io
import threading
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torch_npu

from npu_zoo.simulator.activation import simulated_machine
from npu_zoo.simulator.products import MACHINES

npu = torch.npu
GIB = 1 << 30
PADDING = (0, 512)
"""torch_npu's allocator adds 32 bytes to a request where CANN needs them, and rounds up to 512."""


def test_the_device_is_the_products() -> None:
    machine = simulated_machine()
    assert machine is not None
    properties = npu.get_device_properties(0)
    assert npu.get_device_name(0) == MACHINES[machine.name].soc
    assert properties.total_memory == machine.memory
    assert npu.device_count() == machine.devices
    assert npu.is_bf16_supported() == (machine.chip == "ascend910b")


def test_soc_code_is_the_chips(chip: str) -> None:
    code = torch_npu._C._npu_get_soc_version()
    assert (220 <= code <= 225) if chip == "ascend910b" else (200 <= code <= 205)


def test_more_than_the_memory_is_refused() -> None:
    gc.collect()
    npu.empty_cache()
    _, total = npu.mem_get_info()
    with pytest.raises(torch.OutOfMemoryError, match="NPU out of memory"):
        torch.empty(total + GIB, dtype=torch.uint8, device="npu")
    free = npu.mem_get_info()[0]
    half = [torch.empty(free // 2 - (64 << 20), dtype=torch.uint8, device="npu") for _ in range(2)]
    with pytest.raises(torch.OutOfMemoryError):
        torch.empty(GIB, dtype=torch.uint8, device="npu")
    half.pop()
    npu.empty_cache()
    torch.empty(GIB, dtype=torch.uint8, device="npu")


def test_each_device_has_its_own_memory() -> None:
    npu.empty_cache()
    before = npu.mem_get_info(1)[0]
    tensor = torch.ones(1 << 20, device="npu:1")
    assert npu.mem_get_info(1)[0] < before
    assert npu.memory_allocated(1) - tensor.nbytes in PADDING
    assert torch.equal(tensor.to("npu:0").cpu(), torch.ones(1 << 20))


def test_statistics_count_bytes() -> None:
    gc.collect()
    npu.empty_cache()  # or a cached block that is a little larger is taken whole
    base = npu.memory_allocated()
    npu.reset_peak_memory_stats()
    tensor = torch.empty(GIB, dtype=torch.uint8, device="npu")
    size = npu.memory_allocated() - base
    assert size - GIB in (*PADDING, 2 << 20)
    del tensor
    assert npu.memory_allocated() == base
    assert npu.max_memory_allocated() - base == size


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int64, torch.int8, torch.bool, torch.uint8])
def test_copies_keep_every_byte(dtype: torch.dtype) -> None:
    source = (torch.randn(7, 5) * 50).to(dtype)
    moved = source.npu()
    assert torch.equal(moved.cpu(), source)
    assert torch.equal(moved.t().cpu(), source.t())
    assert torch.equal(moved[1:, ::2].clone().cpu(), source[1:, ::2])
    target = torch.zeros(7, 5, dtype=dtype).npu()
    target.copy_(source)
    assert torch.equal(target.cpu(), source)


def test_pinned_copies_and_streams() -> None:
    pinned = torch.arange(1000.0).pin_memory()
    assert pinned.is_pinned()
    stream = npu.Stream()
    with npu.stream(stream):
        moved = pinned.to("npu", non_blocking=True)
        doubled = moved * 2
    npu.current_stream().wait_stream(stream)
    back = torch.empty(1000).pin_memory()
    back.copy_(doubled, non_blocking=True)
    npu.synchronize()
    assert torch.equal(back, pinned * 2)


def test_events_are_in_order() -> None:
    first, second = npu.Event(enable_timing=True), npu.Event(enable_timing=True)
    first.record()
    torch.ones(10, device="npu").add_(1)
    second.record()
    second.synchronize()
    assert first.query()
    assert second.query()
    assert first.elapsed_time(second) >= 0


def test_generators_give_the_cpus_numbers() -> None:
    generator = torch.Generator("npu").manual_seed(3)
    first, second = (torch.randn(5, generator=generator, device="npu").cpu() for _ in range(2))
    reference = torch.Generator().manual_seed(3)
    assert torch.equal(first, torch.randn(5, generator=reference))
    assert torch.equal(second, torch.randn(5, generator=reference))


def test_a_generators_state_is_saved_and_restored() -> None:
    torch.manual_seed(11)
    torch.rand(3, device="npu")
    state = npu.get_rng_state()
    first = torch.rand(4, device="npu").cpu()
    assert not torch.equal(first, torch.rand(4, device="npu").cpu())
    npu.set_rng_state(state)
    assert torch.equal(first, torch.rand(4, device="npu").cpu())
    torch.manual_seed(11)
    torch.rand(3, device="npu")
    assert torch.equal(first, torch.rand(4, device="npu").cpu())


def test_threads_compute() -> None:
    results: dict[int, torch.Tensor] = {}

    def work(number: int) -> None:
        x = torch.full((16,), float(number)).npu()
        for _ in range(50):
            x = x + 1
        results[number] = x.cpu()

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {n: t.tolist() for n, t in results.items()} == {n: [n + 50.0] * 16 for n in range(4)}


def test_modules_are_saved_and_loaded(tmp_path: Path) -> None:
    module = torch.nn.Linear(4, 3).npu()
    buffer = io.BytesIO()
    torch.save(module.state_dict(), buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, map_location="npu")
    assert loaded["weight"].device.type == "npu"
    path = tmp_path / "weights.safetensors"
    safetensors.torch.save_file({"w": module.weight.detach()}, path)
    again = safetensors.torch.load_file(path, device="npu")["w"]
    assert torch.equal(again.cpu(), module.weight.detach().cpu())
    assert torch.equal(copy.deepcopy(module).weight.cpu(), module.weight.cpu())


def test_gradients_of_a_linear_layer() -> None:
    layer = torch.nn.Linear(4, 3)
    device = copy.deepcopy(layer).npu()
    x = torch.randn(2, 4)
    layer(x).sum().backward()
    device(x.npu()).sum().backward()
    torch.testing.assert_close(device.weight.grad.cpu(), layer.weight.grad)
