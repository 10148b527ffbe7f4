"""Rows of data sets in files on this machine."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from npu_zoo.core.errors import ConfigError, UsageError

Row = dict[str, Any]

SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".parquet")
"""What :func:`read_rows` takes."""

_SPLITS = {
    "train": ("train",),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test",),
}


def read_rows(file: Path) -> list[Row]:
    """All rows of a file: JSON lines, perhaps compressed, a JSON list, or Parquet.

    Raises:
        UsageError: it cannot be read, holds no rows or something else; names the line.
    """
    if not file.name.endswith(SUFFIXES):
        raise UsageError(f"{file} is no data set; name a file of {', '.join(SUFFIXES)}")
    rows = _parquet(file) if file.suffix == ".parquet" else list(_json_rows(file))
    if not rows:
        raise UsageError(f"{file} holds no rows")
    return rows


def data_files(data: Path, suffixes: Sequence[str] = SUFFIXES) -> list[Path]:
    """A file, or those of a folder in the order of their names.

    Raises:
        UsageError: there is no such file or folder, or the folder holds none.
    """
    if data.is_file():
        return [data]
    if not data.is_dir():
        raise UsageError(f"--data {data} does not exist; name a file or a folder")
    found = sorted(path for path in data.iterdir() if path.is_file() and path.name.endswith(tuple(suffixes)))
    if not found:
        raise UsageError(f"--data {data} holds no file of {', '.join(suffixes)}")
    return found


def split_files(data: Path) -> dict[str, list[Path]]:
    """Files by split: one file, or a folder's by what their names begin with (train, validation, test).

    A file whose name says nothing is of the split ``data``, and so is a single one.

    Raises:
        UsageError: as :func:`data_files`.
    """
    files = data_files(data)
    splits: dict[str, list[Path]] = {}
    for file in files:
        splits.setdefault("data" if len(files) == 1 else split_of(file.name), []).append(file)
    return splits


def text_of(file: Path) -> str:
    """A text file's contents.

    Raises:
        UsageError: it cannot be read, or is no text in UTF-8.
    """
    try:
        return file.read_text("utf-8")
    except OSError as error:
        raise UsageError(f"cannot read {file}: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise UsageError(f"{file} is no text in UTF-8 (byte {error.start})") from None


def split_of(name: str) -> str:
    """The split that a file's name, or another name of a split, begins with; ``data`` where it says nothing."""
    return next((split for split, begins in _SPLITS.items() if name.lower().startswith(begins)), "data")


def _json_rows(file: Path) -> Iterator[Row]:
    text = _unzipped(file) if file.suffix == ".gz" else text_of(file)
    if file.suffix == ".json":
        yield from _checked(file, _parsed(file, 1, text))
        return
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            row = _parsed(file, number, line)
            if not isinstance(row, dict):
                raise UsageError(f"{file}, line {number}: no JSON object")
            yield row


def _unzipped(file: Path) -> str:
    try:
        return gzip.decompress(file.read_bytes()).decode("utf-8")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read {file}: {error}") from None


def _parsed(file: Path, number: int, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{file}, line {number}: no JSON: {error}") from None


def _checked(file: Path, rows: Any) -> list[Row]:
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UsageError(f"{file} is no list of JSON objects")
    return rows


def _parquet(file: Path) -> list[Row]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError as error:
        raise ConfigError(f"{file} needs {error.name}: pip install 'npu-zoo[eval]'") from None
    try:
        rows: list[Row] = pyarrow.parquet.read_table(file).to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        raise UsageError(f"cannot read {file}: {error}") from None
    return rows
