"""The closed form of what ranks tell each other, against ranks that count it, and figures worked out by hand."""

from __future__ import annotations

import threading
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from npu_zoo import LLM, SamplingParams
from npu_zoo.communication import StepShape, bytes_of, calls_of, layer_operations, step_operations
from npu_zoo.core.config import EngineArgs, EngineConfig
from npu_zoo.core.model_config import ModelConfig
from npu_zoo.core.parallel import Split
from npu_zoo.dispatch import resolve
from npu_zoo.engine.runner import ModelRunner
from npu_zoo.engine.step import StepRow, micro_batches
from npu_zoo.nn.moe import MoE as MoELayer
from npu_zoo.parallel.groups import Joined
from npu_zoo.registry import get_registry
from npu_zoo.testing.door import unchecked_config
from npu_zoo.testing.ranks import run_ranks
from npu_zoo.testing.shapes import shareable_shape, write_random_model
from npu_zoo.testing.traffic import due_operations

LENGTHS = (130, 3, 17)
"""Of prompts; the first is long enough for two micro-batches, and leaves replicas with unlike numbers of tokens."""


def steps_of(split: Split) -> list[list[StepRow]]:
    """A prompt of each length by turns over replicas, a token of each, and one that the first replica has alone."""
    rows = [
        StepRow(tuple(range(5, 5 + length)), 0, tuple(range(number * 12, number * 12 + 12)), 1, False)
        for number, length in enumerate(LENGTHS)
    ]
    rows = [replace(row, replica=number % split.dp) for number, row in enumerate(rows)]
    behind = [replace(row, token_ids=(7,), start=row.num_tokens) for row in rows]
    unsampled = replace(behind[0], start=behind[0].start + 1, num_logits=0)
    return [rows, behind, [unsampled]]


def shape_of(family: str) -> ModelConfig:
    # More layers than stages, and a vocabulary that is padded.
    sizes = {"num_key_value_heads": 8, "num_hidden_layers": 3, "vocab_size": 300}
    return shareable_shape(get_registry().families[family], **sizes)


def config_of(weights: Path, family: str, split: Split, **changes: Any) -> EngineConfig:
    asked = EngineArgs(
        model=f"{family}:custom", weights=str(weights), hardware="cpu", dtype=changes.pop("dtype", "float32"),
        max_model_len=256, kv_cache_memory="64MiB", skip_tokenizer_init=True, allow_experimental=True,
    )  # fmt: skip
    sizes = {
        "tensor_parallel_size": split.tp, "pipeline_parallel_size": split.pp, "expert_parallel_size": split.ep,
        "data_parallel_size": split.dp, "world_size": split.world_size,
    }  # fmt: skip
    return unchecked_config(resolve(asked), **sizes, **changes)


