"""Streams, aborts and interrupts: nothing is lost, leaked or left wrong."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from npu_zoo import LLM, SamplingParams
from npu_zoo.core.engine import RequestOutput
from npu_zoo.core.errors import EngineError, PromptError
from npu_zoo.engine.engine import NativeEngine

Launch = Callable[..., LLM]
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
PROMPTS = ["def main(args):", "for item in range", "def main(args):\n    return"]


def engine_of(llm: LLM) -> NativeEngine:
    assert isinstance(llm.engine, NativeEngine)
    return llm.engine


def is_clean(llm: LLM) -> bool:
    kv = engine_of(llm).kv
    if hasattr(kv, "check"):
        kv.check(())
    return kv.num_free == kv.num_total and not llm.engine.has_unfinished_requests()


@pytest.fixture(params=["paged", "flash"])
def llm(request: pytest.FixtureRequest, launch: Launch, checkpoint: Path) -> LLM:
    return launch(checkpoint, attention=request.param)


@pytest.fixture(params=[2048, 20])
def chunked(request: pytest.FixtureRequest, launch: Launch, checkpoint: Path) -> LLM:
    """An engine whose steps take whole prompts, and one that splits them."""
    return launch(checkpoint, max_num_batched_tokens=request.param)


@pytest.fixture(scope="module")
def reference(launch: Launch, checkpoint: Path) -> LLM:
    """Another engine, which shares nothing between requests and is never interrupted."""
    return launch(checkpoint, enable_prefix_caching=False)


@pytest.fixture(scope="module")
def due(reference: LLM) -> list[str]:
    """The right completions of PROMPTS."""
    return texts(reference.generate(PROMPTS, GREEDY))


def texts(outputs: list[RequestOutput]) -> list[str]:
    return [output.outputs[0].text for output in outputs]


def test_a_stream_grows_to_what_generate_gives(llm: LLM, due: list[str]) -> None:
    seen = [""]
    for output in llm.stream(PROMPTS[0], GREEDY):
        assert output.outputs[0].text.startswith(seen[-1])
        seen.append(output.outputs[0].text)
    assert len(seen) == 13
    assert len(set(seen)) > 6
    assert seen[-1] == due[0]
    assert output.finished
    assert is_clean(llm)


def test_closing_a_stream_aborts_it(llm: LLM) -> None:
    stream = llm.stream(PROMPTS[0], GREEDY)
    output = next(stream)
    assert llm.engine.has_unfinished_requests()
    stream.close()  # type: ignore[attr-defined]
    assert output.outputs[0].finish_reason == "abort"
    assert is_clean(llm)


def test_a_stream_that_nobody_starts_holds_nothing(llm: LLM) -> None:
    stream = llm.stream(PROMPTS[0], GREEDY)
    assert is_clean(llm)
    del stream


def test_a_stream_of_an_impossible_prompt(llm: LLM) -> None:
    with pytest.raises(PromptError, match="empty"):
        next(llm.stream([], GREEDY))
    assert is_clean(llm)


def test_streams_and_generate_interleave(llm: LLM, due: list[str]) -> None:
    first, second = llm.stream(PROMPTS[0], GREEDY), llm.stream(PROMPTS[1], GREEDY)
    next(first)
    next(second)
    assert texts(llm.generate(PROMPTS[2:], GREEDY)) == due[2:]
    assert texts([list(second)[-1]]) == due[1:2]
    assert texts([list(first)[-1]]) == due[:1]
    assert is_clean(llm)


def test_a_stream_ends_with_the_engine(llm: LLM) -> None:
    stream = llm.stream(PROMPTS[0], GREEDY)
    next(stream)
    llm.shutdown()
    with pytest.raises(EngineError, match="shut down"):
        next(stream)
    with pytest.raises(EngineError, match="was shut down"):
        llm.generate(PROMPTS, GREEDY)
    llm.shutdown()


def test_a_stream_whose_request_is_aborted_elsewhere_ends(llm: LLM) -> None:
    stream = llm.stream(PROMPTS[0], GREEDY)
    llm.engine.abort_request(next(stream).request_id)
    with pytest.raises(EngineError, match="aborted elsewhere"):
        next(stream)
    assert is_clean(llm)


def test_a_callback_hears_of_every_token(llm: LLM, due: list[str]) -> None:
    heard: dict[str, list[int]] = {}
    outputs = llm.generate(
        PROMPTS, GREEDY, on_output=lambda o: heard.setdefault(o.request_id, []).append(len(o.outputs[0].token_ids))
    )
    assert texts(outputs) == due
    assert heard == {output.request_id: list(range(1, 13)) for output in outputs}


def test_a_callback_that_raises_leaves_what_there_is(llm: LLM, due: list[str]) -> None:
    calls = []

    def stop(output: RequestOutput) -> None:
        calls.append(output)
        if len(calls) == 3 * 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        llm.generate(PROMPTS, GREEDY, on_output=stop)
    assert is_clean(llm)
    assert [len(o.outputs[0].token_ids) for o in llm.partial_outputs] == [5, 5, 5]
    assert [o.outputs[0].finish_reason for o in llm.partial_outputs] == ["abort"] * 3
    assert all(o.finished for o in llm.partial_outputs)
    for text, whole in zip(texts(llm.partial_outputs), due, strict=True):
        assert text
        assert whole.startswith(text.rstrip("�"))
    assert texts(llm.generate(PROMPTS, GREEDY)) == due
    assert llm.partial_outputs == []


def interrupt(monkeypatch: pytest.MonkeyPatch, target: Any, name: str, when: int, *, after: bool = False) -> None:
    """Make one call of a method end in KeyboardInterrupt, before or after it does its work."""
    method, calls = getattr(target, name), []

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        calls.append(name)
        if len(calls) == when and not after:
            raise KeyboardInterrupt
        result = method(*args, **kwargs)
        if len(calls) == when:
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(target, name, interrupted)


PLACES = [
    ("runner", "execute", False),
    ("runner", "execute", True),
    ("scheduler", "schedule", True),
    ("kv", "settle", True),
    ("sampler", "sample", False),
    ("sampler", "sample", True),
]


@pytest.mark.parametrize("when", [1, 2, 5])
@pytest.mark.parametrize(("part", "name", "after"), PLACES)
def test_an_interrupted_step_spoils_nothing(
    llm: LLM, due: list[str], monkeypatch: pytest.MonkeyPatch, part: str, name: str, after: bool, when: int
) -> None:
    """The prefix cache must not hold blocks that were never computed; the next run would read them."""
    target = getattr(llm.engine, part)
    interrupt(monkeypatch, target, name, when, after=after)
    with pytest.raises(KeyboardInterrupt):
        llm.generate(PROMPTS, GREEDY)
    assert is_clean(llm)
    assert [len(o.outputs[0].token_ids) for o in llm.partial_outputs] == [when - 1] * 3
    for _ in range(2):
        assert texts(llm.generate(PROMPTS, GREEDY)) == due


@pytest.mark.parametrize("when", [1, 2, 6])
@pytest.mark.parametrize(("part", "name", "after"), PLACES)
def test_requests_go_on_after_an_interrupted_step(
    chunked: LLM, reference: LLM, monkeypatch: pytest.MonkeyPatch, part: str, name: str, after: bool, when: int
) -> None:
    """As in a server that aborts one request of a failed step and keeps the others."""
    llm = chunked
    shared = [9, 8, 7] * 24
    plain = SamplingParams(temperature=0, max_tokens=8, logprobs=1, ignore_eos=True)
    requests = {"b": ([*shared, 5], plain), "c": (shared, replace(plain, prompt_logprobs=1))}
    whole = {name: reference.generate([prompt], params)[0] for name, (prompt, params) in requests.items()}
    llm.engine.add_request("a", [*shared, 6], GREEDY)
    for request_id, (prompt, params) in requests.items():
        llm.engine.add_request(request_id, prompt, params)
    interrupt(monkeypatch, getattr(llm.engine, part), name, when, after=after)
    finished: dict[str, RequestOutput] = {}
    interrupts = 0
    while llm.engine.has_unfinished_requests():
        try:
            finished.update({o.request_id: o for o in llm.engine.step() if o.finished})
        except KeyboardInterrupt:
            interrupts += 1
            llm.engine.abort_request("a")
    assert interrupts == 1
    for request_id, expected in whole.items():
        assert finished[request_id].outputs[0].token_ids == expected.outputs[0].token_ids
        assert values(finished[request_id]) == pytest.approx(values(expected), abs=1e-4)
    assert is_clean(llm)


def values(output: RequestOutput) -> list[float]:
    positions = [*(output.prompt_logprobs or []), *(output.outputs[0].logprobs or [])]
    assert len(positions) in (8, 8 + len(output.prompt_token_ids))
    return [entry.logprob for entries in positions for entry in (entries or {}).values()]


def test_a_reader_of_blocks_that_were_never_computed_starts_anew(
    llm: LLM, reference: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The request that was to write them in the same step is aborted after the interrupt."""
    prompt = [9, 8, 7] * 30
    for name in ("writer", "reader"):
        llm.engine.add_request(name, prompt, GREEDY)
    interrupt(monkeypatch, engine_of(llm).runner, "execute", 1)
    with pytest.raises(KeyboardInterrupt):
        llm.engine.step()
    llm.engine.abort_request("writer")
    outputs: list[RequestOutput] = []
    while llm.engine.has_unfinished_requests():
        outputs = llm.engine.step() or outputs
    assert texts(outputs) == texts(reference.generate([prompt], GREEDY))


