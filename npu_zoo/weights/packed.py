"""Weights as kernels laid them out, kept in files that later runs map instead of laying them out again.

A file is a safetensors file whose ``__metadata__`` tells what it was made of and whose tensors begin at cache lines. It
lies beneath ``XDG_CACHE_HOME`` or ``~/.cache``. A run maps it whole, in large pages where the file system has them, so
that processes with the same weights share their memory.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING

from npu_zoo.core.errors import WeightsError
from npu_zoo.platforms.caches import cache_folder
from npu_zoo.weights.header import MAX_HEADER_BYTES, SAFETENSORS_DTYPES, TensorEntry, parse_safetensors_header
from npu_zoo.weights.mapping import bytes_of, map_file, read_ahead, view_tensor

if TYPE_CHECKING:
    from torch import Tensor

_LINE = 64
_PAGE = 4096
_TOLD_AT_ONCE = 64 << 20
_BLOCK = 4 << 20
"""Bytes of two huge pages."""

_ROOM_LEFT = 1 << 30
_ATTEMPTS = 5
_SUFFIX = ".safetensors"
_SCRATCH = ".new-"
_DTYPES = {name: key for key, (name, _) in SAFETENSORS_DTYPES.items()}

Progress = Callable[[int, int], None]
"""Called with the bytes done and the bytes in all."""


@dataclass(frozen=True)
class PackedRequest:
    """What packed weights are of.

    Attributes:
        weights: the checkpoint's directory.
        made_of: which model is made of it, and which part of that, as JSON.
    """

    weights: str
    made_of: str

    @property
    def path(self) -> Path:
        """Where the file lies, whether it exists or not."""
        digest = hashlib.sha256(os.fsencode(self.weights) + b"\0" + self.made_of.encode()).hexdigest()[:24]
        return packed_folder() / f"{digest}{_SUFFIX}"


@dataclass(frozen=True)
class PackedFile:
    """A file of packed weights.

    Attributes:
        request: what it is of; None where it cannot be read, as after a write that was cut short.
        bytes: its size.
    """

    path: Path
    request: PackedRequest | None
    bytes: int


def packed_folder() -> Path:
    """The folder of all of them, whether it exists or not."""
    return cache_folder() / "packed"


def file_states(paths: Iterable[Path], base: Path) -> list[tuple[str, int, int]]:
    """Of files, by their paths from a directory, each with its size and the time of its last change in nanoseconds.

    It is the system's own time (ctime): that of writing may be any, as where images of containers are made again.
    """
    return [(os.path.relpath(path, base), stat.st_size, stat.st_ctime_ns) for path, stat in _stats(paths)]


def _stats(paths: Iterable[Path]) -> Iterator[tuple[Path, os.stat_result]]:
    for path in paths:
        with suppress(OSError):  # one that is gone by now is missing from the state
            yield path, path.stat()


@dataclass(frozen=True)
class MappedTensors:
    """What was kept, where it is mapped.

    Attributes:
        tensors: by name, views of the memory.
        memory: uint8 [bytes of the file].
    """

    tensors: dict[str, Tensor]
    memory: Tensor


def read_packed(request: PackedRequest, state: str, progress: Progress | None = None) -> MappedTensors | None:
    """The tensors that were kept, as views of the mapped file; None where none are, or none that can be taken.

    They cannot where they were made of another state of things, or the file is not whole.
    """
    try:
        buffer = map_file(request.path)
        raw = buffer[8 : 8 + int.from_bytes(buffer[:8], "little")]
        if _source_of(raw) != (request, state):
            return None
        entries = parse_safetensors_header(raw, len(buffer) - 8 - len(raw), request.path)
    except WeightsError:
        return None
    read_ahead(buffer, progress)
    whole = TensorEntry("", "uint8", 1, (len(buffer),), 0, len(buffer))
    return MappedTensors({entry.name: view_tensor(buffer, entry) for entry in entries}, view_tensor(buffer, whole))


def write_packed(
    request: PackedRequest, state: str, tensors: Mapping[str, Tensor], progress: Progress | None = None
) -> Path:
    """Keep tensors, in place of what was kept before; the file is there whole or not at all.

    Args:
        state: what :func:`read_packed` has to be given to get them back.

    Raises:
        WeightsError: a tensor does not fill whole cache lines, or the file cannot be written; says what to do.
    """
    path = request.path
    total = sum(tensor.nbytes for tensor in tensors.values())
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_abandoned()
        require_room(total)
        with _replacing(path) as file:
            blocks, done = _Blocks(file), 0
            blocks.write(memoryview(_header(request, state, tensors)))
            for tensor in tensors.values():
                data = bytes_of(tensor)
                for first in range(0, len(data), _TOLD_AT_ONCE):
                    done += blocks.write(data[first : first + _TOLD_AT_ONCE])
                    if progress is not None:
                        progress(done, total)
            blocks.flush()
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
    """Every file that was kept, and those that nobody can read."""
    found = []
    for path, stat in _stats(sorted(packed_folder().glob(f"*{_SUFFIX}"))):
        source = _read_source(path)
        found.append(PackedFile(path, source[0] if source else None, stat.st_size))
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


def remove_abandoned() -> None:
    """Remove what runs left that were killed while they wrote: those who still write hold a lock."""
    for scratch in packed_folder().glob(f"*{_SUFFIX}{_SCRATCH}*"):
        with suppress(OSError), scratch.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            scratch.unlink()


def _read_source(path: Path) -> tuple[PackedRequest, str] | None:
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            return _source_of(file.read(min(length, MAX_HEADER_BYTES)))
    except OSError:
        return None


def _source_of(header: bytes) -> tuple[PackedRequest, str] | None:
    try:
        metadata = json.loads(header)["__metadata__"]
        return PackedRequest(metadata["weights"], metadata["made_of"]), metadata["state"]
    except (ValueError, KeyError, TypeError):
        return None


def _header(request: PackedRequest, state: str, tensors: Mapping[str, Tensor]) -> bytes:
    """Filled up to a whole page."""
    metadata = {"weights": request.weights, "made_of": request.made_of, "state": state}
    header: dict[str, object] = {"__metadata__": metadata}
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


class _Blocks:
    """Writes a file from huge page to huge page: what is written from within one, the system keeps in small ones."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._block, self._filled = file, memoryview(bytearray(_BLOCK)), 0

    def write(self, data: memoryview) -> int:
        """All of it, some of which waits for the rest of its block."""
        done = 0
        while done < len(data):
            taken = min(len(data) - done, _BLOCK - self._filled)
            self._block[self._filled : self._filled + taken] = data[done : done + taken]
            self._filled, done = self._filled + taken, done + taken
            if self._filled == _BLOCK:
                self.flush()
        return done

    def flush(self) -> None:
        """What waits."""
        written = 0
        while written < self._filled:
            written += self._file.write(self._block[written : self._filled])
        self._filled = 0


@contextmanager
def _replacing(path: Path) -> Iterator[IO[bytes]]:
    """A file that takes the place of another once everything is on the disk."""
    for _ in range(_ATTEMPTS):
        scratch = path.with_name(f"{path.name}{_SCRATCH}{secrets.token_hex(6)}")
        try:
            with scratch.open("xb", buffering=0) as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                if not _is_at(file, scratch):
                    continue  # another process took it for abandoned before it was locked
                yield file
                os.fsync(file.fileno())
                scratch.replace(path)
                return
        finally:
            scratch.unlink(missing_ok=True)
    raise OSError("other processes remove what is written")


def _is_at(file: IO[bytes], path: Path) -> bool:
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    return False
