"""``validate``: whether what plugins claim holds, claim by claim."""

from __future__ import annotations

import enum
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from npu_zoo.cli.output import note, print_items, print_table
from npu_zoo.core.errors import UsageError

if TYPE_CHECKING:
    from npu_zoo.testing.validation.claims import Claim, Level, Outcome
    from npu_zoo.testing.validation.scope import Part

BROKEN = 6
INTERRUPTED = 130
NOTHING_TOLD = 4
"""As for hardware or an environment that is missing."""

_SECONDS_BETWEEN_LINES = 10.0


class LevelName(str, enum.Enum):
    """How far validation goes; each level includes those before it."""

    spec = "spec"
    build = "build"
    run = "run"
    simulate = "simulate"


JsonFile = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write every claim as JSON.")]
JunitFile = Annotated[
    Path | None, typer.Option("--junit", metavar="FILE", help="Write JUnit's XML, as CI services read it.")
]
MarkdownFile = Annotated[
    Path | None, typer.Option("--markdown", metavar="FILE", help="Write a summary in Markdown, with all that fails.")
]
LevelOption = Annotated[
    LevelName,
    typer.Option(
        "--level",
        metavar="LEVEL",
        help="spec (data alone), build (code is imported, models are built without storage), run (tiny models run on "
        "the CPU) or simulate (rows on NPUs run on the simulated runtime); each includes those before. Default: run.",
    ),
]
ResumeFile = Annotated[
    Path | None,
    typer.Option("--resume", metavar="FILE", help="Take over what held in an interrupted run's --json, of this code."),
]
JobsOption = Annotated[
    int | None,
    typer.Option("--jobs", metavar="N", min=1, help="Processes at once. Default: cores, as far as memory goes."),
]
TimeoutOption = Annotated[
    float | None, typer.Option("--timeout", metavar="SECONDS", min=1, help="For one claim. Default: 300.")
]
EvidenceFolder = Annotated[
    Path | None,
    typer.Option(
        "--evidence",
        metavar="DIR",
        help="Write evidence records to FAMILY.json in this folder. Default: evidence.json beside each plugin; with "
        "--measure the folder evidence.",
    ),
]


def validate(
    families: Annotated[
        list[str] | None, typer.Argument(metavar="FAMILY…", help="These families, and no others.")
    ] = None,
    plugin: Annotated[
        list[str] | None, typer.Option("--plugin", metavar="NAME", help="All that this plugin brings; repeatable.")
    ] = None,
    level: LevelOption = LevelName.run,
    only: Annotated[bool, typer.Option("--only", help="Leave out the levels below.")] = False,
    measure: Annotated[
        bool, typer.Option("--measure", help="Run rows of this machine's own hardware and record what was measured.")
    ] = False,
    hardware: Annotated[
        str | None, typer.Option("--hardware", metavar="PRODUCT", help="With --measure: what this machine is.")
    ] = None,
    json: JsonFile = None,
    junit: JunitFile = None,
    markdown: MarkdownFile = None,
    evidence: EvidenceFolder = None,
    resume: ResumeFile = None,
    jobs: JobsOption = None,
    timeout: TimeoutOption = None,
) -> None:
    """Check what plugins claim: specs, shapes, kernels, every row of their matrices.

    Levels simulate and --measure write evidence records. A claim that cannot be told on this machine is listed with
    what is missing. The exit code is 0 where no claim fails, 6 where one does, and 4 where none of the level could be
    told. Families and plugins that are named are looked at together.
    """
    code = run_validation(
        tuple(plugin or ()),
        level.value,
        families=tuple(families or ()),
        only=only,
        measure=measure,
        hardware=hardware,
        json=json,
        junit=junit,
        markdown=markdown,
        evidence=evidence,
        resume=resume,
        jobs=jobs,
        timeout=timeout,
    )
    if code:
        raise typer.Exit(code)


