"""``eval compare``: two results of the same evaluation, sample by sample."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from pydantic import JsonValue

from npu_zoo.cli.byte_progress import ByteProgress
from npu_zoo.cli.output import print_fields, print_table

if TYPE_CHECKING:
    from npu_zoo.evaluation.comparison.proportions import Interval
    from npu_zoo.evaluation.comparison.report import ComparisonBody, LogitsComparison, Side, TaskComparison

MISSED = 1


def compare(
    a: Annotated[Path, typer.Argument(metavar="A", help="A record of `npu-zoo eval`, the reference.")],
    b: Annotated[Path, typer.Argument(metavar="B", help="Another, which is held against it.")],
    min_agreement: Annotated[
        float | None,
        typer.Option(
            "--min-agreement", metavar="SHARE", min=0, max=1, help="The least share of equal answers in each task."
        ),
    ] = None,
    confidence: Annotated[
        float, typer.Option("--confidence", metavar="SHARE", min=0.5, max=0.9999, help="Of intervals. Default: 0.95.")
    ] = 0.95,
    json: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the comparison as a record.")
    ] = None,
) -> None:
    """Compare two results: answers, accuracy, and logits where both were saved with --save-logits.

    The rule for logits is MindIE's: no position's KL(A || B) above 1e-3, and at most 0.5 % of them above 1e-4. The exit
    code is 1 where the rule or --min-agreement is missed. Samples that one result alone has are named and left out.
    """
    from npu_zoo.evaluation.comparison.compare import compare as compare_results
    from npu_zoo.evaluation.comparison.compare import figures_of
    from npu_zoo.evaluation.comparison.results import read_result
    from npu_zoo.evaluation.record import ResultRecord, require_record_place, write_record

    if json:
        require_record_place(json, "eval compare")
    results = read_result(a), read_result(b)
    has_logits = all(result.logits for result in results)
    if has_logits:
        with ByteProgress("compared") as progress:
            body = compare_results(*results, min_agreement=min_agreement, confidence=confidence, progress=progress)
    else:
        body = compare_results(*results, min_agreement=min_agreement, confidence=confidence)
    _print(body, min_agreement)
    if json:
        arguments: dict[str, JsonValue] = {
            "a": str(a),
            "b": str(b),
            "min_agreement": min_agreement,
            "confidence": confidence,
        }
        record = ResultRecord(kind="eval compare", arguments=arguments, body=body.as_json(), figures=figures_of(body))
        write_record(record, json)
    if not body.passes:
        raise typer.Exit(MISSED)


def _print(body: ComparisonBody, min_agreement: float | None) -> None:
    print_fields({"A": _side(body.a), "B": _side(body.b)})
    print()
    print_table(("task", "samples", "same answer", "right in A", "right in B", "B - A"), map(_row, body.tasks))
    for task in body.tasks:
        _print_task(task)
    if body.logits:
        _print_logits(body.logits)
    _print_verdict(body, min_agreement)


def _side(side: Side) -> str:
    differs = ", ".join(f"{name} {value}" for name, value in side.differs.items() if value is not None)
    return f"{side.record} ({', '.join(filter(None, (side.model, differs))) or 'as the other'})"


def _row(task: TaskComparison) -> Sequence[str]:
    return (
        task.task,
        str(task.samples),
        _interval(task.agreement),
        _interval(task.accuracy_a),
        _interval(task.accuracy_b),
        _interval(task.difference, "+"),
    )


def _interval(interval: Interval | None, sign: str = "") -> str:
    """In percent, with its bounds."""
    if interval is None:
        return "-"
    value, low, high = (f"{100 * share:{sign}.1f}" for share in (interval.value, interval.low, interval.high))
    return f"{value} % ({low} to {high})"


def _print_task(task: TaskComparison) -> None:
    from npu_zoo.evaluation.comparison.compare import shown

    if task.judged:
        table = task.judged
        counts = f"right in both {table.both}, in A alone {table.only_a}, in B alone {table.only_b}"
        print(f"{task.task}: {counts}, in neither {table.neither}; McNemar's exact p = {task.mcnemar_p:.3g}")
    for name, figure in task.figures.items():
        between = figure.difference
        bounds = f" ({between.low:+.4g} to {between.high:+.4g})" if between else ""
        means = f"mean {figure.a:.6g} and {figure.b:.6g}, B - A {figure.b - figure.a:+.4g}{bounds}"
        print(f"{task.task}: {name}: {means}, at most {figure.largest_difference:.4g} in a sample")
    if task.differing:
        print(f"{task.task}: other answers to {shown(task.differing)}")


def _print_logits(found: LogitsComparison) -> None:
    share = found.above_usual / max(found.positions, 1)
    worst = ", ".join(f"{one.sample} at {one.position} ({one.kl:.3g})" for one in found.worst)
    print()
    print_fields(
        {
            "logits": f"{found.positions} positions of {found.samples} samples",
            "KL(A || B)": f"mean {found.mean:.3g}, p99 {found.p99:.3g}, largest {found.largest:.3g} nats",
            f"above {found.largest_bound:g}": f"{found.above_largest}; allowed: none",
            f"above {found.usual_bound:g}": f"{found.above_usual} ({share:.2%}); allowed: {found.share_bound:.1%}",
            "same top token": f"{found.top1_agreement:.2%}",
            "worst samples": worst or "none",
        }
    )


def _print_verdict(body: ComparisonBody, min_agreement: float | None) -> None:
    from npu_zoo.evaluation.comparison.compare import below

    print()
    for remark in body.remarks:
        print(f"note: {remark}")
    if body.partial:
        print("the comparison is partial: what one result alone has is left out")
    if body.logits:
        print(f"the rule for logits {'holds' if body.logits.passes else 'is missed'}")
    if min_agreement is not None:
        short = below(body.tasks, min_agreement)
        print(f"agreement is below {min_agreement:g} in {', '.join(short)}" if short else "agreement is as asked")
