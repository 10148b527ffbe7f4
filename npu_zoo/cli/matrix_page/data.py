"""What the page knows: rows with their splits and records, what sizes are asked for as, and the values to filter by."""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

from npu_zoo import __version__
from npu_zoo.checkpoint import read_config
from npu_zoo.core.config import EngineArgs
from npu_zoo.core.evidence import EvidenceRecord, row_digest
from npu_zoo.core.features import AXES, AxisValue, FeatureRow, layout_names, split_flags, splits_of
from npu_zoo.core.hardware import PRODUCTS
from npu_zoo.core.model_config import ModelConfig
from npu_zoo.core.parallel import Split
from npu_zoo.core.specs import FamilySpec, VariantSpec
from npu_zoo.matrix_text import MatrixPart
from npu_zoo.request import Request, bundled_directory
from npu_zoo.splitting import split_faults
from npu_zoo.weights.quantize import SCHEMES

_TITLES: dict[str, str] = {
    "hardware": "Hardware",
    "dtype": "Dtype",
    "quantization": "Quantization",
    "world_size": "World size",
    "attention": "Attention",
    "parallelism": "Parallelism",
    "kv_cache_dtype": "KV cache",
    "long_sequence": "Long sequences",
    "serving": "Serving",
}
"""What the axes are called, in the order in which they are offered to filter by."""

_FIGURE = re.compile(r"(?:((?:tp|pp|ep|dp)\d+(?:\+(?:tp|pp|ep|dp)\d+)*)_)?(.*)")
"""What follows hardware, dtype and attention in a figure's name: the layout of several devices, and what it is of."""


def page_data(parts: Sequence[MatrixPart], stale: Collection[tuple[str, str]]) -> dict[str, Any]:
    """Plain data for JSON.

    Args:
        parts: what the page shows.
        stale: family names and row digests whose records are stale.
    """
    options = {axis: _options(parts, axis) for axis in _TITLES}
    axes = [{"name": axis, "title": title, "options": options[axis]} for axis, title in _TITLES.items()]
    products = {option["value"] for option in options["hardware"]}
    return {
        "version": __version__,
        "axes": AXES,
        "filters": [{"name": "model", "title": "Model", "options": _models(parts)}, *axes],
        "products": [
            {"name": name, "title": product.title, "devices": product.devices}
            for name, product in PRODUCTS.items()
            if name in products
        ],
        "schemes": list(SCHEMES),
        "families": [_family(part, stale) for part in parts],
    }


def _models(parts: Sequence[MatrixPart]) -> list[dict[str, str]]:
    found = []
    for part in parts:
        name, title = part.family.name, part.family.title
        found.append({"value": name, "label": title, "group": title})
        found += [{"value": f"{name}:{size}", "label": f"{title} {size}", "group": title} for size in part.sizes]
    return found


def _options(parts: Sequence[MatrixPart], axis: str) -> list[dict[str, str]]:
    """The values that some row has or some source denies."""
    rows = [row for part in parts for row in part.rows]
    offered = [value for row in rows for value in _values(row, axis)]
    denied = [value for part in parts for denial in part.denials if denial.axis == axis for value in denial.values]
    return [{"value": _spell(value), "label": _label(axis, value)} for value in _ordered([*offered, *denied], axis)]


def _values(row: FeatureRow, axis: str) -> tuple[AxisValue, ...]:
    """A row's values; of its layouts the kinds that share the model, whatever their sizes."""
    if axis == "parallelism":
        return tuple(layout_names(split)[1] for split in _splits(row))
    return row.values(axis)


def _ordered(values: Iterable[AxisValue], axis: str) -> list[AxisValue]:
    found = list(dict.fromkeys(values))
    if axis == "hardware":
        return [name for name in PRODUCTS if name in found]
    return sorted(found) if all(isinstance(value, int) for value in found) else found


def _spell(value: AxisValue) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _label(axis: str, value: AxisValue) -> str:
    if axis == "hardware":
        return PRODUCTS[str(value)].title
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)


def _family(part: MatrixPart, stale: Collection[tuple[str, str]]) -> dict[str, Any]:
    name = part.family.name
    return {
        "name": name,
        "title": part.family.title,
        "sizes": [_size(part, size) for size in part.sizes],
        "rows": [_row(part, row, (name, row_digest(row)) in stale) for row in part.rows],
        "denials": [denial.model_dump(mode="json") for denial in part.denials],
        "conflicts": [conflict.model_dump(mode="json") for conflict in part.conflicts],
    }


def _size(part: MatrixPart, size: str) -> dict[str, Any]:
    """What a size is asked for as, where its weights are from, and which splits its shape does not allow."""
    family = part.family
    variant, asked = _named(part, size)
    config = _config(family, variant)
    return {
        "name": size,
        "model": f"{family.name}:{asked}",
        "variants": [other.name for other in family.variants if other.size == size],
        "bundled": bool(variant.bundled),
        "pulled": bool(variant.huggingface or variant.modelscope),
        "context": config.context_length if config else None,
        "unfit": dict(_unfit(family, variant, config)) if config else {},
    }