def run_validation(
    plugins: tuple[str, ...],
    level: Level,
    *,
    families: tuple[str, ...] = (),
    only: bool = False,
    measure: bool = False,
    hardware: str | None = None,
    json: Path | None = None,
    junit: Path | None = None,
    markdown: Path | None = None,
    evidence: Path | None = None,
    resume: Path | None = None,
    jobs: int | None = None,
    timeout: float | None = None,
) -> int:
    """Validate plugins and report; see :func:`validate`.

    Returns:
        The exit code.

    Raises:
        UsageError, UnknownModelError: what is named does not exist, or a report would overwrite another file.
        HardwareError: what runs the claims is not installed, or there is nothing to measure.
    """
    from npu_zoo.registry import registry_in_place
    from npu_zoo.testing.validation import measuring, records, report, resuming
    from npu_zoo.testing.validation.probing import unloadable_plugins, without_plugins
    from npu_zoo.testing.validation.processes import Limits
    from npu_zoo.testing.validation.scope import parts_of, validation_registry

    _require_effect(level, only=only, measure=measure, hardware=hardware, evidence=evidence, resume=resume)
    report.require_replaceable([file for file in (json, junit, markdown) if file])
    evidence = evidence or (Path("evidence") if measure else None)
    limits = Limits.of_machine(1 if measure else jobs, timeout)
    left_out = unloadable_plugins(limits.timeout)
    registry = validation_registry(left_out)
    parts = parts_of(registry, plugins, families)
    with registry_in_place(registry), without_plugins(left_out):
        products = measuring.products_at_hand(hardware) if measure else ()
        claims = _measured(parts, products) if measure else _claims(parts, level, only=only)
        if measure or level == "simulate":
            records.require_writable(parts, evidence)
        code = resuming.code_of(parts)
        earlier = resuming.outcomes_of(resume, claims, code) if resume and not measure else {}
        if resume:
            note(f"{len(earlier)} of {len(claims)} claims are taken over from {resume}")
        outcomes, complete = _judge(claims, limits, earlier)
        writers: list[tuple[Path | None, Callable[[], str]]] = [
            (json, lambda: report.to_json(outcomes, level, complete=complete, code=code)),
            (junit, lambda: report.to_junit(outcomes)),
            (markdown, lambda: report.to_markdown(outcomes)),
        ]
        _print(outcomes)
        _write_reports(writers)
        if complete:
            _write_evidence(parts, outcomes, evidence, measured=measure)
    return _exit_code(outcomes, level, complete=complete, measure=measure)


def _require_effect(
    level: Level,
    *,
    only: bool,
    measure: bool,
    hardware: str | None,
    evidence: Path | None,
    resume: Path | None,
) -> None:
    """Refuse options that would do nothing."""
    idle = {
        "--hardware is for --measure": hardware is not None and not measure,
        "--evidence is for --measure and --level simulate": evidence is not None
        and level != "simulate"
        and not measure,
        "--measure runs rows of this machine's hardware and no level; leave out --only": measure and only,
        "--measure takes nothing over; leave out --resume": measure and resume is not None,
    }
    for told, wrong in idle.items():
        if wrong:
            raise UsageError(told)


def _exit_code(outcomes: Sequence[Outcome], level: Level, *, complete: bool, measure: bool) -> int:
    if not complete:
        return INTERRUPTED
    if any(outcome.status == "fails" for outcome in outcomes):
        return BROKEN
    asked = [outcome for outcome in outcomes if measure or outcome.level == level]
    if asked and all(outcome.status == "skipped" for outcome in asked):
        note(f"no claim of level {level} could be told here")
        return NOTHING_TOLD
    return 0


def _claims(parts: Sequence[Part], level: Level, *, only: bool) -> list[Claim]:
    """What plugins claim up to a level."""
    from npu_zoo.testing.validation import suite

    claims = suite.claims_of(parts, level, only=only)
    if not claims:
        raise UsageError(f"nothing is claimed at level {level} by {', '.join(part.record.name for part in parts)}")
    return claims


def _measured(parts: Sequence[Part], products: Sequence[str]) -> list[Claim]:
    from npu_zoo.testing.validation import measuring

    claims = [claim for part in parts for claim in measuring.claims(part, products)]
    if not claims:
        raise measuring.nothing_to_measure(parts, products)
    return claims


def _judge(claims: Sequence[Claim], limits: Any, earlier: Mapping[int, Outcome]) -> tuple[list[Outcome], bool]:
    """The outcomes in the order of the claims, and whether they are all of them.

    Args:
        earlier: those that are known, by place.
    """
    from npu_zoo.testing.validation.processes import judge

    found = dict(earlier)
    places = [number for number in range(len(claims)) if number not in earlier]
    with ClaimProgress(len(places)) as progress:
        try:
            for place, outcome in judge([claims[number] for number in places], limits):
                found[places[place]] = outcome
                progress.update(outcome)
        except KeyboardInterrupt:
            note(f"interrupted: {len(found)} of {len(claims)} claims are known; --json keeps them for --resume")
            return [found[number] for number in sorted(found)], False
    return [found[number] for number in sorted(found)], True


