"""The corpus: sources of the Python standard library, and the pieces of code cut out of them."""

from __future__ import annotations

import ast
import hashlib
import sysconfig
import textwrap
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path

MAX_UNIT_CHARS = 1500
"""Longest piece of code that becomes a document of its own; longer ones do not fit a training row."""

_BLOCKS = (ast.For, ast.While, ast.With, ast.Try, ast.If, ast.AsyncFor, ast.AsyncWith)
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass(frozen=True)
class Unit:
    """One syntactically complete piece of code, without its outer indentation."""

    kind: str
    source: str
    name: str = ""
    signature: str = ""
    summary: str = ""
    is_method: bool = False
    brief_source: str = ""
    """The source with its docstring shortened to one line, when it was longer."""
    bare_source: str = ""
    """The source without its docstring."""


@dataclass
class Module:
    """One source file."""

    name: str
    text: str
    imports: list[str] = field(default_factory=list)
    units: list[Unit] = field(default_factory=list)


def stdlib_root() -> Path:
    """Folder of the running interpreter's standard library."""
    return Path(sysconfig.get_path("stdlib"))


def load_corpus(exclude: list[str], heldout: list[str]) -> list[Module]:
    """Standard library modules in sorted order, each text once, without the held-out ones.

    ``exclude`` holds glob patterns that are matched with every component of the path and with the whole path.
    """
    seen: set[str] = set()
    modules = []
    for path, text in _sources(stdlib_root(), exclude):
        digest = hashlib.sha256(text.encode()).hexdigest()
        if path in heldout or digest in seen:
            continue
        seen.add(digest)
        modules.append(_parse_module(path, text))
    return modules


def read_heldout(names: list[str]) -> dict[str, str]:
    """Texts of the held-out modules, read from the running interpreter."""
    root = stdlib_root()
    return {name: (root / name).read_text(encoding="utf-8") for name in sorted(names)}


def _sources(root: Path, exclude: list[str]) -> Iterator[tuple[str, str]]:
    for file in sorted(root.rglob("*.py")):
        relative = file.relative_to(root)
        names = (*relative.parts, relative.as_posix())
        if any(fnmatch(name, pattern) for name in names for pattern in exclude):
            continue
        try:
            text = file.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        text = text.replace("\r\n", "\n").expandtabs(8)
        if text.strip():
            yield relative.as_posix(), text.rstrip() + "\n"


def _parse_module(name: str, text: str) -> Module:
    module = Module(name, text)
    tree = _parse(text)
    if tree is None:
        return module
    lines = text.splitlines()
    for node in tree.body:
        if isinstance(node, ast.Import | ast.ImportFrom) and node.lineno == node.end_lineno:
            module.imports.append(lines[node.lineno - 1].strip())
    module.units.extend(_units(tree, lines))
    return module


def _parse(text: str) -> ast.Module | None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return ast.parse(text)
        except (SyntaxError, ValueError):
            return None


def _units(tree: ast.Module, lines: list[str]) -> Iterator[Unit]:
    seen: set[str] = set()
    methods = {id(child) for node in ast.walk(tree) if isinstance(node, ast.ClassDef) for child in node.body}
    for node in ast.walk(tree):
        unit = None
        if isinstance(node, _FUNCTIONS):
            unit = _function_unit(node, lines, id(node) in methods)
        elif isinstance(node, ast.ClassDef):
            unit = _class_unit(node, lines)
        elif isinstance(node, _BLOCKS):
            unit = _block_unit(node, lines)
        if unit is not None and unit.source not in seen:
            seen.add(unit.source)
            yield unit


def _function_unit(node: ast.FunctionDef | ast.AsyncFunctionDef, lines: list[str], is_method: bool) -> Unit | None:
    first, last = _extent(node, lines)
    source = _cut(lines, first, last)
    if source is None:
        return None
    docstring = ast.get_docstring(node) or ""
    brief, bare = _without_docstring(node, lines, first, last) if docstring else ("", "")
    return Unit(
        kind="function",
        source=source,
        name=node.name,
        signature=f"{node.name}({ast.unparse(node.args)})",
        summary=_summary(docstring),
        is_method=is_method,
        brief_source=brief,
        bare_source=bare,
    )


def _without_docstring(
    node: ast.FunctionDef | ast.AsyncFunctionDef, lines: list[str], first: int, last: int
) -> tuple[str, str]:
    """The source with a one-line docstring (when it had a longer one), and with none."""
    doc = node.body[0]
    end = doc.end_lineno or doc.lineno
    if doc.lineno == node.lineno:
        return "", ""
    head, tail = lines[first - 1 : doc.lineno - 1], lines[end:last]
    brief = ""
    summary = _summary(ast.get_docstring(node) or "")
    if end > doc.lineno and summary and '"' not in summary and "\\" not in summary:
        line = " " * doc.col_offset + f'"""{summary}"""'
        brief = _checked([*head, line, *tail]) or ""
    bare = _checked([*head, *tail]) or ""
    return brief, bare


def _class_unit(node: ast.ClassDef, lines: list[str]) -> Unit | None:
    first, last = _extent(node, lines)
    for statement in reversed(node.body):
        source = _cut(lines, first, statement.end_lineno or last)
        if source is not None:
            summary = _summary(ast.get_docstring(node) or "")
            return Unit(kind="class", source=source, name=node.name, signature=node.name, summary=summary)
    return None


def _block_unit(node: ast.stmt, lines: list[str]) -> Unit | None:
    first, last = _extent(node, lines)
    # A block that begins in the middle of a line (an ``elif``) would not stand on its own.
    if lines[node.lineno - 1].lstrip().startswith("elif") or last == first:
        return None
    source = _cut(lines, first, last)
    return None if source is None else Unit(kind="block", source=source)


def _extent(node: ast.stmt, lines: list[str]) -> tuple[int, int]:
    """First and last line of a statement with its decorators and the comment directly above it."""
    first = min([node.lineno, *(decorator.lineno for decorator in getattr(node, "decorator_list", []))])
    while first > 1:
        above = lines[first - 2]
        indent = len(above) - len(above.lstrip())
        if not above.lstrip().startswith("# ") or indent != node.col_offset:
            break
        first -= 1
    return first, node.end_lineno or node.lineno


def _cut(lines: list[str], first: int, last: int) -> str | None:
    return _checked(lines[first - 1 : last])


def _checked(lines: list[str]) -> str | None:
    source = textwrap.dedent("\n".join(lines)).rstrip() + "\n"
    if len(source) > MAX_UNIT_CHARS or _parse(source) is None:
        return None
    return source


def _summary(docstring: str) -> str:
    lines = docstring.strip().splitlines()
    return lines[0].strip() if lines and len(lines[0]) <= 100 else ""
