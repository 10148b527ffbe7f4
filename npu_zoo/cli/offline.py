"""``run --prompts-file`` over files of any length: results are written as they finish, and a run can go on later."""

from __future__ import annotations

import enum
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from npu_zoo.cli.interrupts import interrupt_flag
from npu_zoo.cli.output import note
from npu_zoo.cli.progress import RunProgress
from npu_zoo.cli.prompt_file import Line, PromptFile
from npu_zoo.cli.prompt_formats import JsonLines, LineFormat, LineWork, TextLines, looks_like
from npu_zoo.cli.result_file import ResultFile
from npu_zoo.cli.results import json_line
from npu_zoo.cli.run_key import RunKey
from npu_zoo.core.config import EngineConfig
from npu_zoo.core.engine import Engine
from npu_zoo.core.errors import UsageError
from npu_zoo.core.sampling import SamplingParams
from npu_zoo.engine.offline import Finished, OfflineRunner
from npu_zoo.engine.prompting import PromptEncoder
from npu_zoo.settings import Settings


class PromptsFormat(str, enum.Enum):
    """The forms that ``--prompts-format`` names."""

    auto = "auto"
    txt = "txt"
    jsonl = "jsonl"
    batch = "batch"


class Results(Protocol):
    """Where results go; see :class:`npu_zoo.cli.result_file.ResultFile`."""

    done: bytearray
    failed: int

    @property
    def remaining(self) -> int:
        """How many results are still to come."""

    def write(self, index: int, result: dict[str, Any], *, failed: bool) -> None:
        """Take the result of a line of the input."""


class StandardOutput(AbstractContextManager["StandardOutput"]):
    """Results on standard output, of which nothing is kept."""

    def __init__(self, total: int) -> None:
        self.done = bytearray(total)
        self.failed = 0

    def __exit__(self, *exc_info: object) -> None:
        sys.stdout.flush()

    @property
    def remaining(self) -> int:
        """How many results are still to come."""
        return self.done.count(0)

    def write(self, index: int, result: dict[str, Any], *, failed: bool) -> None:
        """Write one line."""
        print(json_line(result), flush=True)
        self.done[index] = 1
        self.failed += failed


@dataclass(frozen=True)
class LineOptions:
    """What the command line says of the lines of a file.

    Attributes:
        sampling_params: for lines that say nothing else, under the command's own defaults.
        chat: whether texts go through the chat template; None as the variant is.
        served_model_names: what a batch's bodies may call the model; empty for the model's own names.
    """

    settings: Settings
    sampling_params: SamplingParams
    chat: bool | None
    served_model_names: Sequence[str]

    def open_format(self, name: str, config: EngineConfig) -> LineFormat:
        """The format of that name.

        Raises:
            UsageError: an option has no meaning with it.
        """
        if name == PromptsFormat.batch:
            return self._batch(config)
        if self.served_model_names:
            raise UsageError("--served-model-name is for batch files, whose bodies name a model")
        chat = config.chat if self.chat is None else self.chat
        return (JsonLines if name == PromptsFormat.jsonl else TextLines)(self.sampling_params, chat)

    def _batch(self, config: EngineConfig) -> LineFormat:
        if self.chat is not None or self.sampling_params.structured_outputs:
            raise UsageError(
                "a batch file says itself what is a chat and what its answers look like (url and response_format of "
                "each body); leave --chat and the options of structured output out"
            )
        from npu_zoo.cli.batch_format import BatchLines
        from npu_zoo.protocol.generation_config import generation_defaults

        defaults = {**generation_defaults(config.weights), **self.settings.sampling}
        return BatchLines(defaults, self.served_model_names or (config.model, config.family))


