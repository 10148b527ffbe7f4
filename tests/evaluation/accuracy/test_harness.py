"""The harness's tasks on our engine: the same figures as with transformers, interruptions, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from npu_zoo import LLM

pytest.importorskip("lm_eval")

import lm_eval
from lm_eval.tasks import TaskManager
from safetensors.numpy import load_file

from npu_zoo.core.errors import UsageError
from npu_zoo.evaluation.accuracy import harness
from npu_zoo.evaluation.accuracy.boolq import boolq_row
from npu_zoo.evaluation.accuracy.harness import HarnessTask
from npu_zoo.evaluation.accuracy.local_task import StoredRows
from npu_zoo.evaluation.accuracy.logits import LogitFile
from npu_zoo.evaluation.accuracy.responses import ResponseFile
from npu_zoo.evaluation.accuracy.tasks import TaskOptions, TaskResult

QUESTIONS = ["is water wet", "do stones float", "is the sky blue", "can pigs fly", "is ice cold", "is 2 odd"]
ROWS = [{"passage": f"Text {n}.", "question": q, "answer": n % 2 == 0} for n, q in enumerate(QUESTIONS)]
YAML = """\
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}, cache_dir: {cache}}}
test_split: test
fewshot_split: test
doc_to_text: "{{{{passage}}}} {{{{question}}}}?"
{rest}
"""
TASKS = {
    "choices": """output_type: multiple_choice
doc_to_target: "{{answer|int}}"
doc_to_choice: ["no", "yes, it is"]
metric_list: [{metric: acc}, {metric: acc_norm}]""",
    "words": """output_type: generate_until
doc_to_target: question
generation_kwargs: {until: ["e"], max_gen_toks: 8}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]""",
    "texts": """output_type: loglikelihood_rolling
doc_to_target: "{{question}}"
metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]""",
}
DRAWN = """\
task: drawn
dataset_path: none
validation_split: validation
test_split: null
fewshot_split: validation
process_docs: !function draws.shuffled
output_type: multiple_choice
doc_to_text: "{{question}} {{hint or ''}}"
doc_to_target: label
doc_to_choice: "{{choices}}"
metric_list: [{metric: acc}]
"""
DRAWS = """\
import random

def _shuffled(row):
    choices = random.sample(row["choices"], 4)
    return {**row, "choices": choices, "label": choices.index(row["choices"][0]) if row["label"] == 0 else -1}

def shuffled(rows):
    return rows.map(_shuffled)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of tasks in the harness's YAML, a group of all of them, and one that runs code."""
    made = tmp_path_factory.mktemp("tasks")
    data = made / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS), "utf-8")
    for name, rest in TASKS.items():
        text = YAML.format(name=name, data=data, cache=made / "cache", rest=rest)
        (made / f"{name}.yaml").write_text(text, "utf-8")
    (made / "all.yaml").write_text(f"group: everything\ntask: [{', '.join(TASKS)}]\n", "utf-8")
    (made / "drawn.yaml").write_text(DRAWN, "utf-8")
    (made / "draws.py").write_text(DRAWS, "utf-8")
    unsafe = YAML.format(name="unsafe", data=data, cache=made / "cache", rest=TASKS["words"] + "\nunsafe_code: true")
    (made / "unsafe.yaml").write_text(unsafe, "utf-8")
    return made


def run(llm: LLM, task: HarnessTask, options: TaskOptions, progress: Any = lambda *told: None) -> list[TaskResult]:
    task.check(options)
    return task.run(llm, options, progress)


def test_figures_are_those_with_transformers(llm: LLM, transformers_lm: Any, folder: Path) -> None:
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    expected = lm_eval.simple_evaluate(transformers_lm, tasks=["everything"], num_fewshot=1, task_manager=manager)
    results = run(llm, HarnessTask("everything", folder), TaskOptions(num_fewshot=1))
    assert [result.task for result in results[:3]] == list(TASKS)
    for result in results[:3]:
        figures = expected["results"][result.task]
        assert result.metrics
        for name, metric in result.metrics.items():
            assert metric.value == pytest.approx(figures[f"{name},none"], rel=1e-4)
            error = figures[f"{name}_stderr,none"]
            assert metric.stderr == (pytest.approx(error, rel=1e-3) if error != "N/A" else None)
        assert len(result.samples) == len(ROWS)
    scored = {sample["id"]: sample["loglikelihoods"] for sample in results[0].samples}
    for sample in expected["samples"]["choices"]:
        assert scored[str(sample["doc_id"])] == pytest.approx([r[0] for r in sample["filtered_resps"]], abs=1e-4)


