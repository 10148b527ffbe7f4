"""What a converted checkpoint was made of, with a checksum of every tensor: written at the end, and verified later."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

import npu_zoo
from npu_zoo.core.errors import WeightsError
from npu_zoo.weights.convert_journal import UnitRecord
from npu_zoo.weights.formats.files import file_pieces
from npu_zoo.weights.plan import ConversionPlan
from npu_zoo.weights.reading import Digest, Piece, Reader
from npu_zoo.weights.shards import shard_path

NAME = "npu-zoo-manifest.json"
_ALONG = ("*.json", "*.model", "*.txt", "*.md", "*.jinja", "LICENSE*", "NOTICE*")
_CODE = "*.py"
_BLOCK = 32 << 20


class SourceFile(BaseModel):
    """A file that was read.

    Attributes:
        size: bytes.
        tensors: how many of its tensors were read.
        sha256: of their names and checksums, in order of the names.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    size: int
    tensors: int
    sha256: str


class Manifest(BaseModel):
    """A conversion's record.

    Attributes:
        options: what was asked for.
        source_format: what was read.
        sources: the files that were read, by name.
        files: bytes of the files that were written.
        tensors: SHA-256 of each stored tensor, by file and name.
        dropped: tensors that were left out.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: int = 1
    npu_zoo: str
    options: dict[str, Any]
    source_format: str
    sources: dict[str, SourceFile]
    files: dict[str, int]
    tensors: dict[str, dict[str, str]]
    dropped: tuple[str, ...] = ()


def write_result(plan: ConversionPlan, work: Path, records: Iterable[UnitRecord]) -> None:
    """Write everything beside the tensors: index, config.json, the files that come along, and the manifest.

    Raises:
        WeightsError: a file that comes along cannot be read.
    """
    records = list(records)
    for name, content in plan.target.side_files(plan.placed).items():
        _write_json(work / name, content)
    _copy_along(plan, work)
    _write_json(work / "config.json", plan.config)
    tensors: dict[str, dict[str, str]] = {}
    for record in records:
        for (file, name), digest in record.written.items():
            tensors.setdefault(file, {})[name] = digest
    manifest = Manifest(
        npu_zoo=npu_zoo.__version__,
        options=asdict(plan.options),
        source_format=plan.source_format,
        sources=_sources(plan, records),
        files={file: (work / file).stat().st_size for file in sorted(tensors)},
        tensors={file: dict(sorted(tensors[file].items())) for file in sorted(tensors)},
        dropped=plan.dropped,
    )
    _write_json(work / NAME, manifest.model_dump(mode="json"))


def _sources(plan: ConversionPlan, records: list[UnitRecord]) -> dict[str, SourceFile]:
    read: dict[str, dict[str, str]] = {}
    for record in records:
        for (file, name), digest in record.read.items():
            read.setdefault(file, {})[name] = digest
    found = {}
    for path in plan.source.files():
        key = path.relative_to(plan.directory).as_posix()
        lines = sorted(f"{name} {digest}\n" for name, digest in read.get(key, {}).items())
        combined = hashlib.sha256("".join(lines).encode()).hexdigest()
        found[key] = SourceFile(size=path.stat().st_size, tensors=len(lines), sha256=combined)
    return found


def _copy_along(plan: ConversionPlan, work: Path) -> None:
    """The tokenizer's and other small files; what a target writes itself, or an index of the source, is left out."""
    patterns = (*_ALONG, _CODE) if plan.options.include_code else _ALONG
    names = sorted({path.name for pattern in patterns for path in plan.directory.glob(pattern) if path.is_file()})
    for name in names:
        if name in ("config.json", NAME) or name.endswith(".index.json") or (work / name).exists():
            continue
        try:
            shutil.copyfile(shard_path(plan.directory, name), work / name)
        except OSError as error:
            raise WeightsError(f"{plan.directory / name} cannot be copied: {error.strerror or error}") from error


def _write_json(path: Path, content: Any) -> None:
    with path.open("w", encoding="utf-8") as file:
        json.dump(content, file, indent=2, ensure_ascii=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())


@dataclass(frozen=True)
class Verification:
    """What became of a checkpoint since its manifest was written.

    Attributes:
        tensors, bytes: that were compared.
        faults: what differs, a line each.
    """

    tensors: int
    bytes: int
    faults: tuple[str, ...]


def read_manifest(directory: Path) -> Manifest:
    """A checkpoint's manifest.

    Raises:
        WeightsError: it has none, or it is damaged.
    """
    path = directory / NAME
    try:
        return Manifest.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        raise WeightsError(f"{directory} has no {NAME}; only what `npu-zoo convert` wrote can be verified") from None
    except (OSError, ValidationError) as error:
        raise WeightsError(f"{path} cannot be read: {error}") from error


def verify(directory: Path, progress: Callable[[int, int, int, int], None] | None = None) -> Verification:
    """Read every tensor and compare its checksum.

    Args:
        progress: called with tensors done, tensors in all, bytes done and bytes in all.

    Raises:
        WeightsError: there is no manifest.
    """
    manifest = read_manifest(directory)
    pieces: list[tuple[Piece, str]] = []
    faults: list[str] = []
    for file, tensors in manifest.tensors.items():
        found, fault = _pieces(directory, file, manifest.files[file])
        faults += [fault] if fault else []
        faults += [f"{file}: tensor {name} is missing" for name in tensors if found and name not in found]
        faults += [f"{file}: tensor {name} is not in the manifest" for name in found if name not in tensors]
        pieces += [(found[name], digest) for name, digest in tensors.items() if name in found]
    total = sum(length for piece, _ in pieces for _, length in piece.chunks)
    done = 0
    with Reader() as reader, ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        digests = pool.map(lambda entry: _digest(entry[0], reader), pieces)
        for number, ((piece, due), digest) in enumerate(zip(pieces, digests, strict=True), start=1):
            done += sum(length for _, length in piece.chunks)
            if digest != due:
                faults.append(f"{piece.path.relative_to(directory)}: tensor {piece.name} has another checksum")
            if progress is not None:
                progress(number, len(pieces), done, total)
    return Verification(len(pieces), total, tuple(faults))


def _pieces(directory: Path, file: str, size: int) -> tuple[dict[str, Piece], str]:
    path = directory / file
    if not path.is_file():
        return {}, f"{file} is missing"
    if path.stat().st_size != size:
        return {}, f"{file} has {path.stat().st_size} bytes; {size} are due"
    try:
        return file_pieces(path), ""
    except WeightsError as error:
        return {}, str(error)


def _digest(piece: Piece, reader: Reader) -> str:
    digest = Digest()
    step = max(1, _BLOCK // max(1, piece.row_bytes))
    for start in range(0, piece.num_rows, step):
        reader.read(piece, start, min(start + step, piece.num_rows), digest)
    return digest.hex()
