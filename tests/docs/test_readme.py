"""What the READMEs show is what happens: their sessions and their Python are run, their links lead somewhere."""

from __future__ import annotations

import argparse
import io
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer

from npu_zoo import LLM, SamplingParams
from npu_zoo.cli import main
from npu_zoo.cli.app import build_app

ROOT = Path(__file__).resolve().parents[2]
PAGES = ["README.md", "README.zh-CN.md"]
MEASURED = re.compile(r"tokens/s")
NEAR = 0.1
"""A difference of log-probabilities that rounding of bfloat16 can turn."""


def comparable(lines: list[str]) -> list[str]:
    """Lines without what is measured anew in every run; in any order, for two streams meet in one terminal."""
    return sorted(line.rstrip() for line in lines if line.strip() and not MEASURED.search(line))


def sessions() -> list[tuple[str, str, list[str]]]:
    """Page, command and shown output of every command in a console block; what both pages show alike once."""
    found: dict[tuple[str, ...], tuple[str, str, list[str]]] = {}
    for page in PAGES:
        for block in re.findall(r"```console\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL):
            for entry in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
                command, _, output = entry.partition("\n")
                shown = output.splitlines()
                found.setdefault((command, *comparable(shown)), (page, command, shown))
    return list(found.values())


@pytest.mark.parametrize(("page", "command", "shown"), sessions())
def test_a_session_shows_what_its_command_prints(
    page: str, command: str, shown: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    program, *arguments = shlex.split(command)
    assert program == "npu-zoo"
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    main(arguments)
    printed = comparable("".join(capsys.readouterr()).splitlines())
    if arguments[0] == "run" and printed != comparable(shown):
        assert_near_ties(arguments[1:], shown)
    else:
        assert printed == comparable(shown), f"{page}: {command}"


def assert_near_ties(arguments: list[str], shown: list[str]) -> None:
    """Where this processor's sums are rounded otherwise, what is shown is what the model would as soon have said."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model")
    parser.add_argument("--prompt")
    parser.add_argument("--chat", action=argparse.BooleanOptionalAction)
    parser.add_argument("--echo", action="store_true")
    asked = parser.parse_args(arguments)
    text = "\n".join(line for line in shown if not line.startswith("note: ") and not MEASURED.search(line)).strip("\n")
    with LLM(model=asked.model) as llm:
        if asked.chat:
            prompt = llm.engine.render_chat([{"role": "user", "content": asked.prompt}])
            whole = prompt + llm.engine.prompts.encode(text, add_special_tokens=False)
        else:
            prompt = llm.engine.prompts.encode(asked.prompt, add_special_tokens=True)
            whole = llm.engine.prompts.encode(text, add_special_tokens=True)
        assert whole[: len(prompt)] == prompt
        params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=1)
        scores = llm.generate([whole], params)[0].prompt_logprobs
    for position, token in enumerate(whole[len(prompt) :], len(prompt)):
        found = scores[position]
        assert found[token].logprob >= max(entry.logprob for entry in found.values()) - NEAR


@pytest.mark.parametrize("page", PAGES)
def test_both_pages_have_a_session(page: str) -> None:
    assert "```console\n$ npu-zoo " in (ROOT / page).read_text(encoding="utf-8")


@pytest.mark.parametrize("page", PAGES)
def test_commands_that_are_named_are_accepted(page: str, accept: Callable[[list[str]], None]) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    found = [shlex.split(line) for line in re.findall(r"^    npu-zoo (.*)$", text, re.MULTILINE)]
    assert len(found) > 4
    for words in found:
        accept(words)


def leaves(command: Any, path: str = "") -> list[str]:
    """The commands that do something, by the words that call them."""
    below = getattr(command, "commands", {})
    own = [path] if path and (not below or command.invoke_without_command) else []
    return own + [leaf for name, child in below.items() for leaf in leaves(child, f"{path} {name}".lstrip())]


@pytest.mark.parametrize(("page", "heading"), [("README.md", "Commands"), ("README.zh-CN.md", "命令")])
def test_every_command_is_listed(page: str, heading: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8").split(f"\n## {heading}\n")[1]
    listed = re.findall(r"`([^`]+)`", text.split("docs/cli.md")[0])
    assert sorted(listed) == sorted(leaves(typer.main.get_command(build_app())))


def python_blocks(page: str) -> list[str]:
    """The page's Python, whose remarks are in the page's language."""
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)


def test_the_python_of_the_readmes_runs() -> None:
    pages = [python_blocks(page) for page in PAGES]
    assert all(pages)
    for block in {re.sub(r"\s*#.*|\n+(?=\n)", "", block) for blocks in pages for block in blocks}:
        exec(block, {})


@pytest.mark.parametrize(
    "page",
    [
        *PAGES,
        "CONTRIBUTING.md",
        "benchmarks/README.md",
        *(f"docs/{p.name}" for p in sorted((ROOT / "docs").glob("*.md"))),
    ],
)
def test_links_lead_somewhere(page: str) -> None:
    path = ROOT / page
    for target in re.findall(r"\]\(([^)#\s]+)\)", path.read_text(encoding="utf-8")):
        if not re.match(r"[a-z]+:", target):
            assert (path.parent / target).exists(), target
