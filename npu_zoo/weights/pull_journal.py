"""What the parts of an unfinished download are parts of."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from npu_zoo.weights.remote_files import Listing, RemoteFile

NAME = "journal.json"


class _Record(BaseModel):
    """One file: what it is known by at the source, and the ETag of what came where the source gives no hash."""

    identity: str
    size: int
    etag: str = ""


class _State(BaseModel):
    source: str = ""
    repository: str = ""
    revision: str = ""
    commit: str = ""
    files: dict[str, _Record] = {}


class Journal:
    """The journal of one folder of parts; replaced as a whole on every change, so that it is never half written."""

    def __init__(self, folder: Path, state: _State) -> None:
        self._folder = folder
        self._state = state
        self._lock = threading.Lock()

    @classmethod
    def read(cls, folder: Path) -> Journal:
        """The journal of a folder; an empty one where there is none that can be read."""
        try:
            state = _State.model_validate_json((folder / NAME).read_bytes())
        except (OSError, ValidationError):
            state = _State()
        return cls(folder, state)

    def part(self, file: RemoteFile) -> Path:
        """Where the part of a file lies."""
        return self._folder / f"{hashlib.sha256(file.path.encode()).hexdigest()[:24]}.part"

    def resumable(self, file: RemoteFile) -> int:
        """How many bytes of a file its part holds; 0 where the part is of another content."""
        part = self.part(file)
        size = part.stat().st_size if part.is_file() else 0
        return size if size <= file.size and self._is_same(file) else 0

    def etag(self, file: RemoteFile) -> str:
        """What the server called the content that a part is the beginning of; empty where a hash tells it."""
        record = self._state.files.get(file.path)
        return record.etag if record else ""

    def keep_etag(self, file: RemoteFile, etag: str) -> None:
        """Remember what the server calls the content; a weak name does not tell bytes apart."""
        etag = "" if etag.startswith("W/") else etag
        with self._lock:
            record = self._state.files[file.path]
            if record.etag != etag:
                self._state.files[file.path] = record.model_copy(update={"etag": etag})
                self._write()

    def adopt(self, listing: Listing, files: Iterable[RemoteFile]) -> list[str]:
        """Take a new download's files over, and delete parts that are no beginning of them; the paths of these."""
        kept = {}
        deleted = []
        for file in files:
            part = self.part(file)
            kept[file.path] = _Record(identity=file.identity, size=file.size)
            if not part.exists():
                continue
            if self.resumable(file):
                kept[file.path] = self._state.files[file.path]
                continue
            if part.stat().st_size:
                deleted.append(file.path)
            part.unlink()
        self._state = _State(
            source=listing.source,
            repository=listing.repository,
            revision=listing.revision,
            commit=listing.commit,
            files=kept,
        )
        self._write()
        return deleted

    def remove(self) -> None:
        """Delete the journal and every part: the download is finished."""
        for part in self._folder.glob("*.part"):
            part.unlink()
        (self._folder / NAME).unlink(missing_ok=True)

    def _is_same(self, file: RemoteFile) -> bool:
        record = self._state.files.get(file.path)
        if record is None or record.size != file.size or record.identity != file.identity:
            return False
        return bool(file.identity or record.etag)

    def _write(self) -> None:
        new = self._folder / f"{NAME}.new"
        content: dict[str, Any] = self._state.model_dump()
        with new.open("w", encoding="utf-8") as file:
            json.dump(content, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        new.replace(self._folder / NAME)
