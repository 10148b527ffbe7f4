"""Kernels of torch_npu's fused operators. Signatures are those of :mod:`npu_zoo.nn.kernels.reference`.

One call is one operator launch where nothing else is said. Sources: the operators' pages in Ascend/op-plugin, and how
vllm-ascend calls them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
import torch_npu
from torch import Tensor

from npu_zoo.nn.kernels import reference
from npu_zoo.nn.kernels.reference import Linear
from npu_zoo.nn.kernels.table import Product
from npu_zoo.nn.routing import Routing

FRACTAL_NZ = 29
_MOST_KEPT = 1024
"""The largest k that npu_top_k_top_p takes."""


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See :func:`reference.rms_norm`; rounded once, after the weight."""
    normed: Tensor = torch_npu.npu_rms_norm(x, weight, eps)[0]
    return normed


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """See :func:`reference.add_rms_norm`."""
    normed, _, total = torch_npu.npu_add_rms_norm(x, residual, weight, eps)
    return normed, total


def silu_and_mul(x: Tensor) -> Tensor:
    """See :func:`reference.silu_and_mul`."""
    activated: Tensor = torch_npu.npu_swiglu(x)
    return activated


def head_linear(x: Tensor, weight: Tensor) -> Tensor:
    """See :func:`reference.head_linear`; the permutations are the operator's own."""
    product: Tensor = torch_npu.npu_transpose_batchmatmul(x, weight, perm_x1=[1, 0, 2], perm_y=[1, 0, 2])
    return product


