"""Calls of the attention operators: names and pages of the fused one, and what shapes and lengths tell."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from npu_zoo.simulator.rules.detect import shape
from npu_zoo.simulator.rules.table import Call, on

FUSED_V1 = ("npu::npu_fused_infer_attention_score",)
FUSED_V2 = ("npu::npu_fused_infer_attention_score_v2",)
FUSED = FUSED_V1 + FUSED_V2
PAGE = "op-plugin, torch_npu-npu_fused_infer_attention_score.md"
PAGE_V2 = "op-plugin, torch_npu-npu_fused_infer_attention_score_v2.md"
ONLY_910B = on("ascend910b")
PACKED_LAYOUTS = ("TND", "TND_NTD", "NTD_TND", "NTD")
_COMPRESSED = ((2048, 2048), (1, 2048, 2048), (1, 1, 2048, 2048))


class CallSizes:
    """The sizes of a call of fused attention, read by its layout; None where a size is not in the shapes."""

    def __init__(self, call: Call) -> None:
        query = call["query"]
        self.layout: str = call["input_layout"]
        self.heads: int = argument(call, "num_heads", "num_query_heads")
        self.kv_heads: int = call["num_key_value_heads"] or self.heads
        inner = self.layout.partition("_")[0]
        axes: dict[str, int] = dict(zip(inner, query.shape, strict=True)) if query.dim() == len(inner) else {}
        self.fits = query.dim() == len(inner)
        self.batch: int | None = axes.get("B")
        self.length: int | None = axes.get("S")
        self.query_heads: int | None = axes.get("N")
        hidden = axes.get("H")
        self.dim: int | None = axes["D"] if "D" in axes else hidden // self.heads if hidden and self.heads else None
        self.packed = self.layout in PACKED_LAYOUTS
        self.paged = call.get("block_table") is not None
        self.rope = call.get("query_rope") is not None
        self.decode = self.length == 1


def sizes_of(call: Call) -> CallSizes:
    """A call's sizes, read once."""
    if "attention" not in call.notes:
        call.notes["attention"] = CallSizes(call)
    sizes: CallSizes = call.notes["attention"]
    return sizes


def argument(call: Call, *names: str) -> Any:
    """The first argument of these names, which differ between the operators' versions; None without one."""
    return next((call[name] for name in names if name in call.arguments), None)


def query_lengths(call: Call) -> Sequence[int] | None:
    """The lengths of queries: in packed layouts where each ends."""
    lengths: Sequence[int] | None = argument(call, "actual_seq_lengths", "actual_seq_qlen")
    return lengths


def key_lengths(call: Call) -> Sequence[int] | None:
    """The lengths of keys, as those of queries; in pages each one's own."""
    lengths: Sequence[int] | None = argument(call, "actual_seq_lengths_kv", "actual_seq_kvlen")
    return lengths


def is_latent(call: Call) -> bool:
    """Whether it is attention over latents (MLA), whose heads are wider than any other."""
    sizes = sizes_of(call)
    return sizes.rope and sizes.dim == 512


def uneven_groups(call: Call) -> str | None:
    """Heads that the key heads do not divide, or that are too many for each."""
    sizes = sizes_of(call)
    if sizes.heads % sizes.kv_heads:
        return f"{sizes.heads} heads are not divisible by {sizes.kv_heads} key heads"
    if sizes.heads // sizes.kv_heads > 64 and not is_latent(call):
        return f"{sizes.heads} heads are {sizes.heads // sizes.kv_heads} times {sizes.kv_heads} key heads, more than 64"
    return None


def ignores_sparse(call: Call) -> bool:
    """Whether the operator takes no heed of ``sparse_mode``."""
    sizes = sizes_of(call)
    return sizes.decode and not sizes.rope


def compressed_mask(call: Call) -> str | None:
    """A ``sparse_mode`` for masks of one size, with none or another."""
    if call["sparse_mode"] not in (2, 3, 4) or ignores_sparse(call):
        return None
    mask = call["atten_mask"]
    if mask is None:
        return f"sparse_mode {call['sparse_mode']} without atten_mask"
    return (
        None
        if tuple(mask.shape) in _COMPRESSED
        else f"atten_mask is {shape(mask)} in sparse_mode {call['sparse_mode']}"
    )
