"""What a run takes of a device's memory, rank by rank, as closed forms of the hyperparameters: no device, no torch.

Weights and cache are exact for what the engine stores. Activations are an estimate of the peak of one step, made of the
tensors that live at once in the largest of its stages; an engine on a device measures that peak instead.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from npu_zoo.core.config import DEFAULT_MAX_NUM_BATCHED_TOKENS, DEFAULT_MAX_NUM_SEQS
from npu_zoo.core.hardware import ITEMSIZE
from npu_zoo.core.model_config import MLAConfig, ModelConfig, MoEConfig, padded_vocab_size
from npu_zoo.core.parallel import Split, stage_layers

_FLOAT32 = 4
_CPU_ROW_TOKENS = 64
"""Tokens of a row of int8 keys on a CPU, which has a scale and a shift of its own."""

_SAMPLED_BYTES = 40
"""Bytes per token of the vocabulary and row that sampling with top_p keeps at once (float32 and float64 copies)."""


@dataclass(frozen=True)
class Workload:
    """What an engine keeps at once: sequences, tokens of a step, the longest sequence, and a sequence's drafts."""

    max_model_len: int
    max_num_seqs: int = DEFAULT_MAX_NUM_SEQS
    max_num_batched_tokens: int = DEFAULT_MAX_NUM_BATCHED_TOKENS
    num_drafts: int = 0


@dataclass(frozen=True)
class RankPlan:
    """Bytes of the rank that takes most.

    Attributes:
        weights: as the engine stores them.
        activations: the estimated peak of one step.
        cache_per_token: keys and values, or latents, of one token in all of the rank's layers. Each replica of the
            attention has a cache of its own.
    """

    weights: int
    activations: int
    cache_per_token: int

    def cache_tokens(self, memory: int, share: float) -> int:
        """Tokens whose keys and values fit into a share of what weights and activations leave; 0 where those do not."""
        return max(0, int((memory - self.weights - self.activations) * share)) // self.cache_per_token

    def largest_batch(self, memory: int, share: float, length: int) -> int:
        """Sequences of a length that fit at once."""
        return self.cache_tokens(memory, share) // length


@dataclass(frozen=True)
class Matrix:
    """``count`` weights of [rows, columns]; ``kind`` says how they are stored."""

    rows: int
    columns: int
    kind: str = "linear"  # linear: may be quantized; plain: the compute dtype; float32
    count: int = 1

    @property
    def values(self) -> int:
        """Of all of them."""
        return self.rows * self.columns * self.count

    def stored(self, itemsize: int, bits: int | None, group_size: int | None) -> int:
        """Bytes that they take.

        Args:
            bits: of a code where linear layers are quantized; None where they are plain.
            group_size: inputs that share a scale; None where there is one per output channel.
        """
        values = self.values
        if self.kind == "float32":
            return values * _FLOAT32
        if bits is None or self.kind != "linear":
            return values * itemsize
        groups = _ceil(self.columns, group_size or self.columns)
        return values * bits // 8 + self.rows * groups * self.count * itemsize  # codes and scales


def plan_rank(
    config: ModelConfig,
    dtype: str,
    split: Split,
    workload: Workload,
    *,
    weight_bits: int | None = None,
    group_size: int | None = None,
    kv_cache_dtype: str = "auto",
    device: str = "npu",
    mtp: bool = False,
) -> RankPlan:
    """The plan of the rank that takes most memory.

    Args:
        dtype: the compute dtype.
        device: ``cpu``, ``cuda`` or ``npu``; what an int8 cache keeps beside its codes differs.
        weight_bits: of a code of a quantized weight; None where weights are plain.
        group_size: inputs that share a quantized weight's scale; None where there is one per output channel.
        mtp: whether the last stage has one layer more, which predicts further tokens.
    """
    itemsize = ITEMSIZE[dtype]
    stages = stage_layers(config.num_hidden_layers, split.pp)
    weights = max(
        sum(matrix.stored(itemsize, weight_bits, group_size) for matrix in matrices)
        for matrices in (_stage_matrices(config, stages, number, split, mtp=mtp) for number in range(split.pp))
    )
    per_token = _token_bytes(config, split.tp, itemsize, kv_cache_dtype, device)
    reads_back = kv_cache_dtype == "int8" and device == "npu"
    # Hidden states of a step that the further layer has not seen, of the next one, and its two inputs side by side.
    waiting = 4 * workload.max_num_batched_tokens * config.hidden_size * itemsize if mtp else 0
    restored = _restored_bytes(config, split.tp, itemsize, workload) if reads_back else 0
    return RankPlan(
        weights=weights,
        activations=_activations(config, itemsize, split, workload, restored) + waiting,
        cache_per_token=max(*map(len, stages), len(stages[-1]) + mtp) * per_token,
    )


