"""What the page on measuring a server shows is taken: commands, lines of files, and the reading of a record."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from npu_zoo.cli.app import find_command
from npu_zoo.evaluation.record import ResultRecord, write_record
from npu_zoo.evaluation.serving.arrivals import ClosedLoop
from npu_zoo.evaluation.serving.datasets import read_dataset
from npu_zoo.evaluation.serving.load import LevelRun
from npu_zoo.evaluation.serving.observation import Observation
from npu_zoo.evaluation.serving.result import MeasuredLevel, ServeResult
from npu_zoo.evaluation.serving.server import ServerIdentity

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "bench-serve.md").read_text(encoding="utf-8")


def test_the_commands_are_taken(accept: Callable[[list[str]], None]) -> None:
    commands = re.findall(r"^\$ npu-zoo (.*)$", PAGE, re.MULTILINE)
    assert len(commands) == 5
    for command in commands:
        accept(command.split())


def test_the_options_are_those_of_the_command() -> None:
    (serve,) = (find_command("bench").commands[name] for name in ("serve",))
    named = set(re.findall(r"--[a-z][a-z-]+", PAGE))
    assert len(named) > 15
    assert named <= {flag for option in serve.params for flag in option.opts}


def test_the_lines_are_taken(tmp_path: Path) -> None:
    (lines,) = re.findall(r"```json\n(.*?)```", PAGE, re.DOTALL)
    file = tmp_path / "prompts.jsonl"
    file.write_text(lines)
    assert len(read_dataset(file).asks) == 3


def test_the_record_is_read_as_shown(tmp_path: Path) -> None:
    seen = Observation(
        index=0, sent=0.5, arrivals=(0.75, 1.0), characters=(1, 1), ended=2.0, status="completed", output_tokens=4
    )
    level = MeasuredLevel.of(ClosedLoop(2), LevelRun([seen]), None)
    server = ServerIdentity(url="http://localhost:8000", model="m")
    result = ServeResult(server=server, endpoint="completions", prompts="ids", ignore_eos=True, levels=(level,))
    write_record(ResultRecord(kind="bench serve", body=result.model_dump(mode="json")), tmp_path / "serve.json")
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    ran = subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert (ran.stdout, ran.stderr) == ("concurrency 2 2.0 0.25\n", "")
