"""Where the data sets of tasks come from, and what their files are known by."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import JsonValue

from npu_zoo.core.errors import UsageError


@dataclass(frozen=True)
class DataFile:
    """A file that is known.

    Attributes:
        url: where it is downloaded from; empty where it is made of another.
        size: in bytes.
        samples: how many it holds.
    """

    name: str
    url: str
    size: int
    sha256: str
    licence: str
    samples: int

    def describe(self) -> str:
        """Where it is, how large, under which licence, and its hash."""
        return f"{self.url} ({self.size:,} bytes, {self.licence}, sha256 {self.sha256})"


_OPENAI = "https://raw.githubusercontent.com/openai/human-eval/6d43fb980f9fee3c892a914eda09951f772ad10d"
_EVALPLUS = "https://raw.githubusercontent.com/evalplus/humanevalplus_release/200defce9e3429d28ca215b6dd061c0f7f31c18b"
_FOUNDRY = "https://raw.githubusercontent.com/mosaicml/llm-foundry/8c8dd48f72168c5d51e2f7b151595892a8fba43d"
_HUMANEVAL = DataFile(
    "HumanEval.jsonl.gz",
    f"{_OPENAI}/data/HumanEval.jsonl.gz",
    44877,
    "b796127e635a67f93fb35c04f4cb03cf06f38c8072ee7cee8833d7bee06979ef",
    "MIT",
    164,
)

DATA_FILES: dict[str, tuple[DataFile, ...]] = {
    "boolq": (
        DataFile(
            "boolq.jsonl of llm-foundry, the whole validation set",
            f"{_FOUNDRY}/scripts/eval/local_data/reading_comprehension/boolq.jsonl",
            2210395,
            "454ff101e614370bb1807fe7ebbda6fdb57e794b9662cc1ccae211bf1ff626c8",
            "CC BY-SA 3.0",
            3270,
        ),
        DataFile(
            "the first 200 rows of the validation set",
            "",
            133390,
            "3534ec4c55876339700b887b826d200feb08122fa82fe65a2c0cd0b1a484b791",
            "CC BY-SA 3.0",
            200,
        ),
    ),
    "humaneval": (_HUMANEVAL,),
    "humaneval_infilling": (_HUMANEVAL,),
    "humaneval_plus": (
        DataFile(
            "HumanEvalPlus.jsonl.gz",
            f"{_EVALPLUS}/HumanEvalPlus.jsonl.gz",
            925932,
            "272720b90ac375502c8ed23cd791c2a93dfb22a911641a494da74a426c09f101",
            "Apache-2.0",
            164,
        ),
        DataFile(
            "HumanEvalPlus-Mini.jsonl.gz",
            f"{_EVALPLUS}/HumanEvalPlus-Mini.jsonl.gz",
            57064,
            "91486741f1627101021fbe50523df08eebb5b0bf5e804b633dcd5ca3c14dbd2f",
            "Apache-2.0",
            164,
        ),
    ),
}
"""By task; the first is the one to take."""


def require_data(task: str, data: Path | None) -> Path:
    """The file or folder of a task's data set.

    Raises:
        UsageError: none was named, or it is not there; says what to download and from where.
    """
    if data is None:
        raise UsageError(f"task {task} reads its data set from a file: give --data FILE; {how_to_get(task)}")
    if not data.exists():
        raise UsageError(f"--data {data} does not exist; {how_to_get(task)}")
    return data


def how_to_get(task: str) -> str:
    """What to download for a task that is in :data:`DATA_FILES`, as a part of a sentence."""
    files = DATA_FILES.get(task)
    return f"download {files[0].describe()}" if files else "name a file that exists"


def known_file(task: str, sha256: str) -> DataFile | None:
    """The known file of that hash."""
    return next((file for file in DATA_FILES.get(task, ()) if file.sha256 == sha256), None)


def hash_note(task: str, data: Path, sha256: str) -> str | None:
    """A remark where a file is none of those that are known for a task, whose figures others can compare with."""
    if task not in DATA_FILES or known_file(task, sha256):
        return None
    return f"{data} (sha256 {sha256}) is none of the files known for {task}; to compare with others {how_to_get(task)}"


def describe_data(data: Path, files: Sequence[Path]) -> dict[str, JsonValue]:
    """What names a data set: its place, and a SHA-256 that names of files have no part in; of several, each one's too.

    Raises:
        UsageError: a file cannot be read.
    """
    digests = {file.name: file_digest(file) for file in files}
    if len(digests) == 1:
        return {"path": str(data), "sha256": next(iter(digests.values()))}
    together = hashlib.sha256("".join(digests.values()).encode()).hexdigest()
    return {"path": str(data), "sha256": together, "files": dict(digests)}


def file_digest(path: Path) -> str:
    """The SHA-256 of a file.

    Raises:
        UsageError: it cannot be read.
    """
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror or error}") from None
    return digest.hexdigest()
