"""A random-weight checkpoint as a GGUF file, as llama.cpp's own converter would write it.

    python gguf_file.py CHECKPOINT FILE [--quantize q8_0]

Runs in llama.cpp's environment, so it imports numpy, gguf and llama_cpp alone and nothing of npu-zoo; a quantized file
is made of a plain one by the library that will run it. Names of tensors and fields are those of the gguf package,
https://github.com/ggml-org/llama.cpp/blob/master/gguf-py/gguf/constants.py.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

DTYPES = {"F32": np.float32, "BF16": np.uint16}
LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_a_proj": "attn_q_a",
    "self_attn.q_a_layernorm": "attn_q_a_norm",
    "self_attn.q_b_proj": "attn_q_b",
    "self_attn.kv_a_proj_with_mqa": "attn_kv_a_mqa",
    "self_attn.kv_a_layernorm": "attn_kv_a_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
    "mlp.shared_experts.gate_proj": "ffn_gate_shexp",
    "mlp.shared_experts.up_proj": "ffn_up_shexp",
    "mlp.shared_experts.down_proj": "ffn_down_shexp",
}
TOP_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
EXPERT_PARTS = {"gate_proj": "ffn_gate_exps", "up_proj": "ffn_up_exps", "down_proj": "ffn_down_exps"}
WHOLE_FLOAT32 = ("ffn_gate_inp.weight", "exp_probs_b.bias")
"""Routers stay in float32, as the converter leaves them."""


class Tensor(NamedTuple):
    """A tensor of the file, read when it is written."""

    name: str
    shape: tuple[int, ...]
    read: Callable[[], Any]


class Checkpoint:
    """The tensors of a safetensors file, mapped; bfloat16 as its bits."""

    def __init__(self, folder: Path) -> None:
        self.config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        self.tokenizer: dict[str, Any] = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        path = folder / "model.safetensors"
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))
        header.pop("__metadata__", None)
        self.entries: dict[str, Any] = header
        self._bytes = np.memmap(path, np.uint8, "r", offset=8 + size)

    def read(self, name: str) -> Any:
        """One tensor's values."""
        entry = self.entries[name]
        start, end = entry["data_offsets"]
        return self._bytes[start:end].view(DTYPES[entry["dtype"]]).reshape(entry["shape"])

    def shape(self, name: str) -> tuple[int, ...]:
        """One tensor's shape."""
        return tuple(self.entries[name]["shape"])


def tensors(checkpoint: Checkpoint) -> Iterator[Tensor]:
    """Every tensor of the file in the checkpoint's order; a layer's experts stand where their first one did."""
    for name in checkpoint.entries:
        if name in TOP_NAMES:
            yield _plain(checkpoint, name, TOP_NAMES[name])
            continue
        layer, _, rest = name.removeprefix("model.layers.").partition(".")
        block, part = f"blk.{layer}.", rest.rpartition(".")[0]
        if ".experts." in rest:
            _, _, number, kind = part.split(".")
            if number == "0":
                yield _stacked(checkpoint, f"model.layers.{layer}.", kind, f"{block}{EXPERT_PARTS[kind]}.weight")
        elif rest == "mlp.gate.e_score_correction_bias":
            yield _plain(checkpoint, name, f"{block}exp_probs_b.bias")
        elif part == "self_attn.kv_b_proj":
            yield from _latent_halves(checkpoint, name, block)
        elif part in ("self_attn.q_proj", "self_attn.k_proj"):
            yield _rotated(checkpoint, name, f"{block}{LAYER_NAMES[part]}.weight")
        else:
            yield _plain(checkpoint, name, f"{block}{LAYER_NAMES[part]}.weight")


def _plain(checkpoint: Checkpoint, name: str, target: str) -> Tensor:
    return Tensor(target, checkpoint.shape(name), lambda: checkpoint.read(name))


