"""Three families' matrices, asked for every combination, against the tables written by hand from their sources."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from npu_zoo.core.cells import Cell
from npu_zoo.core.config import EngineArgs
from npu_zoo.core.features import Verdict, layout_names
from npu_zoo.core.parallel import Split
from npu_zoo.core.truth import read_truth
from npu_zoo.dispatch import check as check_args
from npu_zoo.registry import get_registry

ATLAS = ("atlas_800i_a2", "atlas_300i_duo", "atlas_800t_a2")
DTYPES = ("float16", "bfloat16", "float32")
ATTENTION = ("flash", "paged")
QUANTIZATION = ("none", "w8a8", "w8a16", "w4a16", "sparse")
KV_CACHE = ("auto", "int8")
LONG = (False, True)
SERVING = ("offline", "mindie_service", "tgi")
WORLD_SIZES = (1, 2, 3, 4, 6, 8, 16, 32)

Sizes = tuple[int, ...]  # tensor, pipeline, expert and data parallel size; what is left out is 1


def stated(model: str) -> set[Cell]:
    """What the sources support on Ascend."""
    family, _, size = model.partition(":")
    cells = read_truth(get_registry().families[family].truth).statement.cells.items()
    return {c for c, (t,) in cells if c.size == size and t.status == "supported" and c.hardware in ATLAS}


TRUTH = {model: stated(model) for model in ("wizardcoder:34b", "deepseek_moe:16b", "deepseek_v3:671b")}

MINDIE_WIZARD = "WizardCoder README of the MindIE ATB model zoo"
MINDIE_MOE = "DeepSeek-MoE README of the MindIE ATB model zoo"


def splits() -> list[Sizes]:
    """Tensor parallel, with experts dealt over all cards or over some, in two or more stages, and with replicas."""
    found: list[Sizes] = []
    for world in WORLD_SIZES:
        found += [(world, 1, 1)] + [(world, 1, world)] * (world > 1) + [(world // 2, 2, 1)] * (world % 2 == 0)
    found += [(8, 1, 2), (4, 2, 4), (4, 4, 1), (1, 8, 1), (1, 16, 1)]
    return [*found, (4, 1, 1, 2), (1, 1, 8, 8), (2, 1, 8, 4), (4, 2, 1, 2), (4, 2, 8, 2)]


def request_of(hardware: str, dtype: str, split: Sizes, **others: Any) -> dict[str, Any]:
    """A request that differs from the plainest one only in what is named; ``split`` stays beside the axes."""
    request: dict[str, Any] = {"hardware": hardware, "dtype": dtype, "split": split, "attention": "paged"}
    request |= {"quantization": "none", "kv_cache_dtype": "auto", "long_sequence": False, "serving": "offline"}
    return request | others


def truth(model: str, request: dict[str, Any]) -> bool:
    sizes = (*request["split"], 1, 1, 1)[:4]
    return Cell(**request | {"size": model.partition(":")[2], "split": sizes}) in TRUTH[model]


def check(
    model: str, request: dict[str, Any], *, allow_experimental: bool = False, alternatives: bool = True
) -> Verdict:
    family, variant = get_registry().find(model)
    assert variant is not None
    split = Split(*request["split"])
    axes = {axis: value for axis, value in request.items() if axis != "split"}
    axes |= {"world_size": split.world_size, "parallelism": layout_names(split)}
    options = {"allow_experimental": allow_experimental, "alternatives": alternatives}
    return family.matrix.check(model, variant.size, axes, **options)


def offered(model: str) -> list[dict[str, Any]]:
    """Every request that the sources support."""
    return [{axis: value for axis, value in cell._asdict().items() if axis != "size"} for cell in sorted(TRUTH[model])]


SUPPORTED = [(model, request) for model in TRUTH for request in offered(model)]


def test_truth_tables_have_the_cells_of_the_documents() -> None:
    counts = {model: len(offered(model)) for model in TRUTH}
    # 2 products x 2 sizes, one of them with 2 dtypes; 2 sizes x 2 servings and 4 splits; three weight types.
    assert counts == {"wizardcoder:34b": 6, "deepseek_moe:16b": 8, "deepseek_v3:671b": 3}


@pytest.mark.parametrize("hardware", ATLAS)
@pytest.mark.parametrize("model", TRUTH)
def test_every_cell(model: str, hardware: str) -> None:
    wrong = []
    for dtype, split, attention, quantization in itertools.product(DTYPES, splits(), ATTENTION, QUANTIZATION):
        for kv, long, serving in itertools.product(KV_CACHE, LONG, SERVING):
            request = request_of(hardware, dtype, split, attention=attention, quantization=quantization)
            request |= {"kv_cache_dtype": kv, "long_sequence": long, "serving": serving}
            if check(model, request, alternatives=False).supported != truth(model, request):
                wrong.append(request)
    assert wrong == []


@pytest.mark.parametrize(("model", "request_"), SUPPORTED)
def test_a_supported_cell_rests_on_a_source_and_claims_no_more(model: str, request_: dict[str, Any]) -> None:
    verdict = check(model, request_)
    assert verdict.row is not None
    assert (verdict.status, verdict.row.status) == ("supported", "supported")
    assert verdict.row.evidence == "claimed" or verdict.request["world_size"] in verdict.row.evidence_devices
    assert verdict.row.source != "zoo"


@pytest.mark.parametrize(
    ("model", "hardware", "derived"),
    [
        ("wizardcoder:34b", "atlas_800i_a2", set()),
        ("wizardcoder:34b", "atlas_300i_duo", set()),
        ("deepseek_moe:16b", "atlas_800i_a2", set()),
        ("deepseek_moe:16b", "atlas_800t_a2", {"dtype", "attention"}),
        ("deepseek_v3:671b", "atlas_800i_a2", {"world_size"}),
    ],
)
def test_what_no_source_states_is_marked_as_derived(model: str, hardware: str, derived: set[str]) -> None:
    for request in (r for r in offered(model) if r["hardware"] == hardware):
        row = check(model, request).row
        assert row is not None
        marked = set(row.derived)
        assert marked >= derived
        assert bool(marked) == bool(derived)


AXES_ASKED: dict[str, tuple[Any, ...]] = {
    "dtype": DTYPES,
    "attention": ATTENTION,
    "quantization": QUANTIZATION,
    "kv_cache_dtype": KV_CACHE,
    "long_sequence": LONG,
    "serving": SERVING,
}


@pytest.mark.parametrize(("model", "request_"), SUPPORTED)
def test_one_wrong_value_fails_on_its_axis_alone_and_names_what_is_left(model: str, request_: dict[str, Any]) -> None:
    for axis, value in ((axis, v) for axis, values in AXES_ASKED.items() for v in values):
        asked = request_ | {axis: value}
        if truth(model, asked):
            continue
        left = {v for v in AXES_ASKED[axis] if truth(model, request_ | {axis: v})}
        (reason,) = check(model, asked).reasons
        assert (reason.axis, reason.value) == (axis, value)
        assert set(reason.supported) >= left
        assert all(str(word).lower() in reason.message for word in (axis, value, model, *left))


def test_all_failing_axes_are_named_at_once() -> None:
    wrong: dict[str, Any] = {"attention": "flash", "quantization": "w8a8", "kv_cache_dtype": "int8"}
    wrong |= {"long_sequence": True, "serving": "tgi"}
    expected = {"dtype", "world_size", "attention", "quantization", "kv_cache_dtype", "long_sequence", "serving"}
    cases = [("wizardcoder:34b", "float32", (3, 1, 1)), ("deepseek_moe:16b", "float32", (3, 1, 1))]
    cases += [("deepseek_v3:671b", "float16", (3, 1, 3))]
    for model, dtype, split in cases:
        verdict = check(model, request_of("atlas_800i_a2", dtype, split, **wrong))
        named = {reason.axis for reason in verdict.reasons}
        assert named - {"parallelism"} == expected
        assert verdict.describe().count(f"is not supported by {model}") == len(verdict.reasons)


DENIED = [
    ("wizardcoder:34b", request_of("atlas_300i_duo", "bfloat16", (4, 1, 1)), "dtype", MINDIE_WIZARD),
    ("deepseek_moe:16b", request_of("atlas_800i_a2", "bfloat16", (4, 1, 1)), "dtype", MINDIE_MOE),
]
for _model, _hardware, _source in (
    ("wizardcoder:34b", "atlas_800i_a2", MINDIE_WIZARD),
    ("wizardcoder:34b", "atlas_300i_duo", MINDIE_WIZARD),
    ("deepseek_moe:16b", "atlas_800i_a2", MINDIE_MOE),
):
    _plain = request_of(_hardware, "float16", (8, 1, 1))
    _no: list[tuple[str, Any]] = [("quantization", name) for name in ("w8a8", "w8a16", "sparse")]
    _no += [("kv_cache_dtype", "int8"), ("long_sequence", True), ("serving", "tgi"), ("attention", "flash")]
    _no += [("serving", "mindie_service")] * (_model == "wizardcoder:34b")
    DENIED += [(_model, _plain | {axis: value}, axis, _source) for axis, value in _no]


@pytest.mark.parametrize(("model", "request_", "axis", "source"), DENIED)
def test_a_cell_that_the_source_denies_is_quoted(model: str, request_: dict[str, Any], axis: str, source: str) -> None:
    (reason,) = check(model, request_).reasons
    assert reason.axis == axis
    assert f"the {source} says no" in reason.message


@pytest.mark.parametrize(
    ("model", "request_"),
    [
        ("wizardcoder:34b", request_of("atlas_800i_a2", "float16", (4, 1, 1), quantization="w4a16")),
        ("deepseek_moe:16b", request_of("atlas_800t_a2", "float16", (8, 1, 1), quantization="w8a8")),
        ("deepseek_moe:16b", request_of("atlas_800t_a2", "float16", (8, 1, 1), serving="tgi")),
        ("deepseek_v3:671b", request_of("atlas_800i_a2", "float16", (32, 1, 32))),
        ("deepseek_v3:671b", request_of("atlas_800i_a2", "bfloat16", (32, 1, 32), quantization="w8a8")),
    ],
)
def test_what_the_source_does_not_speak_of_is_not_put_in_its_mouth(model: str, request_: dict[str, Any]) -> None:
    verdict = check(model, request_)
    assert not verdict.supported
    assert "says no" not in verdict.describe()


def test_a_weight_type_of_v3_keeps_its_own_world_size() -> None:
    for quantization, size in {"none": 32, "w8a16": 16, "w4a16": 8}.items():
        for asked in {8, 16, 32} - {size}:
            request = request_of("atlas_800i_a2", "bfloat16", (asked, 1, asked), quantization=quantization)
            verdict = check("deepseek_v3:671b", request)
            nearest = {(a["world_size"], a["quantization"]) for a in verdict.alternatives}
            assert not verdict.supported
            assert (size, quantization) in nearest


def test_v3_without_expert_parallelism_is_told_which_split_is_left() -> None:
    (reason,) = check("deepseek_v3:671b", request_of("atlas_800i_a2", "bfloat16", (32, 1, 1))).reasons
    assert reason.axis == "parallelism"
    assert "tp32+ep32" in reason.message


@pytest.mark.parametrize("hardware", ATLAS)
@pytest.mark.parametrize("model", TRUTH)
def test_every_alternative_passes_and_there_are_at_most_three(model: str, hardware: str) -> None:
    family, variant = get_registry().find(model)
    assert variant is not None
    for dtype, split, attention in itertools.product(DTYPES, splits(), ATTENTION):
        request = request_of(hardware, dtype, split, attention=attention)
        if truth(model, request):
            continue
        alternatives = check(model, request).alternatives
        assert 1 <= len(alternatives) <= 3
        assert all(family.matrix.check(model, variant.size, dict(a)).supported for a in alternatives)


# Latent attention has no operators on 300I Duo, and nothing is offered there, not even as an experiment.
V3_ON_DUO = ["671b", "v3", "v3.1", "r1", "671b-base", "v2-lite", "v2-lite-base", "v2-236b", "demo", "custom"]


@pytest.mark.parametrize("allow_experimental", [False, True])
@pytest.mark.parametrize("variant", V3_ON_DUO)
def test_v3_on_300i_duo_is_refused_with_the_reason(variant: str, allow_experimental: bool) -> None:
    model = f"deepseek_v3:{variant}"
    verdict = check(model, request_of("atlas_300i_duo", "float16", (2, 1, 1)), allow_experimental=allow_experimental)
    reason = verdict.reasons[0]
    assert (verdict.supported, reason.axis) == (False, "hardware")
    assert "no operators for latent attention (MLA)" in reason.message
    assert "atlas_300i_duo" not in reason.supported
    assert "--allow-experimental" not in verdict.describe()


@pytest.mark.parametrize("allow_experimental", [False, True])
def test_moe_on_300i_duo_is_refused_with_the_reason(allow_experimental: bool) -> None:
    request = request_of("atlas_300i_duo", "float16", (4, 1, 1))
    for variant in ("16b", "16b-base", "16b-chat", "demo", "custom"):
        model = f"deepseek_moe:{variant}"
        verdict = check(model, request, allow_experimental=allow_experimental)
        reason = verdict.reasons[0]
        assert (verdict.supported, reason.axis) == (False, "hardware")
        assert f"the {MINDIE_MOE} says no: its table has no world size for Atlas 300I Duo" in reason.message


ON_DUO = [
    "deepseek_v3:671b",
    "deepseek_v3:demo",
    "deepseek_v3",
    "deepseek_moe:16b",
    "deepseek_moe",
    "deepseek_moe:custom",
]


@pytest.mark.parametrize("model", ON_DUO)
def test_the_duo_is_refused_from_the_command_line_too(model: str) -> None:
    verdict = check_args(EngineArgs(model=model, hardware="atlas_300i_duo", dtype="float16", world_size=4))
    assert not verdict.supported
    assert "hardware=atlas_300i_duo is not supported by" in verdict.describe()
    assert "300I Duo" in verdict.reasons[0].message


@pytest.mark.parametrize("hardware", ["cpu", "cuda", *ATLAS])
@pytest.mark.parametrize("variant", ["671b", "v2-lite", "v2-236b", "demo", "custom"])
def test_flash_is_refused_for_latent_attention_everywhere(variant: str, hardware: str) -> None:
    for dtype, split in itertools.product(DTYPES, splits()):
        request = request_of(hardware, dtype, split, attention="flash")
        verdict = check(f"deepseek_v3:{variant}", request, allow_experimental=True, alternatives=False)
        (reason,) = (r for r in verdict.reasons if r.axis == "attention")
        assert not verdict.supported
        assert reason.supported == ("paged",)
        assert ("latents are kept in blocks only" in reason.message) == (hardware != "atlas_300i_duo")


EXPERIMENTAL = [
    ("wizardcoder:7b", request_of("atlas_800i_a2", "float16", (1, 1, 1))),
    ("wizardcoder:7b", request_of("atlas_300i_duo", "float16", (2, 1, 1))),
    ("wizardcoder:13b", request_of("atlas_800i_a2", "bfloat16", (8, 1, 1))),
    ("wizardcoder:33b-v1.1", request_of("atlas_800i_a2", "bfloat16", (4, 1, 1))),
    ("wizardcoder:custom", request_of("atlas_800t_a2", "float16", (2, 1, 1))),
    ("deepseek_moe:custom", request_of("atlas_800i_a2", "float16", (4, 1, 4))),
    ("deepseek_v3:v2-lite", request_of("atlas_800i_a2", "bfloat16", (4, 1, 1))),
    ("deepseek_v3:v2-lite", request_of("atlas_800t_a2", "bfloat16", (8, 1, 8))),
    ("deepseek_v3:v2-236b", request_of("atlas_800i_a2", "bfloat16", (16, 1, 16))),
    ("deepseek_v3:custom", request_of("atlas_800i_a2", "bfloat16", (8, 1, 8))),
    ("wizardcoder:34b", request_of("cuda", "float16", (1, 1, 1))),
    ("deepseek_moe:16b", request_of("cuda", "bfloat16", (1, 1, 1))),
    ("deepseek_v3:v2-lite", request_of("cuda", "bfloat16", (1, 1, 1))),
]

# The zoo's own: quantized checkpoints on a CPU in every size, on one A2 for what has no size, and int8 on a 300I Duo.
# The sources say no to all of it but to V3's int8 and int4 weights, whose rows stand above.
for _family, _size in (("wizardcoder", "34b"), ("deepseek_moe", "16b"), ("deepseek_v3", "671b")):
    for _scheme in ("w8a16", "w4a16", "w8a8"):
        _asked = {"quantization": _scheme}
        EXPERIMENTAL += [
            (f"{_family}:{name}", request_of("cpu", "bfloat16", (1, 1, 1), **_asked)) for name in (_size, "demo")
        ]
        EXPERIMENTAL.append((f"{_family}:custom", request_of("atlas_800t_a2", "float16", (1, 1, 1), **_asked)))
EXPERIMENTAL.append(("wizardcoder:custom", request_of("atlas_300i_duo", "float16", (1, 1, 1), quantization="w8a8")))

NOT_EVEN_EXPERIMENTAL = [
    ("wizardcoder:34b", request_of("atlas_800i_a2", "float16", (4, 1, 1), quantization="w8a8")),
    ("wizardcoder:custom", request_of("atlas_300i_duo", "float16", (1, 1, 1), quantization="w8a16")),
    ("deepseek_moe:16b", request_of("atlas_800i_a2", "float16", (8, 1, 1), quantization="w8a16")),
    ("deepseek_moe:custom", request_of("atlas_300i_duo", "float16", (1, 1, 1), quantization="w8a8")),
    ("deepseek_v3:671b", request_of("atlas_800i_a2", "bfloat16", (16, 1, 16), quantization="w8a8")),
    ("deepseek_v3:custom", request_of("cuda", "bfloat16", (1, 1, 1), quantization="w4a16")),
]


@pytest.mark.parametrize(("model", "request_"), NOT_EVEN_EXPERIMENTAL)
def test_what_no_row_has_is_refused_with_the_flag_too(model: str, request_: dict[str, Any]) -> None:
    verdict = check(model, request_, allow_experimental=True)
    assert not verdict.supported
    assert "quantization" in {reason.axis for reason in verdict.reasons} or "hardware" in {
        r.axis for r in verdict.reasons
    }


@pytest.mark.parametrize(("model", "request_"), EXPERIMENTAL)
def test_siblings_are_experimental(model: str, request_: dict[str, Any]) -> None:
    refused = check(model, request_)
    assert not refused.supported
    assert refused.reasons
    assert all("--allow-experimental runs it" in reason.message for reason in refused.reasons)
    taken = check(model, request_, allow_experimental=True)
    assert taken.row is not None
    assert (taken.supported, taken.status, taken.row.source) == (True, "experimental", "zoo")


SIBLINGS = [f"wizardcoder:{size}" for size in ("7b", "13b", "33b-v1.1")]
SIBLINGS += [f"deepseek_v3:{size}" for size in ("v2-lite", "v2-236b")]


@pytest.mark.parametrize("model", SIBLINGS)
def test_no_sibling_is_supported_on_ascend_without_the_flag(model: str) -> None:
    for hardware, dtype, split in itertools.product(ATLAS, DTYPES, splits()):
        assert not check(model, request_of(hardware, dtype, split)).supported


def test_an_experimental_cell_that_the_source_denies_names_both() -> None:
    request = request_of("atlas_800i_a2", "bfloat16", (4, 1, 1))
    (reason,) = check("deepseek_moe:16b", request).reasons
    assert f"the {MINDIE_MOE} says no" in reason.message
    assert "--allow-experimental" in reason.message
    assert check("deepseek_moe:16b", request, allow_experimental=True).status == "experimental"


@pytest.mark.parametrize("model", ["wizardcoder:demo", "deepseek_moe:demo", "deepseek_v3:demo"])
@pytest.mark.parametrize("hardware", ["cpu", "atlas_800i_a2", "atlas_800t_a2"])
def test_demos_are_supported_where_their_family_is(model: str, hardware: str) -> None:
    assert check(model, request_of(hardware, "bfloat16", (1, 1, 1))).supported
