"""Answers of a model in a file that grows line by line, so that an interrupted run goes on."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import time
from contextlib import AbstractContextManager
from pathlib import Path
from typing import IO

from pydantic import JsonValue

from npu_zoo.core.errors import ConfigError, NpuZooError

SYNC_SECONDS = 1.0
"""A power failure costs what was answered in so long a time; the end of the process costs nothing."""
_FORMAT = "npu-zoo eval responses 1"


class ResponseFile(AbstractContextManager["ResponseFile"]):
    """Answers by request; see :class:`npu_zoo.evaluation.accuracy.tasks.Responses`.

    Attributes:
        found: how many answers an earlier run has left.

    Args:
        path: is made where it does not exist, and read where it does.
        model: tells the model and all else that answers depend on beside the request.

    Raises:
        ConfigError: the file cannot be written, another process writes it, or it holds something else or another
            model's answers.
    """

    def __init__(self, path: Path, model: str) -> None:
        self.path = path
        self._header = {"format": _FORMAT, "model": hashlib.sha256(model.encode()).hexdigest()}
        self._answers: dict[str, JsonValue] = {}
        self._synced = time.monotonic()
        self._file = _locked(path)
        try:
            self._read()
        except BaseException:
            self._close()
            raise
        self.found = len(self._answers)

    def __exit__(self, *exc_info: object) -> None:
        self._close()

    @property
    def count(self) -> int:
        """How many answers there are."""
        return len(self._answers)

    def get(self, key: str) -> JsonValue:
        """The answer to a request; None where there is none yet."""
        return self._answers.get(_digest(key))

    def put(self, key: str, value: JsonValue) -> None:
        """Append an answer.

        Raises:
            NpuZooError: it cannot be written; what was written before is there.
        """
        self._answers[_digest(key)] = value
        self._append({"key": _digest(key), "value": value})

    def remove(self) -> None:
        """Delete the file: the run is over and its record written."""
        self.path.unlink(missing_ok=True)

    def _close(self) -> None:
        with contextlib.suppress(OSError):  # what a full disk could not take, which was said when it was put
            self._file.close()

    def _append(self, line: JsonValue) -> None:
        try:
            self._file.write(json.dumps(line).encode() + b"\n")
            self._file.flush()
            if time.monotonic() - self._synced > SYNC_SECONDS:
                os.fsync(self._file.fileno())
                self._synced = time.monotonic()
        except OSError as error:
            raise NpuZooError(
                f"cannot write {self.path}: {error.strerror or error}; the {len(self._answers) - 1} answers before are "
                "in it, and the same command goes on from there"
            ) from error

    def _read(self) -> None:
        """Take what is there; a last line that was torn is cut off."""
        end = 0
        for number, raw in enumerate(self._file):
            if not raw.endswith(b"\n"):
                break
            self._take(number, raw)
            end += len(raw)
        if end == 0 and self._file.seek(0, os.SEEK_END):
            self._require_own_beginning()
        self._file.truncate(end)
        self._file.seek(end)
        if end == 0:
            self._append(dict(self._header))

    def _take(self, number: int, raw: bytes) -> None:
        try:
            line = json.loads(raw)
            if number == 0:
                self._check_header(line)
            else:
                self._answers[str(line["key"])] = line["value"]
        except (KeyError, TypeError, ValueError, RecursionError):
            raise self._foreign() from None

    def _check_header(self, line: dict[str, str]) -> None:
        if line["format"] != _FORMAT:
            raise ValueError
        if line["model"] != self._header["model"]:
            raise ConfigError(
                f"{self.path} holds the answers of an interrupted run with another model or other settings; repeat "
                "that run as it was, or delete the file"
            )

    def _require_own_beginning(self) -> None:
        self._file.seek(0)
        begun, own = self._file.read(), json.dumps(self._header).encode()
        if not own.startswith(begun):
            raise self._foreign()

    def _foreign(self) -> ConfigError:
        return ConfigError(f"{self.path} exists, and holds no answers of an interrupted run; move it or delete it")


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def _locked(path: Path) -> IO[bytes]:
    """The file for reading and writing; made where there is none."""
    try:
        file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666), "r+b")
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror or error}; name another file for --json") from error
    try:
        fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise ConfigError(f"{path} is being written by another process; wait for it, or name another file") from None
    return file
