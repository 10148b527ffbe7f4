"""Weights as kernels laid them out, kept in files that later runs map instead of laying them out again.

A file is a safetensors file whose ``__metadata__`` tells what it was made of and whose tensors begin at cache lines. It
lies beneath ``XDG_CACHE_HOME`` or ``~/.cache``. A run maps it whole, in large pages where the file system has them, so
that processes with the same weights share their memory.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING

from npu_zoo.core.errors import WeightsError
from npu_zoo.weights.header import MAX_HEADER_BYTES, SAFETENSORS_DTYPES, read_safetensors_header
from npu_zoo.weights.mapping import bytes_of, map_file, read_ahead, view_tensor

if TYPE_CHECKING:
    from torch import Tensor

_LINE = 64
_PAGE = 4096
_WRITTEN_AT_ONCE = 64 << 20
_ROOM_LEFT = 1 << 30
_ABANDONED_S = 3600.0
_SUFFIX = ".safetensors"
_SCRATCH = ".new-"
_DTYPES = {name: key for key, (name, _) in SAFETENSORS_DTYPES.items()}

Progress = Callable[[int, int], None]
"""Called with the bytes done and the bytes in all."""


@dataclass(frozen=True)
class PackedSource:
    """What packed weights are made of, and so when they are out of date.

    Attributes:
        weights: the checkpoint's directory.
        request: which model is made of it, by which kernels, for which rank.
        state: of the checkpoint's files, of the zoo's code and of the processor; they change, the request does not.
    """

    weights: str
    request: str
    state: str

    @property
    def path(self) -> Path:
        """Where the file lies, whether it exists or not."""
        digest = hashlib.sha256(f"{self.weights}\0{self.request}".encode()).hexdigest()[:24]
        return packed_folder() / f"{digest}{_SUFFIX}"

    def is_kept(self) -> bool:
        """Whether the file is there and up to date."""
        found = _read_source(self.path)
        return found == self


@dataclass(frozen=True)
class PackedFile:
    """A file of packed weights.

    Attributes:
        source: what it was made of.
        bytes: its size.
    """

    path: Path
    source: PackedSource
    bytes: int


def packed_folder() -> Path:
    """The folder of all of them, whether it exists or not."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "npu-zoo" / "packed"


def files_state(directory: Path) -> list[tuple[str, int, int]]:
    """Name, size and time of the last change, in nanoseconds, of every file of a checkpoint."""
    found = []
    for path in sorted(directory.rglob("*")):
        with suppress(OSError):
            stat = path.stat()
            if path.is_file():
                found.append((str(path.relative_to(directory)), stat.st_size, stat.st_mtime_ns))
    return found


def read_packed(source: PackedSource, progress: Progress | None = None) -> dict[str, Tensor] | None:
    """The tensors that were kept, as views of the mapped file; None where none are, or none that can be taken.

    They cannot where they are out of date, or the file is damaged.
    """
    if not source.is_kept():
        return None
    try:
        entries = read_safetensors_header(source.path)
        buffer = map_file(source.path)
    except WeightsError:
        return None
    read_ahead(buffer, progress)
    return {entry.name: view_tensor(buffer, entry) for entry in entries}


def write_packed(source: PackedSource, tensors: Mapping[str, Tensor], progress: Progress | None = None) -> Path:
    """Keep tensors, in place of what was kept before; the file is there whole or not at all.

    Raises:
        WeightsError: a tensor does not fill whole cache lines, or the file cannot be written; says what to do.
    """
    path = source.path
    total = sum(tensor.nbytes for tensor in tensors.values())
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(path)
        require_room(total)
        with _replacing(path) as file:
            _write(file, memoryview(_header(source, tensors)))
            done = 0
            for tensor in tensors.values():
                data = bytes_of(tensor)
                for first in range(0, len(data), _WRITTEN_AT_ONCE):
                    done += _write(file, data[first : first + _WRITTEN_AT_ONCE])
                    if progress is not None:
                        progress(done, total)
    except OSError as error:
        raise WeightsError(
            f"{path}: packed weights cannot be kept: {error.strerror or error}; --packed-weights auto runs without"
        ) from error
    return path


def require_room(num_bytes: int) -> None:
    """Refuse to fill the disk.

    Raises:
        WeightsError: it has less room than the file takes and some more.
    """
    folder = packed_folder()
    existing = next(path for path in (folder, *folder.parents) if path.is_dir())
    free = shutil.disk_usage(existing).free
    if free < num_bytes + _ROOM_LEFT:
        raise WeightsError(
            f"packed weights take {num_bytes / 1e9:.1f} GB, and {folder} has {free / 1e9:.1f} GB free; free some "
            "(`npu-zoo weights packed` lists those of other checkpoints), or run with --packed-weights auto"
        )


def list_packed() -> list[PackedFile]:
    """Every file that was kept."""
    found = []
    for path in sorted(packed_folder().glob(f"*{_SUFFIX}")):
        source = _read_source(path)
        if source is not None:
            found.append(PackedFile(path, source, path.stat().st_size))
    return found


def remove_packed(file: PackedFile) -> None:
    """Remove one; runs that have mapped it keep what they mapped.

    Raises:
        WeightsError: it cannot be removed.
    """
    try:
        file.path.unlink(missing_ok=True)
    except OSError as error:
        raise WeightsError(f"{file.path}: cannot be removed: {error.strerror or error}") from error


def _read_source(path: Path) -> PackedSource | None:
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            metadata = json.loads(file.read(min(length, MAX_HEADER_BYTES)))["__metadata__"]
        return PackedSource(metadata["weights"], metadata["request"], metadata["state"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _header(source: PackedSource, tensors: Mapping[str, Tensor]) -> bytes:
    """Filled up to a whole page."""
    header: dict[str, object] = {
        "__metadata__": {"weights": source.weights, "request": source.request, "state": source.state}
    }
    position = 0
    for name, tensor in tensors.items():
        if tensor.nbytes % _LINE:
            raise WeightsError(
                f"the packed weight {name} has {tensor.nbytes} bytes, which do not fill whole cache lines"
            )
        offsets = [position, position + tensor.nbytes]
        dtype = _DTYPES[str(tensor.dtype).removeprefix("torch.")]
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": offsets}
        position = offsets[1]
    raw = json.dumps(header).encode()
    raw += b" " * (-(len(raw) + 8) % _PAGE)
    return len(raw).to_bytes(8, "little") + raw


def _write(file: IO[bytes], data: memoryview) -> int:
    """All of it, in as large pieces as may be: file systems then lay it on large pages."""
    written = 0
    while written < len(data):
        written += file.write(data[written:])
    return written


@contextmanager
def _replacing(path: Path) -> Iterator[IO[bytes]]:
    """A file that takes the place of another once everything is on the disk."""
    scratch = path.with_name(f"{path.name}{_SCRATCH}{secrets.token_hex(6)}")
    try:
        with scratch.open("xb", buffering=0) as file:
            yield file
            os.fsync(file.fileno())
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)


def _remove_abandoned(path: Path) -> None:
    """Remove what a run left that was killed while it wrote."""
    for scratch in path.parent.glob(f"*{_SUFFIX}{_SCRATCH}*"):
        with suppress(OSError):
            if time.time() - scratch.stat().st_mtime > _ABANDONED_S:
                scratch.unlink()