def _named(part: MatrixPart, size: str) -> tuple[VariantSpec, str]:
    """The variant that stands for a size, and what it is asked for as: the bare size where that is one of its names."""
    if part.variant is not None:
        return part.variant, part.variant.name
    of_size = [variant for variant in part.family.variants if variant.size == size]
    usual = next((variant for variant in of_size if size in (variant.name, *variant.aliases)), None)
    return (usual, size) if usual else (of_size[0], of_size[0].name)


def _config(family: FamilySpec, variant: VariantSpec) -> ModelConfig | None:
    """A variant's hyperparameters, or those of its bundled checkpoint."""
    directory = bundled_directory(variant)
    if directory is None:
        return variant.config
    raw = read_config(directory)
    return ModelConfig.from_hf(raw, family.config_defaults.get((raw.get("architectures") or [""])[0], {}))


def _unfit(family: FamilySpec, variant: VariantSpec, config: ModelConfig) -> Iterator[tuple[str, str]]:
    """Splits that rows offer and a variant's shape does not allow, by :func:`_split_name`, with the reason."""
    rows = family.matrix.of_size(variant.size)
    splits = {_split_name(split, row): (split, row) for row in rows for split in _splits(row)}
    for name, (split, row) in splits.items():
        request = _request(family, variant, row, split, config)
        faults = split_faults(EngineArgs.model_validate({}), request, row, config, split)
        if faults:
            yield name, "; ".join(fault.message for fault in faults)


def _request(family: FamilySpec, variant: VariantSpec, row: FeatureRow, split: Split, config: ModelConfig) -> Request:
    return Request(
        asked=f"{family.name}:{variant.name}",
        family=family,
        variant=variant,
        hardware=row.hardware[0],
        dtype=row.dtype[0],
        split=split,
        attention=row.attention[0],
        quantization="none",
        kv_cache_dtype="auto",
        serving="offline",
        long_sequence=False,
        config=config,
    )


def _splits(row: FeatureRow) -> list[Split]:
    """Every split that a row offers, by world size."""
    worlds = [splits_of(layout, world_size) for world_size in sorted(row.world_size) for layout in row.parallelism]
    return list(dict.fromkeys(split for splits in worlds for split in splits))


def _split_name(split: Split, row: FeatureRow) -> str:
    """A split's name with its sizes; whether key-value heads may be copied is a part of what it takes."""
    return layout_names(split)[0] + ("*" if row.replicated_kv_heads else "")


def _row(part: MatrixPart, row: FeatureRow, stale: bool) -> dict[str, Any]:
    digest = row_digest(row)
    return {
        **row.model_dump(mode="json"),
        "sizes": [size for size in row.sizes if size in part.sizes],
        "splits": [_split(split, row) for split in _splits(row)],
        "stale": stale,
        "records": [_record(record, row) for record in part.family.records if record.row == digest],
    }


def _split(split: Split, row: FeatureRow) -> dict[str, Any]:
    """A split with its options, of which tensor parallelism alone needs none beside the world size."""
    sized, kinds = layout_names(split)
    return {
        "name": _split_name(split, row),
        "text": re.sub(r"(\d+)", r" \1", sized).replace("+", ", "),
        "kinds": kinds,
        "world_size": split.world_size,
        "options": "" if split == Split(split.world_size) else split_flags(split),
    }


def _record(record: EvidenceRecord, row: FeatureRow) -> dict[str, Any]:
    return {
        "level": record.level,
        "date": record.date,
        "shape": record.shape,
        "versions": record.versions,
        "figures": [_figure(name, value, row) for name, value in record.figures.items()],
    }


def _figure_prefixes(row: FeatureRow) -> list[tuple[str, list[str]]]:
    """What the names of a row's figures begin with, the longest first, and the values that it stands for."""
    found = []
    axes = (row.hardware, row.dtype, row.attention, row.quantization, row.kv_cache_dtype)
    for hardware, dtype, attention, scheme, cache in itertools.product(*axes):
        stored = [scheme] * (scheme != "none") + [f"{cache}_cache"] * (cache != "auto")
        values = [hardware, dtype, attention, *stored]
        found.append(("_".join(values) + "_", values))
    return sorted(found, key=lambda entry: -len(entry[0]))


def _figure(name: str, value: float, row: FeatureRow) -> dict[str, Any]:
    """A figure, taken apart where its name begins with a combination of the row, and a layout."""
    for prefix, (hardware, *values) in _figure_prefixes(row):
        if name.startswith(prefix):
            layout, metric = _FIGURE.findall(name.removeprefix(prefix))[0]
            return {
                "hardware": hardware,
                "run": ", ".join(filter(None, (*values, layout))),
                "metric": metric,
                "value": value,
            }
    return {"hardware": None, "run": "", "metric": name, "value": value}
