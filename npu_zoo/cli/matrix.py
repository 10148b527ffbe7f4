"""``list``, ``matrix`` and ``check``: what there is and what is supported. None of them imports torch."""

from __future__ import annotations

import contextlib
import enum
import io
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from npu_zoo import matrix_text
from npu_zoo.cli.help import json_output
from npu_zoo.cli.options import JsonFlag, request_options
from npu_zoo.cli.output import print_fields, print_json, print_table, write_file
from npu_zoo.core.errors import UsageError
from npu_zoo.core.evidence import EvidenceRecord, row_digest
from npu_zoo.core.features import AXES, FeatureRow, Verdict, joined
from npu_zoo.core.specs import FamilySpec, VariantSpec
from npu_zoo.dispatch import check as check_request
from npu_zoo.registry import Registry, get_registry
from npu_zoo.settings import Settings
from npu_zoo.testing.evidence import stale_records

if TYPE_CHECKING:
    from npu_zoo.matrix_text import MatrixPart

REFUSED = 3
VERDICT_KEYS: dict[str, str] = {
    "model": "The model as it was asked for, with its variant.",
    "request": f"The request's value on every axis: {', '.join(AXES)}.",
    "supported": "Whether the request is supported.",
    "status": "supported or experimental; null where the request is refused.",
    "reasons": "Why it is refused, one object per failing axis; empty where it is supported.",
    "reasons[].axis": "The axis or setting that fails.",
    "reasons[].value": "What was asked on it.",
    "reasons[].supported": "What is left on it.",
    "reasons[].message": "The reason in words.",
    "alternatives": "The nearest requests that would pass, each with a value on every axis.",
    "row": f"The matrix row that offers the request; null where it is refused: {', '.join(FeatureRow.model_fields)}.",
}
"""What :func:`verdict_data` holds."""


class Format(str, enum.Enum):
    """How ``matrix`` writes."""

    table = "table"
    markdown = "markdown"
    json = "json"
    html = "html"


def list_models(as_json: JsonFlag = False) -> None:
    """List families, their variants and where weights are from."""
    registry = get_registry()
    if as_json:
        print_json([_family_data(family, registry) for family in registry.families.values()])
        return
    for position, family in enumerate(registry.families.values()):
        print(("\n" if position else "") + f"{family.name}: {family.title} (from {_provider(family, registry)})")
        rows = [(v.name, ", ".join(v.aliases), v.size, _where_from(v)) for v in family.variants]
        print_table(("variant", "alias", "size", "weights"), rows)
    if not registry.families:
        print("no model family is registered; `npu-zoo plugins` shows why")


def _provider(family: FamilySpec, registry: Registry) -> str:
    record = registry.plugins[registry.owner(family.name)]
    return record.distribution or record.target or record.name


def _where_from(variant: VariantSpec) -> str:
    return variant.huggingface or variant.modelscope or ("bundled" if variant.bundled else "--weights DIR")


def _family_data(family: FamilySpec, registry: Registry) -> dict[str, Any]:
    fields = {"name", "aliases", "size", "title", "chat", "huggingface", "modelscope"}
    return {
        "name": family.name,
        "title": family.title,
        "plugin": registry.owner(family.name),
        "distribution": _provider(family, registry),
        "default_variant": family.default_variant,
        "documentation": family.documentation,
        "variants": [{**v.model_dump(include=fields), "bundled": bool(v.bundled)} for v in family.variants],
    }