def _stage_matrices(
    config: ModelConfig, stages: list[range], number: int, split: Split, *, mtp: bool
) -> Iterator[Matrix]:
    hidden, share = config.hidden_size, _vocab_share(config, split.tp)
    last = number == len(stages) - 1
    if number == 0 or (last and config.tie_word_embeddings):
        yield Matrix(share, hidden, "plain")
    if last:
        yield Matrix(1, hidden, "plain")
        if not config.tie_word_embeddings:
            yield Matrix(share, hidden, "plain")
    for layer in stages[number]:
        yield from _layer_matrices(config, layer, split)
    if last and mtp:
        yield Matrix(3, hidden, "plain")  # the norms of its two inputs and of its output
        yield Matrix(hidden, 2 * hidden, "plain")
        yield from _layer_matrices(config, config.num_hidden_layers, split)


def _layer_matrices(config: ModelConfig, layer: int, split: Split) -> Iterator[Matrix]:
    hidden, moe = config.hidden_size, config.moe
    yield Matrix(2, hidden, "plain")  # its norms
    yield from attention_matrices(config, split.tp)
    if moe is not None and moe.has_experts(layer):
        yield from moe_matrices(hidden, moe, split)
    else:
        yield from mlp_matrices(hidden, _ceil(config.intermediate_size, split.tp))


def attention_matrices(config: ModelConfig, tp: int) -> Iterator[Matrix]:
    """A rank's share of one layer's attention."""
    hidden, heads, mla = config.hidden_size, _ceil(config.num_attention_heads, tp), config.mla
    if mla is None:
        key_value = 2 * _kv_heads(config, tp) * config.head_dim
        yield Matrix(heads * config.head_dim + key_value, hidden)
        yield Matrix(hidden, heads * config.head_dim)
        return
    if mla.q_lora_rank:
        yield Matrix(mla.q_lora_rank, hidden)
        yield Matrix(1, mla.q_lora_rank, "plain")
    yield Matrix(heads * mla.qk_head_dim, mla.q_lora_rank or hidden)
    yield Matrix(mla.cache_dim, hidden)
    yield Matrix(1, mla.kv_lora_rank, "plain")
    # Kept as two stacks of matrices by head, in the compute dtype whatever the rest is stored as.
    yield Matrix(heads * (mla.qk_nope_head_dim + mla.v_head_dim), mla.kv_lora_rank, "plain")
    yield Matrix(hidden, heads * mla.v_head_dim)


def moe_matrices(hidden: int, moe: MoEConfig, split: Split) -> Iterator[Matrix]:
    """A rank's share of a layer's router, routed experts (with their ``count``) and shared experts, in this order."""
    experts = _ceil(moe.n_routed_experts, split.ep)
    width = _ceil(moe.moe_intermediate_size, split.moe_tp)
    yield Matrix(moe.n_routed_experts, hidden + (moe.topk_method == "noaux_tc"), "float32")
    yield Matrix(2 * width, hidden, count=experts)
    yield Matrix(hidden, width, count=experts)
    if moe.n_shared_experts:
        yield from mlp_matrices(hidden, _ceil(moe.n_shared_experts * moe.moe_intermediate_size, split.tp))


def mlp_matrices(hidden: int, width: int) -> Iterator[Matrix]:
    """A dense feed-forward of a width."""
    yield Matrix(2 * width, hidden)
    yield Matrix(hidden, width)


