from __future__ import annotations

import pytest
import torch
import torch_npu

from npu_zoo.nn.kernels import ascend, reference

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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_one_of_the_two_alone(dtype: torch.dtype) -> None:
    logits = (torch.randperm(40).view(1, 40) / 8).to(dtype)  # exact, and without ties
    k, p = torch.tensor([7], dtype=torch.int32), torch.tensor([0.75], dtype=dtype)
    for given, expected in (({"k": k.npu()}, kept(logits[0].tolist(), 7, 1.0)), ({"p": p.npu()}, None)):
        found = torch_npu.npu_top_k_top_p(logits.npu(), **given).cpu()
        assert found.dtype is dtype
        wanted = expected or kept(logits[0].tolist(), 40, 0.75)
        assert set((found[0] > float("-inf")).nonzero().flatten().tolist()) == wanted
        assert torch.equal(found[0][list(wanted)], logits[0][list(wanted)])


def test_the_best_stays_and_so_do_ties_for_the_last_place() -> None:
    logits = torch.tensor([[3.0, 1.0, 2.0, 2.0], [0.5, 4.0, 4.0, 1.0]])
    k = torch.tensor([2, 1], dtype=torch.int32)
    found = torch_npu.npu_top_k_top_p(logits.npu(), k=k.npu()).cpu() > float("-inf")
    assert found.tolist() == [[True, False, True, True], [False, True, True, False]]
    p = torch.tensor([0.0, 0.0])
    found = torch_npu.npu_top_k_top_p(logits.npu(), p=p.npu()).cpu() > float("-inf")
    assert found.sum(-1).tolist() == [1, 1]
    assert bool(found[0, 0])


@pytest.mark.parametrize(
    ("top_k", "top_p"),
    [([5, 50, 20, 1], [1.0, 0.5, 0.9, 0.3]), ([0, 0, 0, 0], [0.5, 1.0, 0.9, 0.01]), ([0, 7, 0, 1200], [0.9] * 4)],
    ids=["both", "p alone", "what the operator does not take"],
)
def test_the_kernel_keeps_what_the_reference_keeps(top_k: list[int], top_p: list[float]) -> None:
    logits = torch.randn(4, 1500, generator=torch.Generator().manual_seed(1)) * 3
    found = ascend.top_k_top_p(logits.npu(), top_k, top_p).cpu()
    assert torch.equal(found, reference.top_k_top_p(logits, top_k, top_p))
