"""What a conversion makes of every tensor, decided from headers alone, before anything is written."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

from npu_zoo.checkpoint import detect_format, read_config
from npu_zoo.core.errors import UsageError, WeightsError
from npu_zoo.core.specs import WeightFormatSpec
from npu_zoo.registry import get_registry, load_code
from npu_zoo.weights.formats.compressed import quantization_config
from npu_zoo.weights.quantize import Scheme, check_width
from npu_zoo.weights.tensors import (
    LogicalTensor,
    Placement,
    Source,
    Target,
    TargetOptions,
    stored_size,
)

VERSION = 1
"""Of what a conversion makes of its input; a resumed one must be of the same."""

FLOATS = ("float64", "float32", "float16", "bfloat16")
_QUANTIZED = re.compile(
    r".*\.(q_proj|k_proj|v_proj|o_proj|q_a_proj|q_b_proj|kv_a_proj_with_mqa|gate_proj|up_proj|down_proj)\.weight"
)
_IGNORED = ["lm_head", r"re:.*kv_b_proj$", r"re:.*mlp\.gate$", r"re:.*eh_proj$", r"re:.*shared_head\.head$"]
"""Linear layers that are not quantized, in compressed-tensors' spelling."""

_KEPT = re.compile(r".*e_score_correction_bias")
"""What keeps its dtype: a rounded correction bias can choose another expert."""

_LAYER = re.compile(r"model\.layers\.(\d+)\..*")


@dataclass(frozen=True)
class ConvertOptions:
    """What is asked of a conversion.

    Attributes:
        to: the format's name.
        dtype: of plain floating values, and of scales; None leaves each as it is.
        scheme: how linear layers are quantized; None leaves them plain.
        tp, ep: ranks that share the result, and those that share its experts.
        mtp: ``keep`` or ``drop`` the layers beyond the model's own that predict further tokens.
        shard_size: bytes of a file, where the format has files of any number.
        include_code: take Python files along.
    """

    to: str
    dtype: str | None = None
    scheme: Scheme | None = None
    tp: int = 1
    ep: int | None = None
    mtp: Literal["keep", "drop"] = "keep"
    shard_size: int = 5_000_000_000
    include_code: bool = False


@dataclass(frozen=True)
class ConversionPlan:
    """A conversion as it will be.

    Attributes:
        source_format, source, target: what is read and written.
        results: by name, what becomes of each logical tensor.
        placed: by name, the stored tensors that hold it.
        config: config.json of the result.
        dropped: tensors that are left out.
    """

    directory: Path
    options: ConvertOptions
    source_format: str
    source: Source
    target: Target
    results: dict[str, LogicalTensor]
    placed: dict[str, tuple[Placement, ...]]
    config: dict[str, Any]
    dropped: tuple[str, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensors that are written."""
        return stored_size(self.placed)

    @property
    def digest(self) -> str:
        """A digest of the input's files and of what is made of them, by which an interrupted run is known again."""
        files = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in self.source.files()]
        content = {"version": VERSION, "files": files, "options": asdict(self.options), "tensors": sorted(self.placed)}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def open_source(directory: Path) -> tuple[WeightFormatSpec, Source, dict[str, Any]]:
    """A checkpoint as a source, with its format and its config.json.

    Raises:
        WeightsError: it is of no known format, or damaged; names file and tensor.
    """
    config = read_config(directory)
    spec = detect_format(directory, get_registry().weight_formats)
    if spec.source is None:
        raise WeightsError(f"{directory} is in the format {spec.name}, which cannot be read tensor by tensor")
    return spec, cast("Source", load_code(spec.source)(directory, config)), config


def plan_conversion(directory: Path, options: ConvertOptions) -> ConversionPlan:
    """Decide everything that headers and options decide.

    Raises:
        UsageError: options contradict each other or the format.
        WeightsError: the input is damaged, or the format cannot hold a tensor; names file and tensor.
    """
    spec = _format(options.to)
    origin, source, config = open_source(directory)
    num_experts = int(config.get("n_routed_experts") or 0)
    _check_ranks(spec, options, num_experts)
    kept, dropped = _without_mtp(source, config, options)
    results = {name: _result(tensor, options) for name, tensor in kept.items()}
    target = cast("Target", load_code(spec.target or "")(TargetOptions(options.tp, num_experts, options.shard_size)))
    return ConversionPlan(
        directory=directory,
        options=options,
        source_format=origin.name,
        source=source,
        target=target,
        results=results,
        placed=_placed(target, results, mtp_kept=options.mtp == "keep" and bool(mtp_layers(source, config))),
        config=_config(config, results, dropped),
        dropped=tuple(dropped),
    )


