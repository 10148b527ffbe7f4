"""Runs what ``bench serve`` asked for, and shows and writes it."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import typer

from npu_zoo.cli.bench.serve_floor import measure_floor, with_floors
from npu_zoo.cli.bench.serve_options import api_key
from npu_zoo.cli.bench.serve_progress import ServeProgress
from npu_zoo.cli.bench.serve_tables import print_result
from npu_zoo.cli.output import note
from npu_zoo.core.config import EngineConfig
from npu_zoo.evaluation.machine import describe_machine
from npu_zoo.evaluation.record import Machine, ResultRecord, write_record
from npu_zoo.evaluation.serving.client import Client, raise_file_limit
from npu_zoo.evaluation.serving.measuring import ServeBench, ServePlan
from npu_zoo.evaluation.serving.result import ServeResult
from npu_zoo.parallel.processes import exit_on_sigterm
from npu_zoo.protocol.server_address import ServerAddress

FAILED = 1
INTERRUPTED = 130


def run_plan(
    plan: ServePlan,
    address: ServerAddress,
    timeout: float,
    served: EngineConfig | None,
    arguments: dict[str, Any],
    json_file: Path | None,
) -> None:
    """Run all levels, write the record after each, and show what there is at the end, whatever ends it.

    Args:
        served: the model whose floors are shown; None for none.
        arguments: the command's options, for the record.

    Raises:
        typer.Exit: with the code that says how it went, where that is not 0.
    """
    with exit_on_sigterm():
        report = _Report(served, measure_floor(served), arguments, json_file)
        with report:
            _measure(address, plan, timeout, report.keep)
    _finish(report.result)


class _Report(contextlib.AbstractContextManager["_Report"]):
    """What there is: written after each level, and shown at the end, whatever ends it.

    Args:
        served: the model whose floors are shown, and ``machine`` what was measured for them; None for none.
        file: that the record is written to.
    """

    def __init__(
        self, served: EngineConfig | None, machine: Machine | None, arguments: dict[str, Any], file: Path | None
    ) -> None:
        self.result: ServeResult | None = None
        self._served, self._machine = served, machine
        self._arguments, self._file = arguments, file
        self._client_machine = machine or (describe_machine() if file else None)

    def keep(self, result: ServeResult) -> None:
        """Take what was measured so far."""
        self.result = with_floors(result, self._served, self._machine)
        if self._file:
            _write(self.result, self._client_machine, self._arguments, self._file)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self.result is not None:
            print_result(self.result, self._machine)


def _finish(result: ServeResult | None) -> None:
    """End with the code that says how it went."""
    if result is None:
        raise typer.Exit(INTERRUPTED)
    if result.interrupted:
        note("interrupted: the figures are of what was measured until then")
        raise typer.Exit(INTERRUPTED)
    if result.failed:
        raise typer.Exit(FAILED)


def _measure(address: ServerAddress, plan: ServePlan, timeout: float, keep: Callable[[ServeResult], None]) -> None:
    """Run the benchmark; nothing is kept where it is interrupted before anything is measured."""
    raise_file_limit()
    key = api_key()
    if key and not (address.encrypted or address.loopback):
        note(f"the API key goes to {address.host} without encryption; use https where others can listen")

    async def run(progress: ServeProgress) -> ServeResult | None:
        async with Client(address, key, timeout=timeout) as client:
            bench = ServeBench(
                client,
                plan,
                on_note=progress.note,
                on_level=progress.begin,
                on_change=progress.update,
                on_result=keep,
            )
            with _stopped_by_interrupt(bench.stop):
                return await bench.run()

    with ServeProgress() as progress:
        result = asyncio.run(run(progress))
    if result is not None:
        keep(result)


@contextlib.contextmanager
def _stopped_by_interrupt(stop: Callable[[], None]) -> Iterator[None]:
    """The first Ctrl-C stops the benchmark; a second one ends the program as it would elsewhere."""
    loop = asyncio.get_running_loop()

    def handle() -> None:
        loop.remove_signal_handler(signal.SIGINT)
        stop()

    loop.add_signal_handler(signal.SIGINT, handle)
    try:
        yield
    finally:
        loop.remove_signal_handler(signal.SIGINT)


def _write(result: ServeResult, machine: Machine | None, arguments: dict[str, Any], file: Path) -> None:
    record = ResultRecord(
        kind="bench serve",
        machine=machine,
        arguments=arguments,
        body=result.model_dump(mode="json"),
        figures=result.headline(),
    )
    write_record(record, file)
