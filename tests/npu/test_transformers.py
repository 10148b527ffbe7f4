from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch_npu  # noqa: F401  (brings the device)
from transformers import LlamaConfig, LlamaForCausalLM

BF16 = "310" not in torch.npu.get_device_name(0)
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if BF16 else [])]


@pytest.fixture(scope="module", params=DTYPES, ids=str)
def models(request: pytest.FixtureRequest) -> tuple[LlamaForCausalLM, LlamaForCausalLM]:
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
    )
    model = LlamaForCausalLM(config).to(request.param).eval()
    return model, copy.deepcopy(model).npu()


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(1, 300, (3, 12), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    mask[1, :2] = 0
    return ids, mask


def test_logits_are_bit_exact(models: tuple[LlamaForCausalLM, LlamaForCausalLM]) -> None:
    host, device = models
    ids, mask = batch()
    with torch.no_grad():
        expected = host(ids, attention_mask=mask).logits
        found = device(ids.npu(), attention_mask=mask.npu()).logits
    assert torch.equal(found.cpu(), expected)


@pytest.mark.parametrize(
    "options",
    [{"do_sample": False}, {"do_sample": True, "top_k": 20, "top_p": 0.9, "temperature": 0.8}],
    ids=["greedy", "sampling"],
)
def test_generated_tokens_are_the_same(
    models: tuple[LlamaForCausalLM, LlamaForCausalLM], options: dict[str, Any]
) -> None:
    host, device = models
    ids, mask = batch()
    torch.manual_seed(5)
    expected = host.generate(ids, attention_mask=mask, max_new_tokens=10, pad_token_id=0, **options)
    torch.manual_seed(5)
    found = device.generate(ids.npu(), attention_mask=mask.npu(), max_new_tokens=10, pad_token_id=0, **options)
    assert torch.equal(found.cpu(), expected)


def test_one_prompt_alone(models: tuple[LlamaForCausalLM, LlamaForCausalLM]) -> None:
    host, device = models
    ids = batch()[0][:1]
    expected = host.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)
    assert torch.equal(device.generate(ids.npu(), max_new_tokens=8, do_sample=False, pad_token_id=0).cpu(), expected)