class Routing:
    """Keeps which experts each rank's tokens choose, by step, in the order in which layers are computed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, split: Split, num_experts: int) -> None:
        self._split, self._num_experts = split, num_experts
        self._chosen: dict[int, list[list[list[int]]]] = {rank: [] for rank in range(split.world_size)}
        self._here = threading.local()
        original = MoELayer._route

        def route(layer: MoELayer, x: Tensor) -> tuple[Tensor, Tensor]:
            weights, ids = original(layer, x)
            self._chosen[self._here.rank][-1].append(ids.flatten().tolist())
            return weights, ids

        monkeypatch.setattr(MoELayer, "_route", route)

    def begin_step(self, rank: int) -> None:
        self._here.rank = rank
        self._chosen[rank].append([])

    def arrived(self, rank: int, step: int, batches: list[tuple[int, ...]], layers: int) -> list[int]:
        """Rows that come to a rank's experts, by micro-batch and layer of experts."""
        place, found = self._split.place(rank), [0] * (len(batches) * layers)
        for other in place.ep_group:
            calls = iter(self._chosen[other][step])
            for number in range(len(found)):
                if self._share(other, batches[number // layers]):  # a rank without tokens routes none
                    found[number] += sum(expert in place.experts(self._num_experts) for expert in next(calls))
        return found

    def _share(self, rank: int, replica_tokens: tuple[int, ...]) -> int:
        place = self._split.place(rank)
        shares, share = place.split.tp // place.split.moe_tp, place.tp_rank // place.split.moe_tp
        tokens = replica_tokens[place.replica]
        return tokens * (share + 1) // shares - tokens * share // shares


def measure(config: EngineConfig, routing: Routing | None = None) -> list[tuple[Counter[str], Counter[str]]]:
    """Calls and bytes of each rank in all steps, ranks being threads."""

    def rank(joined: Joined) -> tuple[Counter[str], Counter[str]]:
        runner = ModelRunner(config, ranks=joined.ranks)
        for rows in steps_of(config.split):
            if routing is not None:
                routing.begin_step(joined.ranks.place.rank)
            runner.execute(rows)
        return joined.traffic.calls, joined.traffic.bytes

    return run_ranks(config.split, rank)


DENSE = [Split(2), Split(4), Split(pp=2), Split(pp=3), Split(dp=2), Split(2, pp=2), Split(2, dp=2), Split(dp=2, pp=2)]
EXPERTS = [
    Split(2), Split(2, ep=2), Split(4, ep=4), Split(4, ep=2), Split(pp=2), Split(dp=2), Split(dp=2, ep=2),
    Split(2, dp=2, ep=4), Split(2, dp=2, ep=2), Split(dp=4, ep=4), Split(2, pp=2, ep=2), Split(dp=2, pp=2, ep=2),
]  # fmt: skip
TO_EXPERTS = [split for split in EXPERTS if split.ep > 1]
OFTEN = {Split(4), Split(pp=3), Split(dp=2, pp=2), Split(4, ep=2), Split(2, dp=2, ep=4), Split(2, pp=2, ep=2)}
"""Each kind of split, by itself or with another."""


def cases(*families: tuple[str, list[Split]]) -> list[Any]:
    return [
        pytest.param(family, split, id=f"{family}-{split}", marks=[] if split in OFTEN else pytest.mark.long)
        for family, splits in families
        for split in splits
    ]


@pytest.mark.parametrize(
    ("family", "split"), cases(("deepseek_coder", DENSE), ("deepseek_moe", EXPERTS), ("deepseek_v3", EXPERTS[1:8:3]))
)
def test_ranks_say_what_the_closed_form_says(family: str, split: Split, tmp_path: Path) -> None:
    write_random_model(tmp_path, get_registry().families[family], shape_of(family))
    config = config_of(tmp_path, family, split)
    for rank, (calls, sizes) in enumerate(measure(config)):
        due = list(due_operations(config, rank, steps_of(split)))
        assert calls == Counter(calls_of(due)), rank
        assert sizes == Counter(bytes_of(due)), rank


@pytest.mark.parametrize(
    ("family", "split"), cases(("deepseek_moe", TO_EXPERTS), ("deepseek_v3", [*TO_EXPERTS[::3], Split(4, ep=2)]))
)
def test_tokens_that_go_to_their_experts_alone(
    family: str, split: Split, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = shape_of(family)
    assert model.moe
    write_random_model(tmp_path, get_registry().families[family], model)
    config = config_of(tmp_path, family, split, expert_dispatch="all_to_all")
    routing = Routing(monkeypatch, split, model.moe.n_routed_experts)
    measured, steps = measure(config, routing), steps_of(split)
    batches = [[batch.replica_tokens for batch in micro_batches(rows, split.dp, split.pp)] for rows in steps]
    for rank, (calls, sizes) in enumerate(measured):
        layers = sum(map(model.moe.has_experts, split.place(rank).layers(model.num_hidden_layers)))
        came = [routing.arrived(rank, step, shapes, layers) for step, shapes in enumerate(batches)]
        due = list(due_operations(config, rank, steps, came.__getitem__))
        assert calls == Counter(calls_of(due)), rank
        assert sizes == Counter(bytes_of(due)), rank
    # However tokens are routed, all ranks together bring back what uniform routing would.
    mean = sum(bytes_of(due_operations(config, rank, steps))["ep:all_to_all"] for rank in range(split.world_size))
    assert sum(sizes["ep:all_to_all"] for _, sizes in measured) == mean


@pytest.mark.parametrize(
    ("family", "split", "options"),
    [
        pytest.param("deepseek_coder", Split(2, pp=2), {"dtype": "bfloat16"}, marks=pytest.mark.long),
        ("deepseek_moe", Split(dp=2, ep=2), {}),
        pytest.param("deepseek_v3", Split(2, ep=2), {"dtype": "bfloat16"}, marks=pytest.mark.long),
    ],
)
def test_processes_report_what_the_closed_form_says(
    family: str, split: Split, options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_random_model(tmp_path, get_registry().families[family], shape_of(family))
    config = config_of(tmp_path, family, split, **options)
    steps: list[list[StepRow]] = []
    with LLM.from_config(config) as llm:
        runner = llm.engine.runner  # type: ignore[attr-defined]
        execute = runner.execute
        monkeypatch.setattr(runner, "execute", lambda rows: steps.append(list(rows)) or execute(rows))
        llm.generate([list(range(5, 140)), [7, 8, 9]], SamplingParams(max_tokens=5, temperature=0, ignore_eos=True))
        reports = runner.report()
    assert len(steps) >= 5
    for report in reports:
        due = list(due_operations(config, report["rank"], steps))
        assert report["calls"] == calls_of(due)
        assert Counter(report["bytes"]) == Counter(bytes_of(due))


DENSE_KEYS = {
    "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
    "num_attention_heads": 8, "vocab_size": 300, "max_position_embeddings": 512,
}  # fmt: skip
EXPERT_KEYS = {
    "architectures": ["DeepseekForCausalLM"], "n_routed_experts": 8, "num_experts_per_tok": 2,
    "moe_intermediate_size": 32, "first_k_dense_replace": 1,
}  # fmt: skip
LLAMA, MOE = ModelConfig.from_hf(DENSE_KEYS), ModelConfig.from_hf({**DENSE_KEYS, **EXPERT_KEYS})


def test_two_sums_a_layer() -> None:
    """hidden_size 64 in bfloat16 are 128 bytes a token."""
    place = Split(4).place(1)
    assert bytes_of(layer_operations(LLAMA, place, 0, (10,), "bfloat16")) == {"tp:all_reduce": 2 * 10 * 128}
    due = list(step_operations(LLAMA, place, StepShape(((10,),), (1,)), "bfloat16"))
    # The embedding's sum and two of each of 3 layers; a vocabulary of 300 is padded to 320, of which a rank has 80.
    assert bytes_of(due) == {"tp:all_reduce": 7 * 10 * 128, "tp:all_gather": 80 * 2}
    assert calls_of(due) == {"tp:all_reduce": 7, "tp:all_gather": 1}


def test_a_stage_passes_each_token_on_once() -> None:
    step, split = StepShape(((4,), (6,)), (1,)), Split(pp=2)
    first, last = (bytes_of(step_operations(LLAMA, split.place(rank), step, "bfloat16")) for rank in range(2))
    assert first == {"world:send": 10 * 128, "world:receive": 300 * 2}
    assert last == {"world:receive": 10 * 128, "world:send": 300 * 2}


def test_replicas_are_padded_to_the_longest() -> None:
    place = Split(dp=2, ep=2).place(1)
    due = bytes_of(layer_operations(MOE, place, 1, (10, 3), "bfloat16"))
    assert due == {"dp:all_gather": 10 * 128, "dp:reduce_scatter": 2 * 10 * 128}
    assert bytes_of(layer_operations(MOE, place, 0, (10, 3), "bfloat16")) == {}


def test_tokens_go_to_their_experts_and_back() -> None:
    """8 counts of 8 bytes; two rows for each of 3 tokens; back come rows of all 13 tokens, or those that arrived."""
    place = Split(dp=2, ep=2).place(1)
    counts, sent = 64, 3 * 2 * 128
    uniform = bytes_of(layer_operations(MOE, place, 1, (10, 3), "bfloat16", "all_to_all"))
    assert uniform == {"ep:all_to_all": counts + sent + 13 * 2 * 128 / 2}
    known = bytes_of(layer_operations(MOE, place, 1, (10, 3), "bfloat16", "all_to_all", 11))
    assert known == {"ep:all_to_all": counts + sent + 11 * 128}


def test_a_rank_alone_says_nothing() -> None:
    place, step = Split().place(0), StepShape(((10,),), (1,))
    assert list(step_operations(MOE, place, step, "bfloat16", "all_to_all")) == []
