"""Drivers of engines that are not installed here, against stand-ins with the documented names."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Hashable
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from npu_zoo.evaluation.peers.worker.driver import LoadOptions, Request, make_driver
from npu_zoo.evaluation.peers.worker.llama_cpp_driver import SHARED_LEAST
from npu_zoo.evaluation.peers.worker.vllm_driver import VllmDriver, environment

OPTIONS = LoadOptions("model.gguf", "float32", 64, threads=2, max_num_batched_tokens=4, kv_cache_memory=2**30 + 1)
REQUESTS = [Request([1, 2, 3, 4, 5], 3), Request([7], 1), Request([8, 9], 2)]
VOCABULARY = 32


def continuation(sequence: list[int]) -> int:
    """The token that the stand-ins' model gives: it depends on every token before."""
    return (sum(sequence) * 7 + len(sequence)) % VOCABULARY


def expected(request: Request) -> list[int]:
    assert isinstance(request.prompt, list)
    sequence = list(request.prompt)
    for _ in range(request.max_tokens):
        sequence.append(continuation(sequence))
    return sequence[len(request.prompt) :]


class FakeLlama(ModuleType):
    """llama.h's functions, for a model whose next token is :func:`continuation`'s."""

    llama_token = int

    def __init__(self) -> None:
        super().__init__("llama_cpp")
        self.contexts: list[Any] = []
        self.decoded: list[int] = []
        self.cells: dict[int, dict[int, int]] = {}
        self.logits: dict[int, Any] = {}
        self.codes: list[int] = []

    def llama_backend_init(self) -> None: ...
    def llama_free(self, context: Any) -> None:
        self.contexts.remove(context)

    def llama_model_default_params(self) -> Any:
        return SimpleNamespace(n_gpu_layers=-1)

    def llama_model_load_from_file(self, path: bytes, params: Any) -> Any:
        return None if path == b"damaged" else SimpleNamespace(path=path, params=params)

    def llama_model_get_vocab(self, model: Any) -> str:
        return "vocab"

    def llama_vocab_n_tokens(self, vocab: str) -> int:
        return VOCABULARY

    def llama_context_default_params(self) -> Any:
        return SimpleNamespace(n_ctx=512, n_batch=2048, n_seq_max=1, n_threads=4, n_threads_batch=4)

    def llama_init_from_model(self, model: Any, params: Any) -> Any:
        self.contexts.append(params)
        return params

    def llama_batch_init(self, tokens: int, embd: int, sequences: int) -> Any:
        fields = {name: [None] * tokens for name in ("token", "pos", "n_seq_id", "logits")}
        return SimpleNamespace(n_tokens=0, seq_id=[[None] for _ in range(tokens)], **fields)

    def llama_get_memory(self, context: Any) -> str:
        return "memory"

    def llama_memory_clear(self, memory: str, data: bool) -> None:
        self.cells = {}

    def llama_memory_seq_cp(self, memory: str, source: int, target: int, start: int, end: int) -> None:
        assert (start, end) == (-1, -1), "buffers of sequences are copied whole"
        self.cells[target] = dict(self.cells[source])

    def llama_decode(self, context: Any, batch: Any) -> int:
        self.decoded.append(batch.n_tokens)
        self.logits = {}
        for row in range(batch.n_tokens):
            cells = self.cells.setdefault(batch.seq_id[row][0], {})
            assert batch.n_seq_id[row] == 1
            assert batch.pos[row] == len(cells), "positions of a sequence follow each other"
            cells[batch.pos[row]] = batch.token[row]
            if batch.logits[row]:
                self.logits[row] = np.eye(VOCABULARY, dtype=np.float32)[continuation(list(cells.values()))]
        assert len(self.cells) <= context.n_seq_max
        assert sum(map(len, self.cells.values())) <= context.n_ctx
        return self.codes.pop() if self.codes else 0

    def llama_get_logits_ith(self, context: Any, row: int) -> Any:
        return self.logits[row].ctypes.data_as(np.ctypeslib.ctypes.POINTER(np.ctypeslib.ctypes.c_float))


@pytest.fixture
def llama(monkeypatch: pytest.MonkeyPatch) -> FakeLlama:
    fake = FakeLlama()
    monkeypatch.setitem(sys.modules, "llama_cpp", fake)
    return fake


def seen_counts(name: str, static_batch: int) -> tuple[Any, dict[Hashable, list[int]]]:
    driver, counts = make_driver(name), {}  # type: ignore[var-annotated]
    driver.load(OPTIONS)
    driver.prepare(REQUESTS, static_batch)
    generated = driver.generate(REQUESTS, static_batch, lambda key, count: counts.setdefault(key, []).append(count))
    return generated, counts


@pytest.mark.parametrize("static_batch", [0, 2])
def test_llama_cpp_decodes_a_batch_until_each_sequence_is_done(static_batch: int, llama: FakeLlama) -> None:
    generated, counts = seen_counts("llama.cpp", static_batch)
    assert generated.token_ids == [expected(request) for request in REQUESTS]
    assert counts == {0: [1, 2, 3], 1: [1], 2: [1, 2]}
    # Eight prompt tokens in parts of four, then the two and the one that go on; or the same in two batches.
    assert llama.decoded == ([4, 4, 2, 1] if static_batch == 0 else [3, 1, 4, 1, 1, 1])


