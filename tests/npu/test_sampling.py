from __future__ import annotations

import pytest
import torch
import torch_npu

pytestmark = pytest.mark.chip("ascend910b")


def kept(logits: list[float], k: int, p: float) -> set[int]:
    """Tokens that stay: the k best, and of those the fewest whose probabilities reach p."""
    order = sorted(range(len(logits)), key=lambda token: -logits[token])[:k]
    total = sum(2.718281828459045 ** logits[token] for token in order)
    found, mass = set(), 0.0
    for token in order:
        if mass >= p:
            break
        found.add(token)
        mass += 2.718281828459045 ** logits[token] / total
    return found


def test_top_k_and_top_p() -> None:
    logits = torch.randn(4, 50) * 3
    k, p = torch.tensor([5, 50, 20, 1], dtype=torch.int32), torch.tensor([1.0, 0.5, 0.9, 0.3])
    found = torch_npu.npu_top_k_top_p(logits.npu(), p=p.npu(), k=k.npu()).cpu()
    for row in range(4):
        expected = kept(logits[row].tolist(), int(k[row]), float(p[row]))
        assert set((found[row] > float("-inf")).nonzero().flatten().tolist()) == expected
        assert torch.equal(found[row][list(expected)], logits[row][list(expected)])