def _activations(config: ModelConfig, itemsize: int, split: Split, workload: Workload, restored: int) -> int:
    """The peak of a step: the residual stream and what the largest stage of a layer, or the choice of tokens, adds.

    A step has as many tokens for each replica of the attention.
    """
    tokens = workload.max_num_batched_tokens
    # The stream and a layer's input, each before and after a norm, and the rotation of the step and of all positions.
    rotated = config.mla.qk_rope_head_dim if config.mla else config.head_dim
    stream = (4 * tokens * config.hidden_size + 2 * rotated * (tokens + workload.max_model_len)) * itemsize
    stages = [
        _attention_values(config, split.tp, tokens, workload.max_model_len) * itemsize + restored,
        tokens * 3 * _ceil(config.intermediate_size, split.tp) * itemsize,
    ]
    if config.moe is not None:
        stages.append(_moe_bytes(config.hidden_size, config.moe, split, tokens * split.dp, itemsize))
    logits = workload.max_num_seqs * (1 + workload.num_drafts) * config.vocab_size
    return max(stream + max(stages), logits * _SAMPLED_BYTES + stream)


def _attention_values(config: ModelConfig, tp: int, tokens: int, longest: int) -> int:
    heads, mla = _ceil(config.num_attention_heads, tp), config.mla
    if mla is None:
        per_token = (2 * heads + 2 * _kv_heads(config, tp)) * config.head_dim
        return tokens * per_token
    per_token = heads * (2 * mla.qk_head_dim + mla.v_head_dim) + (mla.q_lora_rank or 0) + mla.cache_dim
    # A chunk expands the latents of its whole context, and its operator takes copies of them.
    expanded = heads * (2 * (mla.qk_nope_head_dim + mla.v_head_dim) + mla.qk_rope_head_dim)
    return tokens * per_token + max(tokens, longest) * (mla.cache_dim + expanded)


def _moe_bytes(hidden: int, moe: MoEConfig, split: Split, tokens: int, itemsize: int) -> int:
    width = _ceil(moe.moe_intermediate_size, split.moe_tp)
    rows = tokens * moe.num_experts_per_tok  # all of a step's, should they choose this rank's experts
    routed = rows * (width + max(hidden + 2 * width, 2 * hidden)) * itemsize
    # All replicas' tokens together, and their sum before each replica gets its own back.
    gathered = 2 * tokens * hidden * itemsize if split.dp > 1 else 0
    return gathered + routed + tokens * (hidden + moe.n_routed_experts) * _FLOAT32


def _token_bytes(config: ModelConfig, tp: int, itemsize: int, kv_cache_dtype: str, device: str) -> int:
    """What a token takes in the cache of one layer."""
    mla: MLAConfig | None = config.mla
    if mla:
        return mla.cache_dim * (itemsize if kv_cache_dtype == "auto" else ITEMSIZE[kv_cache_dtype])
    per_head = 2 * config.head_dim * itemsize if kv_cache_dtype == "auto" else _int8_bytes(config.head_dim, device)
    return _kv_heads(config, tp) * per_head


def _int8_bytes(head_dim: int, device: str) -> int:
    """Codes of a key and a value and their scales; on a CPU each row's shift too, which plain torch sums rows with."""
    scales = 2 * _FLOAT32
    if device != "cpu":
        return 2 * head_dim + scales
    shift, key_rows = _FLOAT32, _ceil(head_dim * 2 * _FLOAT32, _CPU_ROW_TOKENS)
    return 2 * head_dim + scales + shift + key_rows


def _restored_bytes(config: ModelConfig, tp: int, itemsize: int, workload: Workload) -> int:
    """A chunk's context, read back from int8: keys and values, and one of them in float32 meanwhile."""
    context = max(workload.max_num_batched_tokens, workload.max_model_len)
    return context * _kv_heads(config, tp) * config.head_dim * (2 * itemsize + _FLOAT32)


def _kv_heads(config: ModelConfig, tp: int) -> int:
    return max(1, config.num_key_value_heads // tp)


def _vocab_share(config: ModelConfig, tp: int) -> int:
    return _ceil(padded_vocab_size(config.vocab_size), tp)


def _ceil(value: int, parts: int) -> int:
    return -(-value // parts)