def test_llama_cpp_computes_a_shared_prefix_once(llama: FakeLlama) -> None:
    prefix = [index % 7 for index in range(SHARED_LEAST)]
    requests = [Request([*prefix, 1, 2], 2), Request([*prefix, 3], 3), Request([*prefix, 1], 1)]
    driver = make_driver("llama.cpp")
    driver.load(dataclasses.replace(OPTIONS, max_num_batched_tokens=80))
    run = driver.run(requests)
    assert run.token_ids == [expected(request) for request in requests]
    assert llama.decoded == [SHARED_LEAST, 4, 2, 1]
    driver.run([Request(prefix[:9], 1), Request(prefix[:9], 1)])
    assert llama.decoded[4:] == [18], "a short prefix is not worth a copy"


def test_llama_cpp_makes_room_for_its_batches_only(llama: FakeLlama) -> None:
    driver = make_driver("llama.cpp")
    driver.load(OPTIONS)
    for static_batch in (0, 0, 2):
        driver.prepare(REQUESTS, static_batch)
    (context,) = llama.contexts
    assert (context.n_seq_max, context.n_ctx, context.n_batch) == (2, 2 * 8, 4)
    assert (context.n_threads, context.n_threads_batch) == (2, 2)


def test_llama_cpp_keeps_the_context_that_a_warm_up_left(llama: FakeLlama) -> None:
    driver = make_driver("llama.cpp")
    driver.load(OPTIONS)
    driver.run([Request([1], 1), Request([2], 1)], 2, longest=8)
    (context,) = llama.contexts
    driver.run(REQUESTS, 2, longest=8)
    assert llama.contexts[0] is context


def test_llama_cpp_s_failures_are_raised(llama: FakeLlama) -> None:
    with pytest.raises(RuntimeError, match="cannot load damaged"):
        make_driver("llama.cpp").load(LoadOptions("damaged", "float32", 8))
    llama.codes = [1]
    with pytest.raises(RuntimeError, match="llama_decode returned 1 for 4 tokens"):
        seen_counts("llama.cpp", 0)


class FakeVllmEngine:
    """Gives each unfinished request a token a step, one request held back a step, as a delta."""

    def __init__(self) -> None:
        self.requests: dict[str, tuple[list[int], Any, int]] = {}
        self.steps = 0
        # The engine's own requests leave this mapping when they finish.
        self.scheduled: dict[str, Any] = {}
        self.engine_core = SimpleNamespace(
            engine_core=SimpleNamespace(scheduler=SimpleNamespace(requests=self.scheduled))
        )

    def add_request(self, request_id: str, prompt: Any, params: Any) -> None:
        assert params.temperature == 0.0
        assert params.ignore_eos
        assert params.output_kind == "delta"
        self.requests[request_id] = (list(prompt["prompt_token_ids"]), params, 0)
        self.scheduled[f"{request_id}-a1b2"] = SimpleNamespace(num_preemptions=0)

    def has_unfinished_requests(self) -> bool:
        return bool(self.requests)

    def step(self) -> list[Any]:
        self.steps += 1
        outputs = []
        for key, (sequence, params, count) in list(self.requests.items()):
            if key == "2" and self.steps == 1:
                self.scheduled["2-a1b2"].num_preemptions += 1
                continue
            sequence.append(continuation(sequence))
            finished = count + 1 == params.max_tokens
            self.requests[key] = (sequence, params, count + 1)
            delta = SimpleNamespace(token_ids=sequence[-1:])
            cached = 3 if key == "0" else None
            outputs.append(
                SimpleNamespace(request_id=key, outputs=[delta], finished=finished, num_cached_tokens=cached)
            )
            if finished:
                del self.requests[key], self.scheduled[f"{key}-a1b2"]
        return outputs


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> Any:
    fake: Any = ModuleType("vllm")
    fake.started = []

    def start(**arguments: Any) -> Any:
        fake.started.append(arguments)
        return SimpleNamespace(llm_engine=FakeVllmEngine())

    fake.LLM, fake.SamplingParams = start, SimpleNamespace
    params: Any = ModuleType("vllm.sampling_params")
    params.RequestOutputKind = SimpleNamespace(DELTA="delta")
    monkeypatch.setitem(sys.modules, "vllm", fake)
    monkeypatch.setitem(sys.modules, "vllm.sampling_params", params)
    for name in environment(OPTIONS):
        monkeypatch.setenv(name, "before")
    return fake


def test_vllm_s_steps_are_put_together(vllm: Any) -> None:
    generated, counts = seen_counts("vllm", 0)
    assert generated.token_ids == [expected(request) for request in REQUESTS]
    assert counts == {"0": [1, 2, 3], "1": [1], "2": [1, 2]}
    assert (generated.cached_tokens, generated.preemptions) == (3, 1)
    (started,) = vllm.started
    assert (started["model"], started["dtype"], started["max_model_len"]) == ("model.gguf", "float32", 64)


@pytest.mark.usefixtures("vllm")
def test_vllm_finds_its_room_and_cores_in_the_environment() -> None:
    import os

    VllmDriver().load(OPTIONS)
    assert os.environ["VLLM_CPU_KVCACHE_SPACE"] == "2"
    assert os.environ["VLLM_CPU_OMP_THREADS_BIND"] == ",".join(map(str, sorted(os.sched_getaffinity(0))))
    assert "VLLM_CPU_KVCACHE_SPACE" not in environment(LoadOptions("x", "float32", 8, device="cuda"))


def test_an_engine_without_a_driver_is_named() -> None:
    with pytest.raises(ValueError, match="no engine 'nosuch'; known: npu-zoo, transformers"):
        make_driver("nosuch")
