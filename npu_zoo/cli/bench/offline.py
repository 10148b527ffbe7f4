"""``bench offline``: batches of random prompts of given lengths, timed."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from npu_zoo.cli.bench.offline_report import BenchProgress, print_report
from npu_zoo.cli.interrupts import interrupt_flag
from npu_zoo.cli.loading import follows, is_launched, loaded, tell_notes
from npu_zoo.cli.options import request_options
from npu_zoo.cli.output import note
from npu_zoo.core.config import EngineArgs, EngineConfig
from npu_zoo.core.errors import HardwareError, UsageError
from npu_zoo.dispatch import resolve
from npu_zoo.evaluation.offline.cases import Case, read_cases
from npu_zoo.evaluation.offline.room import too_long
from npu_zoo.platforms.detection import is_simulated
from npu_zoo.settings import Settings

if TYPE_CHECKING:
    from npu_zoo.engine.llm import LLM
    from npu_zoo.evaluation.offline.results import OfflineBody
    from npu_zoo.evaluation.record import Machine

DEFAULT_CASES = "[[256,256]]"
DEFAULT_BATCH_LIMIT = 256
NOT_ALL_RAN = 1
"""The exit code where a case did not run."""


def _option(help_text: str, *flags: str, metavar: str | None = None, panel: str = "Cases", **more: Any) -> Any:
    return typer.Option(*flags, help=help_text, metavar=metavar, rich_help_panel=panel, **more)


_CASES_HELP = f"Pairs of input and output tokens, such as [[2048,2048],[1024,1024]]. Default: {DEFAULT_CASES}."
_BATCH_HELP = "Sequences at once: 1,4 for all pairs, or [[1,4],[1,8]] with a list for each. Default: 1."
_UNDER_HELP = "Search each pair's largest batch whose non-first tokens take less, on average; in place of --batch."
_LIMIT_HELP = f"The largest batch that the search tries. Default: {DEFAULT_BATCH_LIMIT}."
_CSV_HELP = "Write rows with MindIE's columns; a file that has them keeps its rows."
_JSON_HELP = "Write a record: all times, versions, the machine, the matrix row."


@request_options(engine=True)
def offline(
    settings: Settings,
    cases: Annotated[str, _option(_CASES_HELP, "--cases", metavar="PAIRS")] = DEFAULT_CASES,
    batch: Annotated[str | None, _option(_BATCH_HELP, "--batch", metavar="SIZES")] = None,
    rounds: Annotated[
        int,
        _option("Measured runs of each case, of which medians are told. Default: 1.", "--rounds", metavar="N", min=1),
    ] = 1,
    prompt_seed: Annotated[int, _option("Seed of the random prompts. Default: 0.", "--seed", metavar="N")] = 0,
    max_batch_under: Annotated[
        float | None, _option(_UNDER_HELP, "--max-batch-under", metavar="MS", panel="Search")
    ] = None,
    batch_limit: Annotated[
        int | None, _option(_LIMIT_HELP, "--batch-limit", metavar="N", panel="Search", min=1)
    ] = None,
    csv: Annotated[Path | None, _option(_CSV_HELP, "--csv", metavar="FILE", panel="Output")] = None,
    json: Annotated[Path | None, _option(_JSON_HELP, "--json", metavar="FILE", panel="Output")] = None,
) -> None:
    """Time batches of random prompts of given lengths, which run to the end of their outputs.

    Each case is warmed up first. The longest sequence is set from the largest pair unless --max-model-len says it.
    Cases that do not fit say so, and the others run; it ends with 1 then. Ctrl-C keeps what has finished.
    """
    plan = _read_plan(cases, batch, max_batch_under, batch_limit)
    arguments: dict[str, Any] = {"cases": cases, "batch": batch, "rounds": rounds, "seed": prompt_seed}
    arguments |= {"max_batch_under": max_batch_under, "batch_limit": plan.batch_limit}
    configs = _resolve(settings.args, plan)
    if follows():
        if configs.runnable:
            with loaded(configs.asked):  # which works for the first rank until the run is over, and does not come back
                return
        return
    for text in plan.notes:
        note(text)
    tell_notes(configs.asked)
    shown = {**arguments, "engine": settings.args.model_dump(exclude_none=True)}
    outcome = _Outcome(configs, shown, csv, json)
    try:
        _run(configs, plan, rounds, prompt_seed, outcome)
    except KeyboardInterrupt:
        note(f"interrupted; {len(outcome.body.cases)} of {len(plan.cases)} case(s) have finished")
        raise
    finally:
        print_report(outcome.body, outcome.machine, simulated=outcome.simulated)
    if outcome.body.not_run:
        raise typer.Exit(NOT_ALL_RAN)


@dataclass(frozen=True)
class _Plan:
    """What is to be run.

    Attributes:
        cases: of a search one for each pair, with the largest batch that it may try.
        under_ms: the latency to search under; None where the cases are run as they are.
    """

    cases: tuple[Case, ...]
    notes: tuple[str, ...]
    under_ms: float | None
    batch_limit: int | None


def _read_plan(cases: str, batch: str | None, under_ms: float | None, batch_limit: int | None) -> _Plan:
    if under_ms is None:
        if batch_limit is not None:
            raise UsageError("--batch-limit goes with --max-batch-under; --batch names the batches to run")
        return _Plan(*read_cases(cases, batch or "1"), None, None)
    if batch is not None:
        raise UsageError("--max-batch-under searches the batch; leave --batch out (--batch-limit bounds the search)")
    if not 0 < under_ms < math.inf:
        raise UsageError(f"--max-batch-under {under_ms:g} is no time; give milliseconds above 0")
    limit = batch_limit or DEFAULT_BATCH_LIMIT
    return _Plan(*read_cases(cases, str(limit)), under_ms, limit)


@dataclass(frozen=True)
class _Configs:
    """The request with the longest sequence that the cases need, and without one.

    Attributes:
        too_long: cases that are longer than the model's sequences, and why.
    """

    asked: EngineConfig
    unbounded: EngineConfig
    runnable: tuple[Case, ...]
    too_long: tuple[tuple[Case, str], ...]


def _resolve(args: EngineArgs, plan: _Plan) -> _Configs:
    """Check the request, with ``max_model_len`` and ``max_num_seqs`` from the cases where they are not asked for."""
    sequences = args.max_num_seqs or max(case.batch for case in plan.cases)
    args = args.model_copy(update={"max_num_seqs": sequences})
    unbounded = resolve(args)
    limit = args.max_model_len or unbounded.model_config.context_length
    runnable = tuple(case for case in plan.cases if case.length <= limit)
    refused = tuple((case, too_long(case, limit)) for case in plan.cases if case.length > limit)
    if args.max_model_len is not None or not runnable:
        return _Configs(unbounded, unbounded, runnable, refused)
    longest = max(case.length for case in runnable)
    try:
        asked = resolve(args.model_copy(update={"max_model_len": longest}))
    except HardwareError:  # of memory: without a length, it is as long as fits
        asked = unbounded
    return _Configs(asked, unbounded, runnable, refused)


class _Outcome:
    """What there is so far, and the files that have it, which are whole at any time.

    Attributes:
        machine: with what it was measured to do, once it was.
        simulated: the device is, so that times say nothing.

    Raises:
        UsageError: a file cannot be written, or holds something else.
    """

    def __init__(self, configs: _Configs, arguments: dict[str, Any], csv: Path | None, json: Path | None) -> None:
        from npu_zoo.evaluation.offline.mindie import MindieCsv
        from npu_zoo.evaluation.offline.results import NotRun, OfflineBody
        from npu_zoo.evaluation.record import ModelUnderTest, require_record_place

        self.machine: Machine | None = None
        self.simulated = is_simulated(configs.asked.device)
        refused = tuple(NotRun(**case._asdict(), reason=reason) for case, reason in configs.too_long)
        self.body = OfflineBody(not_run=refused)
        self._config, self._arguments, self._json = configs.asked, arguments, json
        if json is not None:
            require_record_place(json, "bench offline")
            self._model = ModelUnderTest.of(configs.asked)
            if not json.exists():  # what is there is replaced by results alone
                self._write_record(json)
        self._csv = MindieCsv(csv) if csv is not None else None

    def change(self, body: OfflineBody) -> None:
        """Take what there is now, and write it."""
        from npu_zoo.evaluation.offline.mindie import csv_rows

        self.body = body
        if self._csv is not None:
            self._csv.write(csv_rows(self._config.model, body.cases))
        if self._json is not None:
            self._write_record(self._json)

    def measure(self) -> None:
        """Measure the machine, which has to be idle; a simulated one is not. Where that fails there are no shares."""
        from npu_zoo.evaluation.machine import measure_machine

        if self.simulated:
            return
        note("measuring what the machine can do, for the shares of it")
        try:
            self.machine = measure_machine(self._config)
        except Exception as error:  # whatever a device's software raises, the cases' times stand without it
            note(f"the machine could not be measured, so no shares of it are told: {type(error).__name__}: {error}")

    def _write_record(self, path: Path) -> None:
        from npu_zoo.evaluation.machine import describe_machine
        from npu_zoo.evaluation.record import ResultRecord, write_record

        shown = self.body.on(self.machine) if self.machine else self.body
        record = ResultRecord(
            kind="bench offline",
            machine=self.machine or describe_machine(self._config.hardware, self._config.threads),
            model=self._model,
            arguments=self._arguments,
            body=shown.model_dump(mode="json"),
            figures={} if self.simulated else self.body.figures(),
        )
        write_record(record, path)


def _run(configs: _Configs, plan: _Plan, rounds: int, seed: int, outcome: _Outcome) -> None:
    """Run everything that the model's length allows."""
    if configs.runnable:
        with _started(configs) as llm:
            # A device's memory is the engine's as long as that runs; a CPU's threads are set once it does.
            if configs.asked.device == "cpu":
                outcome.measure()
            _run_loaded(llm, configs.runnable, plan, rounds, seed, outcome)
        if configs.asked.device != "cpu":
            outcome.measure()
    outcome.change(outcome.body.model_copy(update={"complete": True}))


def _run_loaded(llm: LLM, cases: Sequence[Case], plan: _Plan, rounds: int, seed: int, outcome: _Outcome) -> None:
    from npu_zoo.evaluation.offline.benchmark import OfflineBenchmark

    with interrupt_flag() as interrupted, BenchProgress(cases, rounds, plan.under_ms, interrupted) as progress:
        benchmark = OfflineBenchmark(llm.engine, rounds, seed, progress, outcome.change, outcome.body)
        if plan.under_ms is None:
            benchmark.run(cases)
        else:
            benchmark.search(cases, plan.under_ms, plan.batch_limit or DEFAULT_BATCH_LIMIT)


@contextlib.contextmanager
def _started(configs: _Configs) -> Iterator[LLM]:
    """The model with room for the longest case, or else for sequences as long as fit."""
    with contextlib.ExitStack() as stack:
        try:
            llm = stack.enter_context(loaded(configs.asked))
        except HardwareError as error:
            if configs.asked is configs.unbounded or is_launched():
                raise
            note(f"{error}; starting for the cases that fit")
            llm = stack.enter_context(loaded(configs.unbounded))
        yield llm
