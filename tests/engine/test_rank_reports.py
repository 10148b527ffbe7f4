"""What ranks report of themselves: that each holds its share of the weights, and that stages work at once."""

from __future__ import annotations

import itertools
import threading
from pathlib import Path
from typing import Any

import pytest

from npu_zoo import LLM, SamplingParams
from npu_zoo.core.config import EngineArgs, EngineConfig
from npu_zoo.core.model_config import ModelConfig
from npu_zoo.core.parallel import Split
from npu_zoo.dispatch import resolve
from npu_zoo.engine.runner import ModelRunner
from npu_zoo.engine.step import MICRO_BATCH_TOKENS, StepRow
from npu_zoo.parallel.groups import Joined
from npu_zoo.registry import get_registry
from npu_zoo.testing.ranks import run_ranks
from npu_zoo.testing.shapes import shareable_shape, write_random_model

FAMILY = "deepseek_coder"
PATIENCE_S = 60.0
Span = tuple[float, float]


def shape_of() -> ModelConfig:
    sizes = {"num_key_value_heads": 8, "num_hidden_layers": 4, "vocab_size": 320}
    return shareable_shape(get_registry().families[FAMILY], **sizes)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_model(tmp_path_factory.mktemp("weights"), get_registry().families[FAMILY], shape_of())


def config_of(weights: Path, **sizes: int) -> EngineConfig:
    asked: dict[str, Any] = {
        "model": f"{FAMILY}:custom", "weights": str(weights), "hardware": "cpu", "dtype": "float32",
        "max_model_len": 512, "kv_cache_memory": "64MiB", "skip_tokenizer_init": True, "allow_experimental": True,
    }  # fmt: skip
    return resolve(EngineArgs(**asked, **sizes))


def overlap(one: Span, other: Span) -> bool:
    return max(one[0], other[0]) < min(one[1], other[1])


def test_each_rank_holds_its_share_of_the_weights(weights: Path) -> None:
    held: dict[int, list[int]] = {}
    for size in (1, 2, 4):
        config = config_of(weights, tensor_parallel_size=size)

        def rank(joined: Joined, config: EngineConfig = config) -> int:
            held: int = ModelRunner(config, ranks=joined.ranks).own_report()["parameter_bytes"]
            return held

        held[size] = run_ranks(Split(size), rank)
        assert len(held[size]) == size
    (whole,) = held[1]
    norms = (2 * 4 + 1) * 256 * 4  # every rank has them
    for size in (2, 4):
        assert held[size] == [(whole - norms) // size + norms] * size
        assert max(held[size]) < 1.02 * whole / size


def test_stages_work_at_once(weights: Path) -> None:
    """Each of two micro-batches waits inside a stage until the other stage computes: one after the other never ends."""
    config = config_of(weights, pipeline_parallel_size=2)
    together = threading.Barrier(2, timeout=PATIENCE_S)
    tokens = tuple(range(5, 5 + 2 * MICRO_BATCH_TOKENS))
    row = StepRow(tokens, 0, tuple(range(8)), num_logits=1, wants_prompt=False)

    def rank(joined: Joined) -> list[Span]:
        runner = ModelRunner(config, ranks=joined.ranks)
        forward, number = runner.model.forward, itertools.count()
        meets = 1 - joined.ranks.place.stage  # the first stage in its second micro-batch, the second in its first

        def slow(*arguments: Any) -> Any:
            if next(number) == meets:
                together.wait()
            return forward(*arguments)

        runner.model.forward = slow  # type: ignore[method-assign]
        runner.execute([row])
        spans: list[Span] = runner.own_report()["spans"]
        return spans

    first, second = run_ranks(Split(pp=2), rank)
    assert len(first) == len(second) == 2
    assert overlap(first[1], second[0])
    assert second[0][0] < first[1][1] < second[1][1]


def test_stages_in_processes_work_at_once(weights: Path) -> None:
    """Of many steps some overlap, however busy the machine is."""
    prompts = [[5 + number, *range(8, 8 + 5 * MICRO_BATCH_TOKENS // 2)] for number in range(16)]
    with LLM.from_config(config_of(weights, pipeline_parallel_size=2)) as llm:
        for prompt in prompts:
            llm.generate([prompt], SamplingParams(max_tokens=1, temperature=0, ignore_eos=True))
        first, second = (report["spans"] for report in llm.engine.runner.report())  # type: ignore[attr-defined]
    assert len(first) == len(second) == 2 * len(prompts)
    assert any(map(overlap, first[1::2], second[::2]))