@pytest.mark.long
def test_control_c_at_any_moment(llm: LLM, due: list[str]) -> None:
    """A block may be lost to an interrupt in the middle of the books; a wrong token may not come of it."""
    previous = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        for _ in range(200):
            signal.setitimer(signal.ITIMER_REAL, random.uniform(0.01, 0.05))
            with pytest.raises(KeyboardInterrupt):  # noqa: PT012
                for _ in range(100):
                    llm.generate(PROMPTS, GREEDY)
            assert not llm.engine.has_unfinished_requests()
            assert texts(llm.generate(PROMPTS, GREEDY)) == due
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["paged", pytest.param("flash", marks=pytest.mark.long)])
def test_no_block_is_lost_over_two_thousand_requests(launch: Launch, narrow_checkpoint: Path, attention: str) -> None:
    llm = launch(
        narrow_checkpoint,
        attention=attention,
        skip_tokenizer_init=True,
        max_model_len=48,
        max_num_seqs=16,
        max_num_batched_tokens=64,
        kv_cache_memory=48 * 5 * 2 * 16 * 4,
        **({"block_size": 4} if attention == "paged" else {}),
    )
    draw, added, ended, preempted = random.Random(0), 0, 0, 0
    stems = [[draw.randrange(3, 101) for _ in range(24)] for _ in range(5)]
    running: set[str] = set()
    started = time.monotonic()
    while added < 2000 or running:
        for _ in range(draw.randrange(4) if added < 2000 else 0):
            prompt = draw.choice(stems)[: draw.randrange(1, 24)] + [draw.randrange(3, 101)] * draw.randrange(8)
            params = SamplingParams(n=draw.choice((1, 1, 1, 2)), max_tokens=draw.randrange(1, 16), seed=added)
            llm.engine.add_request(str(added), prompt, params)
            running.add(str(added))
            added += 1
        for output in llm.engine.step():
            if output.finished:
                running.discard(output.request_id)
                ended, preempted = ended + 1, preempted + output.metrics.preemptions
        if running and draw.random() < 0.2:
            victim = draw.choice(sorted(running))
            running.discard(victim)
            assert llm.engine.abort_request(victim) is not None
            ended += 1
    assert ended == added >= 2000
    assert preempted > 0 or attention == "flash"
    assert is_clean(llm)
    assert time.monotonic() - started < 60
