"""What the page on serving shows is what happens: its Python is run against a server, its paths and options exist."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from npu_zoo.cli.app import find_command
from npu_zoo.testing.serving import RunningServer

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")
ADDRESS = "http://127.0.0.1:8000"
PYTHON = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    with RunningServer(("--model", "deepseek_coder", "--threads", "1", "--log-level", "error")) as server:
        yield server


@pytest.mark.parametrize("block", PYTHON)
def test_the_python_runs(server: RunningServer, block: str) -> None:
    assert ADDRESS in block
    code = block.replace(ADDRESS, server.url)
    exec(code, {})


def test_the_session_shows_what_the_command_says(server: RunningServer) -> None:
    (said,) = re.findall(r"\$ npu-zoo serve --model deepseek_coder\n(note: .*)\n", PAGE)
    assert said.replace(ADDRESS, server.url) in server.log


def test_the_paths_are_those_of_the_server(server: RunningServer) -> None:
    rows = [line for line in PAGE.splitlines() if line.startswith(("| `GET ", "| `POST "))]
    shown = {path for row in rows for path in re.findall(r"(/[\w/.]+)`", row.split("|")[1])}
    _, document = server.get("/openapi.json")
    served = {path.replace("{model}", "NAME") for path in document["paths"]} | {"/openapi.json"}
    assert shown == served


def test_the_options_are_those_of_the_commands() -> None:
    known = {flag for name in ("serve", "run", "chat") for option in find_command(name).params for flag in option.opts}
    named = set(re.findall(r"--[a-z][a-z-]+", PAGE))
    assert len(named) > 20
    assert named <= known
