"""The Python API as it is promised, and what it says where a request cannot be met."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import npu_zoo
from npu_zoo import LLM, SamplingParams
from npu_zoo.core.config import EngineArgs
from npu_zoo.core.errors import (
    ConfigError,
    EngineError,
    HardwareError,
    NpuZooError,
    PromptError,
    UnknownModelError,
    UnsupportedError,
    UsageError,
    WeightsError,
)
from npu_zoo.dispatch import create_engine, resolve
from npu_zoo.engine import device
from npu_zoo.testing.checkpoints import write_checkpoint
from npu_zoo.testing.door import unchecked_config

Launch = Callable[..., LLM]
GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
BYTES_PER_TOKEN = 2 * 2 * 2 * 16 * 4


@pytest.fixture(scope="module")
def promised(checkpoint: Path) -> LLM:
    return LLM(
        model="deepseek_coder",
        weights=str(checkpoint),
        dtype="float32",
        hardware="cpu",
        tensor_parallel_size=1,
        block_size=None,
        max_model_len=512,
        max_num_seqs=64,
        max_num_batched_tokens=2048,
        enable_prefix_caching=True,
        enable_chunked_prefill=True,
        seed=0,
        threads=1,
    )


def test_generate(promised: LLM) -> None:
    outputs = promised.generate(["def f(x):", "import"], SamplingParams(max_tokens=5, n=2, logprobs=1, ignore_eos=True))
    assert len(outputs) == 2
    for output in outputs:
        assert output.finished
        assert output.prompt_token_ids
        for completion in output.outputs:
            assert len(completion.token_ids) == 5
            assert completion.logprobs is not None
            assert completion.finish_reason == "length"
            assert isinstance(completion.text, str)
    ids = [output.prompt_token_ids for output in outputs]
    again = promised.generate(ids, SamplingParams(max_tokens=5, n=2, logprobs=1, ignore_eos=True))
    assert [o.outputs[1].token_ids for o in again] == [o.outputs[1].token_ids for o in outputs]


def test_sampling_params_are_the_default_ones_where_none_are_given(promised: LLM) -> None:
    assert 1 <= len(promised.generate("def f(x):")[0].outputs[0].token_ids) <= 16


def test_chat(promised: LLM) -> None:
    messages = [{"role": "user", "content": "print 1"}]
    (output,) = promised.chat(messages, GREEDY)
    two = promised.chat([messages, [{"role": "system", "content": "be brief"}, *messages]], GREEDY)
    assert two[0].outputs == [output.outputs[0]]
    assert two[1].prompt_token_ids != output.prompt_token_ids
    assert output.prompt_token_ids.count(output.prompt_token_ids[0]) == 1
    assert list(promised.stream_chat(messages, GREEDY))[-1].outputs == output.outputs
    with pytest.raises(PromptError, match="lacks a role"):
        promised.chat([{"content": "print 1"}], GREEDY)


def test_stream(promised: LLM) -> None:
    states = [len(output.outputs[0].token_ids) for output in promised.stream("def f(x):", GREEDY)]
    assert states == [1, 2, 3, 4, 5, 6]
    assert sum(1 for _ in promised.stream([40, 41])) <= 16


def test_infill(promised: LLM) -> None:
    (output,) = promised.infill("def f(x):\n    return ", "\n", GREEDY)
    assert output.prompt_token_ids == promised.fim_prompt("def f(x):\n    return ", "\n")
    both = promised.infill(["def f(x):\n    return ", "a"], ["\n", "b"], GREEDY)
    assert both[0].outputs == output.outputs
    with pytest.raises(PromptError, match="2 prefixes and 1 suffixes"):
        promised.infill(["a", "b"], "c", GREEDY)


def test_infill_of_a_checkpoint_without_the_tokens(launch: Launch, tmp_path: Path) -> None:
    llm = launch(write_checkpoint(tmp_path / "plain"))
    with pytest.raises(PromptError, match="cannot fill in the middle"):
        llm.infill("a", "b", GREEDY)


def test_it_is_a_context_manager(launch: Launch, checkpoint: Path) -> None:
    with launch(checkpoint) as llm:
        llm.generate("a", GREEDY)
    with pytest.raises(EngineError, match="shut down"):
        llm.generate("a", GREEDY)


def test_explain_is_plain_data(promised: LLM) -> None:
    found = promised.engine.explain()
    assert json.loads(json.dumps(found)) == found
    assert found["parameter_bytes"] == 4 * (2 * 320 * 64 + 64 + 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 96 + 2 * 64))
    assert found["max_model_len"] == 512
    assert found["kv_cache_bytes"] == found["kv_cache_tokens"] * BYTES_PER_TOKEN


def test_the_size_of_a_tied_model_counts_its_embedding_once(launch: Launch, tmp_path: Path) -> None:
    plain = launch(write_checkpoint(tmp_path / "plain")).engine.explain()["parameter_bytes"]
    tied = launch(write_checkpoint(tmp_path / "tied", tie_word_embeddings=True)).engine.explain()
    assert plain - tied["parameter_bytes"] == 4 * 320 * 64


def test_public_names() -> None:
    assert npu_zoo.LLM is LLM
    assert npu_zoo.SamplingParams is SamplingParams


REFUSED: list[tuple[dict[str, Any], type[NpuZooError], str]] = [
    ({"max_model_length": 3}, ConfigError, r"unknown key 'max_model_length'.*did you mean max_model_len\?"),
    ({"max_num_seqs": "many"}, ConfigError, "max_num_seqs='many'"),
    ({"model": "deepseek_code"}, UnknownModelError, "deepseek_coder"),
    ({"model": "deepseek_coder:34b"}, UnknownModelError, "33b"),
    ({"dtype": "int4"}, UsageError, "unknown dtype 'int4'; known: float32"),
    ({"hardware": "atlas_900"}, UsageError, "unknown hardware 'atlas_900'; known: "),
    ({"tensor_parallel_size": 3}, UnsupportedError, "tensor_parallel_size=3 does not divide deepseek_coder:custom"),
    ({"world_size": 5}, UnsupportedError, "world_size=5 is not supported by deepseek_coder:custom on cpu"),
    ({"quantization": "w8a8"}, UnsupportedError, "quantization=w8a8 is not supported"),
    ({"max_model_len": 513}, UnsupportedError, "long_sequence=true is not supported"),
    ({"attention": "flash", "enable_prefix_caching": True}, UnsupportedError, "per sequence and cannot be shared"),
    ({"block_size": 3}, HardwareError, "block size 3 is none of 1, 2, 4"),
    ({"engine": "mindie"}, UsageError, "unknown engine 'mindie'; registered: native"),
    ({"max_model_len": 512, "kv_cache_memory": 511 * 512, "block_size": 16}, HardwareError, "for 496 tokens; lower"),
    ({"kv_cache_memory": 1000}, HardwareError, "enough for 0 tokens"),
    ({"kv_cache_memory": "lots"}, ConfigError, "kv_cache_memory='lots' is no size"),
    ({"enable_chunked_prefill": False, "max_num_batched_tokens": 100}, ConfigError, "would never fit a step"),
    ({"weights": "/nowhere"}, WeightsError, "/nowhere has no config.json"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "kind", "message"), REFUSED, ids=lambda value: str(value)[:60])
def test_refusals(checkpoint: Path, options: dict[str, Any], kind: type[NpuZooError], message: str) -> None:
    base = {"model": "deepseek_coder", "weights": str(checkpoint), "hardware": "cpu", "dtype": "float32", "threads": 1}
    with pytest.raises(kind, match=message):
        LLM(**{**base, **options})


def test_more_cache_than_there_is_memory(launch: Launch, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("npu_zoo.engine.device.available_memory", lambda: 2**20)
    with pytest.raises(HardwareError, match="does not fit"):
        launch(checkpoint, kv_cache_memory="1TiB")
    monkeypatch.setattr("npu_zoo.engine.device.available_memory", lambda: 1000)
    with pytest.raises(HardwareError, match="take a smaller variant"):
        launch(checkpoint)


def test_a_small_model_takes_few_threads_and_leaves_the_next_one_its_own(
    launch: Launch, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "_TORCH_THREADS", 4)
    launch(checkpoint, threads=None)
    assert torch.get_num_threads() == 1
    assert [device.default_threads(size * 2**20) for size in (0, 16, 33, 4096)] == [1, 1, 2, 4]


def test_flash_runs_without_a_shared_cache(launch: Launch, checkpoint: Path, promised: LLM) -> None:
    flash = launch(checkpoint, attention="flash")
    assert flash.generate("def f(x):", GREEDY)[0].outputs == promised.generate("def f(x):", GREEDY)[0].outputs
    assert launch(checkpoint, attention="flash", enable_prefix_caching=False).engine.explain()["kv_cache_tokens"]


@pytest.mark.parametrize("attention", ["paged", "flash"])
def test_an_unset_length_is_what_the_memory_holds(launch: Launch, checkpoint: Path, attention: str) -> None:
    memory = 100 * BYTES_PER_TOKEN
    llm = launch(checkpoint, attention=attention, max_model_len=None, kv_cache_memory=memory)
    longest = llm.engine.explain()["max_model_len"]
    assert longest == (96 if attention == "paged" else 100)
    params = SamplingParams(temperature=0, max_tokens=None, ignore_eos=True)
    outputs = llm.generate([[5] * (longest - 3)] * 3, params)
    assert [len(output.outputs[0].token_ids) for output in outputs] == [3, 3, 3]
    with pytest.raises(PromptError, match=f"max_model_len={longest} leaves room"):
        llm.generate([[5] * longest], params)


def test_an_unset_length_is_the_checkpoints(launch: Launch, checkpoint: Path) -> None:
    assert launch(checkpoint, max_model_len=None, kv_cache_memory=None).engine.explain()["max_model_len"] == 512


def test_another_shape_than_the_variants(checkpoint: Path) -> None:
    with pytest.raises(WeightsError) as raised:
        LLM("deepseek_coder:1.3b-base", weights=str(checkpoint), hardware="cpu", dtype="float32")
    message = str(raised.value)
    for line in ("hidden_size: 64, not 2048", "num_hidden_layers: 2, not 24", "num_key_value_heads: 2, not 16",
                 "head_dim: 16, not 128", "vocab_size: 320, not 32256"):  # fmt: skip
        assert line in message
    assert "--model deepseek_coder:custom" in message


def rewritten(checkpoint: Path, directory: Path, **changes: Any) -> Path:
    """A copy of the checkpoint with changes in its config.json."""
    shutil.copytree(checkpoint, directory)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, **changes}))
    return directory


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "architecture: GPT2LMHeadModel, and deepseek_coder loads LlamaF"),
        ({"quantization_config": {"quant_method": "awq"}}, "is quantized, which deepseek_coder:custom does not load"),
        ({"hidden_act": "gelu"}, "activation is gelu; this decoder has silu"),
        ({"attention_bias": True}, "biases; this decoder has none"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "original_max_position_embeddings"),
        ({"rope_parameters": {"rope_type": "llama3"}}, "rope scaling 'llama3'"),
        ({"num_hidden_layers": 3}, r"9 missing:(.|\n)*model.layers.2.self_attn.q_proj.weight"),
        ({"num_hidden_layers": 1}, r"9 unexpected:(.|\n)*model.layers.1.mlp.down_proj.weight"),
        ({"intermediate_size": 97}, r"model.layers.0.mlp.up_proj.weight: \[96, 64\] in the checkpoint, \[97, 64\] due"),
        ({"hidden_size": "wide"}, "config.json lacks hidden_size"),
        ({"head_dim": 16.5}, "values of the wrong form"),
    ],
    ids=str,
)
def test_checkpoints_that_are_not_what_they_say(
    checkpoint: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    directory = rewritten(checkpoint, tmp_path / "weights", **changes)
    with pytest.raises(WeightsError, match=message):
        LLM("deepseek_coder:custom", weights=str(directory), hardware="cpu", dtype="float32", threads=1)


def test_code_in_a_pickled_checkpoint_is_not_executed(checkpoint: Path, tmp_path: Path) -> None:
    directory, mark = tmp_path / "weights", tmp_path / "executed"
    shutil.copytree(checkpoint, directory)
    (directory / "model.safetensors").unlink()

    class Touch:
        def __reduce__(self) -> Any:
            return Path.touch, (mark,)

    torch.save({"model.norm.weight": Touch()}, directory / "pytorch_model.bin")
    with pytest.raises(WeightsError, match=r"pytorch_model\.bin holds code .* it was not executed"):
        LLM("deepseek_coder:custom", weights=str(directory), hardware="cpu")
    assert not mark.exists()


def test_an_engine_takes_only_what_was_checked(checkpoint: Path) -> None:
    config = resolve(EngineArgs(model="deepseek_coder", weights=str(checkpoint), hardware="cpu", dtype="float32"))
    with pytest.raises(ConfigError, match="made by npu_zoo"):
        type(config)(**{name: getattr(config, name) for name in config.__dataclass_fields__})
    changed = unchecked_config(config, max_model_len=64, max_model_len_asked=True, threads=1)
    assert create_engine(changed).explain()["max_model_len"] == 64
    with pytest.raises(TypeError, match="max_length"):
        unchecked_config(config, max_length=64)


def test_loading_reports_its_progress(launch: Launch, checkpoint: Path) -> None:
    heard: list[tuple[str, int, int]] = []
    config = resolve(EngineArgs(model="deepseek_coder", weights=str(checkpoint), hardware="cpu", dtype="float32"))
    LLM.from_config(unchecked_config(config, threads=1), progress=lambda *args: heard.append(args))
    assert {stage for stage, _, _ in heard} == {"loading weights"}
    assert [done for _, done, _ in heard] == sorted(done for _, done, _ in heard)
    assert heard[-1][1] == heard[-1][2] > 0


def test_a_random_checkpoint_is_the_same_for_the_same_seed(tmp_path: Path) -> None:
    state = torch.random.get_rng_state()
    one, two = (write_checkpoint(tmp_path / name, seed=4) for name in ("one", "two"))
    three = write_checkpoint(tmp_path / "three", seed=5)
    contents = [(path / "model.safetensors").read_bytes() for path in (one, two, three)]
    assert contents[0] == contents[1] != contents[2]
    assert torch.equal(state, torch.random.get_rng_state())
    with pytest.raises(UsageError, match="vocab_size=200 is below the tokenizer's 290"):
        write_checkpoint(tmp_path / "four", vocab_size=200)


@pytest.mark.parametrize(
    ("prompts", "params", "message"),
    [
        (["a"], {"max_tokens": 3}, "sampling parameters are dict"),
        (None, None, "prompts are NoneType"),
        (b"abc", None, "the prompt is of bytes"),
        ([["a", "b"]], None, "holds 'a', which is no token id"),
        ([[1.5]], None, "holds 1.5, which is no token id"),
    ],
)
def test_what_is_no_prompt_or_no_parameter_is_said(promised: LLM, prompts: Any, params: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        promised.generate(prompts, params)


def test_prompts_may_come_from_numpy_and_from_a_generator(promised: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=3)
    plain = promised.generate([[5, 6, 7]], params)[0].outputs[0].token_ids
    assert promised.generate(np.array([5, 6, 7]), params)[0].outputs[0].token_ids == plain
    assert promised.generate((ids for ids in [[5, 6, 7]]), params)[0].outputs[0].token_ids == plain


def test_an_error_names_the_prompt_of_a_batch(promised: LLM) -> None:
    with pytest.raises(PromptError, match="prompt 2 of 3: the prompt is empty"):
        promised.generate([[5], [], [6]], SamplingParams(max_tokens=1))
    assert not promised.engine.has_unfinished_requests()


def test_a_text_that_is_too_long_however_it_is_cut_is_not_tokenized(
    promised: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: Any, **options: Any) -> None:
        raise AssertionError("it was tokenized")

    monkeypatch.setattr(promised.engine.tokenizer, "encode", refuse)  # type: ignore[attr-defined]
    with pytest.raises(PromptError, match=r"has at least \d+ tokens, and max_model_len=512"):
        promised.generate("x" * 1_000_000)


@pytest.mark.parametrize("text", ["x" * 600, "é" * 300, "    " * 400, "\n" * 3000])
def test_the_least_number_of_tokens_is_one(promised: LLM, text: str) -> None:
    tokenizer = promised.engine.tokenizer  # type: ignore[attr-defined]
    assert 0 < tokenizer.least_tokens(text) <= len(tokenizer.encode(text))
