"""Files of logits that `npu-zoo eval --save-logits` writes: a float32 tensor [positions, vocab] for each sample."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from npu_zoo.core.errors import ConfigError, UsageError
from npu_zoo.evaluation.accuracy.sources import file_digest

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

CHUNK = 32 << 20
"""Bytes of logits that are in memory at a time, of each file."""


class LogitsFile:
    """One open file; a tensor is read in chunks of positions.

    Attributes:
        names: of its tensors, ``task/sample``.
    """

    def __init__(self, path: Path, file: Any) -> None:
        self.path = path
        self._file = file
        self.names: frozenset[str] = frozenset(file.keys())

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape."""
        return tuple(self._file.get_slice(name).get_shape())

    def rows(self, name: str, start: int, stop: int) -> NDArray[np.float32]:
        """Some positions of a tensor."""
        found: NDArray[np.float32] = self._file.get_slice(name)[start:stop]
        return found


@contextlib.contextmanager
def open_logits(path: Path) -> Iterator[LogitsFile]:
    """Open a file of logits.

    Raises:
        UsageError: it is missing, damaged, or holds other tensors than [positions, vocab] of float32.
        ConfigError: numpy is not installed.
    """
    from safetensors import SafetensorError, safe_open

    try:
        import numpy  # noqa: F401
    except ModuleNotFoundError:
        raise ConfigError(
            "logits are compared with numpy, which is not installed: pip install 'npu-zoo[run]'"
        ) from None
    try:
        opened = safe_open(path, framework="np")
    except (OSError, SafetensorError) as error:
        raise UsageError(f"the logits {path} cannot be read: {error}; write them again: eval --save-logits") from None
    with opened as file:
        for name in file.keys():  # noqa: SIM118 - no mapping
            tensor = file.get_slice(name)
            if tensor.get_dtype() != "F32" or len(tensor.get_shape()) != 2:
                shape = list(tensor.get_shape())
                raise UsageError(f"{path}: {name} is {tensor.get_dtype()} {shape}; logits are F32 [positions, vocab]")
        yield LogitsFile(path, file)


def paired_chunks(
    a: LogitsFile, b: LogitsFile, name: str, chunk: int = CHUNK
) -> Iterator[tuple[NDArray[np.float32], NDArray[np.float32]]]:
    """The same positions of both files' tensor of a name, which has the same shape in both.

    Args:
        chunk: bytes of each file's at a time.
    """
    positions, vocab = a.shape(name)
    step = max(1, chunk // (4 * max(vocab, 1)))
    for start in range(0, positions, step):
        stop = min(start + step, positions)
        yield a.rows(name, start, stop), b.rows(name, start, stop)


def require_digest(path: Path, expected: str) -> None:
    """Refuse logits that are not those that a record speaks of.

    Raises:
        UsageError: the file is missing, or has another SHA-256.
    """
    try:
        found = file_digest(path)
    except UsageError as error:
        raise UsageError(f"the record's logits: {error}; keep them beside the record") from None
    if found != expected:
        raise UsageError(f"{path} are not the logits of the record: SHA-256 {found}, and not {expected}")