def _write_reports(writers: Sequence[tuple[Path | None, Callable[[], str]]]) -> None:
    from npu_zoo.testing.files import write_whole

    failed = []
    for file, text in writers:
        if file:
            try:
                write_whole(file, text())
            except OSError as error:
                failed.append(f"cannot write {file}: {error.strerror or error}")
            else:
                note(f"wrote {file}")
    if failed:
        raise UsageError("\n".join([*failed, "name other files, and validate again"]))


def _write_evidence(parts: Sequence[Part], outcomes: Sequence[Outcome], folder: Path | None, *, measured: bool) -> None:
    from npu_zoo.testing.validation.measuring import versions
    from npu_zoo.testing.validation.records import write_records

    of_level = [outcome for outcome in outcomes if measured or outcome.level == "simulate"]
    level, told = ("measured", versions()) if measured else ("simulated", {})
    for written in write_records(parts, of_level, level, folder, told):  # type: ignore[arg-type]
        lost = f"; {written.failed} that failed have none" if written.failed else ""
        note(f"wrote records of {written.made} rows to {written.file}{lost}")


def _print(outcomes: Sequence[Outcome]) -> None:
    from npu_zoo.testing.validation import report

    for title, status in (("cannot be told here", "skipped"), ("fails", "fails")):
        told = [outcome for outcome in outcomes if outcome.status == status]
        if told:
            print_items(title, map(report.printable, _grouped(told)))
            print()
    rows = [
        (plugin, family or "-", level, *(str(found[status]) for status in ("holds", "fails", "skipped")))
        for (plugin, family, level), found in report.summary(outcomes).items()
    ]
    print_table(("plugin", "family", "level", "holds", "fails", "not told"), rows)
    total, number = report.counts(outcomes), len(outcomes)
    print(f"\n{total['holds']} of {number} claims hold, {total['fails']} fail, {total['skipped']} cannot be told here")


def _grouped(outcomes: Sequence[Outcome]) -> list[str]:
    """One line for what many claims of a plugin have in common; a failure always has a line of its own."""
    from npu_zoo.testing.validation import report

    groups: dict[tuple[str, ...], list[Outcome]] = {}
    for outcome in outcomes:
        alone = (report.describe(outcome),) if outcome.status == "fails" else ()
        groups.setdefault((outcome.level, outcome.subject.plugin, outcome.message, *alone), []).append(outcome)
    lines = []
    for found in groups.values():
        first = report.describe(found[0]) + f": {found[0].message}"
        lines.append(first if len(found) == 1 else f"{first} (and {len(found) - 1} more)")
    return lines


class ClaimProgress(AbstractContextManager["ClaimProgress"]):
    """How many claims are judged, at what rate, and how long the rest takes: a bar on a terminal, lines elsewhere."""

    def __init__(self, total: int) -> None:
        self._total, self._done, self._failed = total, 0, 0
        self._begin = self._last_line = time.monotonic()
        self._bar: Any = _bar(total) if sys.stderr.isatty() else None

    def __enter__(self) -> ClaimProgress:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._bar:
            self._bar.stop()

    def update(self, outcome: Outcome) -> None:
        """Count one more."""
        self._done += 1
        self._failed += outcome.status == "fails"
        now = time.monotonic()
        failed = f"{self._failed} failed" if self._failed else ""
        rate = self._done / max(now - self._begin, 1e-9)
        if self._bar:
            self._bar.update(self._bar.task_ids[0], completed=self._done, failed=failed, rate=f"{rate:.1f}/s")
        elif now - self._last_line > _SECONDS_BETWEEN_LINES:
            self._last_line = now
            left = (self._total - self._done) / rate
            text = f"{self._done}/{self._total} claims, {rate:.1f}/s, about {left:.0f} s left"
            print(", ".join(filter(None, [text, failed])), file=sys.stderr, flush=True)


def _bar(total: int) -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns: list[Any] = [TextColumn("claims"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}")]
    columns += [TimeRemainingColumn(), TextColumn("[red]{task.fields[failed]}")]
    bar = Progress(*columns, console=Console(stderr=True), transient=True)
    bar.add_task("claims", total=total, failed="", rate="")
    return bar
