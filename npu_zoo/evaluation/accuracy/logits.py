"""Logits of samples in a safetensors file, of which no more than one request's are in memory."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from npu_zoo.core.errors import ConfigError, NpuZooError

if TYPE_CHECKING:
    import numpy

POSITIONS = 32
"""How many positions of one request are kept when nothing else is asked for."""
FORMAT = "npu-zoo eval logits 1"
_FLOAT32 = 4
_CHUNK = 1 << 20


@dataclass(frozen=True)
class _Part:
    """One request's logits in the scratch file."""

    number: int
    rows: int
    start: int


class LogitFile(AbstractContextManager["LogitFile"]):
    """Takes logits while a run goes on; see :class:`npu_zoo.evaluation.accuracy.tasks.Logits`.

    The file is put in place by :meth:`finish`: tensors ``task/sample`` of float32 [positions, vocab_size], and metadata
    ``format``, ``model`` and ``vocab_size``.

    Args:
        path: the file, which may exist where it is one of these.
        model: its name, for the metadata.
        positions: how many of one request are kept at most.

    Raises:
        ConfigError: the file cannot be written, or something else is there.
    """

    def __init__(self, path: Path, model: str, positions: int = POSITIONS) -> None:
        _require_own(path)
        self.path, self.positions = path, positions
        self._model = model
        self._vocab_size = 0
        self._parts: dict[str, list[_Part]] = {}
        self._scratch = path.parent / f".{path.name}-{secrets.token_hex(6)}"
        self._end = 0
        try:
            self._file: IO[bytes] = self._scratch.open("x+b")
        except OSError as error:
            raise ConfigError(f"cannot write {path}: {error.strerror or error}; name another file") from error

    def __exit__(self, *exc_info: object) -> None:
        with contextlib.suppress(OSError):  # what a full disk could not take any more
            self._file.close()
        with contextlib.suppress(OSError):
            self._scratch.unlink()

    @property
    def count(self) -> int:
        """How many samples have logits."""
        return len(self._parts)

    def put(self, task: str, sample_id: str, logits: numpy.ndarray[Any, Any], part: int = 0) -> None:
        """Keep logits of a sample; [positions, vocab_size], float32.

        Raises:
            NpuZooError: they cannot be written.
        """
        kept = logits[: self.positions].astype("<f4", copy=False)
        self._vocab_size = kept.shape[1]
        with _writing(self.path):
            self._file.write(kept.tobytes())
        self._parts.setdefault(f"{task}/{sample_id}", []).append(_Part(part, len(kept), self._end))
        self._end += kept.nbytes

    def finish(self) -> None:
        """Write the file, whole.

        Raises:
            NpuZooError: it cannot be written; what was there before stays.
        """
        whole = self._scratch.with_name(f"{self._scratch.name}-whole")
        try:
            with _writing(self.path):
                with whole.open("xb") as out:
                    self._write(out)
                    out.flush()
                    os.fsync(out.fileno())
                whole.replace(self.path)
        finally:
            whole.unlink(missing_ok=True)

    def _write(self, out: IO[bytes]) -> None:
        header = self._header()
        out.write(len(header).to_bytes(8, "little") + header)
        for parts in self._parts.values():
            for part in sorted(parts, key=lambda part: part.number):
                self._copy(part, out)

    def _copy(self, part: _Part, out: IO[bytes]) -> None:
        self._file.seek(part.start)
        left = self._bytes(part.rows)
        while left:
            data = self._file.read(min(left, _CHUNK))
            out.write(data)
            left -= len(data)

    def _header(self) -> bytes:
        metadata = {"format": FORMAT, "model": self._model, "vocab_size": str(self._vocab_size)}
        entries: dict[str, Any] = {"__metadata__": metadata}
        end = 0
        for name, parts in self._parts.items():
            rows = sum(part.rows for part in parts)
            begin, end = end, end + self._bytes(rows)
            entries[name] = {"dtype": "F32", "shape": [rows, self._vocab_size], "data_offsets": [begin, end]}
        text = json.dumps(entries).encode()
        return text + b" " * (-len(text) % 8)

    def _bytes(self, rows: int) -> int:
        return rows * self._vocab_size * _FLOAT32


def _require_own(path: Path) -> None:
    if not path.exists():
        return
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            own = json.loads(file.read(min(length, 1 << 26)))["__metadata__"]["format"] == FORMAT
    except (OSError, ValueError, KeyError, TypeError):
        own = False
    if not own:
        raise ConfigError(f"{path} exists, and is no file of logits that eval has written; name another file")


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise NpuZooError(
            f"cannot write {path}: {error.strerror or error}; free some space, or name another"
        ) from error