def test_boolq_takes_every_form_of_its_rows(llm: LLM, folder: Path, tmp_path: Path) -> None:
    foundry = [
        {"query": f"Passage: {r['passage']}\nQuestion: {r['question']}?", "choices": ["no", "yes"], "gold": r["answer"]}
        for r in ROWS
    ]
    super_glue = [{**row, "label": int(row["answer"]), "idx": n} for n, row in enumerate(ROWS)]
    assert [boolq_row(r) for r in foundry] == [boolq_row(r) for r in super_glue] == [boolq_row(r) for r in ROWS]
    (tmp_path / "train.jsonl").write_text((folder / "rows.jsonl").read_text("utf-8"), "utf-8")
    (tmp_path / "validation.json").write_text(json.dumps(foundry), "utf-8")
    (result,) = run(llm, HarnessTask("boolq"), TaskOptions(data=tmp_path, limit=4, num_fewshot=1))
    assert result.metrics["acc"].samples == len(result.samples) == 4
    right = [
        sample["answer"] == ("yes" if row["answer"] else "no")
        for sample, row in zip(result.samples, ROWS[:4], strict=True)
    ]
    assert [sample["correct"] for sample in result.samples] == right
    assert [sample["target"] for sample in result.samples] == ["yes" if row["answer"] else "no" for row in ROWS[:4]]
    assert result.metrics["acc"].value == sum(right) / 4
    assert "is none of the files known for boolq" in result.notes[0]


def test_local_rows_are_asked_and_judged_by_one_draw(llm: LLM, folder: Path, tmp_path: Path) -> None:
    """Of the split that the task names, though there is another one, which has no labels."""
    rows: list[dict[str, Any]] = [
        {"question": f"number {n}?", "choices": [f"{n} is right", "no", "nor this", "never"], "label": 0}
        for n in range(8)
    ]
    (tmp_path / "test.json").write_text(json.dumps([{**row, "label": -1, "hint": ""} for row in rows]), "utf-8")
    (tmp_path / "validation.json").write_text(json.dumps([*rows[:7], {**rows[7], "hint": "a hint"}]), "utf-8")
    (result,) = run(llm, HarnessTask("drawn", folder), TaskOptions(data=tmp_path, num_fewshot=1))
    assert [sample["target"] for sample in result.samples] == [row["choices"][0] for row in rows]
    assert result.data["path"] == str(tmp_path)
    with pytest.raises(UsageError, match=r"row 1 of its data split has the label -1, and its choices are '"):
        HarnessTask("drawn", folder).check(TaskOptions(data=tmp_path / "test.json"))


def test_a_key_that_the_first_row_lacks_is_kept() -> None:
    rows = StoredRows({"test": [{"a": 1}, {"a": 2, "b": "x"}]})
    assert rows.data_set()["test"].to_list() == [{"a": 1, "b": None}, {"a": 2, "b": "x"}]


def test_the_shared_rows_of_boolq_are_one_data_set(test_data: Path) -> None:
    from npu_zoo.evaluation.accuracy.local_data import read_rows

    first = read_rows(test_data / "boolq" / "boolq_val_first200.jsonl")
    whole = read_rows(test_data / "boolq" / "boolq_val_llmfoundry.jsonl")
    assert [boolq_row(row) for row in first] == [boolq_row(row) for row in whole[:200]]
    assert sum(boolq_row(row)["label"] for row in whole) == 2033


class Interrupting:
    """Interrupts once so many requests are done."""

    def __init__(self, after: int) -> None:
        self.after, self.first = after, -1

    def __call__(self, stage: str, done: int, total: int) -> None:
        self.first = done if self.first < 0 else self.first
        if done == self.after:
            raise KeyboardInterrupt


