"""The parts of an ELF shared library that tell what it needs: libraries, undefined symbols, names it looks up."""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass
from pathlib import Path

_SHT_DYNSYM = 11
_SHT_DYNAMIC = 6
_DT_NEEDED = 1


@dataclass(frozen=True)
class SharedLibrary:
    """What a library asks of its surroundings.

    Attributes:
        needed: names of the libraries it is linked with (``DT_NEEDED``).
        undefined: names of the symbols that others must define.
        data: the file's bytes.
    """

    needed: tuple[str, ...]
    undefined: frozenset[str]
    data: bytes

    def names(self, pattern: bytes) -> set[str]:
        """The zero-terminated strings in the file that match ``pattern`` whole: what it looks up while running."""
        found = re.finditer(pattern + rb"\x00", self.data)
        return {match.group()[:-1].decode() for match in found if self.data[match.start() - 1] == 0}


def read_library(path: Path) -> SharedLibrary:
    """Read a 64-bit little-endian ELF file.

    Raises:
        ValueError: the file is none.
    """
    data = path.read_bytes()
    if data[:6] != b"\x7fELF\x02\x01":
        raise ValueError(f"{path} is no 64-bit little-endian ELF file")
    sections = _sections(data)
    needed: list[str] = []
    undefined: set[str] = set()
    for kind, offset, size, link in sections:
        if kind not in (_SHT_DYNSYM, _SHT_DYNAMIC):
            continue
        strings = sections[link][1]
        if kind == _SHT_DYNAMIC:
            entries = struct.iter_unpack("<qQ", data[offset : offset + size])
            needed += [_string(data, strings + value) for tag, value in entries if tag == _DT_NEEDED]
        else:
            symbols = struct.iter_unpack("<IBBHQQ", data[offset : offset + size])
            undefined |= {_string(data, strings + name) for name, _, _, section, _, _ in symbols if section == 0}
    return SharedLibrary(tuple(needed), frozenset(undefined - {""}), data)


def _sections(data: bytes) -> list[tuple[int, int, int, int]]:
    (table,) = struct.unpack_from("<Q", data, 0x28)
    width, count = struct.unpack_from("<HH", data, 0x3A)
    headers = (struct.unpack_from("<IIQQQQII", data, table + i * width) for i in range(count))
    return [(header[1], header[4], header[5], header[6]) for header in headers]


def _string(data: bytes, start: int) -> str:
    return data[start : data.index(b"\0", start)].decode()
