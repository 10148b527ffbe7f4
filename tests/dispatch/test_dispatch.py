"""From a request to a checked config: what is refused, in which order, and what the config says."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from npu_zoo.api import EngineSpec, FamilySpec, FeatureRow, KernelSpec, VariantSpec, hookimpl
from npu_zoo.core.config import EngineArgs, EngineConfig
from npu_zoo.core.errors import ConfigError, HardwareError, PluginError, UnsupportedError, UsageError, WeightsError
from npu_zoo.core.parallel import Split
from npu_zoo.dispatch import check, create_engine, parse_bytes, resolve
from npu_zoo.registry import Candidate, Registry, build_registry, find_candidates
from npu_zoo.testing.door import unchecked_config

Weights = Callable[..., Path]


class Plugin:
    """A family with rows for several devices of a CPU, and one kernel of its own."""

    @hookimpl
    def register_families(self) -> list[FamilySpec]:
        row = FeatureRow(
            sizes=("small",),
            hardware=("cpu",),
            dtype=("float16",),
            world_size=(1, 2, 3, 4),
            parallelism=("tp", "pp", "tp+pp", "tp+ep", "dp"),
            replicated_kv_heads=True,
            attention=("paged",),
            source="zoo",
        )
        return [
            FamilySpec(
                name="wide",
                title="Wide",
                architectures=("LlamaForCausalLM",),
                model="nowhere.model:Model",
                variants=(VariantSpec(name="small", size="small", stop_token_ids=(7, 2)),),
                default_variant="small",
                rows=(row, row.model_copy(update={"dtype": ("bfloat16",), "world_size": (4,)})),
            )
        ]

    @hookimpl
    def register_kernels(self) -> list[KernelSpec]:
        return [
            KernelSpec(
                name="wide_norm",
                operation="rms_norm",
                chip="cpu",
                dtypes=("float16",),
                implementation="nowhere.kernels:norm",
                priority=99,
                requires=("a_module_that_is_not_installed",),
            )
        ]


@pytest.fixture(scope="module")
def registry() -> Registry:
    registry = build_registry([candidate for candidate in find_candidates("") if candidate.builtin])
    assert registry.add(Candidate("wide", Plugin, "package.plugin")).error is None
    return registry


def config_of(weights: Path, model: str = "deepseek_coder", **asked: Any) -> EngineConfig:
    return resolve(EngineArgs(**{"model": model, "weights": str(weights), "hardware": "cpu", **asked}))


PROBE = """
import json, sys
opened = []
sys.addaudithook(lambda event, args: opened.append(str(args[0])) if event == "open" else None)
from npu_zoo.core.config import EngineArgs
from npu_zoo.core.errors import UnsupportedError
from npu_zoo.dispatch import check, resolve
directory = sys.argv[1]
demo = resolve(EngineArgs(model="deepseek_coder", hardware="cpu"))
given = resolve(EngineArgs(model="deepseek_coder", hardware="cpu", weights=directory))
assert check(EngineArgs(model="deepseek_coder:33b", hardware="atlas_800i_a2")).supported
heavy = sorted({"torch", "torch_npu", "transformers", "safetensors", "numpy"} & set(sys.modules))
print(json.dumps({"heavy": heavy, "opened": [name for name in opened if directory in name or "/demo/" in name]}))
"""


def test_resolve_imports_no_torch_and_reads_no_weight(weights: Weights) -> None:
    directory = weights({"eos_token_id": 3})
    done = subprocess.run(
        [sys.executable, "-c", PROBE, str(directory)], capture_output=True, text=True, check=True, timeout=60
    )
    found = json.loads(done.stdout)
    assert found["heavy"] == []
    assert {Path(name).name for name in found["opened"]} == {
        "config.json",
        "generation_config.json",
        "tokenizer_config.json",
    }


@pytest.mark.parametrize(
    "checkpoint",
    [{}, {"architectures": ["GPT2LMHeadModel"]}, {"quantization_config": {"quant_method": "gptq"}}],
    ids=str,
)
def test_the_matrix_refuses_before_the_weights_are_looked_at(weights: Weights, checkpoint: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedError, match="quantization=w8a8"):
        config_of(weights(**checkpoint), quantization="w8a8")


def test_the_matrix_refuses_before_weights_are_missed() -> None:
    with pytest.raises(UnsupportedError, match="quantization=w8a8"):
        resolve(EngineArgs(model="deepseek_coder:33b", hardware="cpu", quantization="w8a8"))


def test_all_failing_axes_are_named_at_once(weights: Weights) -> None:
    with pytest.raises(UnsupportedError) as raised:
        config_of(weights(), quantization="w8a8", kv_cache_dtype="int8", serving="tgi", world_size=5)
    assert [r.axis for r in raised.value.verdict.reasons] == ["world_size", "quantization", "kv_cache_dtype", "serving"]
    assert raised.value.verdict.alternatives
    assert raised.value.exit_code == 3


def test_a_family_that_takes_no_other_shape_wants_its_variant_named(registry: Registry, weights: Weights) -> None:
    with pytest.raises(UsageError, match="matches no variant of wide; name one: small"):
        resolve(EngineArgs(model="wide", weights=str(weights()), hardware="cpu"), registry)


def test_missing_weights_name_where_to_get_them() -> None:
    with pytest.raises(WeightsError) as raised:
        resolve(EngineArgs(model="deepseek_coder:6.7b-base", hardware="cpu"))
    message = str(raised.value)
    assert "npu-zoo pull deepseek_coder:6.7b-base --to DIR" in message
    assert "--source modelscope" in message
    assert "--model deepseek_coder:demo runs without weights" in message


def test_every_difference_from_the_named_variant_is_listed(weights: Weights) -> None:
    with pytest.raises(WeightsError) as raised:
        config_of(weights(rope_theta=5.0, tie_word_embeddings=True), "deepseek_coder:1.3b-base")
    lines = [line.strip() for line in str(raised.value).splitlines()[1:-1]]
    assert lines == [
        "hidden_size: 96, not 2048",
        "intermediate_size: 64, not 5504",
        "num_hidden_layers: 2, not 24",
        "num_attention_heads: 6, not 16",
        "num_key_value_heads: 2, not 16",
        "head_dim: 16, not 128",
        "vocab_size: 99, not 32256",
        "rope_theta: 5.0, not 100000.0",
        "rope_scaling: none 1, not linear 4",
        "tie_word_embeddings: True, not False",
    ]


def _refusal(registry: Registry, directory: Path, **asked: Any) -> Exception:
    with pytest.raises((UnsupportedError, HardwareError)) as raised:
        resolve(EngineArgs(model="wide:small", weights=str(directory), hardware="cpu", dtype="fp16", **asked), registry)
    return raised.value


def test_a_head_for_each_rank_or_a_rank_for_each_head_is_no_cut(registry: Registry, weights: Weights) -> None:
    directory = weights(num_attention_heads=8, num_key_value_heads=2, head_dim=12)
    for tp in (2, 4):
        asked = EngineArgs(
            model="wide:small", weights=str(directory), hardware="cpu", dtype="fp16", tensor_parallel_size=tp
        )
        assert resolve(asked, registry).head_layout == (8 // tp, max(1, 2 // tp), 12)


NARROW = EngineSpec(
    name="narrow",
    implementation="nowhere.engine:Engine",
    chips=("any",),
    parallelism=("tp",),
    max_world_size={"cpu": 2},
)


@pytest.fixture
def with_narrow_engine(registry: Registry) -> Iterator[Registry]:
    """An engine that knows of tensor parallelism alone, and takes two devices."""
    registry.engines["narrow"] = NARROW
    yield registry
    del registry.engines["narrow"]


@pytest.mark.parametrize(
    ("asked", "named"),
    [
        ({"pipeline_parallel_size": 2}, "--pp 2"),
        ({"data_parallel_size": 2}, "--dp 2"),
        ({"tensor_parallel_size": 2, "pipeline_parallel_size": 2}, "--pp 2"),
    ],
)
def test_ways_of_sharing_that_an_engine_has_not(
    with_narrow_engine: Registry, weights: Weights, asked: dict[str, int], named: str
) -> None:
    assert check(EngineArgs(model="wide:small", hardware="cpu", dtype="fp16", **asked), with_narrow_engine).supported
    refusal = _refusal(with_narrow_engine, weights(), engine="narrow", **asked)
    assert isinstance(refusal, HardwareError)
    assert refusal.exit_code == 4
    assert f"engine narrow shares a model by tp alone in this version, and the request has {named}" in str(refusal)


def test_more_devices_than_an_engine_takes(with_narrow_engine: Registry, weights: Weights) -> None:
    directory = weights(num_attention_heads=8, num_key_value_heads=4, head_dim=12)
    refusal = _refusal(with_narrow_engine, directory, engine="narrow", world_size=4)
    assert "engine narrow runs on at most 2 device(s) of cpu in this version, and the request takes 4" in str(refusal)


@pytest.mark.parametrize(
    ("asked", "due"),
    [
        ({}, Split()),
        ({"world_size": 2}, Split(2)),
        ({"pipeline_parallel_size": 2}, Split(pp=2)),
        ({"data_parallel_size": 4}, Split(dp=4)),
        ({"tensor_parallel_size": 2, "pipeline_parallel_size": 2}, Split(2, 2)),
    ],
)
def test_the_split_is_in_the_config(registry: Registry, weights: Weights, asked: dict[str, int], due: Split) -> None:
    args = EngineArgs(model="wide:small", weights=str(weights()), hardware="cpu", dtype="fp16", **asked)
    config = resolve(args, registry)
    assert config.split == due
    assert config.world_size == due.world_size


def test_the_machine_is_not_asked_where_nothing_is_bound(weights: Weights, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("asked")

    monkeypatch.setattr("npu_zoo.parallel.numa.this_topology", refuse)
    assert config_of(weights()).binding == ("rank 0: not bound; --bind none",)


@pytest.mark.parametrize("given", [True, False])
def test_memory_is_looked_at_once(weights: Weights, monkeypatch: pytest.MonkeyPatch, given: bool) -> None:
    asked = []
    monkeypatch.setattr("npu_zoo.dispatch.total_memory", lambda: asked.append(1) or 1 << 40)
    chosen = {"weights": str(weights())} if given else {}
    resolve(EngineArgs(model="deepseek_coder", hardware="cpu", **chosen))
    assert asked == [1]


def test_the_smallest_world_is_that_of_the_dtype(registry: Registry) -> None:
    worlds = {
        dtype: check(EngineArgs(model="wide:small", hardware="cpu", dtype=dtype), registry).request["world_size"]
        for dtype in ("fp16", "bf16")
    }
    assert worlds == {"fp16": 1, "bf16": 4}


def test_hardware_whose_software_is_not_installed(weights: Weights, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("npu_zoo.dispatch.is_importable", lambda module: module != "torch_npu")
    needs = r"engine native needs torch_npu on atlas_800i_a2: pip install 'npu-zoo\[npu\]'"
    with pytest.raises(HardwareError, match=needs):
        config_of(weights(), hardware="atlas_800i_a2", dtype="float16", allow_experimental=True)


LAUNCHED = {
    "RANK": "2", "WORLD_SIZE": "4", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "10.0.0.1",
    "MASTER_PORT": "20030",
}  # fmt: skip


def test_a_machine_of_fewer_devices_than_ranks(weights: Weights, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("npu_zoo.dispatch.is_importable", lambda module: True)
    monkeypatch.setattr("npu_zoo.selection.is_importable", lambda module: True)
    monkeypatch.setattr("npu_zoo.dispatch.ascend_devices", lambda: [0])
    asked = {"hardware": "atlas_800i_a2", "dtype": "float16", "tensor_parallel_size": 2, "allow_experimental": True}
    with pytest.raises(HardwareError, match="2 ranks would run on this machine, and it shows 1 devices; several nodes"):
        config_of(weights(head_dim=64), **asked)
    monkeypatch.setattr("npu_zoo.dispatch.ascend_devices", lambda: [0, 1])
    assert config_of(weights(head_dim=64), **asked).world_size == 2


def test_the_ranks_that_a_launcher_started_are_bound(weights: Weights, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in LAUNCHED.items():
        monkeypatch.setenv(name, value)
    config = config_of(weights(), tensor_parallel_size=2, pipeline_parallel_size=2, bind="auto")
    assert len(config.rank_bindings) == 2
    with pytest.raises(ConfigError, match="WORLD_SIZE=4: tp 2 × pp 1 × dp 1 takes 2 ranks"):
        config_of(weights(), tensor_parallel_size=2)


def test_an_unknown_engine(weights: Weights) -> None:
    with pytest.raises(UsageError, match="unknown engine 'atb'; registered: native"):
        config_of(weights(), engine="atb")


def test_what_the_engine_needs_and_is_not_installed(weights: Weights, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("npu_zoo.dispatch.is_importable", lambda module: module != "transformers")
    with pytest.raises(HardwareError, match=r"engine native needs transformers: pip install 'npu-zoo\[run\]'"):
        config_of(weights())


def test_a_kernel_that_cannot_be_had_is_passed_over_with_its_reason(registry: Registry, weights: Weights) -> None:
    config = resolve(EngineArgs(model="wide:small", weights=str(weights()), hardware="cpu"), registry)
    (norm,) = [choice for choice in config.kernels if choice.operation == "rms_norm"]
    assert "wide_norm: a_module_that_is_not_installed is not installed" in norm.passed_over


def test_strict_kernels_refuse_the_reference(weights: Weights) -> None:
    directory = weights()
    assert not any(choice.fallback for choice in config_of(directory, strict_kernels=True).kernels)
    on_cuda = {"hardware": "cuda", "allow_experimental": True}
    with pytest.raises(HardwareError, match=r"would fall back to the reference: .*rms_norm \(.*cpu_rms_norm: for cpu"):
        config_of(directory, strict_kernels=True, **on_cuda)
    notes = config_of(directory, **on_cuda).notes
    assert any(note.startswith("reference kernels, not tuned for this chip: add_rms_norm") for note in notes)
    assert "this runs an experimental row of the matrix (source: zoo)" in notes


def test_experimental_rows_are_asked_for(weights: Weights) -> None:
    with pytest.raises(UnsupportedError, match="--allow-experimental runs it"):
        config_of(weights(), hardware="cuda")


def test_notes_say_which_checkpoint_runs(weights: Weights) -> None:
    (demo,) = resolve(EngineArgs(model="deepseek_coder", hardware="cpu")).notes
    assert (
        "no weights were given: this is the small demo checkpoint of DeepSeek-Coder; real weights: `npu-zoo pull"
        in demo
    )
    directory = weights()
    lacking = "the checkpoint brings no chat template; chats take DeepSeek-Coder's own"
    assert config_of(directory).notes == (lacking, "the weights are taken for deepseek_coder:custom")
    (directory / "tokenizer_config.json").write_text('{"chat_template": "{{ messages }}"}')
    assert config_of(directory, "deepseek_coder:custom").notes == ()


def test_the_defaults_of_a_config(weights: Weights) -> None:
    config = config_of(weights())
    assert (config.max_num_seqs, config.max_num_batched_tokens, config.max_model_len) == (64, 2048, 512)
    assert (config.max_model_len_asked, config.kv_cache_memory, config.kv_cache_fraction) == (False, None, 0.5)
    assert (config.enable_prefix_caching, config.enable_chunked_prefill, config.seed) == (True, True, 0)
    assert config.prefault_kv_cache is False
    assert (config.dtype, config.device, config.world_size) == ("float16", "cpu", 1)
    assert (config.expert_dispatch, config.collective_timeout) == ("all_gather", 300.0)
    assert config.head_layout == (6, 2, 16)
    assert not config.bundled
    assert config_of(weights(), attention="flash").enable_prefix_caching is False


def test_what_was_asked_is_in_the_config(weights: Weights) -> None:
    config = config_of(
        weights(), max_num_seqs=3, max_num_batched_tokens=77, max_model_len=99, seed=5, kv_cache_memory="3MiB",
        kv_cache_fraction=0.25, enable_prefix_caching=False, block_size=8, threads=2, prefault_kv_cache=True,
        collective_timeout=12.5, expert_dispatch="all_gather",
    )  # fmt: skip
    assert (config.max_num_seqs, config.max_num_batched_tokens, config.max_model_len, config.seed) == (3, 77, 99, 5)
    assert (config.kv_cache_memory, config.kv_cache_fraction) == (3 * 2**20, 0.25)
    assert (config.enable_prefix_caching, config.attention_choice.block_size, config.threads) == (False, 8, 2)
    assert (config.collective_timeout, config.expert_dispatch) == (12.5, "all_gather")
    assert config.max_model_len_asked
    assert config.prefault_kv_cache


def test_whole_prompts_must_fit_a_step(weights: Weights) -> None:
    directory = weights(max_position_embeddings=4096)
    whole = config_of(directory, enable_chunked_prefill=False)
    assert (whole.max_num_batched_tokens, whole.max_model_len) == (4096, 4096)
    with pytest.raises(ConfigError, match="max_num_batched_tokens=100 is below max_model_len=4096"):
        config_of(directory, enable_chunked_prefill=False, max_num_batched_tokens=100)
    short = config_of(directory, enable_chunked_prefill=False, max_num_batched_tokens=100, max_model_len=100)
    assert short.max_num_batched_tokens == 100


def test_ids_that_end_a_text_come_from_all_that_name_them(registry: Registry, weights: Weights) -> None:
    directory = weights({"eos_token_id": [2, 5]}, eos_token_id=3)
    assert resolve(EngineArgs(model="wide:small", weights=str(directory), hardware="cpu"), registry).stop_token_ids == (
        3,
        2,
        5,
        7,
    )


def test_prefix_caching_is_refused_only_where_it_is_asked_for(weights: Weights) -> None:
    verdict = check(EngineArgs(model="deepseek_coder", hardware="cpu", attention="flash", enable_prefix_caching=True))
    (reason,) = verdict.reasons
    assert (reason.axis, reason.value) == ("attention", "flash")
    assert "enable_prefix_caching=True: its keys and values are stored per sequence" in reason.message
    assert verdict.alternatives[0]["attention"] == "paged"
    assert check(EngineArgs(model="deepseek_coder", hardware="cpu", attention="flash")).supported


@pytest.mark.parametrize(
    ("text", "due"),
    [
        (None, None), (1, 1), ("1", 1), ("2GiB", 2 * 2**30), ("2 gib", 2 * 2**30), ("1.5MiB", 3 * 2**19),
        ("500MB", 500_000_000), ("500M", 500_000_000), ("3k", 3000), ("4Ki", 4096), ("1TiB", 2**40), ("7B", 7),
    ],
)  # fmt: skip
def test_sizes(text: Any, due: int | None) -> None:
    assert parse_bytes(text) == due


@pytest.mark.parametrize("text", ["", "lots", "GiB", "-1GiB", "1 2", "0", 0, "1i", "1XB", True, "0.1", "1e3"])
def test_sizes_that_are_none(text: Any) -> None:
    with pytest.raises(ConfigError, match="is no size"):
        parse_bytes(text)


def test_an_engine_that_cannot_be_imported(weights: Weights) -> None:
    broken = unchecked_config(config_of(weights()), engine_class="npu_zoo.engine.nowhere:Engine")
    with pytest.raises(PluginError, match="nowhere"):
        create_engine(broken)


def test_a_block_size_is_refused_where_there_are_no_blocks() -> None:
    with pytest.raises(ConfigError, match="block_size=16 is for --attention paged"):
        check(EngineArgs(model="deepseek_coder", hardware="cpu", attention="flash", block_size=16))