class OfflineRun:
    """A file of prompts whose lines have been checked.

    Raises:
        UsageError: it holds no prompt, or a line of which no result could be made.
    """

    def __init__(self, file: PromptFile, form: LineFormat, config: EngineConfig) -> None:
        self.file, self.form, self.config = file, form, config
        self.total = self._check()
        self.key = RunKey.of(file.digest, config, form.parameters())

    def results(self, output: Path | None) -> ResultFile | StandardOutput:
        """Where results go, with what is there of them already."""
        return ResultFile(output, self.key, self.total, self.form) if output else StandardOutput(self.total)

    def execute(self, engine: Engine, results: Results, *, timed: bool) -> None:
        """Run every line that has no result yet.

        Raises:
            KeyboardInterrupt: on Ctrl-C, after the step that is under way; a second one ends at once.
        """
        self.form.start(self.key, PromptEncoder(self.config, engine.explain().get("max_model_len")))
        progress = RunProgress(results.remaining, timed=timed, bar=not _shares_terminal(results))
        try:
            with interrupt_flag() as interrupted, progress:
                runner = OfflineRunner(engine)
                for finished in runner.run(self._works(results), on_output=progress.count, stopped=interrupted):
                    _write(finished, results)
                    progress.advance()
            if interrupted() and results.remaining:
                raise KeyboardInterrupt
        finally:
            if progress.done:
                print(progress.summary(), file=sys.stderr)

    def _works(self, results: Results) -> Iterator[LineWork]:
        for line in self.file.lines():
            if line.index >= self.total:
                raise self._changed()
            if not results.done[line.index]:
                yield self._work(line)
        if not self.key.is_of(self.file.digest):
            raise self._changed()

    def _work(self, line: Line) -> LineWork:
        try:
            return self.form.work(line)
        except UsageError:  # which all lines have passed
            raise self._changed() from None

    def _changed(self) -> UsageError:
        return UsageError(f"{self.file.name} was changed while it was run; start anew, with another file for --output")

    def _check(self) -> int:
        count = 0
        for line in self.file.lines():
            _naming_line(self.file, line, self.form.check)
            count += 1
        if self.file.blank:
            note(f"{self.file.name}: {self.file.blank} blank line(s) skipped, {count} prompt(s) read")
        if not count:
            raise UsageError(f"{self.file.name} holds no prompt; write one a line")
        return count


def format_name(asked: PromptsFormat, file: PromptFile, path: Path) -> str:
    """The format of a file: what was asked for, or what it looks like."""
    return asked.value if asked != PromptsFormat.auto else looks_like(path, _first(file.lines()))


def tell_beginning(results: Results, output: Path | None) -> None:
    """Say what an earlier process has done."""
    done = len(results.done) - results.remaining
    if done and results.remaining:
        note(f"{output} holds {done} of {len(results.done)} results; going on with the other {results.remaining}")


def tell_end(results: Results, output: Path | None) -> None:
    """Say how many lines succeeded and failed, and how to go on where some are left; nothing where nothing was done."""
    done = len(results.done) - results.remaining
    if not done:
        return
    where = f" in {output}" if output else ""
    print(f"{done - results.failed} succeeded, {results.failed} failed{where}", file=sys.stderr)
    if results.remaining and output:
        note(f"{results.remaining} of {len(results.done)} lines are left; the same command goes on with them")
    elif results.remaining:
        note(f"{results.remaining} of {len(results.done)} lines are left; with --output FILE a run can go on later")


def _shares_terminal(results: Results) -> bool:
    """Whether results go where a bar would be drawn over them."""
    return isinstance(results, StandardOutput) and sys.stdout.isatty()


def _write(finished: Finished[LineWork], results: Results) -> None:
    work, error = finished.work, finished.error
    try:
        result = work.result(finished.outputs) if error is None else {}
    except Exception as fault:
        error = fault
    results.write(work.line.index, result if error is None else work.refusal(error), failed=error is not None)


def _naming_line(file: PromptFile, line: Line, check: Callable[[Line], None]) -> None:
    try:
        check(line)
    except UsageError as error:
        raise UsageError(f"{file.name}, line {line.number}: {error}") from error


def _first(lines: Iterable[Line]) -> Line | None:
    return next(iter(lines), None)
