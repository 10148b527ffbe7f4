"""The engine with keys and values in int8, on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from npu_zoo import LLM, SamplingParams
from npu_zoo.compiled.library import obstacle
from npu_zoo.core.config import EngineArgs
from npu_zoo.core.engine import RequestOutput
from npu_zoo.core.errors import HardwareError, UnsupportedError
from npu_zoo.core.parallel import Split
from npu_zoo.dispatch import resolve
from npu_zoo.planning import Workload, plan_rank

HELDOUT = Path(__file__).parents[1] / "data" / "demo_heldout"
Launch = Callable[..., LLM]
INT8: dict[str, Any] = {"kv_cache_dtype": "int8", "allow_experimental": True}
BYTES_PER_TOKEN = 2 * 2 * (16 + 2 + 4 + 16 + 8)
"""Of the small checkpoint: layers, heads, and of each a key with the tails of 64 tokens' rows, a value with its own."""
COMPILED_BYTES_PER_TOKEN = 2 * 2 * (16 + 4 + 16 + 4)
"""Where the compiled backend serves: codes and scales alone, which a plan does not count on."""

WORST, MEAN = 0.5, 0.05
"""Natural-log probability; twice what was seen, 0.24 and 0.025."""

DEMOS = ["deepseek_coder", "wizardcoder", "deepseek_moe"]
SCORED = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
GREEDY = SamplingParams(temperature=0, max_tokens=20, logprobs=1, prompt_logprobs=1, ignore_eos=True)
STEM = [3 + number * 7 % 310 for number in range(150)]
PROMPTS = [STEM[:64], STEM[:65], STEM, STEM[:128] + STEM[20:40], STEM[40:47], STEM[9:10]]


def scores(output: RequestOutput) -> list[float]:
    entries = zip(output.prompt_token_ids, output.prompt_logprobs or [], strict=True)
    return [entry[token].logprob for token, entry in entries if entry]


@pytest.mark.parametrize("family", DEMOS)
def test_a_text_is_about_as_likely_as_with_a_plain_cache(family: str) -> None:
    text = (HELDOUT / "queue.py.txt").read_text(encoding="utf-8")
    found = {}
    for stored in ("auto", "int8"):
        llm = LLM(model=f"{family}:demo", hardware="cpu", dtype="float32", **INT8 | {"kv_cache_dtype": stored})
        ids = llm.engine.tokenizer.encode(text, add_special_tokens=False)[:700]  # type: ignore[attr-defined]
        found[stored] = scores(llm.generate([ids], SCORED)[0])
        assert llm.engine.explain()["kv_cache_bytes"]
        llm.shutdown()
    apart = [abs(one - other) for one, other in zip(found["auto"], found["int8"], strict=True)]
    assert len(apart) == 699
    assert 0 < sum(apart) / len(apart) < MEAN
    assert max(apart) < WORST


@pytest.fixture(scope="module")
def start(launch: Launch, checkpoint: Path) -> Launch:
    def start(**options: Any) -> LLM:
        block = {} if options.get("attention") == "flash" else {"block_size": 64}
        return launch(checkpoint, **INT8, **block, **options)

    return start


@pytest.fixture(scope="module")
def alone(start: Launch) -> list[RequestOutput]:
    llm = start(enable_prefix_caching=False)
    return [llm.generate([prompt], GREEDY)[0] for prompt in PROMPTS]


def assert_equal(outputs: list[RequestOutput], due: list[RequestOutput]) -> None:
    for output, expected in zip(outputs, due, strict=True):
        assert output.outputs[0].token_ids == expected.outputs[0].token_ids
        assert scores(output) == pytest.approx(scores(expected), abs=1e-4)
        assert output.outputs[0].cumulative_logprob == pytest.approx(expected.outputs[0].cumulative_logprob, abs=1e-3)


