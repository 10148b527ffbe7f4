"""The least that a model's steps cost: bytes that must be moved and operations that must be done.

Closed forms of the hyperparameters, for all ranks of a run together. A step reads each weight that some token of it
meets once, and each sequence's keys and values (or latents) once; it writes those of its own tokens. An operation is a
multiplication or an addition of a matrix product; norms, rotations, activations and sampling count nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from npu_zoo.core.config import EngineConfig
from npu_zoo.core.hardware import ITEMSIZE
from npu_zoo.core.model_config import ModelConfig, padded_vocab_size
from npu_zoo.core.parallel import Split
from npu_zoo.core.quantization import QuantizationConfig
from npu_zoo.planning import Matrix, Workload, attention_matrices, mlp_matrices, moe_matrices, plan_rank

Row = tuple[int, int]
"""A sequence in a step: its tokens in the cache, and its new ones."""


class Work(NamedTuple):
    """Bytes of memory traffic, and multiplications and additions."""

    bytes: int
    operations: int

    def __add__(self, other: object) -> Work:
        """Both, one after the other."""
        if not isinstance(other, Work):
            return NotImplemented
        return Work(self.bytes + other.bytes, self.operations + other.operations)


NO_WORK = Work(0, 0)


class ModelWork:
    """What the steps of one model need.

    Args:
        dtype: the compute dtype.
        quantization: of its linear layers; None where they are plain.
        kv_cache_dtype: ``auto`` or ``int8``.
        device: ``cpu``, ``cuda`` or ``npu``; what an int8 cache keeps beside its codes differs.
    """

    def __init__(
        self,
        config: ModelConfig,
        dtype: str,
        *,
        quantization: QuantizationConfig | None = None,
        kv_cache_dtype: str = "auto",
        device: str = "cpu",
    ) -> None:
        self.config = config
        self._itemsize = ITEMSIZE[dtype]
        self._bits = quantization.weight_bits if quantization else None
        self._group_size = quantization.group_size if quantization else None
        plan = plan_rank(config, dtype, Split(), Workload(1, 1, 1), kv_cache_dtype=kv_cache_dtype, device=device)
        self.cache_per_token = plan.cache_per_token
        self._head = Matrix(padded_vocab_size(config.vocab_size), config.hidden_size, "plain")

    @classmethod
    def of(cls, config: EngineConfig) -> ModelWork:
        """That of a checked request."""
        return cls(
            config.model_config,
            config.dtype,
            quantization=config.quantization_config,
            kv_cache_dtype=config.kv_cache_dtype,
            device=config.device,
        )

    def step(self, rows: Sequence[Row], sampled: int) -> Work:
        """One step.

        Args:
            rows: its sequences.
            sampled: how many of them get a token, which is what the language-model head is for.
        """
        tokens = sum(new for _, new in rows)
        if not tokens:
            return NO_WORK
        weights = sum(self._stored(matrix) * share for matrix, share in self._read(tokens))
        head = self._stored(self._head) if sampled else 0
        embedded = tokens * self.config.hidden_size * self._itemsize
        cached = sum(start + new for start, new in rows) * self.cache_per_token
        products = 2 * tokens * self._multiplied() + 2 * sampled * self._head.values
        attention = sum(self._attention(start, new) for start, new in rows)
        return Work(int(weights) + head + embedded + cached, products + attention)

    def prefill(self, lengths: Sequence[int], cached: int = 0) -> Work:
        """Prompts in a single step, up to their first tokens.

        Args:
            lengths: of the prompts.
            cached: tokens of each that are in the cache already.
        """
        return self.step([(cached, length - cached) for length in lengths], len(lengths))

    def decode(self, contexts: Sequence[int], steps: int) -> Work:
        """As many steps of sequences that have so many tokens in the cache before the first of them."""
        works = (self.step([(context + number, 1) for context in contexts], len(contexts)) for number in range(steps))
        return total(works)

    def _stored(self, matrix: Matrix) -> int:
        return matrix.stored(self._itemsize, self._bits, self._group_size)

    def _layers(self) -> Iterator[tuple[Matrix, bool]]:
        """Every layer's matrices and norms with the last norm, and whether they are routed experts."""
        config, split = self.config, Split()
        yield Matrix(1, config.hidden_size, "plain"), False
        for layer in range(config.num_hidden_layers):
            yield from ((Matrix(1, config.hidden_size, "plain"), False) for _ in ("attention", "feed-forward"))
            yield from ((matrix, False) for matrix in attention_matrices(config, split.tp))
            moe = config.moe
            if moe is not None and moe.has_experts(layer):
                experts = moe.n_routed_experts
                yield from ((m, m.count == experts > 1) for m in moe_matrices(config.hidden_size, moe, split))
            else:
                yield from ((m, False) for m in mlp_matrices(config.hidden_size, config.intermediate_size))

    def _read(self, tokens: int) -> Iterator[tuple[Matrix, float]]:
        """Matrices, with the share of each that a step of so many tokens reads."""
        share = self._experts_hit(tokens)
        yield from ((matrix, share if routed else 1.0) for matrix, routed in self._layers())

    def _experts_hit(self, tokens: int) -> float:
        """The share of the routed experts that some token goes to, on average, when each is as likely as another."""
        moe = self.config.moe
        return 1.0 if moe is None else 1 - (1 - moe.num_experts_per_tok / moe.n_routed_experts) ** tokens

    def _multiplied(self) -> int:
        """Weights of all layers that one token is multiplied with; of latent attention without what expands latents."""
        moe = self.config.moe
        share = moe.num_experts_per_tok / moe.n_routed_experts if moe else 1.0
        products = ((matrix, routed) for matrix, routed in self._layers() if matrix.rows > 1)  # a norm has one row
        values = sum(matrix.values * (share if routed else 1.0) for matrix, routed in products)
        return round(values) - self.config.num_hidden_layers * self._expansion()

    def _expansion(self) -> int:
        """Weights of one layer that make all heads' keys and values of a latent."""
        config, mla = self.config, self.config.mla
        return config.num_attention_heads * (mla.qk_nope_head_dim + mla.v_head_dim) * mla.kv_lora_rank if mla else 0

    def _attention(self, start: int, new: int) -> int:
        """Operations of ``new`` queries, each of which meets all tokens up to its own, in all layers.

        Latents are met as they are or expanded first, whichever is less (arXiv:2405.04434, section 2.1).
        """
        config, mla, heads = self.config, self.config.mla, self.config.num_attention_heads
        met = new * start + new * (new + 1) // 2
        if mla is None:
            return 2 * config.num_hidden_layers * heads * 2 * config.head_dim * met
        absorbed = new * self._expansion() + heads * (mla.cache_dim + mla.kv_lora_rank) * met
        expanded = (start + new) * self._expansion() + heads * (mla.qk_head_dim + mla.v_head_dim) * met
        return 2 * config.num_hidden_layers * min(absorbed, expanded)


def total(works: Iterable[Work]) -> Work:
    """All of them, one after the other."""
    return sum(works, NO_WORK)
