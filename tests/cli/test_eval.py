"""``npu-zoo eval``: figures, records, interruptions, and what is refused before anything is loaded."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from npu_zoo.cli.evaluation.progress import EvalProgress
from npu_zoo.cli.evaluation.tasks import answers_key
from npu_zoo.core.config import EngineArgs, EngineConfig
from npu_zoo.dispatch import resolve
from npu_zoo.evaluation import record
from npu_zoo.evaluation.record import read_record

pytest.importorskip("lm_eval")


class Ran(NamedTuple):
    code: int
    out: str
    err: str


Cli = Callable[..., Ran]
ROWS = [{"question": f"is {n} even", "passage": f"A text on {n}.", "answer": n % 2 == 0} for n in range(4)]


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    data = tmp_path / "boolq.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS), "utf-8")
    return ["eval", "--model", "deepseek_coder", "--task", "boolq", "--data", str(data), "--json", str(tmp_path / "r")]


def test_an_interrupted_eval_goes_on(cli: Cli, command: list[str], tmp_path: Path) -> None:
    shown = EvalProgress.__call__

    def interrupting(self: EvalProgress, stage: str, done: int, total: int) -> None:
        shown(self, stage, done, total)
        if done == 3:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EvalProgress, "__call__", interrupting)
        ran = cli(*command)
    assert ran.code == 130
    assert "r.responses keeps 3 answers; the same command goes on from there" in ran.err
    assert not (tmp_path / "r").exists()
    ran = cli(*command)
    assert (ran.code, ran.out.split()[10:12]) == (0, ["boolq", "acc"])
    assert "holds 3 answers of an interrupted run" in ran.err
    assert "loglikelihood: 8/8" in ran.err
    assert {path.name for path in tmp_path.iterdir()} == {"boolq.jsonl", "r"}
    written = read_record(tmp_path / "r", "eval")
    assert written.model is not None
    assert written.model.name == "deepseek_coder:demo"
    samples = written.body["samples"]
    assert isinstance(samples, list)
    right = [sample["correct"] for sample in samples if isinstance(sample, dict)]
    assert written.figures["boolq_acc"] == sum(map(bool, right)) / len(ROWS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "no task is named"),
        (["--task", "boolq"], "give --data FILE; download https://"),
        (["--task", "boolq,perplexity", "--data", "a"], "write --data TASK=PATH"),
        (["--task", "boolq", "--data", "a", "--data", "b"], "given twice for boolq"),
        (["--task", "boolq", "--task-arg", "k=1"], "--task-arg k: no setting of boolq; they have none"),
        (["--task", "boolq", "--limit", "0"], "--limit"),
    ],
)
def test_bad_requests_are_refused(cli: Cli, options: list[str], message: str) -> None:
    ran = cli("eval", "--model", "deepseek_coder", *options)
    assert ran.code == 2
    assert message in " ".join(ran.err.split())


@pytest.mark.parametrize("place", ["r", "../{}/r", "r.responses"])
def test_a_record_is_not_replaced_by_logits(cli: Cli, command: list[str], tmp_path: Path, place: str) -> None:
    ran = cli(*command, "--save-logits", str(tmp_path / place.format(tmp_path.name)))
    assert ran.code == 2
    assert "is the place of --json" in " ".join(ran.err.split())
    assert {path.name for path in tmp_path.iterdir()} == {"boolq.jsonl"}


def test_answers_are_taken_up_where_all_they_depend_on_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    config = resolve(EngineArgs(model="deepseek_coder", hardware="cpu", dtype="float32"))
    one = answers_key(config)
    assert answers_key(config) == one
    others = [{"deterministic": True}, {"enforce_eager": not config.enforce_eager}, {"kernels": ()}, {"seed": 7}]
    keys = {one, *(answers_key(_changed(config, **change)) for change in others)}
    monkeypatch.setattr(record, "installed_version", lambda name: "0.1")
    assert len({*keys, answers_key(config)}) == len(others) + 2


def _changed(config: EngineConfig, **change: Any) -> EngineConfig:
    """One that no request makes on every machine."""
    other = copy.copy(config)
    for name, value in change.items():
        object.__setattr__(other, name, value)
    return other


def test_a_file_that_is_no_record_is_left_alone(cli: Cli, command: list[str], tmp_path: Path) -> None:
    (tmp_path / "r").write_text("my notes", "utf-8")
    assert cli(*command).code == 2
    assert (tmp_path / "r").read_text("utf-8") == "my notes"
