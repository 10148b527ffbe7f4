"""Random-weight checkpoints in a hub checkpoint's form: config.json, model.safetensors, tokenizer files."""

from __future__ import annotations

import itertools
import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from harness.shapes import Experts, Shape

SPECIAL_TOKENS = ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>")
REFERENCE = "reference"
"""The folder in a checkpoint that transformers takes instead, where there is one."""
FORMAT = 2
"""Raised when the files change, so that an older cached checkpoint is not taken for one of these."""

REMOTE_CONFIG = "configuration_deepseek"
REMOTE_CONFIG_SOURCE = """\
from transformers import PretrainedConfig


class DeepseekConfig(PretrainedConfig):
    model_type = "deepseek"
"""
"""What vLLM reads such a config.json with, for which transformers has no class; the hub's checkpoints bring it, too."""

Tensors = Iterator[tuple[str, tuple[int, ...]]]


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
    if shape.experts and not shape.latent:
        (part / f"{REMOTE_CONFIG}.py").write_text(REMOTE_CONFIG_SOURCE, encoding="utf-8")
    generation = {"bos_token_id": _bos(shape), "eos_token_id": _eos(shape), "pad_token_id": _eos(shape)}
    _write_json(part / "generation_config.json", generation)
    write_reference(part, shape)
    part.replace(target)
    return target


def config(shape: Shape) -> dict[str, Any]:
    """``config.json`` as the hub's checkpoints of the shape's kind have it."""
    common = {
        "attention_bias": False,
        "bos_token_id": _bos(shape),
        "eos_token_id": _eos(shape),
        "hidden_act": "silu",
        "hidden_size": shape.hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": shape.intermediate_size,
        "max_position_embeddings": 16384,
        "num_attention_heads": shape.num_attention_heads,
        "num_hidden_layers": shape.num_hidden_layers,
        "num_key_value_heads": shape.num_key_value_heads,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-06,
        "tie_word_embeddings": False,
        "torch_dtype": shape.dtype,
        "use_cache": True,
        "vocab_size": shape.vocab_size,
    }
    return common | _kind(shape)


def _kind(shape: Shape) -> dict[str, Any]:
    """What tells the architecture."""
    experts, latent = shape.experts, shape.latent
    if experts is None:
        scaling = {"factor": 4.0, "type": "linear"}
        named: dict[str, Any] = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "rope_scaling": scaling}
        return named | {"rope_theta": 100000}
    found: dict[str, Any] = {
        "architectures": ["DeepseekForCausalLM"],
        "model_type": "deepseek",
        "rope_theta": 10000,
        "n_routed_experts": experts.routed,
        "n_shared_experts": experts.shared,
        "num_experts_per_tok": experts.per_token,
        "moe_intermediate_size": experts.width,
        "first_k_dense_replace": 1,
        "moe_layer_freq": 1,
        "norm_topk_prob": False,
        "scoring_func": "softmax",
    }
    if latent is None:
        return found | {"auto_map": {"AutoConfig": f"{REMOTE_CONFIG}.DeepseekConfig"}}
    yarn = {"type": "yarn", "factor": 4, "original_max_position_embeddings": 4096, "beta_fast": 32, "beta_slow": 1}
    return found | {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "rope_scaling": yarn | {"mscale": 1.0, "mscale_all_dim": 1.0},
        "kv_lora_rank": latent.kv_lora_rank,
        "q_lora_rank": latent.q_lora_rank,
        "qk_rope_head_dim": latent.rope,
        "qk_nope_head_dim": latent.nope,
        "v_head_dim": latent.value,
        "n_group": experts.groups[0],
        "topk_group": experts.groups[1],
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
    }


def _bos(shape: Shape) -> int:
    # The hub's tokenizer has 13 added letters between its last ordinary token and the first special one.
    return shape.num_tokens + 13


def _eos(shape: Shape) -> int:
    return shape.num_tokens + 14


