from __future__ import annotations

import pytest
import torch
import torch_npu

HEADS, SIZE, BLOCKS, BLOCK = 2, 64, 4, 16
SLOTS = torch.tensor([3, 17, 18, 63, 0], dtype=torch.int32)


def rows(*, seed: int) -> torch.Tensor:
    return torch.randn(len(SLOTS), HEADS, SIZE, generator=torch.Generator().manual_seed(seed)).half()


def element(cache: torch.Tensor, slot: int, head: int, column: int, *, nz: bool) -> float:
    block, offset = divmod(slot, BLOCK)
    if not nz:
        return float(cache[block, offset, head, column])
    channel = head * SIZE + column
    return float(cache[block, channel // 16, offset, channel % 16])


def check(cache: torch.Tensor, written: torch.Tensor, *, nz: bool) -> None:
    host = cache.cpu()
    for token, slot in enumerate(SLOTS.tolist()):
        for head in range(HEADS):
            for column in (0, 15, 16, 63):
                assert element(host, slot, head, column, nz=nz) == float(written[token, head, column])
    assert int((host != 0).sum()) == int((written != 0).sum())  # and nothing else


@pytest.mark.chip("ascend910b")
@pytest.mark.parametrize("nz", [False, True])
def test_rows_go_to_their_slots(nz: bool) -> None:
    shape = (BLOCKS, HEADS * SIZE // 16, BLOCK, 16) if nz else (BLOCKS, BLOCK, HEADS, SIZE)
    keys, values = torch.zeros(shape).half().npu(), torch.zeros(shape).half().npu()
    key, value = rows(seed=1), rows(seed=2)
    torch_npu.npu_scatter_pa_kv_cache(
        key.npu(), value.npu(), keys, values, SLOTS.npu(), cache_mode="PA_NZ" if nz else "Norm"
    )
    check(keys, key, nz=nz)
    check(values, value, nz=nz)


@pytest.mark.parametrize("nz", [True, pytest.param(False, marks=pytest.mark.chip("ascend910b"))])
def test_the_older_operator_writes_the_same(nz: bool) -> None:
    shape = (BLOCKS, HEADS * SIZE // 16, BLOCK, 16) if nz else (BLOCKS, BLOCK, HEADS, SIZE)
    keys, values = torch.zeros(shape).half().npu(), torch.zeros(shape).half().npu()
    if nz:
        torch.npu.config.allow_internal_format = True
        keys, values = (torch_npu.npu_format_cast(cache, 29) for cache in (keys, values))
    key, value = rows(seed=3), rows(seed=4)
    torch_npu._npu_reshape_and_cache(
        key=key.npu(), value=value.npu(), key_cache=keys, value_cache=values, slot_indices=SLOTS.npu()
    )
    check(keys, key, nz=nz)
    check(values, value, nz=nz)


def latent_parts(kv: torch.Tensor, gamma: torch.Tensor, angle: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The norm of the first 512 columns, and the rest with its pairs turned and brought apart."""
    latent = kv[..., :512].double()
    normed = latent / (latent.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * gamma.double()
    turned = torch.complex(kv[..., 512::2].double(), kv[..., 513::2].double()) * torch.exp(1j * angle)
    return normed, torch.cat([turned.real, turned.imag], -1)


@pytest.mark.chip("ascend910b")
@pytest.mark.parametrize("mode", ["PA", "PA_NZ", "Norm"])
def test_latents_and_rotary_keys(mode: str) -> None:
    batch = 3
    kv, gamma = torch.randn(batch, 1, 1, 576).half(), torch.randn(512).half()
    angle = torch.rand(batch, 1, 1, 32).double() * 6
    cos, sin = (f(angle).repeat(1, 1, 1, 2).half() for f in (torch.cos, torch.sin))
    if mode == "Norm":
        caches = [torch.zeros(batch, 1, 8, width).half().npu() for width in (64, 512)]
        index = torch.tensor([[2], [0], [7]])
    else:
        caches = [torch.zeros(BLOCKS, BLOCK, 1, width).half().npu() for width in (64, 512)]
        index = torch.tensor([5, 40, 0])
    torch_npu.npu_kv_rmsnorm_rope_cache(
        kv.npu(), gamma.npu(), cos.npu(), sin.npu(), index.npu(), *caches, epsilon=1e-5, cache_mode=mode
    )
    normed, turned = latent_parts(kv, gamma, angle)
    for cache, expected in zip(caches, (turned, normed), strict=True):
        for token, slot in enumerate(index.flatten().tolist()):
            found = read(cache.cpu(), token, slot, mode)
            torch.testing.assert_close(found.double(), expected[token, 0, 0], atol=1e-2, rtol=1e-2)
        assert int((cache.cpu() != 0).flatten(2).any(-1).sum()) <= max(batch, BLOCKS * BLOCK)


def read(cache: torch.Tensor, token: int, slot: int, mode: str) -> torch.Tensor:
    if mode == "Norm":
        return cache[token, 0, slot]
    block, offset = divmod(slot, BLOCK)
    if mode == "PA":
        return cache[block, offset, 0]
    return cache[block].reshape(-1, BLOCK, 16)[:, offset].flatten()
