from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch_npu

from npu_zoo.simulator.errors import CaptureError
from npu_zoo.simulator.report import measure

Graph = torch.npu.NPUGraph


@pytest.fixture(autouse=True)
def _default_stream() -> Iterator[None]:
    """A capture that fails leaves its stream behind as the current one."""
    yield
    torch.npu.set_stream(torch.npu.default_stream())


def capture(work: Callable[[], torch.Tensor]) -> tuple[Graph, torch.Tensor]:
    graph = Graph()
    with torch.npu.graph(graph):
        output = work()
    return graph, output


def test_a_replay_computes_on_new_data() -> None:
    x, weight = torch.randn(3, 8).npu(), torch.randn(8, 8).npu()
    gamma = torch.randn(8).npu()
    graph, y = capture(lambda: torch.relu(torch_npu.npu_rms_norm(x @ weight, gamma)[0]).add_(1))
    for seed in range(3):
        fresh = torch.randn(3, 8, generator=torch.Generator().manual_seed(seed))
        x.copy_(fresh)
        graph.replay()
        product = fresh @ weight.cpu()
        normed = product * (product.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * gamma.cpu()
        torch.testing.assert_close(y.cpu(), torch.relu(normed) + 1)


def test_a_capture_does_not_compute() -> None:
    x = torch.full((4,), 2.0).npu()
    total = torch.zeros(4).npu()
    graph, _ = capture(lambda: total.add_(x))
    assert total.cpu().tolist() == [0.0] * 4
    graph.replay()
    graph.replay()
    assert total.cpu().tolist() == [4.0] * 4


def test_a_replay_is_one_launch() -> None:
    x = torch.randn(4).npu()
    with measure() as captured:
        graph, _ = capture(lambda: torch.relu(x * 2))
    with measure() as replayed:
        graph.replay()
    assert sum(captured.captured.values()) == 2
    assert captured.num_launches == 0
    assert (replayed.replays, replayed.num_launches) == (1, 0)


def test_memory_of_a_graph_is_written_by_every_replay() -> None:
    x = torch.ones(4).npu()
    graph, y = capture(lambda: x + 1)
    graph.replay()
    y.zero_()
    graph.replay()
    assert y.cpu().tolist() == [2.0] * 4


def test_copies_inside_a_graph_are_replayed() -> None:
    source, target = torch.zeros(2, 3).npu(), torch.zeros(3, 2).npu()
    graph, whole = capture(lambda: target.copy_(source.t()).clone())
    source.copy_(torch.arange(6.0).view(2, 3))
    graph.replay()
    assert whole.cpu().tolist() == [[0, 3], [1, 4], [2, 5]]


@pytest.mark.parametrize(
    "work",
    [
        lambda x: x.sum().item(),
        lambda x: x.cpu(),
        lambda x: torch.npu.synchronize(),
        lambda x: x.tolist(),
        lambda x: bool((x > 0).all()),
    ],
    ids=["item", "cpu", "synchronize", "tolist", "bool"],
)
def test_waiting_for_the_device_breaks_a_capture(work: Callable[[torch.Tensor], object]) -> None:
    x = torch.randn(4).npu()
    with pytest.raises(RuntimeError, match="captured"), torch.npu.graph(Graph()):
        work(x)
    assert (x + 0).cpu().shape == (4,)  # the device works after it


@pytest.mark.parametrize(
    "work",
    [lambda x: torch.nonzero(x), lambda x: x[x > 0], lambda x: torch.multinomial(x.abs(), 1), lambda x: x.unique()],
    ids=["nonzero", "mask", "multinomial", "unique"],
)
def test_shapes_that_depend_on_data_cannot_be_captured(work: Callable[[torch.Tensor], object]) -> None:
    x = torch.randn(4).npu()
    with pytest.raises((CaptureError, RuntimeError), match="captured"), torch.npu.graph(Graph()):
        work(x)


def test_the_default_stream_cannot_be_captured() -> None:
    graph = Graph()
    with pytest.raises(RuntimeError, match="default stream"):
        graph.capture_begin()


def test_a_task_group_is_updated() -> None:
    x = torch.arange(6.0).npu()
    out = torch.zeros(2).npu()
    stream = torch.npu.Stream()
    graph = Graph()
    with torch.npu.graph(graph, stream=stream):
        doubled = x * 2
        torch.npu.graph_task_group_begin(stream)
        torch.sum(doubled[:4].view(2, 2), 1, out=out)
        handle = torch.npu.graph_task_group_end(stream)
        tripled = out * 3
    graph.replay()
    assert tripled.cpu().tolist() == [6.0, 30.0]
    updates = torch.npu.Stream()
    with torch.npu.stream(updates):
        torch.npu.graph_task_update_begin(updates, handle)
        torch.sum(doubled[2:].view(2, 2), 1, out=out)
        torch.npu.graph_task_update_end(updates)
    graph.replay()
    assert tripled.cpu().tolist() == [30.0, 54.0]


def test_a_task_update_with_other_operators_is_refused() -> None:
    x, out = torch.arange(4.0).npu(), torch.zeros(2).npu()
    stream, graph = torch.npu.Stream(), Graph()
    with torch.npu.graph(graph, stream=stream):
        torch.npu.graph_task_group_begin(stream)
        torch.sum(x.view(2, 2), 1, out=out)
        handle = torch.npu.graph_task_group_end(stream)
    with torch.npu.stream(stream):
        torch.npu.graph_task_update_begin(stream, handle)
        torch.sum(x.view(2, 2), 1, out=out)
        out.mul_(2)
        with pytest.raises(RuntimeError, match="1 operators, not 2"):
            torch.npu.graph_task_update_end(stream)


def test_stale_memory_shows() -> None:
    inputs = [torch.full((1 << 19,), 3.0).npu()]
    address = inputs[0].data_ptr()
    graph, y = capture(lambda: inputs[0] + 1)
    inputs.clear()
    others = [torch.full((1 << 19,), 7.0).npu() for _ in range(8)]
    assert address in [other.data_ptr() for other in others]
    graph.replay()
    assert y[0].item() == 8.0  # the graph reads whatever lies at the address by now


def test_random_numbers_of_a_graph_move_on() -> None:
    x = torch.empty(64).npu()
    graph, y = capture(lambda: x.uniform_().mul(1))
    graph.replay()
    first = y.cpu()
    graph.replay()
    assert not torch.equal(first, y.cpu())
    assert 0 <= float(first.min()) <= float(first.max()) <= 1


def test_operators_of_the_atb_library_are_replayed_and_updated() -> None:
    """Their kernels cannot run, so their golden semantics alone go on the tape."""
    torch.npu.config.allow_internal_format = True
    heads, size, block = 2, 64, 128
    keys = torch.randn(2, heads * size // 16, block, 16).half()
    cache = torch_npu.npu_format_cast(keys.npu(), 29)
    query, out = torch.zeros(1, heads, size).half().npu(), torch.zeros(1, heads, size).half().npu()
    table = torch.zeros(1, 1, dtype=torch.int32).npu()
    stream, graph = torch.npu.Stream(), Graph()

    def attention(length: int) -> None:
        torch_npu._npu_paged_attention(
            query, cache, cache, heads, heads, 0.1, table, torch.tensor([length], dtype=torch.int32), out
        )

    with torch.npu.graph(graph, stream=stream):
        torch.npu.graph_task_group_begin(stream)
        attention(1)
        handle = torch.npu.graph_task_group_end(stream)
    rows = keys[0].transpose(0, 1).reshape(block, heads, size)
    assert not bool(out.any())
    graph.replay()
    assert torch.equal(out.cpu(), rows[:1])
    with torch.npu.stream(stream):
        torch.npu.graph_task_update_begin(stream, handle)
        attention(3)
        torch.npu.graph_task_update_end(stream)
    assert torch.equal(out.cpu(), rows[:1])
    graph.replay()
    torch.testing.assert_close(
        out.cpu(), rows[:3].float().mean(0, keepdim=True).half()
    )  # a query of zeros weighs alike