def tensors(shape: Shape) -> Tensors:
    """Every tensor's hub name and shape."""
    hidden = shape.hidden_size
    yield "model.embed_tokens.weight", (shape.vocab_size, hidden)
    for layer in range(shape.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        yield prefix + "input_layernorm.weight", (hidden,)
        yield from _attention(shape, prefix + "self_attn.")
        yield prefix + "post_attention_layernorm.weight", (hidden,)
        if shape.experts is None or layer == 0:
            yield from _feed_forward(prefix + "mlp.", hidden, shape.intermediate_size)
        else:
            yield from _experts(shape, shape.experts, prefix + "mlp.")
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (shape.vocab_size, hidden)


def _attention(shape: Shape, prefix: str) -> Tensors:
    hidden, heads, latent = shape.hidden_size, shape.num_attention_heads, shape.latent
    if latent is None:
        query, key_value = heads * shape.head_dim, shape.num_key_value_heads * shape.head_dim
        yield prefix + "q_proj.weight", (query, hidden)
        yield prefix + "k_proj.weight", (key_value, hidden)
        yield prefix + "v_proj.weight", (key_value, hidden)
        yield prefix + "o_proj.weight", (hidden, query)
        return
    yield prefix + "q_a_proj.weight", (latent.q_lora_rank, hidden)
    yield prefix + "q_a_layernorm.weight", (latent.q_lora_rank,)
    yield prefix + "q_b_proj.weight", (heads * (latent.nope + latent.rope), latent.q_lora_rank)
    yield prefix + "kv_a_proj_with_mqa.weight", (latent.kv_lora_rank + latent.rope, hidden)
    yield prefix + "kv_a_layernorm.weight", (latent.kv_lora_rank,)
    yield prefix + "kv_b_proj.weight", (heads * (latent.nope + latent.value), latent.kv_lora_rank)
    yield prefix + "o_proj.weight", (hidden, heads * latent.value)


def _feed_forward(prefix: str, hidden: int, width: int) -> Tensors:
    yield prefix + "gate_proj.weight", (width, hidden)
    yield prefix + "up_proj.weight", (width, hidden)
    yield prefix + "down_proj.weight", (hidden, width)


def _experts(shape: Shape, experts: Experts, prefix: str) -> Tensors:
    yield prefix + "gate.weight", (experts.routed, shape.hidden_size)
    if shape.latent:
        yield prefix + "gate.e_score_correction_bias", (experts.routed,)
    for number in range(experts.routed):
        yield from _feed_forward(f"{prefix}experts.{number}.", shape.hidden_size, experts.width)
    yield from _feed_forward(prefix + "shared_experts.", shape.hidden_size, experts.shared * experts.width)


def write_reference(folder: Path, shape: Shape) -> None:
    """The same model for transformers where it has no class of the architecture: Qwen2Moe's, beside the checkpoint.

    The gate of its shared expert is zero, a sigmoid of one half, so its down projection is twice ours.
    """
    import torch
    from safetensors.torch import load_file, save_file

    experts = shape.experts
    if experts is None or shape.latent is not None:
        return
    found = {}
    for name, value in load_file(folder / "model.safetensors").items():
        factor = 2 if name.endswith("shared_experts.down_proj.weight") else 1
        found[name.replace("shared_experts.", "shared_expert.")] = value * factor
    for layer in range(1, shape.num_hidden_layers):
        gate = torch.zeros(1, shape.hidden_size, dtype=getattr(torch, shape.dtype))
        found[f"model.layers.{layer}.mlp.shared_expert_gate.weight"] = gate
    target = folder / REFERENCE
    shutil.copytree(folder, target, ignore=shutil.ignore_patterns("model.safetensors", "*.py", REFERENCE))
    save_file(found, target / "model.safetensors", {"format": "pt"})
    plain = {name: value for name, value in config(shape).items() if name != "auto_map"}
    described = plain | {
        "architectures": ["Qwen2MoeForCausalLM"],
        "model_type": "qwen2_moe",
        "num_experts": experts.routed,
        "mlp_only_layers": [0],
        "decoder_sparse_step": 1,
        "qkv_bias": False,
        "shared_expert_intermediate_size": experts.shared * experts.width,
        "use_sliding_window": False,
    }
    _write_json(target / "config.json", described)


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
