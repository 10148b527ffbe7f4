from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from npu_zoo.cli.app import run_app
from npu_zoo.core.engine import CompletionOutput, RequestMetrics, RequestOutput
from npu_zoo.core.errors import UsageError
from npu_zoo.core.model_config import FimFormat, ReasoningFormat
from npu_zoo.core.sampling import SamplingParams
from npu_zoo.engine import prompting
from npu_zoo.engine.llm import LLM
from npu_zoo.evaluation.accuracy.tasks import EvalTask, TaskOptions, TaskResult, load_task
from npu_zoo.evaluation.programs import task as task_module
from npu_zoo.evaluation.programs.sandbox import Sandbox
from npu_zoo.evaluation.programs.task import HumanEval, HumanEvalInfilling, HumanEvalPlus

ROWS = [
    {
        "task_id": f"T/{number}",
        "prompt": f'def f{number}(x):\n    """x and {number}."""\n',
        "entry_point": f"f{number}",
        "canonical_solution": f"    y = x\n\n    return y + {number}\n",
        "test": f"def check(candidate):\n    assert candidate(1) == {number + 1}\n",
    }
    for number in range(4)
]
QUICK = {"workers": "2"}


class Scripted:
    """Stands in for an LLM and its engine: answers each prompt with texts, the last prompts first."""

    def __init__(self, answers: Callable[[str], Sequence[str]], **config: Any) -> None:
        usual = {"chat": False, "reasoning": None, "fim": None, "model": "m:v", "family": "deepseek_v3", "variant": "v"}
        self.engine = self
        self.config = SimpleNamespace(**usual | {"max_num_seqs": 999} | config)
        self.asked: list[tuple[str, SamplingParams]] = []
        self._answers = answers
        self._open: list[tuple[str, list[int], SamplingParams]] = []

    def render_chat(self, messages: Sequence[dict[str, str]]) -> list[int]:
        return [ord(character) for character in "CHAT" + messages[0]["content"]]

    def fim_prompt(self, prefix: str, suffix: str) -> list[int]:
        return [ord(character) for character in f"{prefix}<hole>{suffix}"]

    def explain(self) -> dict[str, int]:
        return {"max_model_len": 9999}

    def add_request(self, request_id: str, prompt: list[int], params: SamplingParams, **_: Any) -> None:
        self._open.append((request_id, prompt, params))

    def has_unfinished_requests(self) -> bool:
        return bool(self._open)

    def step(self) -> Iterator[RequestOutput]:
        while self._open:
            request_id, prompt, params = self._open.pop()
            text = "".join(map(chr, prompt))
            self.asked.append((text, params))
            answers = enumerate(self._answers(text))
            outputs = [CompletionOutput(index, self._end(answer, params)) for index, answer in answers]
            yield RequestOutput(request_id, None, prompt, outputs[:1], False, RequestMetrics(0))
            yield RequestOutput(request_id, None, prompt, outputs, True, RequestMetrics(0), reasoning_open=True)

    @staticmethod
    def _end(answer: str, params: SamplingParams) -> str:
        return answer.split("\n")[0] if params.stop == ("\n",) else answer


class CharacterEncoder:
    """A token for each character."""

    def __init__(self, config: Any, _: int) -> None:
        self.config = config

    def encode(self, prompt: str | list[int]) -> list[int]:
        return [ord(character) for character in prompt] if isinstance(prompt, str) else prompt


class Kept(dict[str, Any]):
    put = dict.__setitem__


