"""Rows: sampling."""

from __future__ import annotations

from npu_zoo.simulator.rules.detect import (
    FLOATS,
    INT32,
    dtype_differs,
    dtype_outside,
    first,
    missing,
    rank_outside,
    size_differs,
)  # fmt: skip
from npu_zoo.simulator.rules.table import UNDOCUMENTED, Call, Rule, on

_TOP = ("npu::npu_top_k_top_p",)
_PAGE = "op-plugin, torch_npu-npu_top_k_top_p.md"
_SAMPLE = ("npu::npu_top_k_top_p_sample",)
_SAMPLE_PAGE = "op-plugin, torch_npu-npu_top_k_top_p_sample.md"


def _k_range(call: Call) -> str | None:
    k, most = call["k"], min(1024, call["logits"].shape[-1])
    if k is None or not k.numel() or (int(k.min()) >= 1 and int(k.max()) <= most):
        return None
    return f"k holds {int(k.min())} to {int(k.max())}, not in [1, {most}]"


def _p_range(call: Call) -> str | None:
    p = call["p"]
    if p is None or not p.numel() or (float(p.min()) >= 0 and float(p.max()) <= 1):
        return None
    return f"p holds {float(p.min())} to {float(p.max())}, not in [0, 1]"


RULES: list[Rule] = [
    Rule(
        "npu_top_k_top_p.dtype", _TOP, "logits that are no floats", on(), f"{_PAGE}, logits",
        dtype_outside(("logits",), FLOATS),
    ),
    Rule(
        "npu_top_k_top_p.rank", _TOP, "logits of other dimensions", on(), f"{_PAGE}, logits",
        rank_outside("logits", 2),
    ),
    Rule(
        "npu_top_k_top_p.p_dtype", _TOP, "a p of another dtype than the logits", on(), f"{_PAGE}, p",
        dtype_differs("logits", "p"),
    ),
    Rule(
        "npu_top_k_top_p.k_dtype", _TOP, "a k that is not int32", on(), f"{_PAGE}, k",
        dtype_outside(("k",), (INT32,)),
    ),
    Rule(
        "npu_top_k_top_p.shape", _TOP, "a p or k of another length than the rows", on(), f"{_PAGE}, p, k",
        first(
            rank_outside("p", 1), rank_outside("k", 1), size_differs("p", 0, "logits", 0),
            size_differs("k", 0, "logits", 0),
        ),
    ),
    Rule(
        "npu_top_k_top_p.missing", _TOP, "one of p and k alone", on("ascend910b", value=UNDOCUMENTED),
        f"{_PAGE}, p, k are required; torch_npu's schema has defaults for them", missing("p", "k"),
    ),
    Rule(
        "npu_top_k_top_p.k", _TOP, "a k outside 1 to 1024, or above the vocabulary", on(), f"{_PAGE}, k", _k_range,
        of_values=True,
    ),
    Rule("npu_top_k_top_p.p", _TOP, "a p outside 0 to 1", on(), f"{_PAGE}, p", _p_range, of_values=True),
    Rule(
        "npu_top_k_top_p_sample.dtype", _SAMPLE, "logits that are no floats", on(), f"{_SAMPLE_PAGE}, logits",
        dtype_outside(("logits",), FLOATS),
    ),
    Rule(
        "npu_top_k_top_p_sample.k_dtype", _SAMPLE, "a k that is not int32", on(), f"{_SAMPLE_PAGE}, top_k",
        dtype_outside(("top_k",), (INT32,)),
    ),
    Rule(
        "npu_top_k_top_p_sample.p_dtype", _SAMPLE, "a p of another dtype than the logits", on(),
        f"{_SAMPLE_PAGE}, top_p", dtype_differs("logits", "top_p"),
    ),
]  # fmt: skip
