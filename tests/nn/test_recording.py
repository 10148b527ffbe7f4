"""Recordings: what was computed is computed again from the same memory, whatever it then holds."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from npu_zoo.compiled.library import obstacle
from npu_zoo.nn.kernels import cpu, reference
from npu_zoo.nn.kernels.compiled.binding import COUNT, SIZE, Function
from npu_zoo.nn.kernels.recording import NotReplayableError, depends_on_values, record

pytestmark = pytest.mark.skipif(bool(obstacle()), reason=f"the compiled kernels cannot serve: {obstacle()}")

CHOSEN = torch.zeros(3, 1, dtype=torch.long), torch.ones(3, 1)

COMPUTATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "product": lambda x: x @ torch.ones(4, 3),
    "view of a result": lambda x: (x + 1)[1:, ::2] * 2,
    "reshape that copies": lambda x: x.t().reshape(-1) + 1,
    "reshape that does not": lambda x: (x + 1).reshape(-1) * 2,
    "cast": lambda x: x.bfloat16().float() + x,
    "cast to what it is": lambda x: x.float() + 1,
    "contiguous": lambda x: x.t().contiguous() * x.t(),
    "in place": lambda x: torch.zeros(3, 4).add_(x).mul_(2),
    "into a result": lambda x: torch.mul(x, 2, out=torch.empty(3, 4)),
    "several results": lambda x: torch.cat([part * n for n, part in enumerate(x.max(1))]),
    "parts": lambda x: torch.cat(torch.split(x * 3, [1, 3], 1)[::-1], 1),
    "index": lambda x: x.index_select(0, x[:, 0].abs().long() % 3),
    "norm": lambda x: reference.rms_norm(x, torch.ones(4), 1e-6),
}


@pytest.mark.parametrize("name", COMPUTATIONS)
def test_a_replay_gives_what_the_computation_gives(name: str) -> None:
    compute, x = COMPUTATIONS[name], torch.randn(3, 4)
    with torch.inference_mode():
        before = compute(x).clone()
        with record() as recording:
            found = compute(x)
        assert torch.equal(found, before)
        for seed in (1, 2):
            x.copy_(torch.randn(3, 4, generator=torch.Generator().manual_seed(seed)))
            recording.replay()
            assert torch.equal(found, compute(x))


def test_calls_of_the_library_are_one_step() -> None:
    from npu_zoo.nn.kernels.compiled.elementwise import add_rms_norm, silu_and_mul

    x, weight = torch.randn(2, 8).bfloat16(), torch.ones(8).bfloat16()
    with torch.inference_mode():
        with record() as recording:
            normed, total = add_rms_norm(x, x, weight, 1e-6)
            found = silu_and_mul(normed)
        assert recording.num_steps == 1
        x.mul_(-3)
        recording.replay()
        due, due_total = add_rms_norm(x, x, weight, 1e-6)
        assert torch.equal(total, due_total)
        assert torch.equal(found, silu_and_mul(due))


@pytest.mark.parametrize(
    "compute",
    [
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: torch.full((2,), x.sum().item()),
        lambda x: depends_on_values(),
        lambda x: cpu.experts(x, torch.zeros(3, 1).long(), torch.ones(3, 1), [], [], reference.Linear, torch.relu),
        lambda x: reference.experts(
            x, torch.zeros(3, 1).long(), torch.ones(3, 1), [], [], reference.Linear, torch.relu
        ),
    ],
)
def test_what_depends_on_values_is_not_recorded(compute: Callable[[Tensor], object]) -> None:
    with torch.inference_mode(), pytest.raises(NotReplayableError), record():
        compute(torch.randn(3, 4))
    depends_on_values()  # nothing is recorded any more
    with torch.inference_mode():
        with record() as recording:
            torch.ones(2) + 1
        recording.replay()


def test_a_function_without_a_form_for_words_is_named() -> None:
    function = Function("zoo_strip_bytes", SIZE, SIZE, COUNT, result=SIZE)
    with pytest.raises(NotReplayableError, match="zoo_strip_bytes"), record():
        function(0, 64, 0)
