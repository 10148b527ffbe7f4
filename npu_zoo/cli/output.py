"""How listings are written: aligned text for people, JSON for programs, remarks on stderr, or whole files."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import sys
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from npu_zoo.core.errors import ConfigError

WIDTH_OF_A_PIPE = 140
_GAP = "  "


def print_json(value: Any) -> None:
    """Write a value as indented JSON on stdout."""
    print(json.dumps(value, indent=2, ensure_ascii=False))


def note(text: str) -> None:
    """Write a remark on stderr; of the ranks that a launcher started the first one does."""
    if os.environ.get("RANK", "0") != "0":
        return
    print(f"note: {text}", file=sys.stderr, flush=True)


def write_file(path: Path, text: str, *, replace: bool = False) -> None:
    """Write a text to a file, which is there whole or not at all.

    Args:
        path: it must not exist yet, unless it is to be replaced.
        replace: whether it may.

    Raises:
        ConfigError: the file exists, or cannot be written.
    """
    scratch = path.parent / f".{path.name}-{secrets.token_hex(6)}"
    try:
        with scratch.open("x", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        if replace:
            scratch.replace(path)
        else:
            path.hardlink_to(scratch)  # which does not replace, as a rename would
    except FileExistsError:
        raise ConfigError(f"cannot write {path}: it exists; choose another name, or give --force") from None
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror or error}; choose another file") from None
    finally:
        with contextlib.suppress(OSError):
            scratch.unlink()


def count_text(values: int) -> str:
    """A large number of values in words."""
    return f"{values / 1e9:,.1f} billion" if values >= 1e9 else f"{values / 1e6:,.1f} million"


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Write an aligned table; where it is too wide for the terminal, cells wrap between words."""
    table = [list(columns), *(list(row) for row in rows)]
    widths = _column_widths(table, table_width())
    for number, row in enumerate(table):
        wrapped = [_wrap(cell, width) for cell, width in zip(row, widths, strict=True)]
        height = max(map(len, wrapped))
        for lines in zip(*(cell + [""] * (height - len(cell)) for cell in wrapped), strict=True):
            text = _GAP.join(f"{line:<{width}}" for line, width in zip(lines, widths, strict=True))
            print(_bold(text.rstrip()) if number == 0 else text.rstrip())
        if number == 0:
            print(_GAP.join("-" * width for width in widths))


def print_fields(fields: Mapping[str, str]) -> None:
    """Write names and values, one pair a line, the values aligned and wrapped at the terminal's width."""
    indent = max(map(len, fields), default=0) + len(_GAP)
    for name, value in fields.items():
        first, *rest = _wrap(value, max(20, table_width() - indent))
        print(f"{name:<{indent}}{first}")
        for line in rest:
            print(" " * indent + line)


def print_items(title: str, items: Iterable[str]) -> None:
    """Write a title and a list below it, wrapped at the terminal's width."""
    print(f"{title}:")
    for item in items:
        first, *rest = _wrap(item, table_width() - len(_GAP))
        print(f"- {first}")
        for line in rest:
            print(_GAP + line)


def _column_widths(table: list[list[str]], available: int) -> list[int]:
    """Widths that fit: the widest column gives way first, and none goes below its longest word."""
    columns = list(zip(*table, strict=True))
    widths = [max(len(line) for cell in column for line in cell.split("\n")) for column in columns]
    least = [max((len(word) for cell in column for word in cell.split()), default=1) for column in columns]
    excess = sum(widths) + len(_GAP) * (len(widths) - 1) - available
    while excess > 0:
        shrinkable = [i for i, width in enumerate(widths) if width > least[i]]
        if not shrinkable:
            break
        widths[max(shrinkable, key=lambda i: widths[i])] -= 1
        excess -= 1
    return widths


def _wrap(text: str, width: int) -> list[str]:
    lines = [textwrap.wrap(line, width, break_long_words=False, break_on_hyphens=False) for line in text.split("\n")]
    return [part for line in lines for part in line or [""]]


def table_width() -> int:
    """Columns of the terminal; of a pipe, what COLUMNS says or :data:`WIDTH_OF_A_PIPE`."""
    return shutil.get_terminal_size((WIDTH_OF_A_PIPE, 24)).columns


def faint(text: str) -> str:
    """Dim at a terminal that shows colours, plain elsewhere."""
    return f"\033[2m{text}\033[22m" if text and sys.stdout.isatty() and "NO_COLOR" not in os.environ else text


def _bold(text: str) -> str:
    return f"\033[1m{text}\033[0m" if sys.stdout.isatty() and "NO_COLOR" not in os.environ else text
