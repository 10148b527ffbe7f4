"""Replayed decode steps give what eager ones give, bit for bit."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch

from npu_zoo import LLM, SamplingParams
from npu_zoo.compiled.library import obstacle
from npu_zoo.engine.decode.replay import SIZES

pytestmark = pytest.mark.skipif(bool(obstacle()), reason=f"the compiled kernels cannot serve: {obstacle()}")

FAMILIES = ["deepseek_coder", "deepseek_moe", "deepseek_v3", "wizardcoder"]
PROMPTS = ["def add(a, b):", "import os\n", "class A:\n    def __init__(self", "for i in range(", "x"]
SAMPLED = SamplingParams(temperature=0.8, seed=3, max_tokens=24, logprobs=2, ignore_eos=True)


def results(llm: LLM, prompts: list[str], params: SamplingParams = SAMPLED) -> list[Any]:
    return [(o.outputs[0].token_ids, o.outputs[0].logprobs) for o in llm.generate(prompts, params)]


def sizes(llm: LLM) -> set[int]:
    """Batch sizes that were recorded."""
    replays = llm.engine.runner.decode_path  # type: ignore[attr-defined]
    return {size for size, entry in replays._replays.items() if entry.recording is not None}


def both(**options: Any) -> tuple[LLM, LLM]:
    return LLM(**options), LLM(**options, enforce_eager=True)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("options", [{}, {"attention": "flash"}, {"kv_cache_dtype": "int8"}], ids=str)
def test_replays_equal_eager_steps(family: str, options: dict[str, Any]) -> None:
    if family == "deepseek_v3" and options:
        pytest.skip("latents are kept in pages, in the compute dtype")
    llm, eager = both(model=family, dtype="bfloat16", allow_experimental=True, **options)
    for count in (1, 3, 5):
        assert results(llm, PROMPTS[:count]) == results(eager, PROMPTS[:count])
    assert sizes(llm) >= {1, 3, 5}
    assert llm.engine.explain()["decode"] == "replays of recorded steps"
    assert eager.engine.explain()["decode"] == "eager"


def test_sequences_that_grow_past_their_blocks() -> None:
    llm, eager = both(model="deepseek_coder", dtype="bfloat16", block_size=32)
    params = SamplingParams(temperature=0, max_tokens=150, ignore_eos=True)
    assert results(llm, PROMPTS[:2], params) == results(eager, PROMPTS[:2], params)


@pytest.mark.parametrize("family", FAMILIES)
def test_steps_of_other_sizes_are_filled_up(family: str) -> None:
    """With rows that change nothing, whoever they are copies of: all sequences end at different times here."""
    llm, eager = both(model=family, dtype="bfloat16", allow_experimental=True)
    prompts = [f"def f{number}(" + "x" * number for number in range(19)]
    params = [SamplingParams(temperature=0, max_tokens=6 + number, ignore_eos=True) for number in range(19)]
    found = [o.outputs[0].token_ids for o in llm.generate(prompts, params)]
    due = [o.outputs[0].token_ids for o in eager.generate(prompts, params)]
    assert sum(a == b for a, b in zip(found, due, strict=True)) >= 17  # sums in another order may turn a close choice
    assert [len(ids) for ids in found] == list(range(6, 25))
    assert {12, 16, 24} <= sizes(llm) <= set(SIZES)


def test_more_rows_than_any_size_run_eagerly() -> None:
    llm, eager = both(model="deepseek_coder", dtype="bfloat16", max_num_seqs=SIZES[-1] + 6)
    prompts = [f"def f{number}(" for number in range(SIZES[-1] + 6)]
    params = SamplingParams(temperature=0.8, seed=3, max_tokens=4, logprobs=2, ignore_eos=True)
    assert results(llm, prompts, params) == results(eager, prompts, params)
    assert not sizes(llm)


@pytest.mark.parametrize("options", [{}, {"kv_cache_dtype": "int8"}, {"model": "deepseek_v3"}], ids=str)
def test_shared_prefixes_are_read_once_in_replays_too(options: dict[str, Any]) -> None:
    options = {"model": "deepseek_coder", "dtype": "bfloat16", "enable_prefix_caching": True, **options}
    llm, eager = both(allow_experimental=True, **options)
    shared = "import os\n" * 110  # a prefix that pays to be read for all at once
    prompts = [shared + end for end in "uvwxyz"]
    assert results(llm, prompts) == results(eager, prompts)
    assert 6 in sizes(llm)
    alone = ["a", "b", "c", "d", "e", "f"]  # a replay of the same size in which nothing is shared
    assert results(llm, alone) == results(eager, alone)
    assert results(llm, prompts) == results(eager, prompts)


@pytest.mark.parametrize("method", ["prompt_lookup", "mtp"])
def test_drafts(method: str) -> None:
    options = {"speculative_method": method, "adaptive_speculation": False}
    llm = LLM(model="deepseek_v3", dtype="bfloat16", **options)
    plain = LLM(model="deepseek_v3", dtype="bfloat16", enforce_eager=True)
    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
    assert [ids for ids, _ in results(llm, PROMPTS[:2], params)] == [
        ids for ids, _ in results(plain, PROMPTS[:2], params)
    ]


def test_a_model_whose_kernels_look_at_values_runs_eagerly() -> None:
    """Experts in float32 are those of plain torch, which ask where tokens go."""
    llm, eager = both(model="deepseek_moe", dtype="float32")
    assert results(llm, PROMPTS[:2]) == results(eager, PROMPTS[:2])
    assert "values" in llm.engine.explain()["decode"]
    assert not sizes(llm)


def test_an_interrupted_recording_is_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    llm, eager = both(model="deepseek_coder", dtype="bfloat16")
    due = results(eager, PROMPTS[:1])
    assert results(llm, PROMPTS[:1]) == due
    replays = llm.engine.runner.decode_path  # type: ignore[attr-defined]
    replays._replays.clear()
    model = llm.engine.runner.model  # type: ignore[attr-defined]
    compute_logits = type(model).compute_logits

    def interrupted(self: Any, hidden: torch.Tensor) -> torch.Tensor:
        monkeypatch.setattr(type(model), "compute_logits", compute_logits)
        raise KeyboardInterrupt

    llm.generate(PROMPTS[:1], SamplingParams(max_tokens=1))
    monkeypatch.setattr(type(model), "compute_logits", interrupted)
    with pytest.raises(KeyboardInterrupt):
        llm.generate(PROMPTS[:1], SAMPLED)
    assert results(llm, PROMPTS[:1]) == due


def test_recording_does_not_import_the_compiler() -> None:
    """Importing torch._dynamo takes most of a second, which a first text would wait for."""
    program = (
        "import sys\n"
        "from npu_zoo import LLM, SamplingParams\n"
        "llm = LLM(model='deepseek_coder', dtype='bfloat16')\n"
        "llm.generate('x', SamplingParams(max_tokens=6, ignore_eos=True))\n"
        "assert llm.engine.explain()['decode'] == 'replays of recorded steps'\n"
        "assert 'torch._dynamo' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
