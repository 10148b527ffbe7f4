"""Int8 keys and values on the simulated device: against attention over restored ones, and against the CPU's engine."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from npu_zoo import LLM, SamplingParams
from npu_zoo.core.attention import AttentionMetadata, CacheLayout, SequenceSlice
from npu_zoo.core.errors import EngineError, UnsupportedError
from npu_zoo.core.parallel import Split
from npu_zoo.planning import Workload, plan_rank
from npu_zoo.simulator import measure
from npu_zoo.testing.agreement import SCORED, compare

from . import dense

PRODUCT = os.environ.get("NPU_ZOO_SIMULATE", "")
ON_910B = pytest.mark.chip("ascend910b")
FAMILIES = ["deepseek_coder", "wizardcoder", "deepseek_moe"]
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
BOUND = {"float16": 0.15, "bfloat16": 0.5}
"""Natural-log probability; twice and more what was seen. A key that rounds otherwise may get another code."""

HEADS, KV_HEADS, SIZE, BLOCK = 8, 2, 64, 32
Rows = list[tuple[str, SequenceSlice]]


def restored(x: Tensor) -> Tensor:
    """What int8 keeps of vectors along the last dimension, by numpy, one vector after the other."""
    rows = x.float().numpy()
    out = np.zeros_like(rows)
    for place in np.ndindex(*rows.shape[:-1]):
        step = np.abs(rows[place]).max() / np.float32(127)
        if step:
            out[place] = np.rint(rows[place] / step) * step
    return torch.from_numpy(out)


class Runs:
    """Runs steps of random tokens through a backend and holds them against dense attention in float64."""

    def __init__(self, name: str, dtype: torch.dtype, slots: int = 16, slot_size: int = BLOCK) -> None:
        from npu_zoo.nn.attention import ascend_int8

        layout = CacheLayout(2, KV_HEADS, SIZE, slots, slot_size)
        self.dtype, self.scale = dtype, SIZE**-0.5
        self.backend = getattr(ascend_int8, name)(layout, dtype, torch.device("npu", 0), HEADS, self.scale)
        self.generator = torch.Generator().manual_seed(5)
        self.keys: dict[str, Tensor] = {}
        self.values: dict[str, Tensor] = {}

    def draw(self, tokens: int, heads: int) -> Tensor:
        return torch.randn(tokens, heads, SIZE, generator=self.generator).to(self.dtype)

    def step(self, rows: Rows, zero: int | None = None) -> None:
        """Run a step; ``zero`` names a token whose key and value are zeros in one head."""
        lengths = [row.num_tokens for _, row in rows]
        query, key, value = (self.draw(sum(lengths), heads) for heads in (HEADS, KV_HEADS, KV_HEADS))
        if zero is not None:
            key[zero, 0] = value[zero, 0] = 0
        found = self.forward(query, key, value, self.backend.prepare([row for _, row in rows]))
        self.compare(rows, found, query, key, value)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, metadata: AttentionMetadata) -> Tensor:
        # Values are a part of a wider projection, as in a model, and so not contiguous.
        wide = torch.cat((key, value), -1).npu()[..., SIZE:]
        found: Tensor = self.backend.forward(1, query.npu(), key.npu(), wide, metadata)
        return found

    def compare(self, rows: Rows, found: Tensor, query: Tensor, key: Tensor, value: Tensor) -> None:
        kept, first = (restored(key), restored(value)), 0
        for name, row in rows:
            part = slice(first, first + row.num_tokens)
            for store, new in zip((self.keys, self.values), kept, strict=True):
                before = store.get(name, new[:0])
                assert len(before) == row.start
                store[name] = torch.cat((before, new[part]))
            tensors = query[part], self.keys[name], self.values[name]
            expected, _ = dense.dense_attention(*tensors, self.scale, causal=True)
            rounding = 2e-3 if self.dtype == torch.float16 else 2e-2
            torch.testing.assert_close(found[part].cpu().double(), expected, atol=rounding, rtol=rounding)
            first += row.num_tokens


@ON_910B
@pytest.mark.parametrize("dtype", DTYPES)
class TestBackend:
    def test_prompts_chunks_and_tokens(self, dtype: str) -> None:
        runs = Runs("FusedInt8PagedAttention", DTYPES[dtype])
        a, b, c = (3, 9, 0), (12, 1), (7, 8, 2)
        runs.step([("a", SequenceSlice(0, 33, a)), ("b", SequenceSlice(0, 5, b))])
        runs.step([("a", SequenceSlice(33, 1, a)), ("b", SequenceSlice(5, 1, b))])
        runs.step([("a", SequenceSlice(34, 1, a)), ("c", SequenceSlice(0, 40, c)), ("b", SequenceSlice(6, 29, b))])
        runs.step([("c", SequenceSlice(40, 20, c)), ("a", SequenceSlice(35, 1, a)), ("b", SequenceSlice(35, 2, b))])
        runs.step([("c", SequenceSlice(60, 1, c)), ("b", SequenceSlice(37, 1, b)), ("a", SequenceSlice(36, 1, a))])

    def test_contexts_are_read_back_in_several_groups(self, dtype: str) -> None:
        runs = Runs("FusedInt8PagedAttention", DTYPES[dtype])
        tables = {"a": (0, 1, 2, 3), "b": (4, 5, 6), "c": (10, 9, 8, 7), "d": (12,)}
        runs.step([("a", SequenceSlice(0, 97, tables["a"])), ("b", SequenceSlice(0, 65, tables["b"]))])
        runs.step([("c", SequenceSlice(0, 98, tables["c"]))])
        starts = {"a": 97, "b": 65, "d": 0, "c": 98}
        rows: Rows = [(name, SequenceSlice(start, 2, tables[name])) for name, start in starts.items()]
        metadata = runs.backend.prepare([row for _, row in rows])
        assert [group.context_lens for group in metadata.prompts] == [[99], [67, 2], [100]]
        runs.step(rows)

    def test_one_slot_per_sequence(self, dtype: str) -> None:
        runs = Runs("FusedInt8ContiguousAttention", DTYPES[dtype], slots=3, slot_size=150)
        runs.step([("a", SequenceSlice(0, 130, (2,))), ("b", SequenceSlice(0, 1, (0,)))])
        runs.step([("b", SequenceSlice(1, 1, (0,))), ("a", SequenceSlice(130, 9, (2,)))])
        runs.step([("b", SequenceSlice(2, 1, (0,))), ("a", SequenceSlice(139, 1, (2,)))])

    def test_a_vector_of_zeros_harms_only_itself(self, dtype: str) -> None:
        runs = Runs("FusedInt8PagedAttention", DTYPES[dtype])
        runs.step([("a", SequenceSlice(0, 9, (3,)))], zero=4)
        runs.step([("a", SequenceSlice(9, 1, (3,)))], zero=0)
        runs.step([("a", SequenceSlice(10, 1, (3,)))])

    def test_padding_of_a_graph_lies_in_the_spare_block(self, dtype: str) -> None:
        runs = Runs("FusedInt8PagedAttention", DTYPES[dtype])
        rows: Rows = [("a", SequenceSlice(0, 40, (3, 5))), ("b", SequenceSlice(0, 7, (9,)))]
        runs.step(rows)
        backend, rows = runs.backend, [("b", SequenceSlice(7, 1, (9,))), ("a", SequenceSlice(40, 1, (3, 5)))]
        padding = [SequenceSlice(place, 1, (backend.spare_slot,)) for place in range(2)]
        metadata = backend.graph_metadata(4, 64)
        update = backend.fill(metadata, [row for _, row in rows] + padding)
        assert update == {"actual_seq_lengths_kv": [8, 41, 1, 2]}
        query, key, value = (runs.draw(4, heads) for heads in (HEADS, KV_HEADS, KV_HEADS))
        metadata.single.context_lens[:] = update["actual_seq_lengths_kv"]  # what a replay is told
        found = runs.forward(query, key, value, metadata)
        runs.compare(rows, found[:2], query[:2], key[:2], value[:2])

    def test_foreign_metadata_is_refused(self, dtype: str) -> None:
        runs = Runs("FusedInt8PagedAttention", DTYPES[dtype])
        x = torch.zeros(1, HEADS, SIZE, dtype=DTYPES[dtype])
        with pytest.raises(EngineError, match="takes what its prepare"):
            runs.forward(x, x[:, :KV_HEADS], x[:, :KV_HEADS], AttentionMetadata([], 1))


TEXTS = [
    "def add(a, b):\n    return a + b\n\n\ndef mul(a, b):\n    return a * b\n",
    "import os\n\n\ndef main() -> None:\n    for name in os.listdir('.'):\n        print(name)\n",
    "class Stack:\n",
    "x",
]


@pytest.fixture(scope="module")
def engine() -> Callable[..., LLM]:
    """Engines with an int8 cache, each started once."""
    started: dict[Any, LLM] = {}

    def start(family: str, hardware: str, dtype: str, **options: Any) -> LLM:
        key = (family, hardware, dtype, *sorted(options.items()))
        if key not in started:
            shared: dict[str, Any] = {"max_model_len": 512, "kv_cache_memory": "64MiB", "kv_cache_dtype": "int8"}
            shared |= {"model": f"{family}:demo", "hardware": hardware, "dtype": dtype, "allow_experimental": True}
            started[key] = LLM(**shared | options)
        return started[key]

    return start


@ON_910B
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
class TestEngine:
    def test_together_and_in_chunks(self, family: str, dtype: str, engine: Callable[..., LLM]) -> None:
        reference = engine(family, "cpu", dtype).generate(TEXTS, SCORED)
        for options in ({}, {"max_num_batched_tokens": 16, "max_num_seqs": 4}):
            found = compare(reference, engine(family, PRODUCT, dtype, **options).generate(TEXTS, SCORED))
            assert found.within(BOUND[dtype]), (options, found)

    def test_from_the_prefix_cache(self, family: str, dtype: str, engine: Callable[..., LLM]) -> None:
        prompts = [TEXTS[1] * 8 + "x = 1\n", TEXTS[1] * 8 + "y = 2\n"]
        params = SamplingParams(temperature=0, max_tokens=8, logprobs=2)
        reference = [engine(family, "cpu", dtype).generate([prompt], params)[0] for prompt in prompts]
        found = [engine(family, PRODUCT, dtype).generate([prompt], params)[0] for prompt in prompts]
        assert found[1].metrics.cached_tokens > 0
        assert compare(reference, found).within(BOUND[dtype])

    def test_graphs_equal_launching_one_by_one(self, family: str, dtype: str, engine: Callable[..., LLM]) -> None:
        params = SamplingParams(temperature=0, max_tokens=12, logprobs=1)
        prompts = [*TEXTS, TEXTS[0][:9]]
        graphs = engine(family, PRODUCT, dtype).generate(prompts, params)
        eager = engine(family, PRODUCT, dtype, enforce_eager=True).generate(prompts, params)
        assert [o.outputs[0].token_ids for o in graphs] == [o.outputs[0].token_ids for o in eager]
        assert [o.outputs[0].cumulative_logprob for o in graphs] == [o.outputs[0].cumulative_logprob for o in eager]

    def test_a_decode_step_is_one_launch_and_one_copy_back(
        self, family: str, dtype: str, engine: Callable[..., LLM]
    ) -> None:
        llm, steps = engine(family, PRODUCT, dtype), {}
        for tokens in (2, 10):
            params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
            llm.generate(TEXTS[2:3], params)  # captures
            with measure() as report:
                llm.generate(TEXTS[2:3], params)
            steps[tokens] = report
        few, many = steps[2], steps[10]
        assert many.replays - few.replays == 8
        assert many.num_launches - few.num_launches == 8  # the choice of the token
        assert many.copies["device_to_host"][0] - few.copies["device_to_host"][0] == 8
        assert many.synchronisations - few.synchronisations == 8


@ON_910B
@pytest.mark.parametrize("dtype", DTYPES)
def test_contiguous_attention(dtype: str, engine: Callable[..., LLM]) -> None:
    reference = engine("deepseek_coder", "cpu", dtype).generate(TEXTS, SCORED)
    found = engine("deepseek_coder", PRODUCT, dtype, attention="flash").generate(TEXTS, SCORED)
    assert compare(reference, found).within(BOUND[dtype])


@ON_910B
def test_launches_of_a_layer(engine: Callable[..., LLM]) -> None:
    """Beside those of a plain cache: keys and values are stacked and quantized, and their scales written."""
    counts = {}
    for stored in ("int8", "auto"):
        llm = engine("deepseek_coder", PRODUCT, "float16", enforce_eager=True, kv_cache_dtype=stored)
        per_run = {}
        for tokens in (1, 9):
            with measure() as report:
                llm.generate(TEXTS[2:3], SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True))
            per_run[tokens] = report.launches
        layers = llm.engine.config.model_config.num_hidden_layers * 8
        names = set(per_run[9])
        counts[stored] = {n: (per_run[9][n] - per_run[1].get(n, 0)) / layers for n in names}
    more = {n: counts["int8"].get(n, 0) - counts["auto"].get(n, 0) for n in set(counts["int8"]) | set(counts["auto"])}
    more = {name: count for name, count in more.items() if abs(count) > 0.5}
    assert more == {"aclnnStack": 1, "aclnnDynamicQuantV2": 1, "aclnnScatterNdUpdate": 1}


@ON_910B
def test_the_cache_is_sized_and_planned_exactly() -> None:
    llm = LLM(
        model="deepseek_coder:demo", hardware=PRODUCT, dtype="float16", kv_cache_dtype="int8", allow_experimental=True
    )
    config, found = llm.engine.config, llm.engine.explain()
    workload = Workload(config.max_model_len, config.max_num_seqs, config.max_num_batched_tokens)
    plan = plan_rank(config.model_config, "float16", Split(), workload, kv_cache_dtype="int8")
    attention = llm.engine.runner.attention  # type: ignore[attr-defined]
    pools = [tensor for pair in attention._caches for tensor in pair] + attention._scales
    spare = len(pools[0]) / (len(pools[0]) - 1)
    assert sum(pool.nbytes for pool in pools) == round(found["kv_cache_bytes"] * spare)
    assert plan.cache_per_token * found["kv_cache_tokens"] == found["kv_cache_bytes"]
    assert 0.7 < plan.activations / found["activation_bytes"] < 1.3
    llm.shutdown()


@ON_910B
def test_latents_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="kv_cache_dtype=int8 is not supported by deepseek_v3"):
        LLM(model="deepseek_v3:demo", hardware=PRODUCT, dtype="float16", kv_cache_dtype="int8", allow_experimental=True)


@pytest.mark.chip("ascend310p")
def test_it_is_refused_on_310p() -> None:
    with pytest.raises(UnsupportedError, match="kv_cache_dtype=int8 is not supported"):
        LLM(
            model="deepseek_coder:demo",
            hardware=PRODUCT,
            dtype="float16",
            kv_cache_dtype="int8",
            allow_experimental=True,
        )
