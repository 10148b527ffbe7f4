"""A vocabulary that ranks cannot share evenly is padded, and the padding is never seen."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from npu_zoo import LLM, SamplingParams
from npu_zoo.core.model_config import VOCAB_MULTIPLE, padded_vocab_size
from npu_zoo.testing.checkpoints import write_checkpoint


@pytest.mark.parametrize(("size", "padded"), [(32001, 32064), (32256, 32256), (1, 64), (64, 64), (129280, 129280)])
def test_padded_sizes(size: int, padded: int) -> None:
    assert padded_vocab_size(size) == padded
    assert all(padded % ranks == 0 for ranks in (1, 2, 4, 8, 16, 32, 64))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("tied", [False, True])
def test_padding_is_never_drawn_nor_read(tmp_path: Path, dtype: str, tied: bool) -> None:
    """Where every real token scores below zero, a padded row of zeros would win."""
    directory = write_checkpoint(tmp_path / "weights", tokenizer=False, vocab_size=77, tie_word_embeddings=tied)
    lower_all_scores(directory / "model.safetensors", tied)
    options = {"hardware": "cpu", "dtype": dtype, "threads": 1, "max_model_len": 64, "skip_tokenizer_init": True}
    llm = LLM("deepseek_coder:custom", weights=str(directory), **options)
    runner = llm.engine.runner  # type: ignore[attr-defined]
    head = runner.model.lm_head
    logits = runner.compute_logits(torch.full((3, 64), 1.0, dtype=runner.dtype))
    assert head.weight.numel() == 0 or len(head.weight) % VOCAB_MULTIPLE == 0
    assert logits.shape == (3, 77)
    assert logits.float().max() < 0
    params = SamplingParams(temperature=5.0, max_tokens=40, ignore_eos=True, logprobs=20, seed=3)
    completion = llm.generate([[1, 2, 3]], params)[0].outputs[0]
    assert max(completion.token_ids) < 77
    assert completion.logprobs is not None
    assert all(max(entries) < 77 for entries in completion.logprobs)


def lower_all_scores(path: Path, tied: bool) -> None:
    tensors: dict[str, Tensor] = load_file(path)
    name = "model.embed_tokens.weight" if tied else "lm_head.weight"
    tensors[name] = -tensors[name].abs()
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    save_file(tensors, path, metadata)
