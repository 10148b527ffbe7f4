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


def test_steps_of_other_sizes_run_as_they_did() -> None:
    count = 12
    assert count not in SIZES
    llm, eager = both(model="deepseek_coder", dtype="bfloat16")
    prompts = [f"def f{number}(" for number in range(count)]
    assert results(llm, prompts) == results(eager, prompts)
    assert count not in sizes(llm)


def test_shared_prefixes_are_still_read_once() -> None:
    llm, eager = both(model="deepseek_coder", dtype="bfloat16", enable_prefix_caching=True)
    prompts = ["import os\n" * 110 + end for end in "uvwxyz"]  # a prefix that pays to be read for all at once
    assert results(llm, prompts) == results(eager, prompts)
    assert 6 in SIZES
    assert 6 not in sizes(llm)


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