def show_matrix(
    model: str | None = typer.Argument(None, metavar="FAMILY[:VARIANT]", help="Only this family or variant."),
    form: Annotated[
        Format, typer.Option("--format", metavar="FORM", help="table, markdown, json or html. Default: table.")
    ] = Format.table,
    output: Annotated[
        Path | None, typer.Option("--output", metavar="FILE", help="Write to a file that does not exist yet.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the file of --output where it exists.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Show the feature matrix.

    A row says what is supported together, who says so, and how far it is proven. As html it is a page that needs no
    network, with filters, and behind each cell its rows and the commands that run them.
    """
    if force and output is None:
        raise UsageError("--force replaces the file that --output names; give --output FILE too")
    registry = get_registry()
    if model:
        family, variant = registry.find(model)
        chosen = [(family, variant)]
    else:
        chosen = [(family, None) for family in registry.families.values()]
    parts = [matrix_text.part_of(family, variant, _stale(family, registry)) for family, variant in chosen]
    form = Format.json if as_json else form
    if output is None:
        _print_matrix(parts, form)
        return
    with io.StringIO() as text, contextlib.redirect_stdout(text):
        _print_matrix(parts, form)
        written = text.getvalue()
    write_file(output, written, replace=force)
    print(f"{output} is complete")


def _stale(family: FamilySpec, registry: Registry) -> list[EvidenceRecord]:
    return stale_records(family, registry.plugins[registry.owner(family.name)])


def _print_matrix(parts: list[MatrixPart], form: Format) -> None:
    from npu_zoo.cli import matrix_formats

    if form is Format.json:
        print_json([part.data() for part in parts])
    elif form is Format.table:
        matrix_formats.print_tables(parts)
    elif form is Format.markdown:
        print(matrix_text.markdown(parts), end="")
    else:
        from npu_zoo.cli.matrix_page import page

        stale = {(part.family.name, digest) for part in parts for digest in part.stale}
        print(page(parts, stale), end="")


@json_output(VERDICT_KEYS)
@request_options()
def check(settings: Settings, as_json: JsonFlag = False) -> None:
    """Check a request against the feature matrix.

    Needs no device and no weights. The exit code is 3 where the request is refused.
    """
    verdict = check_request(settings.args)
    if as_json:
        print_json(verdict_data(verdict))
    elif verdict.row is None:
        print(f"not supported: {verdict.model}\n{verdict.describe()}")
    else:
        print(f"{verdict.status}: {verdict.model}")
        print_fields({**request_fields(verdict), **row_fields(verdict.row, stale=_is_stale(verdict))})
    if not verdict.supported:
        raise typer.Exit(REFUSED)


def verdict_data(verdict: Verdict) -> dict[str, Any]:
    """A verdict as plain data, under the names of :data:`VERDICT_KEYS`."""
    row = verdict.row
    return {
        "model": verdict.model,
        "request": verdict.request,
        "supported": verdict.supported,
        "status": verdict.status if verdict.supported else None,
        "reasons": [reason.model_dump(mode="json") for reason in verdict.reasons],
        "alternatives": list(verdict.alternatives),
        "row": row.model_dump(mode="json") if row else None,
    }


def request_fields(verdict: Verdict) -> dict[str, str]:
    """The request's value on every axis, for people; axes at their usual value are left out."""
    usual = {"quantization": "none", "kv_cache_dtype": "auto", "long_sequence": False, "serving": "offline"}
    shown = [axis for axis in AXES if axis not in usual or verdict.request[axis] != usual[axis]]
    return {axis.replace("_", " "): joined([verdict.request[axis]]) for axis in shown}


def row_fields(row: FeatureRow, *, stale: bool = False) -> dict[str, str]:
    """Who says that a row is supported and how far it is proven."""
    proven = f"{row.evidence} (stale)" if stale and row.evidence != "claimed" else row.evidence
    fields = {"source": row.source, "status": row.status, "evidence": proven}
    return {**fields, "remark": row.note} if row.note else fields


def _is_stale(verdict: Verdict) -> bool:
    """Whether the record that proves a verdict's row speaks of other code than today's."""
    if verdict.row is None or verdict.row.evidence == "claimed":
        return False
    registry = get_registry()
    family, _ = registry.find(verdict.model)
    return row_digest(verdict.row) in {record.row for record in _stale(family, registry)}
