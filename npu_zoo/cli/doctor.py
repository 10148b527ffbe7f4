"""``doctor``: what a run on this machine would stand on, and what to do where something is missing."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import typer

from npu_zoo.cli.help import json_output
from npu_zoo.cli.options import JsonFlag
from npu_zoo.cli.output import print_json, print_table
from npu_zoo.core.errors import UnknownModelError, UsageError
from npu_zoo.core.hardware import PRODUCTS
from npu_zoo.platforms.doctor import chips_in_question, examine, this_machine
from npu_zoo.platforms.findings import Finding, problems
from npu_zoo.platforms.operators import Needs, operators_of_chip, operators_of_family
from npu_zoo.registry import Registry, get_registry

UNFIT = 4
REPORT_KEYS: dict[str, str] = {
    "findings": "What was looked at, one object each.",
    "findings[].topic": "What it is about: python, torch, torch_npu, transformers, libgomp, driver, devices, cann, "
    "operators, environment, ports or plugins.",
    "findings[].status": "ok, note, warning (may fail) or problem (will fail).",
    "findings[].message": "What was found.",
    "findings[].advice": "What to do; empty where there is nothing to do.",
    "problems": "How many findings are problems; the exit code is 4 where there is one.",
}
"""What ``--json`` holds."""


def _complete_model(incomplete: str) -> list[str]:
    return [name for name in get_registry().families if name.startswith(incomplete)]


def _complete_hardware(incomplete: str) -> list[str]:
    return [name for name in PRODUCTS if name.startswith(incomplete)]


@json_output(REPORT_KEYS)
def doctor(
    model: str | None = typer.Option(
        None,
        "--model",
        metavar="FAMILY[:VARIANT]",
        help="Look up the operators that this family calls. Default: all that are registered.",
        autocompletion=_complete_model,
    ),
    hardware: str | None = typer.Option(
        None,
        "--hardware",
        metavar="NAME",
        help="The product that is to be used. Default: what this machine shows.",
        autocompletion=_complete_hardware,
    ),
    as_json: JsonFlag = False,
) -> None:
    """Look at this machine's software, driver and devices, and say what to do.

    Imports nothing into this process and needs neither torch nor a device. The exit code is 4 where a run would fail.
    """
    if hardware is not None and hardware not in PRODUCTS:
        raise UsageError(f"unknown hardware '{hardware}'; known: {', '.join(PRODUCTS)}")
    registry, unknown = get_registry(), None
    try:
        if model:
            registry.find(model)
    except UnknownModelError as error:  # the machine is looked at all the same
        unknown, model = error, None
    machine = this_machine()
    needs = {chip: _needs(registry, model, chip) for chip in chips_in_question(machine, hardware)}
    findings = [*examine(machine, hardware, needs, model or ""), *_dropped_plugins(registry)]
    if as_json:
        report = [dataclasses.asdict(finding) for finding in findings]
        print_json({"findings": report, "problems": len(problems(findings))})
    else:
        print_findings(findings)
    if unknown is not None:
        raise unknown
    if problems(findings):
        raise typer.Exit(UNFIT)


def print_findings(findings: Sequence[Finding]) -> None:
    """Write findings by topic, what to do beneath each, and a count."""
    topics = dict.fromkeys(finding.topic for finding in findings)
    rows = []
    for topic in topics:
        of_topic = [finding for finding in findings if finding.topic == topic]
        for number, finding in enumerate(of_topic):
            text = finding.message + (f"\n-> {finding.advice}" if finding.advice else "")
            rows.append(["" if number else topic, finding.status, text])
    print_table(["about", "state", "finding"], rows)
    print(f"\n{_count(findings, 'problem')}, {_count(findings, 'warning')}")


def _needs(registry: Registry, model: str | None, chip: str) -> Needs:
    if model is None:
        return operators_of_chip(chip, registry.kernels, registry.attention_backends)
    family, variant = registry.find(model)
    return operators_of_family(family, variant, chip, registry.kernels, registry.attention_backends)


def _dropped_plugins(registry: Registry) -> list[Finding]:
    return [
        Finding("plugins", "warning", f"plugin {record.name}: {record.error.splitlines()[0]}", "npu-zoo plugins")
        for record in registry.plugins.values()
        if record.error
    ]


def _count(findings: Sequence[Finding], status: str) -> str:
    number = sum(finding.status == status for finding in findings)
    return f"{number or 'no'} {status}{'' if number == 1 else 's'}"
