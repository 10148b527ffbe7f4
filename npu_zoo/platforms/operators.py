"""The operators of torch_npu that kernels and attention backends call, and whether an installed torch_npu has them."""

from __future__ import annotations

import mmap
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

from npu_zoo.core.errors import NpuZooError
from npu_zoo.core.features import Attention
from npu_zoo.core.hardware import CHIPS, PRODUCTS, DType
from npu_zoo.core.specs import AttentionBackendSpec, FamilySpec, KernelSpec, VariantSpec
from npu_zoo.platforms.findings import Finding
from npu_zoo.selection import select_attention, select_kernels

Needs = Mapping[str, tuple[str, ...]]
"""By operator, the kernels and attention backends that call it."""

ATB_PREFIX = "_npu_"
"""How torch_npu names the operators of the ATB library."""


def operators_of_chip(
    chip: str, kernels: Mapping[str, KernelSpec], backends: Mapping[str, AttentionBackendSpec]
) -> Needs:
    """What everything that is registered for a chip calls."""
    specs: list[KernelSpec | AttentionBackendSpec] = [*kernels.values(), *backends.values()]
    return _by_operator(spec for spec in specs if spec.chip == chip)


def operators_of_family(
    family: FamilySpec,
    variant: VariantSpec | None,
    chip: str,
    kernels: Mapping[str, KernelSpec],
    backends: Mapping[str, AttentionBackendSpec],
) -> Needs:
    """What a family calls on a chip, in every dtype and kind of attention that its matrix offers there.

    Args:
        family: the family.
        variant: the one variant that it is about; None, or one whose shape is open, takes every variant.
        chip: the chip's name.
        kernels, backends: what is registered.
    """
    products = {name for name, product in PRODUCTS.items() if product.chip == chip}
    kernels = {name: spec.model_copy(update={"requires": ()}) for name, spec in kernels.items()}
    backends = {name: spec.model_copy(update={"requires": ()}) for name, spec in backends.items()}
    chosen: dict[str, KernelSpec | AttentionBackendSpec] = {}
    for one in [variant] if variant and variant.config else [v for v in family.variants if v.config]:
        rows = [row for row in family.rows if one.size in row.sizes and products & set(row.hardware)]
        for dtype in {dtype for row in rows for dtype in row.dtype}:
            chosen |= _kernels_of(family, one, chip, dtype, kernels)
            kinds = {kind for row in rows for kind in row.attention if dtype in row.dtype}
            chosen |= {spec.name: spec for kind in kinds for spec in _backend_of(one, kind, chip, dtype, backends)}
    return _by_operator(chosen.values())


def present_operators(folder: Path, operators: Collection[str]) -> set[str]:
    """Those of the operators that the libraries of an installed torch_npu have, by their files alone.

    An operator's schema stands in the library that registers it, or the name of the function that it is registered
    with; nothing is loaded.

    Args:
        folder: torch_npu's folder.
        operators: names as torch_npu has them.
    """
    missing = set(operators)
    for library in sorted(folder.glob("lib/lib*.so")):
        missing -= _operators_in(library, missing)
    return set(operators) - missing


def check_operators(folder: Path, needs: Needs, chip: str, who: str = "") -> Finding:
    """Whether an installed torch_npu has the operators.

    Args:
        folder: torch_npu's folder.
        needs: what is called, and by what.
        chip: the chip's name.
        who: whose needs they are, where they are a family's.
    """
    on = f"{who} on {chip}" if who else chip
    if not needs:
        why = "its matrix offers nothing there" if who else "nothing is registered that calls operators of torch_npu"
        return Finding("operators", "note", f"{on}: {why}")
    found = present_operators(folder, needs)
    if not found:
        message = f"{on}: none of its {len(needs)} operators can be read in the files of {folder}"
        return Finding("operators", "warning", message, "pip install --force-reinstall 'npu-zoo[npu]'")
    missing = [f"{name} (for {', '.join(needs[name])})" for name in sorted(needs) if name not in found]
    if missing:
        message = f"{on}: this torch_npu does not have {', '.join(missing)}"
        return Finding(
            "operators", "problem", message, "install a newer torch_npu: pip install 'npu-zoo[npu]' --upgrade"
        )
    return Finding("operators", "ok", f"{on}: torch_npu has all {len(needs)} operators that are called")


def npu_chips() -> tuple[str, ...]:
    """The chips that torch_npu is for."""
    return tuple(name for name, chip in CHIPS.items() if chip.device == "npu")


def _by_operator(specs: Iterable[KernelSpec | AttentionBackendSpec]) -> Needs:
    needs: dict[str, tuple[str, ...]] = {}
    for spec in specs:
        for operator in spec.operators:
            needs[operator] = (*needs.get(operator, ()), spec.name)
    return needs


def _kernels_of(
    family: FamilySpec, variant: VariantSpec, chip: str, dtype: DType, kernels: Mapping[str, KernelSpec]
) -> dict[str, KernelSpec]:
    try:
        choices = select_kernels(kernels, chip, dtype, variant.config, operations=family.operations)
        bare = select_kernels(kernels, chip, dtype, operations=family.operations)
    except NpuZooError:  # an operation without any kernel, which `npu-zoo explain` tells
        return {}
    # What the model has no use for is marked in the choice that knows the model, and so differs.
    used = [choice.kernel for choice, other in zip(choices, bare, strict=True) if choice == other]
    return {name: kernels[name] for name in used}


def _backend_of(
    variant: VariantSpec, kind: Attention, chip: str, dtype: DType, backends: Mapping[str, AttentionBackendSpec]
) -> list[AttentionBackendSpec]:
    if variant.config is None:
        return []
    try:
        choice = select_attention(backends, kind, chip, dtype, variant.config, None)
    except NpuZooError:  # none takes the model's shape
        return []
    return [backends[choice.backend]]


def _operators_in(library: Path, operators: Iterable[str]) -> set[str]:
    try:
        with library.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return {name for name in operators if _stands_in(content, name)}
    except (OSError, ValueError):  # ValueError: an empty file
        return set()


def _stands_in(content: mmap.mmap, name: str) -> bool:
    return _has_schema(content, name.encode()) or content.find(f"{len(name)}{name}E".encode()) >= 0


def _has_schema(content: mmap.mmap, name: bytes) -> bool:
    """Whether a name stands there as in ``npu::name``, ``name(Tensor`` or ``name.out(``, and is no part of another."""
    position = content.find(name)
    while position >= 0:
        before, after = (
            content[max(position - 1, 0) : position],
            content[position + len(name) : position + len(name) + 1],
        )
        if after in (b"(", b".", b"\0") and not re.match(rb"\w", before):
            return True
        position = content.find(name, position + 1)
    return False
