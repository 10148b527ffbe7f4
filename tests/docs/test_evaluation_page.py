"""The commands on the page of accuracy run as they stand there, and write what it says."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from npu_zoo.cli import main

pytest.importorskip("lm_eval")

from npu_zoo.evaluation.accuracy.tasks import EVAL_TASKS
from npu_zoo.evaluation.record import read_record

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "evaluation.md").read_text(encoding="utf-8")
ROWS = [{"question": "is it so", "passage": f"It is {word}.", "answer": word == "so"} for word in ("so", "not so")]


def test_the_commands_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    Path("boolq.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS), "utf-8")
    Path("texts").mkdir()
    Path("texts", "a.txt").write_text("A text of a few words.", "utf-8")
    section = PAGE[: PAGE.index("## HumanEval")]
    for block in re.findall(r"```sh\n(.*?)```", section, re.DOTALL):
        for line in block.splitlines():
            assert main(shlex.split(line)[1:]) == 0
    metrics = re.findall(r"`(\w+)` \|$|`(\w+_perplexity|bits_per_byte)`", section, re.MULTILINE)
    shown = capsys.readouterr().out
    assert all((first or second) in shown for first, second in metrics)
    record = read_record(Path("boolq.result.json"), "eval")
    assert "boolq_acc" in record.figures
    (sample,) = (json.loads(text) for text in re.findall(r"```json\n(.*?)```", section, re.DOTALL))
    samples = record.body["samples"]
    assert isinstance(samples, list)
    assert list(samples[0]) == list(sample)


def test_all_own_tasks_are_there() -> None:
    table = PAGE[PAGE.index("| task |") :]
    assert all(f"`{name}`" in table for name in EVAL_TASKS)
