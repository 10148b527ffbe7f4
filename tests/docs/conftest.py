"""What tests of several pages take."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import typer

from npu_zoo.cli.app import build_app


@pytest.fixture(scope="module")
def accept() -> Callable[[list[str]], None]:
    """Has a command of npu-zoo take its arguments, without running it; raises where it knows one of them not."""
    root = typer.main.get_command(build_app())

    def take(words: list[str]) -> None:
        command, rest = root, words
        while hasattr(command, "commands") and (rest[0] in command.commands or not command.invoke_without_command):
            command, rest = command.commands[rest[0]], rest[1:]
        command.make_context(" ".join(words), list(rest))

    return take
