"""Ranks on several simulated devices, over hccl, against one device."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from npu_zoo import LLM, SamplingParams
from npu_zoo.core.config import EngineArgs, EngineConfig
from npu_zoo.core.errors import HardwareError
from npu_zoo.core.parallel import Split
from npu_zoo.dispatch import resolve
from npu_zoo.registry import get_registry
from npu_zoo.request import bundled_directory
from npu_zoo.simulator import Report, measure
from npu_zoo.testing.agreement import agree
from npu_zoo.testing.door import unchecked_config
from npu_zoo.testing.quantized import quantize_checkpoint
from npu_zoo.testing.shapes import rank_shape, write_random_model
from npu_zoo.weights.convert import convert
from npu_zoo.weights.plan import ConvertOptions, plan_conversion

PRODUCT = os.environ.get("NPU_ZOO_SIMULATE", "")
DUO = PRODUCT == "atlas_300i_duo"
BOUND, CACHED_BOUND, INT8_BOUND = 0.06, 0.15, 0.3
"""Natural-log probability, as for one device; where keys and values become codes, and where activations do."""

PROMPTS = [list(range(5, 45)), [7, 8, 9], list(range(30, 47)), [5]]

DENSE = [Split(2), Split(pp=2), Split(pp=3), Split(2, pp=2), Split(dp=2)]
EXPERTS = [
    Split(2), Split(pp=3), Split(2, ep=2), Split(2, pp=2, ep=2), Split(dp=2, ep=2), Split(2, dp=2, ep=4),
]  # fmt: skip
LONG = ("deepseek_coder", "deepseek_v3")
FAMILIES = {"deepseek_coder": DENSE, "wizardcoder": DENSE[3:]}  # the two are of one architecture
if not DUO:
    FAMILIES |= {"deepseek_moe": [Split(2), *EXPERTS[3:5]], "deepseek_v3": EXPERTS}
GRAPHED = {"hccl:allreduce", "hccl:allgather", "hccl:reducescatter"}
"""What a captured step may take part in: operations whose sizes the host knows."""


def config_of(family: str, split: Split = Split(), **options: Any) -> EngineConfig:  # noqa: B008
    """The demo or a checkpoint of one's own; rows offer fewer splits than the engine runs."""
    base: dict[str, Any] = {"model": f"{family}:demo", "dtype": "float16", "max_model_len": 128}
    unseen = {name: options.pop(name) for name in ("expert_dispatch", "enforce_eager") if name in options}
    checked = resolve(EngineArgs(**{**base, "hardware": PRODUCT, "kv_cache_memory": "32MiB", **options}))
    sizes = {
        "tensor_parallel_size": split.tp, "pipeline_parallel_size": split.pp, "expert_parallel_size": split.ep,
        "data_parallel_size": split.dp, "world_size": split.world_size,
    }  # fmt: skip
    return unchecked_config(checked, **sizes, **unseen)


def custom(family: str, weights: Path, **options: Any) -> dict[str, Any]:
    own = {"model": f"{family}:custom", "weights": str(weights), "skip_tokenizer_init": True}
    return {**own, "allow_experimental": True, **options}


pytestmark = [
    pytest.mark.usefixtures("simulated_ranks"),
    pytest.mark.skipif(
        PRODUCT == "atlas_800t_a2", reason="its chip is that of atlas_800i_a2, on which several of them are tested"
    ),
]


@pytest.fixture(
    params=[
        # One of each kind of layer; the evidence of rows has the others, and make verify.
        pytest.param(name, marks=pytest.mark.long) if name in LONG else name
        for name in FAMILIES
    ]
)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_several_devices_are_one(family: str) -> None:
    with LLM.from_config(config_of(family)) as one:
        for split in FAMILIES[family]:
            with LLM.from_config(config_of(family, split)) as several:
                with measure() as first:
                    assert agree(one, several, PROMPTS).within(BOUND), split
                assert first.replays, split
                assert hccl(first.captured) <= GRAPHED, split
                assert not first.cpu_fallbacks
                assert agree(one, several, PROMPTS[:1]).within(BOUND), split  # from the prefix cache
                assert_a_step_copies_back_once(several, split)


def hccl(counts: dict[str, int]) -> set[str]:
    return {name for name in counts if name.startswith("hccl:")}


def assert_a_step_copies_back_once(llm: LLM, split: Split) -> None:
    """Of the first rank; what other stages and replicas computed comes from device to device."""
    _, few, many = (generated(llm, tokens) for tokens in (2, 2, 10))  # the first one captures
    assert many.replays - few.replays == 8, split
    assert many.copies["device_to_host"][0] - few.copies["device_to_host"][0] == 8, split
    # The replicas' rows are put in the order of the step by an index from the host.
    waits = 2 if split.dp > 1 else 1
    assert many.synchronisations - few.synchronisations == 8 * waits, split
    between = Counter(many.launches)
    between.subtract(few.launches)
    received = 8 if split.pp > 1 or split.dp > 1 else 0
    assert between["hccl:receive"] == received, split
    assert between["hccl:send"] == (8 if split.pp > 1 else 0), split


def generated(llm: LLM, tokens: int) -> Report:
    with measure() as report:
        llm.generate(PROMPTS[1:3], SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True))
    return report