OPTIONS: dict[str, dict[str, Any]] = {
    "together": {},
    "in chunks": {"max_num_batched_tokens": 23},
    "few at once": {"max_num_seqs": 2, "max_num_batched_tokens": 70},
    "contiguous": {"attention": "flash"},
    "contiguous, in chunks": {"attention": "flash", "max_num_batched_tokens": 9},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_results_do_not_depend_on_the_steps(options: dict[str, Any], start: Launch, alone: list[RequestOutput]) -> None:
    assert_equal(start(**options).generate(PROMPTS, GREEDY), alone)


def test_results_do_not_depend_on_preemption(start: Launch) -> None:
    """Five blocks hold every prompt and not every text."""
    prompts = [STEM[number : number + 60 - number] for number in range(5)]
    ample, tight = start(), start(kv_cache_memory=5 * 64 * BYTES_PER_TOKEN, max_num_batched_tokens=100)
    outputs = tight.generate(prompts, GREEDY)
    assert sum(output.metrics.preemptions for output in outputs) > 0
    assert_equal(outputs, [ample.generate([prompt], GREEDY)[0] for prompt in prompts])


def test_blocks_are_shared(start: Launch, alone: list[RequestOutput]) -> None:
    llm, params = start(), replace(GREEDY, prompt_logprobs=None)
    llm.generate([PROMPTS[2]], params)
    outputs = llm.generate(PROMPTS[:4], params)
    assert [output.metrics.cached_tokens for output in outputs] == [0, 64, 128, 128]
    assert [o.outputs[0].token_ids for o in outputs] == [o.outputs[0].token_ids for o in alone[:4]]


def test_the_cache_is_planned_exactly(start: Launch) -> None:
    llm = start(kv_cache_memory="300KiB")
    config, found = llm.engine.config, llm.engine.explain()
    workload = Workload(config.max_model_len, config.max_num_seqs, config.max_num_batched_tokens)
    arguments: dict[str, Any] = {"kv_cache_dtype": "int8", "device": "cpu"}
    plan = plan_rank(config.model_config, "float32", Split(), workload, **arguments)
    assert plan.cache_per_token == BYTES_PER_TOKEN
    per_token = BYTES_PER_TOKEN if obstacle() else COMPILED_BYTES_PER_TOKEN
    assert found["kv_cache_bytes"] == found["kv_cache_tokens"] * per_token
    assert found["kv_cache_tokens"] == (300 << 10) // per_token // 64 * 64
    backend = llm.engine.runner.attention  # type: ignore[attr-defined]
    if obstacle():
        pools = [pool[:, :-1] for pool in (backend.cache.keys, backend.cache.values, backend.cache.key_scales)]
    else:
        pools = [backend.keys, backend.values]
    assert sum(pool.nbytes for pool in pools) == found["kv_cache_bytes"]


def test_it_is_experimental() -> None:
    with pytest.raises(UnsupportedError, match="--allow-experimental runs it"):
        resolve(EngineArgs(model="deepseek_coder:demo", hardware="cpu", kv_cache_dtype="int8"))


def test_latents_are_refused_with_the_reason() -> None:
    with pytest.raises(UnsupportedError, match="the zoo says no: rounding a latent"):
        resolve(EngineArgs(model="deepseek_v3:demo", hardware="cpu", **INT8))


def test_other_block_sizes_are_refused() -> None:
    with pytest.raises(HardwareError, match=r"a cache of int8: .*cpu_paged_int8: block size 16 is none of 64"):
        resolve(EngineArgs(model="deepseek_coder:demo", hardware="cpu", block_size=16, **INT8))


@pytest.mark.parametrize("kind", ["paged", "flash"])
@pytest.mark.parametrize("stored", ["auto", "int8"])
def test_the_backend_stores_what_was_asked_for(kind: Any, stored: str) -> None:
    asked = INT8 | {"kv_cache_dtype": stored}
    choice = resolve(EngineArgs(model="wizardcoder:demo", hardware="cpu", attention=kind, **asked)).attention_choice
    expected = {"auto": kind, "int8": f"{kind}_int8"}
    assert choice.backend == f"{'cpu' if obstacle() else 'compiled'}_{expected[stored]}"
