"""``bench compare``: the same work on npu-zoo and on other engines."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from npu_zoo.cli.loading import tell_notes
from npu_zoo.cli.options import request_options
from npu_zoo.cli.output import note, print_items, print_table
from npu_zoo.core.errors import UsageError
from npu_zoo.evaluation.offline.cases import CASES_EXAMPLE, read_cases
from npu_zoo.evaluation.peers.cases import CATALOGUE, DEFAULT_CASES, Case, cases_of_lengths, named_cases
from npu_zoo.evaluation.peers.comparison import Step
from npu_zoo.evaluation.peers.engines import InstalledEngine, find_engines, parse_interpreters, parse_names
from npu_zoo.evaluation.peers.process import PeerError
from npu_zoo.evaluation.peers.session import Session, checked_request
from npu_zoo.evaluation.peers.table import HEADS, WORK_HEADS, remarks, table_rows, work_rows
from npu_zoo.evaluation.record import require_record_place, write_record
from npu_zoo.parallel.processes import exit_on_sigterm
from npu_zoo.settings import Settings

_ENGINES_HELP = "Engines, comma-separated; the first is compared with the others. Default: npu-zoo and all installed."
_PYTHON_HELP = "The interpreter of the environment that has an engine; repeatable. Default: this one."
_CASES_HELP = (
    f"Cases, comma-separated: {', '.join(CATALOGUE)}; or pairs of lengths, such as [[2048,2048],[256,256]]. "
    f"Default: {', '.join(DEFAULT_CASES)}."
)
_BATCH_HELP = "Batch sizes of pairs: 1, or 1,4 for all, or [[1,4],[8]] with a list for each pair. Default: 1."
_GGUF_HELP = "The model as llama.cpp takes it; its convert_hf_to_gguf.py makes one of a checkpoint."
_JSON_HELP = "Write the record, with all samples, after every case."


def _option(help_text: str, *flags: str, metavar: str | None = None) -> Any:
    return typer.Option(*flags, help=help_text, metavar=metavar, rich_help_panel="Comparison")


@request_options(engine=True)
def compare(
    settings: Settings,
    engines: Annotated[str | None, _option(_ENGINES_HELP, "--engines", metavar="NAME,…")] = None,
    engine_python: Annotated[list[str] | None, _option(_PYTHON_HELP, "--engine-python", metavar="NAME=PYTHON")] = None,
    cases: Annotated[str | None, _option(_CASES_HELP, "--cases", metavar="CASE,…")] = None,
    batch: Annotated[str | None, _option(_BATCH_HELP, "--batch", metavar="N,…")] = None,
    rounds: Annotated[int, typer.Option("--rounds", min=1, metavar="N", rich_help_panel="Comparison")] = 3,
    gguf: Annotated[Path | None, _option(_GGUF_HELP, "--gguf", metavar="FILE")] = None,
    json_file: Annotated[Path | None, _option(_JSON_HELP, "--json", metavar="FILE")] = None,
) -> None:
    """Run the same work on npu-zoo and on other engines, in turn, and show medians and ratios.

    Each engine is one loaded process on the same cores, and who runs first changes from round to round. A ratio is the
    median of the rounds' pairs, with the lowest and highest; above 1 the first engine is better, whatever the unit.
    """
    args, config = checked_request(settings.args)
    if json_file:
        require_record_place(json_file, "bench compare")
    chosen = read_wanted(cases, batch)
    found, missing = _find_engines(engines, engine_python or [], gguf)
    session = Session.prepare(args, config, found, chosen, rounds=rounds, gguf=gguf)
    session.body.missing = missing
    asked = {
        "engines": engines,
        "engine_python": engine_python,
        "cases": cases,
        "batch": batch,
        "rounds": rounds,
        "gguf": gguf and str(gguf),
    }
    asked |= settings.args.model_dump(mode="json")
    tell_notes(config)
    with exit_on_sigterm(), _reported(session):
        for _ in session.run(_Progress()):
            if json_file:
                write_record(session.record({k: v for k, v in asked.items() if v is not None}), json_file)
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
            f"{session.config.dtype}{threads}, measured before the first case"
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