def _rotated(checkpoint: Checkpoint, name: str, target: str) -> Tensor:
    """A query or key matrix whose head's halves are interleaved, as llama.cpp rotates neighbours."""
    kind = "num_attention_heads" if ".q_proj." in name else "num_key_value_heads"
    heads, shape = checkpoint.config[kind], checkpoint.shape(name)

    def read() -> Any:
        halves = checkpoint.read(name).reshape(heads, 2, shape[0] // heads // 2, shape[1])
        return halves.swapaxes(1, 2).reshape(shape)

    return Tensor(target, shape, read)


def _stacked(checkpoint: Checkpoint, layer: str, kind: str, target: str) -> Tensor:
    count = checkpoint.config["n_routed_experts"]
    names = [f"{layer}mlp.experts.{number}.{kind}.weight" for number in range(count)]
    return Tensor(target, (count, *checkpoint.shape(names[0])), lambda: np.stack(list(map(checkpoint.read, names))))


def _latent_halves(checkpoint: Checkpoint, name: str, block: str) -> Iterator[Tensor]:
    """What makes keys of latents, transposed so that queries can be folded into it, and what makes values of them."""
    config = checkpoint.config
    heads, key, value = config["num_attention_heads"], config["qk_nope_head_dim"], config["v_head_dim"]
    rank = checkpoint.shape(name)[1]

    def both() -> Any:
        return checkpoint.read(name).reshape(heads, key + value, rank)

    yield Tensor(f"{block}attn_k_b.weight", (heads, rank, key), lambda: both()[:, :key].swapaxes(1, 2))
    yield Tensor(f"{block}attn_v_b.weight", (heads, value, rank), lambda: both()[:, key:])


def architecture(config: dict[str, Any]) -> str:
    """llama.cpp's name of it."""
    return {"llama": "llama", "deepseek": "deepseek", "deepseek_v3": "deepseek2"}[config["model_type"]]


def add_fields(writer: Any, config: dict[str, Any]) -> None:
    """The hyperparameters."""
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(float(config["rope_theta"]))
    writer.add_vocab_size(config["vocab_size"])
    if "kv_lora_rank" in config:
        _add_latents(writer, config)
    else:
        writer.add_head_count_kv(config["num_key_value_heads"])
        writer.add_rope_dimension_count(config["hidden_size"] // config["num_attention_heads"])
    _add_rope_scaling(writer, config.get("rope_scaling"))
    if "n_routed_experts" in config:
        _add_experts(writer, config)


def _add_latents(writer: Any, config: dict[str, Any]) -> None:
    rank, rope = config["kv_lora_rank"], config["qk_rope_head_dim"]
    writer.add_head_count_kv(1)
    writer.add_q_lora_rank(config["q_lora_rank"])
    writer.add_kv_lora_rank(rank)
    writer.add_key_length(rank + rope)
    writer.add_value_length(rank)
    writer.add_key_length_mla(config["qk_nope_head_dim"] + rope)
    writer.add_value_length_mla(config["v_head_dim"])
    writer.add_rope_dimension_count(rope)


def _add_rope_scaling(writer: Any, scaling: dict[str, Any] | None) -> None:
    import gguf

    if not scaling:
        return
    writer.add_rope_scaling_type(gguf.RopeScalingType(scaling["type"]))
    writer.add_rope_scaling_factor(float(scaling["factor"]))
    if scaling["type"] == "yarn":
        writer.add_rope_scaling_orig_ctx_len(scaling["original_max_position_embeddings"])
        writer.add_rope_scaling_yarn_log_mul(0.1 * scaling["mscale_all_dim"])


def _add_experts(writer: Any, config: dict[str, Any]) -> None:
    import gguf

    writer.add_leading_dense_block_count(config["first_k_dense_replace"])
    writer.add_expert_count(config["n_routed_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_expert_shared_count(config["n_shared_experts"])
    writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    writer.add_expert_weights_scale(float(config.get("routed_scaling_factor", 1.0)))
    if config["scoring_func"] == "sigmoid":
        writer.add_expert_weights_norm(config["norm_topk_prob"])
        writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
        writer.add_expert_group_count(config["n_group"])
        writer.add_expert_group_used_count(config["topk_group"])


def add_tokenizer(writer: Any, checkpoint: Checkpoint) -> None:
    """The byte-level tokenizer, filled up to the model's vocabulary."""
    import gguf

    described, config = checkpoint.tokenizer, checkpoint.config
    kinds = dict.fromkeys(described["model"]["vocab"].values(), gguf.TokenType.NORMAL)
    texts = {index: text for text, index in described["model"]["vocab"].items()}
    for added in described["added_tokens"]:
        texts[added["id"]] = added["content"]
        kinds[added["id"]] = gguf.TokenType.CONTROL if added["special"] else gguf.TokenType.USER_DEFINED
    everything = range(config["vocab_size"])
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in described["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([texts.get(index, f"[unused{index}]") for index in everything])
    writer.add_token_types([kinds.get(index, gguf.TokenType.UNUSED) for index in everything])
    writer.add_token_merges(merges)
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])
    writer.add_add_bos_token(False)


def write_plain(checkpoint: Checkpoint, target: Path) -> None:
    """The file in the checkpoint's own dtype, one tensor in memory at a time."""
    import gguf

    writer = gguf.GGUFWriter(target, architecture(checkpoint.config))
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16 if _is_bfloat16(checkpoint) else gguf.LlamaFileType.ALL_F32)
    add_fields(writer, checkpoint.config)
    add_tokenizer(writer, checkpoint)
    listed = list(tensors(checkpoint))
    for tensor in listed:
        kind = gguf.GGMLQuantizationType.BF16 if _stays_bfloat16(checkpoint, tensor) else gguf.GGMLQuantizationType.F32
        size = int(np.prod(tensor.shape)) * (2 if kind == gguf.GGMLQuantizationType.BF16 else 4)
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), size, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in listed:
        values = tensor.read()
        stays = values.dtype == np.float32 or _stays_bfloat16(checkpoint, tensor)
        writer.write_tensor_data(np.ascontiguousarray(values if stays else _as_float32(values)))
    writer.close()


def _is_bfloat16(checkpoint: Checkpoint) -> bool:
    return any(entry["dtype"] == "BF16" for entry in checkpoint.entries.values())


def _stays_bfloat16(checkpoint: Checkpoint, tensor: Tensor) -> bool:
    return _is_bfloat16(checkpoint) and len(tensor.shape) > 1 and not tensor.name.endswith(WHOLE_FLOAT32)


def _as_float32(bits: Any) -> Any:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def quantize(source: Path, target: Path, scheme: str) -> None:
    """A quantized file of a plain one, as llama.cpp's own tool makes it.

    Raises:
        RuntimeError: the library refused.
    """
    import llama_cpp

    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = {"q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0, "q4_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0}[scheme]
    status = llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), params)
    if status:
        raise RuntimeError(f"llama.cpp does not quantize {source} to {scheme}: status {status}")


def main(arguments: list[str] | None = None) -> int:
    """Write one file, whole."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("source", type=Path, help="a checkpoint's folder; with --quantize a GGUF file")
    parser.add_argument("target", type=Path)
    parser.add_argument("--quantize", choices=("q8_0", "q4_0"))
    options = parser.parse_args(arguments)
    part = options.target.with_suffix(".part")
    if options.quantize:
        quantize(options.source, part, options.quantize)
    else:
        write_plain(Checkpoint(options.source), part)
    part.replace(options.target)
    return 0


if __name__ == "__main__":
    sys.exit(main())
