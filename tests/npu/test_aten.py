from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from npu_zoo.simulator.activation import runtime
from npu_zoo.simulator.overrides import install
from npu_zoo.simulator.report import measure

Case = Callable[[Callable[[torch.Tensor], torch.Tensor]], Any]


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(7)).to(dtype)


X, Y, W = draw(4, 6), draw(4, 6).flip(0), draw(5, 6)
CUBE = draw(2, 3, 4)
IDS = torch.tensor([[1, 3, 0], [2, 2, 4]])
POSITIVE = X.abs() + 0.1
INTS = torch.tensor([5, 1, 4, 1, 3])
ROWS = torch.tensor([2, 0, 2])


def in_place(start: torch.Tensor, work: Callable[..., object]) -> Case:
    def case(to: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        tensor = to(start.clone())
        work(tensor, to)
        return tensor

    return case


CASES: dict[str, Case] = {
    "add": lambda to: to(X) + to(Y),
    "add_scalar": lambda to: to(X) + 1.5,
    "add_broadcast": lambda to: to(X) + to(Y)[0],
    "add_strided": lambda to: to(X).t() + to(Y).t(),
    "add_int_float": lambda to: to(INTS) * 0.5,
    "radd": lambda to: 2 - to(X),
    "div_floor": lambda to: torch.div(to(INTS), 2, rounding_mode="floor"),
    "remainder": lambda to: to(INTS) % 3,
    "pow": lambda to: to(X).pow(2),
    "pow_scalar": lambda to: 2.0 ** to(X),
    "rsqrt": lambda to: to(POSITIVE).rsqrt(),
    "exp_log": lambda to: to(POSITIVE).log().exp(),
    "silu": lambda to: torch.nn.functional.silu(to(X)),
    "gelu": lambda to: torch.nn.functional.gelu(to(X), approximate="tanh"),
    "sigmoid": lambda to: to(X).sigmoid(),
    "softmax": lambda to: to(X).softmax(-1),
    "softmax_half": lambda to: to(X).half().softmax(-1, dtype=torch.float32),
    "log_softmax": lambda to: to(X).log_softmax(-1),
    "logsumexp": lambda to: to(X).logsumexp(-1),
    "mm": lambda to: to(X) @ to(W).t(),
    "bmm": lambda to: to(CUBE) @ to(CUBE).transpose(1, 2),
    "linear": lambda to: torch.nn.functional.linear(to(X), to(W), to(W)[:, 0]),
    "linear_bf16": lambda to: torch.nn.functional.linear(to(X).half(), to(W).half()),
    "addmm": lambda to: torch.addmm(to(W)[:, 0], to(X), to(W).t(), alpha=0.5),
    "einsum": lambda to: torch.einsum("bij,bkj->bik", to(CUBE), to(CUBE)),
    "baddbmm": lambda to: torch.baddbmm(to(CUBE), to(CUBE), to(torch.eye(4).expand(2, 4, 4).contiguous())),
    "embedding": lambda to: torch.nn.functional.embedding(to(IDS), to(W)),
    "layer_norm": lambda to: torch.nn.functional.layer_norm(to(X), (6,)),
    "rms_norm": lambda to: torch.nn.functional.rms_norm(to(X), (6,)),
    "sdpa": lambda to: torch.nn.functional.scaled_dot_product_attention(
        to(CUBE)[None], to(CUBE)[None], to(CUBE)[None], is_causal=True
    ),
    "sdpa_mask": lambda to: torch.nn.functional.scaled_dot_product_attention(
        to(CUBE)[None], to(CUBE)[None], to(CUBE)[None], attn_mask=to(torch.ones(3, 3).tril().bool())
    ),
    "mean": lambda to: to(X).mean(-1, keepdim=True),
    "sum_all": lambda to: to(X).sum(),
    "sum_half": lambda to: to(X).half().sum(0),
    "var": lambda to: to(X).var(-1),
    "norm": lambda to: to(X).norm(dim=-1),
    "max": lambda to: to(X).max(),
    "max_dim": lambda to: to(X).max(-1),
    "amax": lambda to: to(X).amax(0),
    "argmax": lambda to: to(X).argmax(-1),
    "min_dim": lambda to: to(X).min(0),
    "topk": lambda to: to(X).topk(3),
    "sort": lambda to: to(X).sort(descending=True),
    "sort_stable": lambda to: to(INTS).sort(stable=True),
    "argsort": lambda to: to(INTS).argsort(stable=True),
    "cumsum": lambda to: to(X).cumsum(-1),
    "cumprod": lambda to: to(X).cumprod(0),
    "any": lambda to: (to(X) > 1).any(-1),
    "all": lambda to: (to(X) < 100).all(),
    "compare": lambda to: (to(X) >= to(Y)) & ~(to(X) == to(Y)) | (to(X) != 0),
    "isnan": lambda to: torch.isnan(to(X)) | torch.isinf(to(X)),
    "where": lambda to: torch.where(to(X) > 0, to(X), to(Y)),
    "where_scalar": lambda to: torch.where(to(X) > 0, to(X), 0.0),
    "masked_fill": lambda to: to(X).masked_fill(to(X) > 0, float("-inf")),
    "clamp": lambda to: to(X).clamp(-0.5, 0.5),
    "cat": lambda to: torch.cat([to(X), to(Y)], 1),
    "stack": lambda to: torch.stack([to(X), to(Y)]),
    "split": lambda to: torch.cat(to(X).split([2, 4], 1)[::-1], 1),
    "chunk": lambda to: to(X).chunk(2, -1)[1] * 1,
    "repeat": lambda to: to(X).repeat(2, 1),
    "repeat_interleave": lambda to: to(X).repeat_interleave(2, 0),
    "repeat_interleave_tensor": lambda to: torch.repeat_interleave(to(X), to(torch.tensor([1, 0, 3, 2])), dim=0),
    "expand": lambda to: to(X)[:1].expand(3, 6).contiguous(),
    "tril": lambda to: to(X).tril(),
    "triu": lambda to: to(X).triu(1),
    "flip": lambda to: to(X).flip(0),
    "roll": lambda to: to(X).roll(2, 1),
    "gather": lambda to: to(X).gather(1, to(IDS)[:2]),
    "index_select": lambda to: to(X).index_select(0, to(ROWS)),
    "index": lambda to: to(X)[to(ROWS)],
    "index_pair": lambda to: to(X)[to(ROWS), to(torch.tensor([0, 5, 1]))],
    "index_put_mask": in_place(X, lambda t, to: t.__setitem__(t > 0, to(Y)[to(X) > 0])),
    "index_bool": lambda to: to(X)[to(X)[:, 0] > 0],
    "index_host": lambda to: to(X)[ROWS],
    "take_along": lambda to: to(X)[:2].take_along_dim(to(IDS), 1),
    "nonzero": lambda to: (to(X) > 0).nonzero(),
    "masked_select": lambda to: to(X).masked_select(to(X) > 0),
    "unique": lambda to: to(INTS).unique(),
    "bincount": lambda to: to(INTS).bincount(minlength=8),
    "isin": lambda to: torch.isin(to(INTS), to(torch.tensor([1, 3]))),
    "searchsorted": lambda to: torch.searchsorted(to(torch.tensor([1, 3, 5])), to(INTS)),
    "one_hot": lambda to: torch.nn.functional.one_hot(to(INTS), 6),
    "scatter": lambda to: (
        torch.zeros(4, 6).scatter(1, IDS[:2], 1.0) if to is host else to(torch.zeros(4, 6)).scatter(1, to(IDS[:2]), 1.0)
    ),
    "pad": lambda to: torch.nn.functional.pad(to(X), (1, 2), value=3.0),
    "outer": lambda to: torch.outer(to(X)[0], to(X)[1]),
    "cos_sin": lambda to: torch.cat([to(X).cos(), to(X).sin()], -1),
    "neg_abs": lambda to: -(to(X).abs()),
    "floor_ceil_round": lambda to: to(X).floor() + to(X).ceil() * to(X).round(),
    "bitwise": lambda to: (to(INTS) & 3) | (to(INTS) ^ 1),
    "shift": lambda to: (to(INTS) << 2) >> 1,
    "to_bfloat16": lambda to: to(X).to(torch.bfloat16) if BF16 else to(X).half(),
    "to_int": lambda to: to(X * 10).to(torch.int32),
    "to_bool": lambda to: to(INTS).bool(),
    "clone_strided": lambda to: to(X).t().clone(),
    "reshape_strided": lambda to: to(X).t().reshape(-1),
    "conv1d": lambda to: torch.nn.functional.conv1d(to(CUBE), to(draw(3, 3, 2))),
    "cdist_free_distance": lambda to: (to(X)[:, None] - to(Y)[None]).square().sum(-1),
    "lerp": lambda to: torch.lerp(to(X), to(Y), 0.3),
    "addcmul": lambda to: torch.addcmul(to(X), to(Y), to(Y), value=0.5),
    "foreach": lambda to: torch.stack(torch._foreach_add([to(X), to(Y)], 1.0)),
    "kthvalue_free_median": lambda to: to(X).sort(-1).values[:, 2],
    "arange": lambda to: to(torch.arange(3)) + torch.arange(3, device=to(X).device),
    "full": lambda to: torch.full((2, 2), 3.5, device=to(X).device) + torch.ones(2, 2, device=to(X).device),
    "zeros_like": lambda to: torch.zeros_like(to(X)) + torch.ones_like(to(X)),
    "eye": lambda to: torch.eye(3, device=to(X).device),
    "linspace": lambda to: torch.linspace(0, 1, 5, device=to(X).device),
    "meshgrid": lambda to: torch.stack(torch.meshgrid(to(X)[0], to(Y)[0], indexing="ij")),
    "inplace_add": in_place(X, lambda t, to: t.add_(to(Y))),
    "inplace_slice": in_place(X, lambda t, to: t[1:3].mul_(2)),
    "inplace_column": in_place(X, lambda t, to: t[:, 2].copy_(to(Y)[:, 0])),
    "setitem": in_place(X, lambda t, to: t.__setitem__((slice(None), 1), 7.0)),
    "setitem_mask": in_place(X, lambda t, to: t.__setitem__(t > 0, 0.0)),
    "index_put": in_place(X, lambda t, to: t.__setitem__(to(ROWS[:2]), to(Y)[:2])),
    "index_add": in_place(X, lambda t, to: t.index_add_(0, to(ROWS), to(Y)[:3])),
    "index_copy": in_place(X, lambda t, to: t.index_copy_(0, to(ROWS[:2]), to(Y)[:2])),
    "scatter_add": in_place(X, lambda t, to: t.scatter_add_(1, to(IDS), to(Y)[:2, :3])),
    "masked_fill_": in_place(X, lambda t, to: t.masked_fill_(t < 0, 1.0)),
    "zero_fill": in_place(X, lambda t, to: (t[0].zero_(), t[1].fill_(2.0))),
    "copy_cast": in_place(X, lambda t, to: t.copy_(to(INTS[:1]).expand(4, 6))),
    "clamp_": in_place(X, lambda t, to: t.clamp_(min=0)),
    "out": in_place(X, lambda t, to: torch.mul(to(X), to(Y), out=t)),
    "out_resized": in_place(torch.empty(0), lambda t, to: torch.add(to(X), to(Y), out=t)),
    "out_strided": in_place(X, lambda t, to: torch.mul(to(X)[:, :3], 2, out=t[:, ::2])),
    "cumsum_out": in_place(X, lambda t, to: torch.cumsum(to(X), 1, out=t)),
    "exponential_division": lambda to: (to(POSITIVE) / to(POSITIVE).sum(-1, keepdim=True)).argmax(-1),
    "equal": lambda to: torch.tensor(torch.equal(to(X), to(X)) and not torch.equal(to(X), to(Y))),
    "empty": lambda to: to(X)[:0] * 2,
    "item": lambda to: torch.tensor(to(X)[1, 2].item()),
    "tolist": lambda to: torch.tensor(to(INTS).tolist()),
}

BF16 = "310" not in torch.npu.get_device_name(0)


def host(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def device(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.npu()


@pytest.mark.parametrize("name", CASES)
def test_operators_of_torch_equal_the_cpu(name: str) -> None:
    expected, found = CASES[name](host), CASES[name](device)
    for one, other in zip(as_list(expected), as_list(found), strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other.cpu()), (one, other.cpu())


def as_list(value: Any) -> list[torch.Tensor]:
    return [value] if isinstance(value, torch.Tensor) else list(value)


def test_a_tensor_of_the_host_is_refused_beside_one_of_the_device() -> None:
    with pytest.raises(RuntimeError, match="same device"):
        X.npu() + Y


def test_what_no_kernel_exists_for_is_named() -> None:
    x = X.npu()
    with measure() as report, pytest.warns(UserWarning, match=r"aten::\S+ and computes it on the host"):
        found = torch.special.bessel_j0(x)
    torch.testing.assert_close(found.cpu(), torch.special.bessel_j0(X))
    assert report.cpu_fallbacks == {"aten::special_bessel_j0.out": 1}
    install(runtime()).cpu_fallbacks.clear()  # or this test would fail by what it tests


def test_an_operator_without_semantics_is_named() -> None:
    with pytest.raises(RuntimeError, match=r"aclnn\w+: the simulated Ascend runtime has no semantics for it"):
        torch.ops.aten.silu_backward(X.npu(), X.npu())
