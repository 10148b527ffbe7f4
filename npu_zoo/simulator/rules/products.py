"""Rows: each operator at all, and what holds for every operator of a chip.

The rows of documented products come from ``op_support.json``: for each page of op-plugin's documentation of operators,
whether its table of products lists the chip.
"""

from __future__ import annotations

import json
from importlib.resources import files
from typing import Any

import torch

from npu_zoo.simulator.rules.detect import always
from npu_zoo.simulator.rules.table import CHIPS, EVERY_OPERATOR, NO, UNDOCUMENTED, YES, Call, Rule, Value, on

_USED: dict[tuple[str, str], str] = {
    ("npu_dynamic_quant", "ascend310p"): "_310p/quantization/methods/w8a8_dynamic.py",
    ("npu_moe_gating_top_k_softmax", "ascend310p"): "_310p/fused_moe/grouped_topk_router.py",
    ("npu_swiglu", "ascend310p"): "_310p/fused_moe/moe_mlp.py, _310p/ops/activation.py",
}
"""Uses that the field makes although the page's table of products does not list the chip."""

_WHEEL = "torch_npu, _op_plugin_docs.py"
_FIELD = "vllm-ascend, vllm_ascend/"
_MLA = (
    "atb::npu_multi_head_latent_attention", "atb::npu_mla_preprocess", "atb::npu_ring_mla",
    "atb::_npu_paged_attention_mla",
)  # fmt: skip


def name_of(doc: str) -> str:
    """The operator that a page documents."""
    name = doc.rsplit("/", 1)[1].removeprefix("（beta）").removeprefix("torch_npu-").removesuffix(".md")
    return "npu_apply_rotary_pos_emb" if name == "apply_rotary_pos_emb" else name


def _product(entry: dict[str, Any]) -> Rule:
    doc: str = entry["doc"]
    name, page = name_of(doc), "op-plugin, " + doc.rsplit("/", 1)[1]
    values: dict[str, Value] = {}
    source = f"{page}, supported products"
    for chip in CHIPS:
        used = _USED.get((name, chip))
        values[chip] = YES if entry[chip] else UNDOCUMENTED if used else NO
        if used and not entry[chip]:
            source += f"; used in {_FIELD}{used}"
    found = always(f"{page} does not list this chip among the supported products; the operator is called")
    return Rule(f"{name}.product", (f"npu::{name}",), f"{name} at all", values, source, found)


def _without_page(operators: tuple[str, ...], name: str, value: Value, source: str, *chips: str) -> Rule:
    found = always("the operator is called")
    return Rule(f"{name}.product", operators, f"{name} at all", on(*chips, value=value), source, found)


def _bfloat16(call: Call) -> str | None:
    for name, value in call.arguments.items():
        for item in value if isinstance(value, (list, tuple)) else (value,):
            if isinstance(item, torch.Tensor):
                if item.dtype is torch.bfloat16 and item.device.type != "cpu":
                    return f"{name} is torch.bfloat16"
            elif item is torch.bfloat16:
                return f"{name} is torch.bfloat16"
    return None


def _support() -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = json.loads(
        (files("npu_zoo.simulator") / "op_support.json").read_text(encoding="utf-8")
    )
    return entries


RULES: list[Rule] = [
    *(_product(entry) for entry in _support()),
    _without_page(
        ("npu::npu_moe_token_unpermute", "npu::_npu_moe_token_unpermute"), "npu_moe_token_unpermute", UNDOCUMENTED,
        f"{_WHEEL}, npu_moe_token_unpermute, supported products; used in {_FIELD}_310p/fused_moe/moe_comm_method.py",
        "ascend310p",
    ),
    _without_page(
        ("npu::npu_moe_token_permute",), "npu_moe_token_permute", NO,
        f"{_WHEEL}, npu_moe_token_permute, supported products", "ascend310p",
    ),
    _without_page(
        ("npu::npu_grouped_matmul_swiglu_quant",), "npu_grouped_matmul_swiglu_quant", NO,
        f"{_WHEEL}, npu_grouped_matmul_swiglu_quant, supported products", "ascend310p",
    ),
    _without_page(
        ("npu::npu_quant_grouped_matmul_dequant",), "npu_quant_grouped_matmul_dequant", UNDOCUMENTED,
        "no page; op-plugin, test/test_base_ops/test_quant_grouped_matmul_dequant.py tests it on Ascend310P alone",
        "ascend910b",
    ),
    _without_page(_MLA, "mla", NO, f"{_FIELD}_310p/model_runner_310p.py (MLA is not supported for 310P)", "ascend310p"),
    _without_page(
        ("atb::_npu_matmul_add_fp32",), "_npu_matmul_add_fp32", NO, f"{_FIELD}_310p/worker_310p.py", "ascend310p",
    ),
    _without_page(
        ("aten::index_fill_", "aten::index_fill"), "index_fill", NO,
        f"{_FIELD}device/device_op.py, Ascend310PDeviceAdaptor.index_fill", "ascend310p",
    ),
    Rule(
        "chip.bfloat16", (EVERY_OPERATOR,), "bfloat16 in any operator", on("ascend310p"),
        "op-plugin, torch_npu-npu_add_rms_norm.md, torch_npu-npu_moe_init_routing_v2.md, "
        "torch_npu-apply_rotary_pos_emb.md, （beta）torch_npu-npu_rms_norm.md "
        "(no page allows bfloat16 on Atlas inference products)",
        _bfloat16,
    ),
]  # fmt: skip