def _placed(
    target: Target, results: Mapping[str, LogicalTensor], *, mtp_kept: bool
) -> dict[str, tuple[Placement, ...]]:
    try:
        return target.place(results.values())
    except WeightsError as error:
        if not mtp_kept:
            raise
        raise WeightsError(f"{error}; --mtp drop leaves layers out that predict further tokens") from error


def mtp_layers(source: Source, config: Mapping[str, Any]) -> set[int]:
    """The numbers of layers beyond the model's own, which predict further tokens."""
    own = int(config.get("num_hidden_layers") or 0)
    numbers = {int(match[1]) for name in source.tensors if (match := _LAYER.fullmatch(name))}
    return {number for number in numbers if own and number >= own}


def _format(name: str) -> WeightFormatSpec:
    formats = get_registry().weight_formats
    spec = formats.get(name)
    if spec is None or spec.target is None:
        known = ", ".join(format_name for format_name, found in formats.items() if found.target)
        raise UsageError(f"unknown format '{name}' for --to; formats that can be written: {known}")
    return spec


def _check_ranks(spec: WeightFormatSpec, options: ConvertOptions, num_experts: int) -> None:
    if options.tp > 1 and not spec.ranks:
        raise UsageError(f"--tp {options.tp}: {spec.name} holds whole tensors, which any number of ranks can load")
    if options.ep not in (None, 1, options.tp):
        raise UsageError(f"--ep {options.ep}: the ranks that share the experts are those of --tp {options.tp}")
    if options.ep not in (None, 1) and not num_experts:
        raise UsageError(f"--ep {options.ep}: config.json names no routed experts")


def _without_mtp(
    source: Source, config: Mapping[str, Any], options: ConvertOptions
) -> tuple[dict[str, LogicalTensor], list[str]]:
    if options.mtp == "keep":
        return source.tensors, []
    layers = mtp_layers(source, config)
    beyond = [name for name in source.tensors if (match := _LAYER.fullmatch(name)) and int(match[1]) in layers]
    gone = set(beyond)
    return {name: tensor for name, tensor in source.tensors.items() if name not in gone}, beyond


def _result(tensor: LogicalTensor, options: ConvertOptions) -> LogicalTensor:
    if tensor.scheme is not None:
        if options.scheme not in (None, tensor.scheme):
            raise WeightsError(
                f"tensor {tensor.name} is quantized already ({tensor.scheme.name}); convert the plain checkpoint"
            )
        return replace(tensor, dtype=options.dtype or tensor.dtype)
    if tensor.dtype not in FLOATS or _KEPT.fullmatch(tensor.name):
        return tensor
    dtype = options.dtype or tensor.dtype
    if options.scheme is None or not _QUANTIZED.fullmatch(tensor.name):
        return replace(tensor, dtype=dtype)
    if len(tensor.shape) != 2 or not all(tensor.shape):
        raise WeightsError(f"tensor {tensor.name} of shape {list(tensor.shape)} cannot be quantized; a matrix is due")
    check_width(tensor.name, tensor.shape[1], options.scheme)
    return replace(tensor, dtype=dtype, scheme=options.scheme)


def _config(config: Mapping[str, Any], results: Mapping[str, LogicalTensor], dropped: list[str]) -> dict[str, Any]:
    """config.json of the result: its dtype, its quantization and its layers as they are."""
    told = {key: value for key, value in config.items() if key not in ("quantization_config", "torch_dtype", "dtype")}
    sizes: Counter[str] = Counter()
    for tensor in results.values():
        if tensor.dtype in FLOATS:
            sizes[tensor.dtype] += tensor.num_rows * tensor.row_values
    if sizes:
        key = "dtype" if "dtype" in config else "torch_dtype"
        told[key] = sizes.most_common(1)[0][0]
    schemes = {tensor.scheme for tensor in results.values() if tensor.scheme}
    if schemes:
        told["quantization_config"] = quantization_config(schemes.pop(), _IGNORED)
    if dropped and "num_nextn_predict_layers" in told:
        told["num_nextn_predict_layers"] = 0
    return told