@pytest.mark.parametrize("name", TASKS)
def test_an_interrupted_run_goes_on(llm: LLM, folder: Path, tmp_path: Path, name: str) -> None:
    (whole,) = run(llm, HarnessTask(name, folder), TaskOptions())
    path = tmp_path / "out.responses"
    with ResponseFile(path, "m") as kept, pytest.raises(KeyboardInterrupt):
        run(llm, HarnessTask(name, folder), TaskOptions(responses=kept), Interrupting(2))
    path.write_bytes(path.read_bytes() + b'{"key": "torn')
    again = Interrupting(-1)
    with ResponseFile(path, "m") as kept:
        assert kept.found == 2
        (result,) = run(llm, HarnessTask(name, folder), TaskOptions(responses=kept), again)
        assert again.first == 2
        kept.remove()
    for metric, value in whole.metrics.items():
        assert result.metrics[metric].value == pytest.approx(value.value, rel=1e-4)
    assert [sample["answer"] for sample in result.samples] == [sample["answer"] for sample in whole.samples]
    assert not path.exists()
    assert not llm.engine.has_unfinished_requests()


def test_logits_are_those_of_the_scored_positions(llm: LLM, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "logits.safetensors"
    with LogitFile(out, "tiny", positions=3) as logits:
        options = TaskOptions(logits=logits, limit=2)
        scored, _, rolled = (run(llm, HarnessTask(name, folder), options)[0] for name in TASKS)
        logits.finish()
    found = load_file(out)
    assert set(found) == {f"{name}/{n}" for name in TASKS for n in range(2)}
    for sample in scored.samples:
        rows = found[f"choices/{sample['id']}"].astype("float64")
        logprobs = rows - (rows.max(1) + _log_sum(rows))[:, None]
        assert logprobs.shape == (6, llm.engine.config.model_config.vocab_size)
        scores = sample["loglikelihoods"]
        assert isinstance(scores, list)
        assert logprobs[0].max() == pytest.approx(logprobs[3].max(), abs=1e-4)  # both choices follow one context
    assert len(found["words/0"]) == 1
    assert len(found["texts/0"]) == 3
    assert not list(tmp_path.glob(".*"))
    assert rolled.samples


def _log_sum(rows: Any) -> Any:
    import numpy

    return numpy.log(numpy.exp(rows - rows.max(1)[:, None]).sum(1))


def test_an_unknown_name_gets_the_nearest_ones(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manager = TaskManager(include_path=str(folder), include_defaults=False)  # all of the harness's take seconds
    monkeypatch.setattr(harness, "_manager", lambda *where, **how: manager)
    with pytest.raises(UsageError, match=r"no task choises; the nearest names are choices"):
        HarnessTask("choises", folder).check(TaskOptions())
    with pytest.raises(UsageError, match=r"nearest names are humaneval"):
        HarnessTask("human_eval", folder).check(TaskOptions())


def test_what_cannot_run_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"unsafe of the harness runs generated programs"):
        HarnessTask("unsafe", folder).check(TaskOptions())
    with pytest.raises(UsageError, match=r"boolq\.jsonl \(2,210,395 bytes, CC BY-SA 3\.0, sha256 454ff"):
        HarnessTask("boolq").check(TaskOptions())
    with pytest.raises(UsageError, match=r"nothing does not exist; download https"):
        HarnessTask("boolq").check(TaskOptions(data=tmp_path / "nothing"))
    with pytest.raises(UsageError, match=r"everything stands for 3: choices, words, texts; name the task"):
        HarnessTask("everything", folder).check(TaskOptions(data=folder / "rows.jsonl"))
    with pytest.raises(UsageError, match=r"6 examples before each question, and its data set has 5"):
        HarnessTask("choices", folder).check(TaskOptions(num_fewshot=6))
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"question": "q", "passage": "p", "answer": 1}\n{"question": "q", "passage": "p"}\n', "utf-8")
    with pytest.raises(UsageError, match=r"rows\.jsonl, row 2: no row of BoolQ"):
        HarnessTask("boolq").check(TaskOptions(data=rows))
    rows.write_text('{"question": "q"\n', "utf-8")
    with pytest.raises(UsageError, match=r"rows\.jsonl, line 1: no JSON"):
        HarnessTask("boolq").check(replace(TaskOptions(), data=rows))
