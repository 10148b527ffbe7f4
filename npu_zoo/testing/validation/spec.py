"""What a plugin's specs claim that data alone can tell: of its code nothing but the hooks runs, and no torch."""

from __future__ import annotations

import ast
import functools
import importlib.util
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

from npu_zoo.core.errors import NpuZooError
from npu_zoo.core.evidence import EvidenceRecord, row_digest
from npu_zoo.core.features import FeatureRow, splits_of
from npu_zoo.core.hardware import chip_of
from npu_zoo.core.model_config import ModelConfig
from npu_zoo.core.quantization import scheme_operations
from npu_zoo.core.specs import AttentionBackendSpec, CodeRef, FamilySpec, KernelSpec, VariantSpec
from npu_zoo.core.truth import differences, read_truth
from npu_zoo.registry import PluginRecord, Registry, SpecFault
from npu_zoo.selection import select_attention, select_kernels
from npu_zoo.testing.evidence import current_code
from npu_zoo.testing.shapes import configs_of
from npu_zoo.testing.validation import pages
from npu_zoo.testing.validation.claims import CannotTell, Claim, ClaimFails, Figures, Subject
from npu_zoo.testing.validation.refusals import row_refusals
from npu_zoo.testing.validation.scope import Part, bundled_fault

Spec = TypeVar("Spec", KernelSpec, AttentionBackendSpec)

_HEAVY = """
import json, sys
from importlib.metadata import EntryPoint
from npu_zoo.registry import Candidate, build_registry
point = EntryPoint(sys.argv[1], sys.argv[2], "npu_zoo")
record = build_registry([Candidate(point.name, point.load)], tolerant=True).plugins[point.name]
heavy = sorted({"torch", "torch_npu", "transformers"} & set(sys.modules))
print(json.dumps({"error": record.error, "heavy": heavy}))
"""
"""Loads one plugin by its entry point, and tells what came along."""


def claims(part: Part) -> Iterator[Claim]:
    """The claims of one plugin."""
    record = part.record
    plugin = Subject(record.name)
    yield _claim(plugin.on("plugin"), "loads", _loads, record)
    if record.error:
        return
    yield _claim(plugin.on("import"), "loads without torch", _is_light, record.name, record.target)
    for fault in record.faults:
        subject = Subject(record.name, fault.family, fault.row, fault.axis)
        yield _claim(subject, "is sound" if fault.row else f"{fault.subject} is sound", _refuse_fault, fault)
    for kind, spec in part.specs:
        for field, reference in code_references(spec):
            subject = Subject(record.name, name=f"{kind} {spec.name}", axis=field)
            yield _claim(subject, f"{reference} is there", _is_there, reference)
    for family in part.families:
        yield from _family_claims(part, family)
    yield from pages.claims(part)


def _family_claims(part: Part, family: FamilySpec) -> Iterator[Claim]:
    subject = Subject(part.record.name, family.name)
    for variant in family.variants:
        if variant.bundled:
            named = Subject(part.record.name, family.name, axis="bundled", name=variant.name)
            yield _claim(named, f"{variant.bundled} holds a checkpoint", _holds_checkpoint, variant, family)
    for record in family.records:
        named = part.subject_of_record(family, record)
        text = f"its {record.level} record of {record.date} speaks of today's row and code"
        yield _claim(named.on("evidence"), text, _is_fresh, part, family, record)
    if family.truth:
        yield _claim(subject.on("row"), f"its rows are those of {family.truth}", _is_its_truth, family)
    readable = part.readable
    family = readable.registry.families[family.name]
    for number, row in readable.rows(family):
        yield from row_claims(readable, family, number, row)


def row_claims(part: Part, family: FamilySpec, number: int, row: FeatureRow) -> Iterator[Claim]:
    """The claims of one row, which has a place among the family's, from 0."""
    subject = part.subject(family, row)
    registry = part.registry
    yield _claim(subject.on("dtype"), "its chips have its dtypes", _has_dtypes, row)
    yield _claim(
        subject.on("parallelism"), "each world size has a layout, and each layout a world size", _has_layouts, row
    )
    for kind in row.attention:
        text = f"{kind} attention has a backend for each of its chips and dtypes"
        yield _claim(subject.on("attention"), text, _has_backend, registry, family, row, kind)
    text = "every operation has a kernel for each of its chips and dtypes"
    yield _claim(subject.on("dtype"), text, _has_kernels, registry, family, row)
    for scheme in row.quantization:
        if scheme != "none":
            text = f"{scheme} has a method and kernels for each of its chips and dtypes"
            yield _claim(subject.on("quantization"), text, _has_method, registry, family, row, scheme)
    yield _claim(subject.on("row"), "what it does not offer is refused by the right axis", _refuses, family, number)


