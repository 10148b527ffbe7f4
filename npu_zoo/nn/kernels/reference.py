"""Every operation in plain torch: the oracle that each other kernel is tested against, and the fallback.

A kernel has the signature of the function or class of the same name here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from npu_zoo.nn.kernels.quantized import QuantizedWeight, pack_nibbles, unpack_nibbles
from npu_zoo.nn.kernels.recording import depends_on_values
from npu_zoo.nn.kernels.table import Product, Stored
from npu_zoo.nn.routing import BEST_OF_GROUP, Routing


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm (arXiv:1910.07467), in float32, rounded before the weight as transformers does.

    Args:
        x: [..., hidden].
        weight: [hidden].
    """
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * wide.to(x.dtype)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The norm of ``x + residual``, and the sum, which is the next residual. Shapes as in :func:`rms_norm`."""
    total = x + residual
    return rms_norm(total, weight, eps), total


def rotary_embedding(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate queries and keys by position, first half against second half (arXiv:2104.09864, the NeoX layout).

    Args:
        query: [T, num_heads, head_dim].
        key: [T, num_kv_heads, head_dim].
        cos, sin: [T, head_dim / 2], in the dtype of the query.
    """
    return _rotate(query, cos, sin), _rotate(key, cos, sin)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def interleaved_rotary_embedding(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn [T, heads, D] queries or keys whose pairs are stored together: values 2i and 2i + 1 (the GPT-J layout).

    The result is in halves, which a product of query and key does not see.
    """
    return _rotate(_in_halves(x), cos, sin)


def _in_halves(x: Tensor) -> Tensor:
    return torch.cat((x[..., 0::2], x[..., 1::2]), dim=-1)


def head_linear(x: Tensor, weight: Tensor) -> Tensor:
    """A product with a matrix of each head's own.

    Args:
        x: [T, num_heads, in].
        weight: [num_heads, in, out].

    Returns:
        [T, num_heads, out].
    """
    return torch.einsum("thi,hio->tho", x, weight)


def silu_and_mul(x: Tensor) -> Tensor:
    """SwiGLU's activation: ``silu(first half) * second half`` of [..., 2 * d], giving [..., d]."""
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


class Linear:
    """``x @ weight.T``, in two steps, so that a kernel can keep the weight in a layout of its own."""

    @staticmethod
    def packs(dtype: torch.dtype) -> bool:
        """Whether :meth:`pack` gives another layout than it is given."""
        return False

    @staticmethod
    def pack(weight: Tensor) -> Tensor:
        """The stored form of a [out, in] weight; called once, after loading. May return the weight itself."""
        return weight

    @staticmethod
    def apply(x: Tensor, packed: Tensor) -> Tensor:
        """[..., in] times the packed [out, in] weight, giving [..., out]."""
        return F.linear(x, packed)


@dataclass(frozen=True)
class StoredCodes:
    """A quantized weight in as many bits as it has; codes of 4 bits stand two to a byte.

    Attributes:
        codes: [out, in] int8, or [out, ceil(in / 2)] uint8.
        scale: [out, groups], float32.
        in_features: codes of a row.
    """

    codes: Tensor
    scale: Tensor
    in_features: int

    def block(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Some output channels' codes as int8 [rows, groups, group_size], and their scales [rows, groups, 1]."""
        codes, scale = self.codes[start:stop], self.scale[start:stop]
        if codes.dtype is torch.uint8:
            codes = unpack_nibbles(codes, self.in_features)
        return codes.reshape(len(codes), scale.shape[1], -1), scale.unsqueeze(-1)


def store_codes(weight: QuantizedWeight) -> StoredCodes:
    """A copy of a quantized weight in as many bits as it has."""
    codes = pack_nibbles(weight.codes) if weight.bits == 4 else weight.codes.clone()
    return StoredCodes(codes, weight.scale.clone(), weight.codes.shape[1])


class DequantizedLinear:
    """``x @ (codes * scale).T``, the weight dequantized block by block, so that no whole copy of it ever exists."""

    pack = staticmethod(store_codes)

    @staticmethod
    def apply(x: Tensor, packed: StoredCodes) -> Tensor:
        """[..., in] to [..., out]; the weight is rounded once, to the dtype of ``x``."""
        outputs = []
        for start, stop in blocks_of(len(packed.scale), packed.in_features):
            codes, scale = packed.block(start, stop)
            outputs.append(F.linear(x, (codes * scale).to(x.dtype).flatten(1)))
        return torch.cat(outputs, -1)


def blocks_of(out_features: int, in_features: int, least: int = 64) -> list[tuple[int, int]]:
    """Ranges of output channels whose dequantized weights stay in a core's cache; each has so many at least."""
    size = max(least, _BLOCK_VALUES // in_features)
    return [(start, min(start + size, out_features)) for start in range(0, out_features, size)]


_BLOCK_VALUES = 1 << 20


def quantize_tokens(x: Tensor) -> tuple[Tensor, Tensor]:
    """Int8 codes of each row, as whole numbers in float32, and a float32 scale per row [..., 1]: ``max|x| / 127``."""
    wide = x.float()
    scale = wide.abs().amax(-1, keepdim=True) / 127
    scale = torch.where(scale == 0, 1.0, scale)
    return (wide / scale).round_(), scale


class Int8Linear:
    """w8a8: each token's activations become int8 codes too; sums of products of codes are exact, then scaled."""

    pack = staticmethod(store_codes)

    @staticmethod
    def apply(x: Tensor, packed: StoredCodes) -> Tensor:
        """[..., in] to [..., out]."""
        tokens, token_scale = quantize_tokens(x)
        parts = torch.split(tokens, _EXACT_INPUTS, -1)
        outputs = []
        for start, stop in blocks_of(len(packed.scale), packed.in_features):
            weights = torch.split(packed.codes[start:stop], _EXACT_INPUTS, -1)
            sums = sum(F.linear(part, weight.float()) for part, weight in zip(parts, weights, strict=True))
            outputs.append(sums * packed.scale[start:stop, 0])
        return (torch.cat(outputs, -1) * token_scale).to(x.dtype)


_EXACT_INPUTS = 1024
"""Products of int8 codes whose sum float32 holds exactly, since 1024 * 127 * 128 is below 2 ** 24."""


def route_tokens(logits: Tensor, bias: Tensor | None, routing: Routing) -> tuple[Tensor, Tensor]:
    """Each token's experts, the best first, and their weights.

    Args:
        logits: [T, num_experts], float32.
        bias: [num_experts], float32, where the routing has one.

    Returns:
        weights: [T, top_k], float32.
        ids: [T, top_k], int64.
    """
    scores = logits.softmax(-1) if routing.scoring == "softmax" else logits.sigmoid()
    choice = scores if bias is None else scores + bias
    if routing.limits_groups:
        choice = _best_groups(choice, routing)
    ids = choice.topk(routing.top_k, dim=-1).indices
    weights = scores.gather(1, ids)
    if routing.renormalize:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return weights * routing.scaling_factor, ids


def _best_groups(choice: Tensor, routing: Routing) -> Tensor:
    """The [T, num_experts] values with minus infinity in the groups that a token does not reach."""
    groups = choice.reshape(len(choice), routing.n_group, -1)  # [T, n_group, experts of a group]
    best = groups.topk(BEST_OF_GROUP, dim=-1).values.sum(-1) if routing.has_bias else groups.amax(-1)
    dropped = torch.ones_like(best, dtype=torch.bool)
    dropped.scatter_(1, best.topk(routing.topk_group, dim=-1).indices, False)
    reached: Tensor = groups.masked_fill(dropped.unsqueeze(-1), float("-inf"))
    return reached.flatten(1)


def experts(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    gate_up: Sequence[Stored],
    down: Sequence[Stored],
    linear: Product,
    silu_and_mul: Callable[[Tensor], Tensor],
    elsewhere: bool = False,
) -> Tensor:
    """Each token's experts, SwiGLU feed-forwards all, added up by their weights in float32 and rounded once.

    An expert that no token goes to is not computed.

    Args:
        x: [T, hidden].
        ids, weights: [T, top_k], as :func:`route_tokens` gives them; no token has an expert twice.
        gate_up, down: of each expert, its [2 * intermediate, hidden] and [hidden, intermediate] weights as ``linear``
            packs them.
        elsewhere: whether ids may be the number of these experts, which stands for those of other ranks.

    Returns:
        [T, hidden], in the dtype of ``x``.
    """
    depends_on_values()
    total = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for expert in sorted(set(ids.flatten().tolist()) - ({len(gate_up)} if elsewhere else set())):
        tokens, slots = torch.where(ids == expert)
        output = linear.apply(silu_and_mul(linear.apply(x[tokens], gate_up[expert])), down[expert])
        total[tokens] += output.float() * weights[tokens, slots].unsqueeze(1)
    return total.to(x.dtype)


def top_k_top_p(logits: Tensor, top_k: Sequence[int], top_p: Sequence[float]) -> Tensor:
    """Float32 logits [N, vocab_size] with minus infinity where a row's ``top_k``, then its ``top_p`` cuts.

    Args:
        top_k: how many of the most likely tokens a row keeps; 0 keeps all.
        top_p: the total probability that it keeps of those, the best always; 1 keeps all.
    """
    size = logits.shape[1]
    ordered = logits.sort(-1, descending=True).values
    kept = torch.tensor([k or size for k in top_k], device=logits.device)
    ordered = ordered.masked_fill(torch.arange(size, device=logits.device) >= kept.unsqueeze(1), float("-inf"))
    probabilities = torch.softmax(ordered, -1)
    before = probabilities.cumsum(-1) - probabilities
    # Rounded sums reach 1 before the last token; a row without top_p must lose none of them to another row's.
    shares = [p if p < 1.0 else float("inf") for p in top_p]
    nucleus = before < torch.tensor(shares, device=logits.device).unsqueeze(1)
    nucleus &= ordered > float("-inf")
    nucleus[:, 0] = True
    smallest = ordered.masked_fill(~nucleus, float("inf")).amin(-1, keepdim=True)
    return logits.masked_fill(logits < smallest, float("-inf"))
