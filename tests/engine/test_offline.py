"""Any number of requests through an engine, a bounded number of them at a time."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from npu_zoo import LLM, SamplingParams
from npu_zoo.core.engine import (
    CompletionOutput,
    Engine,
    EngineStats,
    GenerationRequest,
    RequestMetrics,
    RequestOutput,
)
from npu_zoo.core.errors import EngineError, PromptError, UsageError
from npu_zoo.engine.offline import Finished, OfflineRunner


class SlowEngine(Engine):
    """A request takes as many steps as its prompt has tokens, and says what its prompt was."""

    def __init__(self, max_num_seqs: int = 2) -> None:
        self.config: Any = SimpleNamespace(max_num_seqs=max_num_seqs)
        self.left: dict[str, int] = {}
        self.requests: dict[str, GenerationRequest] = {}
        self.most = 0
        self.steps = 0
        self.fail_at: int | None = None
        self.forgetful = False

    def add_request(self, request_id: str, prompt: Any, sampling_params: SamplingParams, **options: Any) -> None:
        if 13 in prompt:
            raise PromptError("13 is no token id")
        if request_id in self.left:
            raise UsageError("in use")
        options.pop("add_special_tokens", None)
        self.requests[request_id] = GenerationRequest(request_id, prompt, sampling_params, **options)
        self.left[request_id] = len(prompt)
        self.most = max(self.most, sum(self.requests[i].sampling_params.n for i in self.left))

    def abort_request(self, request_id: str) -> RequestOutput | None:
        self.left.pop(request_id, None)
        return None

    def step(self) -> list[RequestOutput]:
        self.steps += 1
        if self.steps == self.fail_at:
            raise EngineError("a rank died")
        outputs = []
        for request_id in list(self.left):
            self.left[request_id] -= 1
            done = self.left[request_id] == 0
            if done:
                del self.left[request_id]
            outputs.append(self._output(request_id, done))
        return [] if self.forgetful else outputs

    def _output(self, request_id: str, done: bool) -> RequestOutput:
        request = self.requests[request_id]
        answers = [CompletionOutput(i, str(list(request.prompt_token_ids))) for i in range(request.sampling_params.n)]
        return RequestOutput(request_id, None, list(request.prompt_token_ids), answers, done, RequestMetrics(0.0))

    def has_unfinished_requests(self) -> bool:
        return bool(self.left)

    def stats(self) -> EngineStats:
        return EngineStats()

    def render_chat(self, messages: Any, *, add_generation_prompt: bool = True) -> list[int]:
        raise NotImplementedError

    def render_fim(self, prefix: str, suffix: str) -> list[int]:
        raise NotImplementedError

    def explain(self) -> dict[str, Any]:
        return {}

    def shutdown(self) -> None:
        pass


@dataclass
class Prompts:
    """A work of several prompts; an exception among them is raised in preparing."""

    name: str
    prompts: Sequence[Sequence[int] | Exception] = ((1,),)
    n: int = 1
    prepared: list[str] = field(default_factory=list)

    def prepare(self) -> list[GenerationRequest]:
        self.prepared.append(self.name)
        for prompt in self.prompts:
            if isinstance(prompt, Exception):
                raise prompt
        params = SamplingParams(n=self.n)
        numbered = enumerate(prompt for prompt in self.prompts if not isinstance(prompt, Exception))
        return [GenerationRequest(f"{self.name}-{i}", p, params, priority=3, max_time=5.0) for i, p in numbered]


def texts(finished: Finished[Prompts]) -> list[str]:
    return [output.outputs[0].text for output in finished.outputs]


def test_all_works_come_back_each_as_soon_as_it_is_over() -> None:
    works = [Prompts("long", [(1, 2, 3)]), Prompts("short", [(4,)]), Prompts("both", [(5, 6), (7,)]), Prompts("no", [])]
    done = list(OfflineRunner(SlowEngine(10)).run(works))
    assert [finished.work.name for finished in done] == ["no", "short", "both", "long"]
    assert [texts(finished) for finished in done] == [[], ["[4]"], ["[5, 6]", "[7]"], ["[1, 2, 3]"]]
    assert [finished.error for finished in done] == [None] * 4


def test_a_million_works_are_asked_for_one_by_one() -> None:
    engine, asked = SlowEngine(4), itertools.count()
    works = (Prompts(str(number), [(number % 5 + 20,) * (number % 5 + 1)]) for number in iter(asked.__next__, 10**6))
    running = OfflineRunner(engine).run(works)
    for finished in itertools.islice(running, 500):
        assert len(texts(finished)) == 1
    running.close()
    assert engine.most == 8
    assert next(asked) < 520
    assert engine.left == {}


@pytest.mark.parametrize(("n", "most"), [(1, 6), (2, 6), (4, 8), (9, 9)])
def test_completions_count_towards_the_bound(n: int, most: int) -> None:
    engine = SlowEngine(3)
    assert len(list(OfflineRunner(engine).run(Prompts(str(i), [(1, 2)], n=n) for i in range(20)))) == 20
    assert engine.most == most


def test_requests_go_in_as_they_are() -> None:
    engine = SlowEngine()
    list(OfflineRunner(engine).run([Prompts("a", [(1, 2)], n=2)]))
    assert engine.requests["a-0"] == GenerationRequest("a-0", (1, 2), SamplingParams(n=2), priority=3, max_time=5.0)


def test_a_refused_work_leaves_the_others_alone() -> None:
    engine = SlowEngine(10)
    works = [
        Prompts("good", [(1,)]),
        Prompts("unprepared", [ValueError("no such body")]),
        Prompts("half", [(1,), (2, 13), (3,)]),
        Prompts("good"),
        Prompts("last", [(2,)]),
    ]
    done = list(OfflineRunner(engine).run(works))
    errors = [(finished.work.name, str(finished.error)) for finished in done if finished.error]
    assert errors == [("unprepared", "no such body"), ("half", "13 is no token id"), ("good", "in use")]
    assert [texts(finished) for finished in done if not finished.error] == [["[1]"], ["[2]"]]
    assert "half-0" not in engine.left


def test_a_stop_between_steps_aborts_what_runs() -> None:
    engine = SlowEngine(2)
    works = (Prompts(str(i), [(1,) * (i + 1)]) for i in itertools.count())
    done = list(OfflineRunner(engine).run(works, stopped=lambda: engine.steps == 2))
    assert [finished.work.name for finished in done] == ["0", "1"]
    assert engine.left == {}


def test_an_engine_that_fails_ends_the_run_and_keeps_what_was_yielded() -> None:
    engine = SlowEngine()
    engine.fail_at = 2
    running = OfflineRunner(engine).run([Prompts("a"), Prompts("b", [(1, 2)])])
    assert next(running).work.name == "a"
    with pytest.raises(EngineError, match="a rank died"):
        next(running)
    assert engine.left == {}


def test_requests_that_the_engine_loses_are_no_endless_loop() -> None:
    engine = SlowEngine()
    engine.forgetful = True
    with pytest.raises(EngineError, match="lost"):
        list(OfflineRunner(engine).run([Prompts("a")]))


def test_every_step_of_a_request_is_told() -> None:
    seen: list[tuple[str, bool]] = []
    works = [Prompts("a", [(1, 2)]), Prompts("b")]
    list(OfflineRunner(SlowEngine()).run(works, on_output=lambda o: seen.append((o.request_id, o.finished))))
    assert seen == [("a-0", False), ("b-0", True), ("a-0", True)]


def test_results_are_those_of_each_prompt_alone(llm: LLM) -> None:
    prompts = [[5 + i, 7, 9 * i + 1, *range(i + 1)] for i in range(30)]
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)

    @dataclass
    class One:
        index: int

        def prepare(self) -> list[GenerationRequest]:
            return [GenerationRequest(str(self.index), prompts[self.index], params)]

    runner = OfflineRunner(llm.engine, max_sequences=7)
    found = {f.work.index: f.outputs[0].outputs[0].token_ids for f in runner.run(map(One, range(30)))}
    alone = [llm.generate([prompt], params)[0].outputs[0].token_ids for prompt in prompts]
    assert [found[index] for index in range(30)] == alone
