"""How a program is made of what a model wrote: a base model's completion, or an answer in a conversation."""

from __future__ import annotations

import ast
import re
import textwrap
from collections.abc import Iterator, Sequence

from npu_zoo.core.model_config import EvaluationFormat
from npu_zoo.evaluation.programs.humaneval import Problem

STOP_SEQUENCES = ("\nclass ", "\ndef ", "\n#", "\nif ", "\nprint(", "\n@", "\nassert ", "\n```")
"""What begins something behind a function's body: those of Codex (arXiv:2107.03374), and what else does."""

_FENCE = re.compile(r"^(?P<indent>[ \t]*)(?P<fence>`{3,}|~{3,})[ \t]*[\w+#.-]*[ \t]*$")
_CODE_BEGINS = re.compile(r"^(?:from\s+\S+\s+import\b|import\s|def\s|async\s+def\s|class\s|@)")
_DEFINING = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
_KEPT = (*_DEFINING, ast.Assign, ast.AnnAssign, ast.AugAssign)
_PRINTING = {"print", "pprint"}
_LEAVING = {"input", "exit", "quit", "unittest", "doctest"}


def program_of_completion(problem: Problem, completion: str) -> str:
    """The prompt and a base model's completion of it, which ends where something other than the body begins."""
    ends = [found for stop in STOP_SEQUENCES if (found := completion.find(stop)) >= 0]
    return problem.prompt + completion[: min(ends, default=len(completion))]


def program_of_answer(problem: Problem, answer: str, rules: EvaluationFormat) -> str:
    """The program that an answer holds, reasoning left out before.

    A code block that defines the function is taken, else a text that does, each with what the prompt has before the
    function: its imports and the functions that it may use. What holds neither is taken for the function's body. Of a
    program, statements at its top that use the function, test, print or wait for input are dropped.
    """
    text = answer.replace("\r\n", "\n").replace("\r", "\n")
    text = text.replace("\t", "    ") if rules.tabs else text
    blocks = list(code_blocks(text))
    defining = [block for block in blocks if _defines(block, problem.entry_point)]
    if defining:
        return _whole(problem, defining[0 if rules.code_block == "first" else -1])
    plain = _code_in(text)
    if not blocks and _defines(plain, problem.entry_point):
        return _whole(problem, plain)
    return _with_body(problem, blocks[0] if blocks else text)


def code_blocks(text: str) -> Iterator[str]:
    """The contents of fenced code blocks, without the fences' indentation; one that is not closed runs to the end."""
    lines: list[str] = []
    opened: re.Match[str] | None = None
    for line in text.split("\n"):
        found = _FENCE.match(line)
        if opened is None:
            opened, lines = found, []
        elif found and line.strip().startswith(opened["fence"]) and not line.strip().strip("`~"):
            yield _block(lines, opened["indent"])
            opened = None
        else:
            lines.append(line)
    if opened is not None:
        yield _block(lines, opened["indent"])


def _block(lines: Sequence[str], indent: str) -> str:
    return "\n".join(line.removeprefix(indent) for line in lines) + "\n"


def _defines(source: str, name: str) -> bool:
    return re.search(rf"^[ \t]*(?:async[ \t]+)?def[ \t]+{name}[ \t]*\(", source, re.MULTILINE) is not None


def _whole(problem: Problem, source: str) -> str:
    """What the prompt has before the function, and a source that defines it."""
    before = re.split(rf"^(?=def[ \t]+{problem.entry_point}[ \t]*\()", problem.prompt, maxsplit=1, flags=re.MULTILINE)
    return before[0] + _without_doings(textwrap.dedent(source), problem.entry_point)


def _without_doings(source: str, entry_point: str) -> str:
    """A source whose top-level examples, tests and dialogues are ``pass``; as it is where it does not parse."""
    tree = _parsed(source)
    if tree is None:
        return source
    users = _users(tree, entry_point)
    lines = [line.encode() for line in source.split("\n")]
    for node in reversed(tree.body):
        if _is_doing(node, users):
            first, last = node.lineno - 1, (node.end_lineno or node.lineno) - 1
            lines[first : last + 1] = [lines[first][: node.col_offset] + b"pass" + lines[last][node.end_col_offset :]]
    kept = b"\n".join(lines).decode()
    return kept if _parsed(kept) else source


def _is_doing(node: ast.stmt, users: set[str]) -> bool:
    """Whether a statement only uses the function, tests it, prints, or waits for input."""
    if isinstance(node, ast.Assert) or (isinstance(node, ast.If) and "__name__" in _names(node.test)):
        return True
    if isinstance(node, _KEPT) or any(isinstance(inner, _DEFINING) for inner in ast.walk(node)):
        return False
    return not _names(node).isdisjoint(users | _PRINTING if isinstance(node, ast.Expr) else users)


def _users(tree: ast.Module, entry_point: str) -> set[str]:
    """Names whose use makes a statement a doing: the function, what waits or leaves, and functions that use these."""
    users, before = {entry_point, *_LEAVING}, 0
    while len(users) > before:
        before = len(users)
        functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
        users |= {function.name for function in functions if not _names(function).isdisjoint(users)}
    return users


def _names(node: ast.AST) -> set[str]:
    inner = list(ast.walk(node))
    attributes = {one.attr for one in inner if isinstance(one, ast.Attribute)}
    return attributes | {one.id for one in inner if isinstance(one, ast.Name)}


def _with_body(problem: Problem, body: str) -> str:
    """The prompt with a body as it is, or indented where only that parses."""
    as_it_is = program_of_completion(problem, body if body.startswith("\n") else "\n" + body)
    indented = problem.prompt + textwrap.indent(textwrap.dedent(body).strip("\n"), "    ") + "\n"
    for program in (problem.prompt + body, as_it_is, indented):
        if _has_body(program, problem.entry_point):
            return program
    return problem.prompt + body


def _has_body(program: str, name: str) -> bool:
    """Whether a program parses and its function has more than a docstring."""
    tree = _parsed(program)
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)] if tree else []
    return any(function.name == name and len(function.body) > 1 for function in functions)


def _code_in(text: str) -> str:
    """The longest code that parses from the first line that looks like a module's; empty where there is none."""
    lines = text.split("\n")
    start = next((number for number, line in enumerate(lines) if _CODE_BEGINS.match(line)), len(lines))
    for end in range(len(lines), start, -1):
        source = "\n".join(lines[start:end]) + "\n"
        if _parsed(source):
            return source
    return ""


def _parsed(source: str) -> ast.Module | None:
    try:
        return ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
