from __future__ import annotations

import json
from importlib.resources import files
from typing import Any

import pytest
import torch

from npu_zoo.simulator.errors import RuleBroken
from npu_zoo.simulator.rules import detect
from npu_zoo.simulator.rules.products import name_of
from npu_zoo.simulator.rules.table import CHIPS, NO, UNDOCUMENTED, YES, Call, Rule, RuleTable, load_rules, on


@pytest.fixture(scope="module")
def rules() -> list[Rule]:
    return load_rules()


@pytest.fixture(scope="module")
def support() -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = json.loads(
        (files("npu_zoo.simulator") / "op_support.json").read_text(encoding="utf-8")
    )
    return entries


def row(name: str, *operators: str, value: Any = NO, found: str | None = "found", of_values: bool = False) -> Rule:
    return Rule(name, operators, "a use", on(value=value), "a page", lambda call: found, of_values)


def test_every_row_names_its_operators_chips_and_source(rules: list[Rule]) -> None:
    for rule in rules:
        subject, _, aspect = rule.name.partition(".")
        assert subject, rule.name
        assert aspect, rule.name
        assert rule.operators, rule.name
        assert all(operator == "*" or operator.count("::") == 1 for operator in rule.operators), rule.name
        assert set(rule.values) <= set(CHIPS), rule.name
        assert any(value is not YES for value in rule.values.values()) or rule.name.endswith(".product"), rule.name
        assert rule.source.startswith(("op-plugin, ", "vllm-ascend, ", "torch_npu, ", "no page; ")), rule.name


def test_a_use_outside_the_documents_names_who_makes_it(rules: list[Rule]) -> None:
    unnamed = [
        rule.name
        for rule in rules
        if UNDOCUMENTED in rule.values.values()
        and not any(field in rule.source for field in ("vllm-ascend", "torch_npu", "op-plugin, test/", "its parameter"))
    ]
    assert unnamed == []


def test_the_operators_that_the_field_uses_against_the_documents(rules: list[Rule]) -> None:
    used = {rule.name for rule in rules if rule.values.get("ascend310p") is UNDOCUMENTED}
    assert {
        "npu_dynamic_quant.product", "npu_swiglu.product", "npu_moe_gating_top_k_softmax.product",
        "npu_moe_token_unpermute.product", "npu_quant_matmul.pertoken_310p", "matmul.nz",
    } <= used  # fmt: skip
    for name in ("npu_dynamic_quant", "npu_swiglu", "npu_moe_gating_top_k_softmax"):
        source = next(rule.source for rule in rules if rule.name == f"{name}.product")
        assert "op-plugin" in source
        assert "vllm-ascend" in source


def test_every_documented_operator_has_a_row_with_its_products(
    rules: list[Rule], support: list[dict[str, Any]]
) -> None:
    by_name = {rule.name: rule for rule in rules}
    for entry in support:
        rule = by_name[f"{name_of(entry['doc'])}.product"]
        assert entry["doc"].rsplit("/", 1)[1] in rule.source
        for chip in CHIPS:
            assert (rule.values[chip] is YES) == entry[chip], rule.name


@pytest.mark.parametrize(
    ("operator", "chip", "listed"),
    [
        ("npu_fused_infer_attention_score", "ascend910b", True),
        ("npu_fused_infer_attention_score", "ascend310p", False),
        ("npu_prompt_flash_attention", "ascend310p", True),
        ("npu_scatter_pa_kv_cache", "ascend310p", False),
        ("npu_moe_init_routing_v2", "ascend310p", True),
        ("npu_grouped_matmul", "ascend310p", True),
        ("npu_apply_rotary_pos_emb", "ascend310p", True),
        ("npu_swiglu", "ascend910b", True),
        ("npu_alltoallv_gmm", "ascend910b", False),
    ],
)
def test_products_of_operators(support: list[dict[str, Any]], operator: str, chip: str, listed: bool) -> None:
    entry = next(entry for entry in support if name_of(entry["doc"]) == operator)
    assert entry[chip] is listed


@pytest.mark.parametrize(
    ("page", "operator"),
    [
        ("docs/torch_npu-npu_ffn.md", "npu_ffn"),
        ("docs/（beta）torch_npu-npu_rms_norm.md", "npu_rms_norm"),
        ("docs/torch_npu-apply_rotary_pos_emb.md", "npu_apply_rotary_pos_emb"),
        ("docs/torch_npu-npu_scatter_nd_update_.md", "npu_scatter_nd_update_"),
    ],
)
def test_the_operator_of_a_page(page: str, operator: str) -> None:
    assert name_of(page) == operator


def test_a_row_speaks_of_all_overloads_of_a_name_without_one() -> None:
    table = RuleTable([row("a.base", "npu::a")], "ascend910b")
    for operator in ("npu::a", "npu::a.out"):
        with pytest.raises(RuleBroken, match="found on ascend910b"):
            table.check(operator, {})
    table.check("npu::ab", {})


def test_a_row_of_an_overload_speaks_of_it_alone() -> None:
    table = RuleTable([row("a.out", "npu::a.out")], "ascend910b")
    table.check("npu::a", {})
    table.check("npu::a.List", {})
    with pytest.raises(RuleBroken):
        table.check("npu::a.out", {})


def test_rows_of_every_operator_come_after_its_own() -> None:
    table = RuleTable([row("all.use", "*"), row("a.use", "npu::a")], "ascend310p")
    with pytest.raises(RuleBroken) as own:
        table.check("npu::a", {})
    with pytest.raises(RuleBroken) as other:
        table.check("aten::mm", {})
    assert (own.value.rule, other.value.rule) == ("a.use", "all.use")


