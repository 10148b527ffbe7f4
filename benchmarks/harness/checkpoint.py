"""Random-weight checkpoints in a hub checkpoint's form: config.json, model.safetensors, tokenizer files."""

from __future__ import annotations

import itertools
import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from harness.shapes import Shape

SPECIAL_TOKENS = ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>")
FORMAT = 1
"""Raised when the files change, so that an older cached checkpoint is not taken for one of these."""


def ensure_checkpoint(root: Path, shape: Shape) -> Path:
    """The shape's checkpoint under a folder, written there unless it is complete already."""
    target = root / f"{shape.name}-{shape.dtype}-v{FORMAT}"
    if target.is_dir():
        return target
    part = target.with_suffix(".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    write_weights(part / "model.safetensors", shape)
    write_tokenizer(part, shape)
    _write_json(part / "config.json", config(shape))
    generation = {"bos_token_id": _bos(shape), "eos_token_id": _eos(shape), "pad_token_id": _eos(shape)}
    _write_json(part / "generation_config.json", generation)
    part.replace(target)
    return target


def config(shape: Shape) -> dict[str, Any]:
    """``config.json`` as the hub's DeepSeek-Coder checkpoints have it."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "bos_token_id": _bos(shape),
        "eos_token_id": _eos(shape),
        "hidden_act": "silu",
        "hidden_size": shape.hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": shape.intermediate_size,
        "max_position_embeddings": 16384,
        "model_type": "llama",
        "num_attention_heads": shape.num_attention_heads,
        "num_hidden_layers": shape.num_hidden_layers,
        "num_key_value_heads": shape.num_key_value_heads,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-06,
        "rope_scaling": {"factor": 4.0, "type": "linear"},
        "rope_theta": 100000,
        "tie_word_embeddings": False,
        "torch_dtype": shape.dtype,
        "use_cache": True,
        "vocab_size": shape.vocab_size,
    }


def _bos(shape: Shape) -> int:
    # The hub's tokenizer has 13 added letters between its last ordinary token and the first special one.
    return shape.num_tokens + 13


def _eos(shape: Shape) -> int:
    return shape.num_tokens + 14


def tensors(shape: Shape) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every tensor's hub name and shape."""
    hidden, intermediate = shape.hidden_size, shape.intermediate_size
    query, key_value = shape.num_attention_heads * shape.head_dim, shape.num_key_value_heads * shape.head_dim
    yield "model.embed_tokens.weight", (shape.vocab_size, hidden)
    for layer in range(shape.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        yield prefix + "input_layernorm.weight", (hidden,)
        yield prefix + "self_attn.q_proj.weight", (query, hidden)
        yield prefix + "self_attn.k_proj.weight", (key_value, hidden)
        yield prefix + "self_attn.v_proj.weight", (key_value, hidden)
        yield prefix + "self_attn.o_proj.weight", (hidden, query)
        yield prefix + "post_attention_layernorm.weight", (hidden,)
        yield prefix + "mlp.gate_proj.weight", (intermediate, hidden)
        yield prefix + "mlp.up_proj.weight", (intermediate, hidden)
        yield prefix + "mlp.down_proj.weight", (hidden, intermediate)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (shape.vocab_size, hidden)


def write_weights(target: Path, shape: Shape) -> None:
    """Stream random weights to a safetensors file; no more than one tensor is held at a time."""
    import torch

    generator = torch.Generator().manual_seed(0)
    # 0.02 at the 1.3b shape; the same gain per matrix, and so sane activations, at any other width.
    deviation = 0.02 * math.sqrt(2048 / shape.hidden_size)
    dtype = getattr(torch, shape.dtype)
    with target.open("wb") as file:
        file.write(_header(shape))
        for _, size in tensors(shape):
            if len(size) == 1:
                values = torch.ones(size, dtype=dtype)
            else:
                values = torch.empty(size).normal_(0.0, deviation, generator=generator).to(dtype)
            file.write(values.view(torch.uint8).numpy().data)


def _header(shape: Shape) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, size in tensors(shape):
        end = offset + math.prod(size) * shape.itemsize
        dtype = {"bfloat16": "BF16", "float32": "F32"}[shape.dtype]
        entries[name] = {"dtype": dtype, "shape": list(size), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write_tokenizer(folder: Path, shape: Shape) -> None:
    """A ByteLevel BPE tokenizer of the right size, whose merges are pairs of bytes: real to load, of no language."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = list(itertools.islice(itertools.product(alphabet, alphabet), shape.num_tokens - len(alphabet)))
    words = alphabet + [first + second for first, second in merges]
    tokenizer = Tokenizer(models.BPE(vocab={word: index for index, word in enumerate(words)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([AddedToken(f"<unused_{index}>", normalized=False) for index in range(13)])
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL_TOKENS])
    tokenizer.save(str(folder / "tokenizer.json"))
    described = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": SPECIAL_TOKENS[0],
        "eos_token": SPECIAL_TOKENS[1],
        "pad_token": SPECIAL_TOKENS[1],
        "clean_up_tokenization_spaces": False,
        "model_max_length": 16384,
    }
    _write_json(folder / "tokenizer_config.json", described)


def _write_json(target: Path, data: dict[str, Any]) -> None:
    target.write_text(json.dumps(data, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
