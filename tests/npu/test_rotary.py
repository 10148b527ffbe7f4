from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch_npu

TOKENS, HEADS, SIZE = 5, 3, 128


def angles(size: int) -> torch.Tensor:
    """[TOKENS, size / 2]: positions times inverse frequencies."""
    return torch.arange(TOKENS).double()[:, None] / 10000 ** (torch.arange(0, size, 2).double() / size)


def turned(x: torch.Tensor, *, pairs: bool) -> torch.Tensor:
    """Each pair of columns of x [TOKENS, H, D] as a complex number, times ``exp(i * angle)``."""
    size = x.shape[-1]
    wide = x.double()
    first, second = (wide[..., 0::2], wide[..., 1::2]) if pairs else (wide[..., : size // 2], wide[..., size // 2 :])
    product = torch.complex(first, second) * torch.exp(1j * angles(size))[:, None]
    if pairs:
        return torch.stack([product.real, product.imag], -1).flatten(-2)
    return torch.cat([product.real, product.imag], -1)


def tables(size: int, *, pairs: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines [1, TOKENS, 1, size]."""
    spread = angles(size).repeat_interleave(2, -1) if pairs else angles(size).repeat(1, 2)
    return spread.cos().half()[None, :, None], spread.sin().half()[None, :, None]


@pytest.mark.parametrize("pairs", [False, pytest.param(True, marks=pytest.mark.chip("ascend910b"))])
def test_rotary_mul(pairs: bool) -> None:
    x = torch.randn(1, TOKENS, HEADS, SIZE).half()
    cos, sin = tables(SIZE, pairs=pairs)
    found = torch_npu.npu_rotary_mul(x.npu(), cos.npu(), sin.npu(), "interleave" if pairs else "half")
    torch.testing.assert_close(found.cpu()[0].double(), turned(x[0], pairs=pairs), atol=5e-3, rtol=5e-3)


LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "BNSD": lambda x: x.transpose(1, 2).contiguous(),
    "SBND": lambda x: x.transpose(0, 1).contiguous(),
    "TND": lambda x: x[0],
}


@pytest.mark.chip("ascend910b")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_tables_spread_over_the_heads(layout: str) -> None:
    x = torch.randn(1, TOKENS, HEADS, SIZE).half()
    tensors = [LAYOUTS[layout](tensor).npu() for tensor in (x, *tables(SIZE, pairs=False))]
    expected = LAYOUTS[layout](turned(x, pairs=False))
    torch.testing.assert_close(torch_npu.npu_rotary_mul(*tensors).cpu().double(), expected, atol=5e-3, rtol=5e-3)


@pytest.mark.parametrize("layout", ["BSND", "TND"])
def test_apply_rotary_pos_emb(layout: str) -> None:
    query, key = torch.randn(1, TOKENS, HEADS, SIZE).half(), torch.randn(1, TOKENS, 1, SIZE).half()
    tensors = [query, key, *tables(SIZE, pairs=False)]
    device = [(tensor if layout == "BSND" else tensor[0]).npu() for tensor in tensors]
    found = torch_npu.npu_apply_rotary_pos_emb(*device, layout=layout)
    for one, updated, x in zip(found, device[:2], (query, key), strict=True):
        expected = turned(x[0], pairs=False)
        torch.testing.assert_close(one.cpu().view(TOKENS, -1, SIZE).double(), expected, atol=5e-3, rtol=5e-3)
        assert torch.equal(updated.cpu(), one.cpu())  # in place as well


@pytest.mark.chip("ascend910b")
def test_interleave_rope_brings_pairs_apart() -> None:
    x = torch.randn(TOKENS, HEADS, 1, 64).half()
    cos, sin = (t.view(TOKENS, 1, 1, 64) for t in tables(64, pairs=False))
    found = torch_npu.npu_interleave_rope(x.npu(), cos.npu(), sin.npu()).cpu().view(TOKENS, HEADS, 64)
    expected = turned(x.view(TOKENS, HEADS, 64), pairs=True)
    torch.testing.assert_close(
        found.double(), torch.cat([expected[..., 0::2], expected[..., 1::2]], -1), atol=5e-3, rtol=5e-3
    )


@pytest.mark.parametrize("neox", [True, False])
def test_atb_rotary_embedding_turns_in_place(neox: bool) -> None:
    query, key = torch.randn(TOKENS, HEADS * SIZE).half(), torch.randn(TOKENS, SIZE).half()
    table = torch.cat([angles(SIZE).cos(), angles(SIZE).sin()], -1).half()
    order = torch.tensor([3, 1, 4, 0, 2])
    device = query.npu(), key.npu()
    torch_npu._npu_rotary_embedding(order.npu(), *device, SIZE, table.npu(), neox)
    inverse = order.argsort()
    for found, x in zip(device, (query, key), strict=True):
        expected = turned(x.view(TOKENS, -1, SIZE)[inverse], pairs=not neox)[order]
        torch.testing.assert_close(found.cpu().view(TOKENS, -1, SIZE).double(), expected, atol=5e-3, rtol=5e-3)