def _claim(subject: Subject, text: str, check: Any, *arguments: Any, apart: bool = False) -> Claim:
    return Claim("spec", subject, text, functools.partial(check, *arguments), apart)


def _loads(record: PluginRecord) -> Figures:
    if record.error:
        raise ClaimFails(record.error)
    return {}


def _refuse_fault(fault: SpecFault) -> Figures:
    raise ClaimFails(fault.message)


def _is_light(name: str, target: str) -> Figures:
    """In a process of its own: this one may have torch for reasons of its own."""
    module = target.partition(":")[0]
    if module not in sys.modules and importlib.util.find_spec(module.partition(".")[0]) is None:
        raise CannotTell(f"{target} is an object of this process, which no other can load")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    environment.pop("NPU_ZOO_SIMULATE", None)
    command = [sys.executable, "-c", _HEAVY, name, target]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    if done.returncode:
        raise ClaimFails(f"a process that loads it alone ends with {done.returncode}: {done.stderr.strip()[-500:]}")
    found = json.loads(done.stdout)
    if found["error"]:
        raise ClaimFails(f"alone in a process it does not load: {found['error']}")
    if found["heavy"]:
        raise ClaimFails(
            f"loading it imports {', '.join(found['heavy'])}, which makes every command slow; name code as "
            "'package.module:attribute' in specs, and import it where it is used"
        )
    return {}


def code_references(spec: Any) -> list[tuple[str, str]]:
    """The fields of a spec that name code, with what they name."""
    hints = get_type_hints(type(spec), include_extras=True)
    fields = [name for name, hint in hints.items() if hint == CodeRef or CodeRef in get_args(hint)]
    return [(name, getattr(spec, name)) for name in fields if getattr(spec, name)]


def _is_there(reference: str) -> Figures:
    """Looked up in the module's source, so that nothing is imported; a module without source passes here."""
    module, _, attribute = reference.partition(":")
    found = _find_module(module)
    if found is None:
        raise ClaimFails(f"there is no module {module}")
    names = _names_of(Path(found.origin)) if found.origin and found.origin.endswith(".py") else None
    if names is not None and attribute not in names:
        raise ClaimFails(f"{module} has no '{attribute}'")
    return {}


def _find_module(name: str) -> ModuleSpec | None:
    """Where a module is; unlike importlib.util.find_spec, without importing the packages above it."""
    package, *parts = name.split(".")
    found = importlib.util.find_spec(package)
    for part in parts:
        if found is None or found.submodule_search_locations is None:
            return None
        found = PathFinder.find_spec(f"{found.name}.{part}", found.submodule_search_locations)
    return found


def _names_of(file: Path) -> set[str] | None:
    """Names that a module binds at its top level; None where it binds some in a way that is not told by looking."""
    tree = ast.parse(file.read_bytes())
    if any(isinstance(node, ast.FunctionDef) and node.name == "__getattr__" for node in tree.body):
        return None
    nodes = [node for statement in tree.body for node in _in_place(statement)]
    if any(isinstance(node, ast.alias) and node.name == "*" for node in nodes):
        return None
    found = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    found |= {node.asname or node.name.partition(".")[0] for node in nodes if isinstance(node, ast.alias)}
    return found | {
        node.name for node in nodes if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.AsyncFunctionDef))
    }


def _in_place(node: ast.AST) -> Iterator[ast.AST]:
    """A node and what stands in it, without what stands in functions and classes."""
    yield node
    if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)):
        for child in ast.iter_child_nodes(node):
            yield from _in_place(child)


def _holds_checkpoint(variant: VariantSpec, family: FamilySpec) -> Figures:
    fault = bundled_fault(variant, family)
    if fault:
        raise ClaimFails(f"{fault}; is it among its package's data?")
    return {}


