"""What a conversion has finished, so that an interrupted one goes on.

A line of JSON for each tensor that is written. Written bytes outlive their process; after a power failure they may not
have reached the disk, so where the machine was started since, what was written is read and compared before it counts.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Protocol

from npu_zoo.core.errors import WeightsError
from npu_zoo.weights.tensors import Segments

NAME = "journal.jsonl"
_READ = 8 << 20


@dataclass(frozen=True)
class UnitRecord:
    """One logical tensor that is written.

    Attributes:
        read: the SHA-256 of each stored tensor that it was made of, by file and name.
        written: that of each stored tensor of the result, by file and name.
    """

    name: str
    read: dict[tuple[str, str], str]
    written: dict[tuple[str, str], str]

    def to_json(self) -> str:
        """One line."""
        lists = {"read": [[*key, value] for key, value in self.read.items()]}
        lists["written"] = [[*key, value] for key, value in self.written.items()]
        return json.dumps({"name": self.name, **lists})

    @classmethod
    def from_json(cls, line: str) -> UnitRecord:
        """The record of a line; a ValueError or KeyError where it is none."""
        content = json.loads(line)
        read, written = (
            {(str(file), str(name)): str(digest) for file, name, digest in content[key]} for key in ("read", "written")
        )
        return cls(str(content["name"]), read, written)


class Bytes(Protocol):
    """Something that a result's bytes can be read back from."""

    def read(self, file: str, size: int, offset: int) -> bytes:
        """Bytes of a file; fewer where it ends."""


class Journal:
    """The journal of one unfinished result, which no second process can open meanwhile."""

    def __init__(self, path: Path, file: IO[str], done: dict[str, UnitRecord], *, trusted: bool) -> None:
        self.done = done
        self._path, self._file, self._trusted = path, file, trusted
        self._lock = threading.Lock()

    @classmethod
    def open(cls, folder: Path, digest: str) -> Journal:
        """The journal of a folder, which is made where there is none.

        Args:
            digest: of the conversion.

        Raises:
            WeightsError: the folder holds the unfinished result of another one, or another process works on it.
        """
        if folder.exists() and not (folder / NAME).exists() and any(folder.iterdir()):
            raise WeightsError(f"{folder} is in the way: it holds files and no journal of a conversion; delete it")
        folder.mkdir(exist_ok=True)
        file = (folder / NAME).open("a+", encoding="utf-8")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            file.seek(0)
            return cls._read(folder, file, digest)
        except BlockingIOError:
            file.close()
            raise WeightsError(f"another process writes into {folder}; wait for it, or stop it") from None
        except BaseException:
            file.close()
            raise

    @classmethod
    def _read(cls, folder: Path, file: IO[str], digest: str) -> Journal:
        lines = file.read().splitlines(keepends=True)
        head = {"conversion": digest, "boot": _boot()}
        if not lines or not lines[0].endswith("\n"):
            file.truncate(0)
            file.write(json.dumps(head) + "\n")
            file.flush()
            return cls(folder / NAME, file, {}, trusted=True)
        found = json.loads(lines[0])
        if found.get("conversion") != digest:
            raise WeightsError(
                f"{folder} holds the unfinished result of another conversion (other options, or a changed source); "
                "repeat that one, or delete the directory"
            )
        done = {}
        for line in lines[1:]:
            if line.endswith("\n"):  # a line that was cut off speaks of a tensor that is written anew
                record = UnitRecord.from_json(line)
                done[record.name] = record
        if not lines[-1].endswith("\n"):
            file.write("\n")
        return cls(folder / NAME, file, done, trusted=found.get("boot") == head["boot"])

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._file.close()

    def add(self, record: UnitRecord) -> None:
        """A tensor is written."""
        with self._lock:
            self._file.write(record.to_json() + "\n")
            self._file.flush()
            self.done[record.name] = record

    def check(self, content: Bytes, segments: Mapping[str, Mapping[str, Segments]]) -> None:
        """Forget what did not reach the disk before the machine was started anew."""
        if self._trusted:
            return
        for record in list(self.done.values()):
            found = {
                (file, name): _digest(content, file, segments.get(file, {}).get(name, ()))
                for file, name in record.written
            }
            if found != record.written:
                del self.done[record.name]

    def records(self) -> list[UnitRecord]:
        """Everything that is written."""
        return list(self.done.values())

    def remove(self) -> None:
        """The result is complete."""
        self._path.unlink()


def _digest(content: Bytes, file: str, segments: Segments) -> str:
    digest = hashlib.sha256()
    for offset, length in segments:
        for start in range(0, length, _READ):
            digest.update(content.read(file, min(_READ, length - start), offset + start))
    return digest.hexdigest()


def _boot() -> str:
    """What tells one start of the machine from another; empty where nothing does."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return f"unknown-{os.getpid()}"