def test_rows_of_values_are_asked_of_values_alone() -> None:
    table = RuleTable([row("a.values", "npu::a", of_values=True)], "ascend310p")
    table.check("npu::a", {})
    with pytest.raises(RuleBroken):
        table.check("npu::a", {}, of_values=True)


def test_an_undocumented_use_goes_through_and_is_counted() -> None:
    table = RuleTable([row("a.use", "npu::a", value=UNDOCUMENTED)], "ascend310p")
    table.check("npu::a", {})
    table.check("npu::a", {})
    assert table.undocumented == {("npu::a", "a.use"): 2}


def test_a_row_for_one_chip_is_silent_on_the_other() -> None:
    rule = Rule("a.use", ("npu::a",), "a use", on("ascend310p"), "a page", lambda call: "found")
    RuleTable([rule], "ascend910b").check("npu::a", {})
    with pytest.raises(RuleBroken):
        RuleTable([rule], "ascend310p").check("npu::a", {})


def test_bfloat16_on_the_device_is_refused_in_any_operator_of_310p(rules: list[Rule]) -> None:
    meta = torch.empty(2, dtype=torch.bfloat16, device="meta")
    table = RuleTable(rules, "ascend310p")
    for arguments in ({"self": meta}, {"tensors": [torch.empty(2, device="meta"), meta]}, {"dtype": torch.bfloat16}):
        with pytest.raises(RuleBroken) as caught:
            table.check("aten::anything", arguments)
        assert caught.value.rule == "chip.bfloat16"
    RuleTable(rules, "ascend910b").check("aten::anything", {"self": meta})


def test_a_checkpoint_in_bfloat16_may_be_read_on_the_host(rules: list[Rule]) -> None:
    host, device = torch.empty(2, dtype=torch.bfloat16), torch.empty(2, dtype=torch.float16, device="meta")
    RuleTable(rules, "ascend310p").check("aten::copy_", {"self": device, "src": host, "non_blocking": False})


def found(detector: Any, **arguments: Any) -> str | None:
    text: str | None = detector(Call("npu::a", "ascend910b", arguments))
    return text


@pytest.mark.parametrize(
    ("detector", "wrong", "right"),
    [
        (detect.dtype_outside(("x",), (torch.int8,)), torch.empty(2), torch.empty(2, dtype=torch.int8)),
        (detect.rank_outside("x", 2, 3), torch.empty(2), torch.empty(2, 2)),
        (detect.shape_outside("x", (2,)), torch.empty(3), torch.empty(2)),
        (detect.size_outside("x", -1, 64, 128), torch.empty(2, 96), torch.empty(96, 64)),
        (detect.size_not_within("x", 0, 1, 4), torch.empty(5), torch.empty(4)),
        (detect.size_not_multiple("x", -1, 16), torch.empty(17), torch.empty(32)),
        (detect.empty("x"), torch.empty(0, 4), torch.empty(1, 4)),
        (detect.not_contiguous("x"), torch.empty(4, 4)[:, :2], torch.empty(4, 2)),
        (detect.value_outside("x", 0, 1), 2, 1),
        (detect.value_not_within("x", 0, 1), 1.5, 1),
        (detect.given("x"), 0, None),
        (detect.missing("x"), None, 0),
        (detect.elements_outside("x", 0, lambda call: 4), torch.tensor([0, 4]), torch.tensor([3, 0])),
        (detect.elements_repeated("x", ignore_negative=True), torch.tensor([1, 1]), torch.tensor([-1, -1, 1])),
        (detect.elements_decrease("x"), [1, 3, 2], [0, 0, 2]),
        (detect.elements_decrease("x"), torch.tensor([-1, 2]), torch.tensor([2, 2])),
    ],
)
def test_detectors(detector: Any, wrong: Any, right: Any) -> None:
    text = found(detector, x=wrong)
    assert text is not None
    assert text.startswith("x")
    assert found(detector, x=right) is None


def test_detectors_of_two_arguments() -> None:
    x, y = torch.empty(4, 8), torch.empty(4, 16, dtype=torch.float16)
    assert found(detect.dtype_differs("x", "y"), x=x, y=y) == "y is torch.float16 where x is torch.float32"
    assert found(detect.shape_differs("x", "y"), x=x, y=y) == "y is (4, 16) where x is (4, 8)"
    assert found(detect.size_differs("x", -1, "y", -1), x=x, y=y) == "x.size(-1) is 8 where y.size(-1) is 16"
    assert found(detect.size_differs("x", 0, "y", 0), x=x, y=y) is None
    assert found(detect.only_one_of("x", "y"), x=None, y=y) == "y is given and x is not"
    assert found(detect.only_one_of("x", "y"), x=x, y=y) is None


def test_detectors_look_into_lists_and_past_arguments_that_are_none() -> None:
    halves = detect.dtype_outside(("x",), detect.HALVES)
    assert found(halves, x=[torch.empty(2, dtype=torch.float16), torch.empty(2)]) is not None
    assert found(halves, x=None) is None
    assert found(detect.dtype_differs("x", "y"), x=torch.empty(2), y=None) is None


def test_two_rows_of_one_name_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from npu_zoo.simulator.rules import norm

    monkeypatch.setattr(norm, "RULES", [row("a.use", "npu::a"), row("a.use", "npu::b")])
    with pytest.raises(ValueError, match=r"a\.use"):
        load_rules()