@pytest.mark.parametrize(
    ("family", "split"),
    [pytest.param("deepseek_coder", Split(2, pp=2), marks=[] if DUO else pytest.mark.long)]
    + ([] if DUO else [pytest.param("deepseek_moe", Split(dp=2, ep=2))]),
    ids=lambda value: value.describe() if isinstance(value, Split) else value,
)
def test_graphs_equal_launching_one_by_one(family: str, split: Split) -> None:
    wanted = SamplingParams(temperature=0, max_tokens=10, logprobs=1, ignore_eos=True)
    found = []
    for eager in (False, True):
        with LLM.from_config(config_of(family, split, enforce_eager=eager)) as llm:
            found.append([output.outputs[0] for output in llm.generate(PROMPTS, wanted)])
    graphs, one_by_one = found
    assert [o.token_ids for o in graphs] == [o.token_ids for o in one_by_one]
    assert [o.cumulative_logprob for o in graphs] == [o.cumulative_logprob for o in one_by_one]


@pytest.mark.chip("ascend910b")
@pytest.mark.parametrize("split", [Split(2, ep=2), pytest.param(Split(2, dp=2, ep=4), marks=pytest.mark.long)])
def test_tokens_sent_to_their_experts_ranks_alone(split: Split) -> None:
    """Prompts go by all-to-all, whose sizes depend on the tokens; captured steps never do."""
    sent = config_of("deepseek_v3", split, expert_dispatch="all_to_all")
    with LLM.from_config(config_of("deepseek_v3")) as one, LLM.from_config(sent) as several, measure() as report:
        assert agree(one, several, PROMPTS).within(BOUND)
    assert "hccl:alltoall" in report.launches
    assert report.replays
    assert hccl(report.captured) <= GRAPHED
    assert not report.cpu_fallbacks


def test_a_row_of_the_matrix_and_a_cache_that_is_measured(capfd: pytest.CaptureFixture[str]) -> None:
    """Past no door: the row of the family's own checkpoints offers tp 2."""
    variant = next(v for v in get_registry().families["deepseek_coder"].variants if v.bundled)
    weights = bundled_directory(variant)
    assert weights is not None
    asked = custom("deepseek_coder", weights, hardware=PRODUCT, dtype="float16", max_model_len=128, max_num_seqs=8)
    with LLM(**asked) as one, LLM(**asked, tensor_parallel_size=2) as two:
        assert agree(one, two, PROMPTS).within(BOUND)
        ranks = two.engine.explain()["ranks"]
        assert [rank["device"] for rank in ranks] == ["npu:0", "npu:1"]
        assert len({rank["kv_cache_bytes"] for rank in ranks}) == 1
        assert two.engine.runner.activations  # type: ignore[attr-defined]
    assert "[rank1]" not in capfd.readouterr().err  # what torch_npu warns of everywhere, the first rank says


SCHEMES: dict[str, dict[str, Any]] = {"w8a16": {"bits": 8}, "w8a8": {"bits": 8, "activations": 8}}
QUANTIZED = [("deepseek_coder", "6.7b", "w8a8", Split(2))]
if not DUO:
    QUANTIZED = [("deepseek_coder", "6.7b", "w8a16", Split(2)), ("deepseek_moe", "16b", "w8a8", Split(2, ep=2))]


@pytest.mark.parametrize(("family", "size", "scheme", "split"), QUANTIZED)
def test_quantized(family: str, size: str, scheme: str, split: Split, tmp_path: Path) -> None:
    spec = get_registry().families[family]
    variant = spec.variant(size)
    assert variant is not None
    assert variant.config is not None
    source = write_random_model(tmp_path / "source", spec, rank_shape(variant.config, Split(4)))
    weights, _ = quantize_checkpoint(source, tmp_path, **SCHEMES[scheme])
    options = custom(family, weights, strict_kernels=True)
    with (
        LLM.from_config(config_of(family, **options)) as one,
        LLM.from_config(config_of(family, split, **options)) as two,
    ):
        assert agree(one, two, PROMPTS).within(INT8_BOUND if scheme == "w8a8" else BOUND)


@pytest.mark.chip("ascend910b")
@pytest.mark.parametrize("family", ["deepseek_coder", pytest.param("deepseek_moe", marks=pytest.mark.long)])
def test_int8_keys_and_values(family: str) -> None:
    options = {"kv_cache_dtype": "int8", "allow_experimental": True}
    with (
        LLM.from_config(config_of(family, **options)) as one,
        LLM.from_config(config_of(family, Split(2), **options)) as two,
    ):
        assert agree(one, two, PROMPTS).within(CACHED_BOUND)


@pytest.mark.chip("ascend910b")
def test_a_checkpoint_that_is_cut_for_two_ranks(tmp_path: Path) -> None:
    variant = next(v for v in get_registry().families["deepseek_moe"].variants if v.bundled)
    source = bundled_directory(variant)
    assert source is not None
    convert(plan_conversion(source, ConvertOptions("ascend-mp", tp=2)), tmp_path / "cut")
    with (
        LLM.from_config(config_of("deepseek_moe")) as one,
        LLM.from_config(config_of("deepseek_moe", Split(2), **custom("deepseek_moe", tmp_path / "cut"))) as two,
    ):
        assert agree(one, two, PROMPTS).within(BOUND)


def test_more_ranks_than_devices_are_refused() -> None:
    config = unchecked_config(config_of("deepseek_coder"), tensor_parallel_size=99, world_size=99)
    with pytest.raises(HardwareError, match=r"99 ranks of this host need 99 devices of .* torch sees \d+;"):
        LLM.from_config(config)