def _whole_tables(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """[P, D / 2] tables as the operators take them, [P, D]."""
    return torch.cat((cos, cos), -1), torch.cat((sin, sin), -1)


class RotaryEmbedding:
    """See :func:`reference.rotary_embedding`: queries and keys turned by one operator, each row by its angles."""

    tables = staticmethod(_whole_tables)

    def __call__(self, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Rotate [T, heads, D] by [T, D] tables."""
        angles = cos[None, :, None], sin[None, :, None]
        turned = torch_npu.npu_apply_rotary_pos_emb(query[None], key[None], *angles, layout="BSND")
        return turned[0][0], turned[1][0]


class InterleavedRotaryEmbedding:
    """See :func:`reference.interleaved_rotary_embedding`; a slice is copied first."""

    tables = staticmethod(_whole_tables)

    def __call__(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rotate [T, heads, 64] by [T, 64] tables."""
        turned: Tensor = torch_npu.npu_interleave_rope(
            x.unsqueeze(2).contiguous(), cos[:, None, None], sin[:, None, None]
        )
        return turned.squeeze(2)


rotary_embedding = RotaryEmbedding()
interleaved_rotary_embedding = InterleavedRotaryEmbedding()


class PartsLinear(Linear):
    """See :class:`reference.Linear`; parts of a stacked weight come from one grouped product, each contiguous.

    Slices of one product would have to be copied, since the operators after it take contiguous tensors alone.
    """

    @staticmethod
    def apply_parts(x: Tensor, packed: Tensor, rows: tuple[int, ...]) -> tuple[Tensor, ...]:
        """[T, in] to [T, rows] of each part."""
        weights = [part.t() for part in torch.split(packed, list(rows))]
        return tuple(torch_npu.npu_grouped_matmul(x=[x] * len(rows), weight=weights, split_item=0, group_type=-1))


class FractalLinear:
    """See :class:`reference.Linear`; the weight in FRACTAL_NZ, the only layout that 310P multiplies fast."""

    @staticmethod
    def packs(dtype: torch.dtype) -> bool:
        """Float32 has no such layout."""
        return dtype is torch.float16

    @staticmethod
    def pack(weight: Tensor) -> Tensor:
        """A copy of the [out, in] weight in that layout."""
        if 1 in weight.shape:
            return weight
        torch.npu.config.allow_internal_format = True  # type: ignore[attr-defined]
        packed: Tensor = torch_npu.npu_format_cast(weight, FRACTAL_NZ)
        return packed

    @staticmethod
    def apply(x: Tensor, packed: Tensor) -> Tensor:
        """[..., in] to [..., out]."""
        return F.linear(x, packed)


def route_tokens(logits: Tensor, bias: Tensor | None, routing: Routing) -> tuple[Tensor, Tensor]:
    """See :func:`reference.route_tokens`; ids are int32. Softmax that is renormalised takes two launches more."""
    weights, ids, _ = torch_npu.npu_moe_gating_top_k(
        logits,
        k=routing.top_k,
        bias=bias,
        k_group=routing.topk_group if routing.limits_groups else 1,
        group_count=routing.n_group if routing.limits_groups else 1,
        group_select_mode=1 if routing.has_bias else 0,
        renorm=0,
        norm_type=0 if routing.scoring == "softmax" else 1,
        routed_scaling_factor=routing.scaling_factor,
        eps=1e-20,
    )
    if routing.scoring == "softmax" and routing.renormalize:
        weights = weights * (routing.scaling_factor / weights.sum(-1, keepdim=True))
    return weights, ids


class Experts:
    """See :func:`reference.experts`: four launches and the activation, for any number of tokens and experts."""

    @staticmethod
    def stack(weights: Sequence[Tensor]) -> Tensor:
        """Experts' [out, in] weights as one [E, in, out], which the operator takes."""
        return torch.stack([weight.t() for weight in weights])

    def __call__(
        self,
        x: Tensor,
        ids: Tensor,
        weights: Tensor,
        gate_up: Sequence[Tensor] | Tensor,
        down: Sequence[Tensor] | Tensor,
        linear: Product,
        silu_and_mul: Callable[[Tensor], Tensor],
        elsewhere: bool = False,
    ) -> Tensor:
        """[T, hidden] to [T, hidden], the experts' weights stacked."""
        if not isinstance(gate_up, Tensor) or not isinstance(down, Tensor):
            gate_up, down = self.stack(list(gate_up)), self.stack(list(down))
        rows, places, counts = sort_by_expert(x, ids, len(gate_up), elsewhere=elsewhere)
        hidden = silu_and_mul(_grouped(rows, gate_up, counts))
        outputs = _grouped(hidden, down, counts)
        if elsewhere:
            return combine_held(outputs, places, counts, weights.masked_fill(ids == len(gate_up), 0))
        return combine(outputs, places, weights)


def sort_by_expert(x: Tensor, ids: Tensor, num_experts: int, *, elsewhere: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens [T, hidden] once per expert of theirs, sorted by expert.

    Args:
        ids: [T, top_k], from 0 to ``num_experts``, which stands for experts of other ranks where ``elsewhere`` is set.

    Returns:
        [T * top_k, hidden] rows, of which only those of the experts here have content; where each token's rows stand,
        with -1 for those of other ranks; and how many rows each expert has.
    """
    rows, places, counts, _ = torch_npu.npu_moe_init_routing_v2(
        x,
        ids.int(),
        active_num=len(x) * ids.shape[1],
        expert_num=num_experts + elsewhere,
        expert_tokens_num_type=1,
        expert_tokens_num_flag=True,
        active_expert_range=[0, num_experts],
        quant_mode=-1,
    )
    return rows, places, counts


def combine(outputs: Tensor, places: Tensor, weights: Tensor) -> Tensor:
    """[T, hidden]: each token's rows by its weights."""
    combined: Tensor = torch_npu.npu_moe_token_unpermute(outputs, places, probs=weights.to(outputs.dtype))
    return combined


def combine_held(outputs: Tensor, places: Tensor, counts: Tensor, weights: Tensor) -> Tensor:
    """The same where other ranks hold some of the experts, whose weights are 0 and whose rows have no content."""
    filled = torch.arange(len(outputs), device=outputs.device) < counts.sum()
    return combine(outputs.where(filled.unsqueeze(1), 0), places.abs(), weights)


def _grouped(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    product: Tensor = torch_npu.npu_grouped_matmul(
        x=[x], weight=[weight], split_item=2, group_type=0, group_list_type=1, group_list=counts
    )[0]
    return product


experts = Experts()


def top_k_top_p(logits: Tensor, top_k: Sequence[int], top_p: Sequence[float]) -> Tensor:
    """See :func:`reference.top_k_top_p`; one launch, where every row has a k of at most 1024 or none has one."""
    if any(top_k) and not all(0 < k <= _MOST_KEPT for k in top_k):
        return reference.top_k_top_p(logits, top_k, top_p)
    shares = torch.tensor(top_p, dtype=logits.dtype).to(logits.device)
    kept = torch.tensor(top_k, dtype=torch.int32).to(logits.device) if any(top_k) else None
    cut: Tensor = torch_npu.npu_top_k_top_p(logits, shares, kept)
    return cut
