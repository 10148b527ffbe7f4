"""Where ``run`` takes its prompts from: options, a file, standard input; every one is kept, in order."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from npu_zoo.cli.options import parse_ids
from npu_zoo.cli.output import note
from npu_zoo.cli.prompt_file import PromptFile
from npu_zoo.core.errors import UsageError

EXAMPLE = "def fibonacci(n):\n"
"""What the bundled checkpoint completes where no prompt is given."""

MANY = 10_000
"""Prompts beyond which a run that holds them all says so."""

NO_PROMPT = (
    "no prompt was given; use --prompt TEXT, --prompts-file FILE (one prompt a line), --prompt-token-ids 1,2,3, "
    "--fim-prefix with --fim-suffix, or standard input"
)


@dataclass(frozen=True)
class Prompt:
    """A text, token ids, a conversation, or a prefix and suffix with a hole between them.

    Attributes:
        line: its line in a file, from 1.
        id: what the file calls it.
    """

    text: str | None = None
    token_ids: tuple[int, ...] | None = None
    fim: tuple[str, str] | None = None
    messages: tuple[dict[str, Any], ...] | None = None
    line: int | None = None
    id: str | int | None = None


@dataclass(frozen=True)
class PromptOptions:
    """The prompt options as they were given."""

    texts: list[str] | None = None
    file: PromptFile | None = None
    token_ids: list[str] | None = None
    fim_prefix: str | None = None
    fim_suffix: str | None = None
    fim_prefix_file: Path | None = None
    fim_suffix_file: Path | None = None

    def collect(self) -> list[Prompt]:
        """Every prompt in order: texts, then the file's lines; or token ids; or a hole to fill; or standard input.

        Raises:
            UsageError: kinds are mixed, or a file cannot be read or holds no prompt.
        """
        fim = self._fim()
        texts = [*(Prompt(text=text) for text in self.texts or ()), *(_lines(self.file) if self.file else ())]
        ids = [tuple(parse_ids(text, "--prompt-token-ids")) for text in self.token_ids or ()]
        if sum(map(bool, (texts, ids, fim))) > 1:
            raise UsageError("prompts as text, as token ids and with a hole to fill cannot be mixed in one run")
        if fim:
            return [Prompt(fim=fim)]
        if ids:
            return [Prompt(token_ids=found) for found in ids]
        if not texts and self.file:
            raise UsageError(f"{self.file.name} holds no prompt; write one a line")
        return texts or _standard_input()

    def require_file_alone(self) -> PromptFile:
        """The file, which is run line by line.

        Raises:
            UsageError: there is anything but the file.
        """
        others = (self.texts, self.token_ids, self._fim())
        if self.file is None or any(others):
            raise UsageError(
                "--output, JSON lines and batch files go with --prompts-file alone, without prompts from options"
            )
        return self.file

    def _fim(self) -> tuple[str, str] | None:
        prefix = _one_of(self.fim_prefix, self.fim_prefix_file, "prefix")
        suffix = _one_of(self.fim_suffix, self.fim_suffix_file, "suffix")
        return None if prefix is None and suffix is None else (prefix or "", suffix or "")


def _one_of(text: str | None, file: Path | None, kind: str) -> str | None:
    if text is not None and file is not None:
        raise UsageError(f"--fim-{kind} and --fim-{kind}-file exclude each other")
    return read_text(file) if file else text


def read_text(path: Path) -> str:
    """A UTF-8 file's text; ``-`` is standard input.

    Raises:
        UsageError: it cannot be read or is not UTF-8.
    """
    standard = str(path) == "-"
    name = "standard input" if standard else str(path)
    try:
        # Not the text stream: what it decodes with depends on the locale.
        return (sys.stdin.buffer.read() if standard else path.read_bytes()).decode("utf-8-sig")
    except OSError as error:
        raise UsageError(f"cannot read {name}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{name} is not UTF-8: {error}") from error


def _lines(file: PromptFile) -> list[Prompt]:
    prompts = [Prompt(text=line.text, line=line.number) for line in file.lines()]
    if file.blank:
        note(f"{file.name}: {file.blank} blank line(s) skipped, {len(prompts)} prompt(s) read")
    if len(prompts) > MANY:
        note(
            f"all {len(prompts)} prompts are held in memory; with --output FILE a few are, and the run can go on later"
        )
    return prompts


def _standard_input() -> list[Prompt]:
    """All of standard input as one prompt, without its last line end; nothing from a terminal."""
    if sys.stdin is None or sys.stdin.isatty():
        return []
    text = read_text(Path("-"))
    return [Prompt(text=text.removesuffix("\n").removesuffix("\r"))] if text.strip() else []