class Shared(Sandbox):
    """Stays open, so that each run of a task does not start its own."""

    def __exit__(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def shared() -> Iterator[Sandbox]:
    sandbox = Shared(workers=2)
    yield sandbox
    sandbox.close()


@pytest.fixture
def _one_sandbox(monkeypatch: pytest.MonkeyPatch, shared: Sandbox) -> None:
    monkeypatch.setattr(task_module, "Sandbox", lambda *_: shared)
    monkeypatch.setattr(prompting, "PromptEncoder", CharacterEncoder)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("data") / "HumanEval.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return file


def row_of(text: str) -> dict[str, str]:
    return next(row for row in ROWS if row["prompt"].strip() in text)


def run(task: EvalTask, llm: Scripted, data: Path, kept: Kept | None = None, **options: Any) -> TaskResult:
    arguments = QUICK | options.pop("arguments", {})
    given = TaskOptions(data=data, arguments=arguments, responses=kept, **options)
    return task.run(llm, given, lambda *_: None)  # type: ignore[arg-type]


@pytest.mark.usefixtures("_one_sandbox")
def test_base_models_complete_the_prompt(data: Path) -> None:
    llm = Scripted(lambda text: [row_of(text)["canonical_solution"] if "f2" not in text else "    return 0\n"])
    result = run(HumanEval(), llm, data)
    assert result.metrics["pass@1"].model_dump() == {"value": 0.75, "stderr": pytest.approx(0.25), "samples": 4}
    assert [text for text, _ in llm.asked] == [row["prompt"] for row in reversed(ROWS)]
    assert [sample["id"] for sample in result.samples] == ["T/0", "T/1", "T/2", "T/3"]
    assert [sample["correct"] for sample in result.samples] == [True, True, False, True]
    wrong = result.samples[2]
    assert (wrong["status"], wrong["answer"]) == ("failed", "    return 0\n")
    assert wrong["program"] == ROWS[2]["prompt"] + "    return 0\n"
    assert wrong["message"] == "AssertionError at: assert candidate(1) == 3"
    params = llm.asked[0][1]
    assert (params.n, params.temperature, params.max_tokens) == (1, 0.0, 512)
    assert "\ndef " in params.stop
    assert "no network" in result.notes[0]
    assert "none of the files known for humaneval" in result.notes[1]
    assert result.data["file"] == "HumanEval.jsonl"


@pytest.mark.usefixtures("_one_sandbox")
def test_others_answer_in_a_conversation_without_their_reasoning(data: Path) -> None:
    def answer(text: str) -> list[str]:
        row = row_of(text)
        return [f"```python\nwrong\n```</think>Here:\n```python\n{row['prompt']}{row['canonical_solution']}```"]

    reasoning = ReasoningFormat(start="<think>", end="</think>")
    llm = Scripted(answer, chat=True, reasoning=reasoning)
    result = run(HumanEval(), llm, data, limit=3)
    assert result.metrics["pass@1"].value == 1
    assert result.metrics["pass@1"].samples == 3
    assert llm.asked[0][0].startswith("CHATComplete this Python function.")
    assert (llm.asked[0][1].max_tokens, llm.asked[0][1].stop) == (1024, ())
    assert "wrong" not in str(result.samples[0]["answer"])
    assert run(HumanEval(), Scripted(lambda text: ["    return 9\n"], chat=True), data, chat=False).samples


@pytest.mark.usefixtures("_one_sandbox")
def test_several_programs_per_problem(data: Path) -> None:
    llm = Scripted(lambda text: ["    return 0\n", *[row_of(text)["canonical_solution"]] * 9])
    result = run(HumanEval(), llm, data, arguments={"n": "10", "k": "1,2,10"}, seed=3)
    assert result.metrics["pass@1"].value == pytest.approx((3 * 0.9 + 0.9) / 4)
    assert result.metrics["pass@2"].value == result.metrics["pass@10"].value == 1
    assert [sample["id"] for sample in result.samples[:2]] == ["T/0#0", "T/0#1"]
    params = llm.asked[0][1]
    assert (params.n, params.temperature, params.top_p, params.seed) == (10, 0.2, 0.95, 3)
    assert list(run(HumanEval(), llm, data, arguments={"n": "10"}).metrics) == ["pass@1", "pass@10"]


@pytest.mark.usefixtures("_one_sandbox")
def test_kept_answers_are_not_asked_for_again(data: Path) -> None:
    kept = Kept()
    first = Scripted(lambda text: [row_of(text)["canonical_solution"]])
    run(HumanEval(), first, data, kept, limit=2)
    second = Scripted(lambda text: [row_of(text)["canonical_solution"]])
    assert run(HumanEval(), second, data, kept).metrics["pass@1"].value == 1
    assert [text for text, _ in second.asked] == [ROWS[3]["prompt"], ROWS[2]["prompt"]]
    third = Scripted(lambda text: ["    pass\n"])
    assert run(HumanEval(), third, data, kept, arguments={"max_tokens": "9"}).metrics["pass@1"].value == 0
    assert len(third.asked) == 4


@pytest.mark.usefixtures("_one_sandbox")
def test_holes_are_filled(data: Path) -> None:
    def answer(text: str) -> list[str]:
        prefix, _, suffix = text.partition("<hole>")
        row = row_of(prefix)
        whole = row["prompt"] + row["canonical_solution"]
        return [whole[len(prefix) : len(whole) - len(suffix)] if "f1" not in prefix else "    pass  # "]

    llm = Scripted(answer, fim=FimFormat(begin="a", hole="b", end="c"))
    result = run(HumanEvalInfilling(), llm, data)
    names = [f"{form}_{what}" for form in ("single_line", "random_span") for what in ("pass@1", "exact_match")]
    assert list(result.metrics) == names
    assert result.metrics["single_line_pass@1"].samples == 8
    assert result.metrics["single_line_pass@1"].value == result.metrics["single_line_exact_match"].value == 0.75
    assert result.metrics["random_span_pass@1"].samples == 40
    assert result.metrics["random_span_exact_match"].value == 0.75
    assert {params.stop for _, params in llm.asked} == {("\n",), ()}
    assert result.samples[0]["exact_match"] is True
    assert list(run(HumanEvalInfilling(), llm, data, arguments={"form": "random_span"}).metrics) == names[2:]


@pytest.mark.usefixtures("_one_sandbox")
def test_holes_of_two_forms_with_one_prompt_have_their_own_answers(tmp_path: Path) -> None:
    file = tmp_path / "HumanEval.jsonl"
    file.write_text(json.dumps(ROWS[0] | {"canonical_solution": "  y"}))
    llm = Scripted(lambda _: ["  y\n  z"], fim=FimFormat(begin="a", hole="b", end="c"))
    result = run(HumanEvalInfilling(), llm, file)
    assert len({text for text, _ in llm.asked}) < len(llm.asked)
    answers = {(str(sample["id"]).split("/")[2], sample["answer"]) for sample in result.samples}
    assert answers == {("single_line", "  y"), ("random_span", "  y\n  z")}


def test_families_without_tokens_for_holes_are_refused_before_a_model_is_loaded(
    data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(LLM, "from_config", lambda *_, **__: pytest.fail("a model was loaded"))
    command = ["eval", "--model", "wizardcoder", "--hardware", "cpu", "--task", "humaneval_infilling"]
    assert run_app([*command, "--data", str(data)]) == 2
    assert "wizardcoder:demo cannot fill in the middle" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("task", "arguments", "message"),
    [
        (HumanEval(), {"n": "2", "k": "3"}, "pass@3 cannot be estimated from 2"),
        (HumanEval(), {"n": "0"}, "--task-arg: n"),
        (HumanEval(), {"n": "2", "temperature": "0"}, "are all the same"),
        (HumanEval(), {"samples": "2"}, "--task-arg: samples"),
        (HumanEvalInfilling(), {"form": "multi_line"}, "the forms of infilling are single_line, random_span"),
    ],
)
def test_options_that_make_no_sense_are_refused_before_a_model_is_loaded(
    data: Path, task: EvalTask, arguments: dict[str, str], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        task.check(TaskOptions(data=data, arguments=arguments))


def test_missing_data_says_what_to_download(tmp_path: Path, data: Path) -> None:
    for task in (HumanEval(), HumanEvalPlus(), HumanEvalInfilling()):
        with pytest.raises(UsageError, match=r"give --data FILE; download https://.* sha256 [0-9a-f]{64}"):
            task.check(TaskOptions())
        task.check(TaskOptions(data=data))
        assert type(load_task(task.name)) is type(task)


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM("deepseek_coder:demo", dtype="float32", threads=1) as llm:
        yield llm


@pytest.mark.parametrize(
    ("task", "chat", "arguments", "count"),
    [
        (HumanEval(), False, {}, 4),
        (HumanEval(), True, {}, 4),
        (HumanEvalInfilling(), False, {"form": "single_line"}, 8),
    ],
)
def test_a_model_is_asked(
    llm: LLM, data: Path, task: EvalTask, chat: bool, arguments: dict[str, str], count: int
) -> None:
    told: list[tuple[str, int, int]] = []
    given = QUICK | {"max_tokens": "4", "n": "2"} | arguments
    result = task.run(llm, TaskOptions(data=data, limit=2, arguments=given, chat=chat), lambda *one: told.append(one))
    assert len(result.samples) == len({sample["id"] for sample in result.samples}) == count
    assert ("answers", count // 2, count // 2) in told
    assert told[-1][0] == "programs"
    assert told[-1][1] == told[-1][2]


def test_the_first_token_s_logits_are_kept(llm: LLM, data: Path) -> None:
    kept: dict[str, Any] = {}

    def put(task: str, sample: str, logits: Any, part: int = 0) -> None:
        kept[f"{task}/{sample}"] = logits

    sink = SimpleNamespace(positions=32, put=put)
    for n in ("1", "2"):
        given = QUICK | {"max_tokens": "2", "n": n}
        options = TaskOptions(data=data, limit=2, arguments=given, chat=False, logits=sink)
        HumanEval().run(llm, options, lambda *_: None)
    assert list(kept) == ["humaneval/T/0", "humaneval/T/1", "humaneval/T/0#0", "humaneval/T/1#0"]
    assert {(len(logits), str(logits.dtype)) for logits in kept.values()} == {(1, "float32")}
