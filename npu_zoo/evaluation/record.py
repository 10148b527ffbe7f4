"""What a benchmark or an evaluation writes: what ran, on what, and what came of it."""

from __future__ import annotations

import datetime
import hashlib
import json
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError

import npu_zoo
from npu_zoo.checkpoint import fingerprints
from npu_zoo.core.config import EngineConfig
from npu_zoo.core.errors import UsageError, validation_lines
from npu_zoo.core.evidence import row_digest
from npu_zoo.core.features import layout_names
from npu_zoo.platforms.detection import is_simulated
from npu_zoo.registry import get_registry
from npu_zoo.testing.evidence import current_code
from npu_zoo.testing.files import write_whole
from npu_zoo.testing.simulation import installed_version
from npu_zoo.testing.validation.records import SHOWN

Kind = Literal["bench offline", "bench serve", "bench compare", "eval", "eval compare"]
_PACKAGES = ("torch", "torch_npu", "transformers")
_DIGITS = 16


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Machine(_Part):
    """What a run had, and what that was measured to do.

    Attributes:
        hardware: the product, as the matrix names it.
        cpu: the processor's name.
        instructions: those of its extensions that matter for matrix products.
        cores: that the process may use.
        threads: that the engine had; None for torch's choice.
        memory_gib: of the machine, within the control group's limit.
        devices: soc, cann and driver, where they took part.
        bandwidth: bytes read per second by all of the run's devices together; None where it was not measured.
        peak: multiplications and additions per second of matrix products in the run's dtype, likewise.
    """

    hardware: str
    cpu: str
    instructions: tuple[str, ...] = ()
    cores: int
    threads: int | None = None
    memory_gib: float
    system: str
    python: str
    devices: dict[str, str] = Field(default_factory=dict)
    bandwidth: float | None = None
    peak: float | None = None


class ModelUnderTest(_Part):
    """The checked request that ran, and what its matrix row can be told by.

    Attributes:
        weights: a digest of the checkpoint's :func:`npu_zoo.checkpoint.fingerprints`, for which contents are sampled.
        shape: the hyperparameters that an evidence record shows, :data:`npu_zoo.testing.validation.records.SHOWN`.
        split: ranks by kind of parallelism, such as ``tp2``.
        row: :func:`npu_zoo.core.evidence.row_digest` of the row that offers the request.
        code: of the files that the family's evidence rests on, as they were.
        simulated: the product was simulated, so times say nothing and nothing was measured.
    """

    family: str
    variant: str
    weights: str
    hardware: str
    dtype: str
    world_size: int
    split: str
    attention: str
    quantization: str
    kv_cache_dtype: str
    serving: str
    row: str
    code: str
    shape: dict[str, int] = Field(default_factory=dict)
    simulated: bool = False

    @property
    def name(self) -> str:
        """``family:variant``."""
        return f"{self.family}:{self.variant}"

    @classmethod
    def of(cls, config: EngineConfig) -> ModelUnderTest:
        """That of a checked request."""
        registry = get_registry()
        family = registry.families[config.family]
        return cls(
            family=config.family,
            variant=config.variant,
            weights=_digest(fingerprints(Path(config.weights))),
            hardware=config.hardware,
            dtype=config.dtype,
            world_size=config.world_size,
            split=layout_names(config.split)[0],
            attention=config.attention,
            quantization=config.quantization,
            kv_cache_dtype=config.kv_cache_dtype,
            serving=config.serving,
            row=row_digest(config.row),
            code=current_code(family, registry.plugins[registry.owner(config.family)]),
            shape={name: getattr(config.model_config, name) for name in SHOWN},
            simulated=is_simulated(config.device),
        )


class ResultRecord(_Part):
    """A command's result.

    Attributes:
        format: raised when a field changes its meaning, so that an older record is not read as a newer one.
        date: when it was written, ISO 8601 in UTC.
        versions: of npu-zoo and the packages that took part.
        machine: that it ran on; of a benchmark of a server, the client's.
        model: None where it was somebody else's server or engine.
        arguments: what was asked for.
        body: the kind's own results, whose form is the kind's model.
        figures: the few that a matrix row would cite, with the unit in the name.
    """

    kind: Kind
    format: Literal[1] = 1
    date: str = Field(default_factory=lambda: _now())
    versions: dict[str, str] = Field(default_factory=lambda: installed_versions())
    machine: Machine | None = None
    model: ModelUnderTest | None = None
    arguments: dict[str, JsonValue] = Field(default_factory=dict)
    body: dict[str, JsonValue] = Field(default_factory=dict)
    figures: dict[str, float] = Field(default_factory=dict)


def installed_versions(more: Iterable[str] = ()) -> dict[str, str]:
    """Versions of npu-zoo, and of what it runs on, as far as they are installed.

    Args:
        more: further distributions, such as ``lm_eval``.
    """
    found = {name: installed_version(name) for name in (*_PACKAGES, *more)}
    return {"npu_zoo": npu_zoo.__version__, **{name: version for name, version in found.items() if version}}


def write_record(record: ResultRecord, path: Path) -> None:
    """Put a record in place, whole; what was there before is replaced if it is a record, too.

    Raises:
        UsageError: there is something else at that place, or it cannot be written.
    """
    require_record_place(path, record.kind)
    try:
        write_whole(path, record.model_dump_json(indent=1) + "\n")
    except OSError as error:
        raise UsageError(f"the record {path} cannot be written: {error.strerror or error}; name another file") from None


def require_record_place(path: Path, kind: Kind) -> None:
    """Refuse a place that :func:`write_record` would, before anything is run.

    Raises:
        UsageError: there is a file that is no record of this kind, or no file can be there.
    """
    try:
        _probe(path)
    except OSError as error:
        raise UsageError(f"the record {path} cannot be written: {error.strerror or error}; name another file") from None
    if path.exists() and path.stat().st_size:
        read_record(path, kind)


def _probe(path: Path) -> None:
    """Make the folder and a file in it, as writing would; the folder stays."""
    if path.is_dir() or (path.exists() and not path.is_file()):
        raise UsageError(f"{path} is no file; name one for the record")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}-"):
        pass


def read_record(path: Path, kind: Kind | None = None) -> ResultRecord:
    """The record in a file.

    Args:
        kind: that it has to be of.

    Raises:
        UsageError: the file cannot be read, holds no record, or one of another kind.
    """
    try:
        record = ResultRecord.model_validate_json(path.read_bytes())
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror or error}") from None
    except ValidationError as error:
        raise UsageError(f"{path} is no record of a benchmark or an evaluation: {validation_lines(error)[0]}") from None
    if kind is not None and record.kind != kind:
        raise UsageError(f"{path} is a record of `npu-zoo {record.kind}`, and one of `npu-zoo {kind}` is due")
    return record


def _now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def _digest(data: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:_DIGITS]
