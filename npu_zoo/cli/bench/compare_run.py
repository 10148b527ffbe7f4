"""Runs what ``bench compare`` asked for, and shows it."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from npu_zoo.cli.loading import tell_notes
from npu_zoo.cli.output import note, print_items, print_table
from npu_zoo.core.config import EngineArgs
from npu_zoo.core.errors import UsageError
from npu_zoo.evaluation.offline.cases import CASES_EXAMPLE, read_cases
from npu_zoo.evaluation.peers.cases import DEFAULT_CASES, Case, cases_of_lengths, named_cases
from npu_zoo.evaluation.peers.comparison import Step
from npu_zoo.evaluation.peers.engines import InstalledEngine, find_engines, parse_interpreters, parse_names
from npu_zoo.evaluation.peers.process import PeerError
from npu_zoo.evaluation.peers.session import Session, checked_request
from npu_zoo.evaluation.peers.table import HEADS, WORK_HEADS, remarks, table_rows, work_rows
from npu_zoo.evaluation.record import require_record_place, write_record
from npu_zoo.parallel.processes import exit_on_sigterm


def run_comparison(args: EngineArgs, asked: Mapping[str, Any], gguf: Path | None, json_file: Path | None) -> None:
    """Run all cases, write the record after each, and show what there is at the end.

    Args:
        asked: the command's own options, by name.
    """
    args, config = checked_request(args)
    if json_file:
        require_record_place(json_file, "bench compare")
    chosen = read_wanted(asked["cases"], asked["batch"])
    found, missing = _find_engines(asked["engines"], asked["engine_python"] or [], gguf)
    session = Session.prepare(args, config, found, chosen, rounds=asked["rounds"], gguf=gguf)
    session.body.missing = missing
    everything = {**asked, **args.model_dump(mode="json")}
    arguments = {name: value for name, value in everything.items() if value is not None}
    tell_notes(config)
    with exit_on_sigterm(), _reported(session):
        for _ in session.run(_Progress()):
            if json_file:
                write_record(session.record(arguments), json_file)
        if json_file:
            write_record(session.record(arguments), json_file)
    if not any(sample for case in session.body.cases for sample in case.rounds):
        raise PeerError("no engine came through any case; the reasons stand above")


def read_wanted(cases: str | None, batch: str | None) -> list[Case]:
    """Named cases, or prefill and decode of pairs of lengths."""
    if cases is not None and cases.lstrip().startswith("["):
        found = read_cases(cases, batch or "1")
        for text in found.notes:
            note(text)
        return cases_of_lengths(found.cases)
    if batch is not None:
        raise UsageError(f"--batch {batch} goes with pairs of lengths, such as --cases '{CASES_EXAMPLE}'")
    return named_cases(cases or ",".join(DEFAULT_CASES))


def _find_engines(
    names: str | None, pythons: list[str], gguf: Path | None
) -> tuple[list[InstalledEngine], dict[str, str]]:
    """Engines, and how to install others; llama.cpp takes part unasked only where there is a file for it."""
    found, missing = find_engines(parse_names(names) if names else None, parse_interpreters(pythons))
    if names or gguf:
        return found, missing
    without = [installed for installed in found if installed.name != "llama.cpp"]
    if len(without) < len(found):
        missing = {**missing, "llama.cpp": "it is installed; give --gguf FILE"}
    return without, missing


@contextlib.contextmanager
def _reported(session: Session) -> Iterator[None]:
    """Show what there is at the end, whatever ends it."""
    try:
        yield
    finally:
        if session.body.cases:
            print_table(HEADS, table_rows(session.body))
            print()
            print("Needed at least:")
            print_table(WORK_HEADS, work_rows(session.body))
        lines = [*remarks(session.body), *_measured(session)]
        if lines:
            print()
            print_items("Remarks", lines)


def _measured(session: Session) -> Iterator[str]:
    machine = session.machine
    if machine and machine.bandwidth and machine.peak:
        threads = f" with --threads {machine.threads}" if machine.threads else ""
        yield (
            f"the machine reads {machine.bandwidth / 1e9:.0f} GB/s and computes {machine.peak / 1e9:,.0f} GFLOP/s in "
            f"{session.config.dtype}{threads}, as measured before the first case and after the last"
        )


class _Progress:
    """Lines on stderr with the time that is left."""

    def __init__(self) -> None:
        self._start = time.monotonic()

    def __call__(self, step: Step) -> None:
        left = (time.monotonic() - self._start) / step.done * (step.total - step.done)
        print(f"{step.done}/{step.total} {step.text}; {_duration(left)} left", file=sys.stderr, flush=True)


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