def _is_fresh(part: Part, family: FamilySpec, record: EvidenceRecord) -> Figures:
    if record.row not in {row_digest(row) for row in family.rows}:
        raise ClaimFails(f"no row of {family.name} has the digest {record.row}: the row was changed; run it again")
    code = current_code(family, part.record)
    if record.code != code:
        raise ClaimFails(
            f"stale: it was made with the code {record.code}, and today's is {code}; run it again: npu-zoo validate "
            f"{family.name} {'--measure' if record.level == 'measured' else '--level simulate'}"
        )
    return {"date": record.date}


def _is_its_truth(family: FamilySpec) -> Figures:
    found = differences(family, read_truth(family.truth))
    if found:
        raise ClaimFails("\n".join(f"{difference.axis}: {difference.message}" for difference in found))
    return {}


def _has_dtypes(row: FeatureRow) -> Figures:
    for hardware in row.hardware:
        chip = chip_of(hardware)
        missing = [dtype for dtype in row.dtype if dtype not in chip.dtypes]
        if missing:
            raise ClaimFails(
                f"{hardware} has no {', '.join(missing)}: {chip.name} computes in {', '.join(chip.dtypes)}"
            )
    return {}


def _has_layouts(row: FeatureRow) -> Figures:
    for size in row.world_size:
        if not any(splits_of(layout, size) for layout in row.parallelism):
            raise ClaimFails(f"world_size={size} has none of the layouts {', '.join(row.parallelism)}")
    for layout in row.parallelism:
        if not any(splits_of(layout, size) for size in row.world_size):
            sizes = ", ".join(map(str, row.world_size))
            raise ClaimFails(f"parallelism={layout} makes none of the world sizes {sizes}")
    return {}


def _has_backend(registry: Registry, family: FamilySpec, row: FeatureRow, kind: Any) -> Figures:
    backends = installed_everywhere(registry.attention_backends)
    for config, chip, dtype in _places(family, row):
        for stored in row.kv_cache_dtype:
            _or_fails(select_attention, backends, kind, chip, dtype, config, None, stored)
    return {}


def _has_kernels(registry: Registry, family: FamilySpec, row: FeatureRow) -> Figures:
    kernels = installed_everywhere(registry.kernels)
    for config, chip, dtype in _places(family, row):
        _or_fails(select_kernels, kernels, chip, dtype, config, "none", family.operations)
    return {}


def _has_method(registry: Registry, family: FamilySpec, row: FeatureRow, scheme: str) -> Figures:
    method = registry.quantization_methods.get(scheme)
    if method is None:
        known = ", ".join(registry.quantization_methods) or "none"
        raise ClaimFails(f"no plugin registers the quantization method {scheme}; registered: {known}")
    kernels = installed_everywhere(registry.kernels)
    for config, chip, dtype in _places(family, row):
        if chip not in method.chips and "any" not in method.chips:
            raise ClaimFails(f"{scheme} is for {', '.join(method.chips)}, not {chip}")
        chosen = _or_fails(select_kernels, kernels, chip, dtype, config, scheme, family.operations)
        due = scheme_operations(scheme)[: 2 if config.moe else 1]
        missing = [name for name in due if name not in {choice.operation for choice in chosen}]
        if missing:
            raise ClaimFails(f"no plugin registers a kernel for {', '.join(missing)}")
    return {}


def _places(family: FamilySpec, row: FeatureRow) -> Iterator[tuple[ModelConfig, str, Any]]:
    """Every model that a row speaks of, with each chip and those of its dtypes that the chip has."""
    chips = {chip.name: chip for chip in map(chip_of, row.hardware)}
    for config, chip in itertools.product(configs_of(family, row), chips.values()):
        yield from ((config, chip.name, dtype) for dtype in row.dtype if dtype in chip.dtypes)


def _or_fails(choose: Callable[..., Any], *arguments: Any) -> Any:
    try:
        return choose(*arguments)
    except NpuZooError as error:
        raise ClaimFails(str(error)) from None


def installed_everywhere(specs: Mapping[str, Spec]) -> dict[str, Spec]:
    """Specs as they stand where everything that they require is installed: a matrix speaks of such machines."""
    return {name: spec.model_copy(update={"requires": (), "condition": None}) for name, spec in specs.items()}


def _refuses(family: FamilySpec, number: int) -> Figures:
    asked, faults = row_refusals(family, number)
    if faults:
        raise ClaimFails("\n".join(faults))
    return {"combinations": asked}
