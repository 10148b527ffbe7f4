"""Layers are torch modules in all but what their calls cost."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from npu_zoo.nn.layer import Layer


class Inner(Layer):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(factor), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


class Twice(Inner):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Outer(Layer):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Inner(3.0), Twice(5.0)

    def forward(self, x: Tensor) -> Tensor:
        product: Tensor = self.second(self.first(x))
        return product


def test_a_call_is_its_own_forward() -> None:
    assert Outer()(torch.tensor(1.0)).item() == 30


def test_parts_are_a_modules_parts() -> None:
    outer = Outer()
    assert dict(outer.named_children()) == {"first": outer.first, "second": outer.second}
    assert list(outer.state_dict()) == ["first.weight", "second.weight"]
    assert [name for name, _ in outer.named_modules()] == ["", "first", "second"]


def test_a_part_that_is_replaced_is_gone() -> None:
    outer = Outer()
    outer.first = Inner(7.0)
    assert outer(torch.tensor(1.0)).item() == 70
    assert outer.get_submodule("first") is outer.first
    del outer.second
    assert not hasattr(outer, "second")
    assert dict(outer.named_children()) == {"first": outer.first}


def test_weights_that_are_moved_are_those_that_count() -> None:
    outer = Outer().to(torch.float64)
    assert outer(torch.tensor(1.0, dtype=torch.float64)).dtype == torch.float64
    other = copy.deepcopy(outer)
    other.first.weight.data.fill_(1.0)
    assert (outer(torch.tensor(1.0)).item(), other(torch.tensor(1.0)).item()) == (30, 10)


def test_a_call_costs_no_frame_of_torch() -> None:
    """Hooks are looked for in torch's own __call__, which a layer does not have."""
    outer = Outer()
    seen: list[Tensor] = []
    outer.first.register_forward_hook(lambda module, inputs, output: seen.append(output))
    outer(torch.tensor(1.0))
    assert not seen
