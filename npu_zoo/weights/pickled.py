"""Reads pickles as data: what they would call is recorded and never imported or called.

The opcodes are those that plain containers, strings and numbers need; see Python's ``pickletools`` for their meaning.
"""

from __future__ import annotations

import io
import pickletools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Global:
    """A name that a pickle asks for."""

    module: str
    name: str


@dataclass(frozen=True)
class PersistentId:
    """What a pickle says of an object outside it."""

    value: Any


@dataclass(frozen=True)
class Call:
    """What a pickle would call, and with what."""

    function: Global
    arguments: tuple[Any, ...]


class Interpreter:
    """Runs one pickle.

    Args:
        check: is given every name that the pickle asks for, and raises for those that are not taken.
        call: what stands for a call's result.
    """

    def __init__(self, check: Callable[[Global], None], call: Callable[[Call], Any]) -> None:
        self._check = check
        self._call = call
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}

    def run(self, raw: bytes) -> Any:
        """What the pickle holds.

        Raises:
            ValueError: the pickle is damaged, or does what no pickle of plain data does.
        """
        stream = io.BytesIO(raw)
        while code := stream.read(1):
            opcode = _OPCODES.get(code)
            if opcode is None:
                raise ValueError(f"opcode {code!r} at byte {stream.tell() - 1} has no place in it")
            if opcode.name == "STOP":
                return self._pop()
            if opcode.name == "GLOBAL":  # pickletools would take backslashes in it for escapes
                self._name(_line(stream), _line(stream))
            else:
                _OPERATIONS[opcode.name](self, opcode.arg.reader(stream) if opcode.arg else None)
        raise ValueError("it does not end")

    def _pop(self) -> Any:
        if len(self._stack) <= (self._marks[-1] if self._marks else 0):
            raise ValueError("it takes more from its stack than is there")
        return self._stack.pop()

    def _pop_to_mark(self) -> list[Any]:
        if not self._marks:
            raise ValueError("it looks for a mark that is not there")
        start = self._marks.pop()
        items = self._stack[start:]
        del self._stack[start:]
        return items

    def _top(self) -> Any:
        value = self._pop()
        self._stack.append(value)
        return value

    def _literal(self, value: Any) -> None:
        if isinstance(value, int) and not -(2**63) <= value < 2**64:
            raise ValueError("a number in it has more than 64 bits")
        self._stack.append(value)

    def _mark(self, _: Any) -> None:
        self._marks.append(len(self._stack))

    def _tuple_of(self, count: int) -> None:
        self._stack.append(tuple([self._pop() for _ in range(count)][::-1]))

    def _tuple(self, _: Any) -> None:
        self._stack.append(tuple(self._pop_to_mark()))

    def _put(self, index: Any) -> None:
        self._memo[len(self._memo) if index is None else index] = self._top()

    def _get(self, index: Any) -> None:
        if index not in self._memo:
            raise ValueError(f"it recalls object {index}, which it never kept")
        self._stack.append(self._memo[index])

    def _append(self, items: list[Any]) -> None:
        target = self._top()
        if not isinstance(target, list):
            raise ValueError(f"it appends to a {type(target).__name__}")
        target += items

    def _set_items(self, items: list[Any]) -> None:
        target = self._top()
        if not isinstance(target, dict) or len(items) % 2:
            raise ValueError(f"it sets items of a {type(target).__name__}")
        for key, value in zip(items[::2], items[1::2], strict=True):
            set_item(target, key, value)

    def _set_item(self, _: Any) -> None:
        value, key = self._pop(), self._pop()
        self._set_items([key, value])

    def _stack_global(self, _: Any) -> None:
        name, module = self._pop(), self._pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise ValueError("it asks for a name that is no string")
        self._name(module, name)

    def _name(self, module: str, name: str) -> None:
        found = Global(module, name)
        self._check(found)
        self._stack.append(found)

    def _reduce(self, _: Any) -> None:
        arguments, function = self._pop(), self._pop()
        if not isinstance(function, Global) or not isinstance(arguments, tuple):
            raise ValueError(f"it calls a {type(function).__name__} with a {type(arguments).__name__}")
        self._stack.append(self._call(Call(function, arguments)))

    def _build(self, _: Any) -> None:
        state = self._pop()
        if not isinstance(self._top(), dict) or not isinstance(state, dict):  # the attributes of a dict are dropped
            raise ValueError(f"it gives a {type(self._top()).__name__} a state")

    def _persistent(self, _: Any) -> None:
        self._stack.append(PersistentId(self._pop()))


def _line(stream: io.BytesIO) -> str:
    line = stream.readline()
    if not line.endswith(b"\n"):
        raise ValueError("a name in it does not end")
    return line[:-1].decode("utf-8")


def set_item(target: dict[Any, Any], key: Any, value: Any) -> None:
    """Set an item as a pickle may: strings and integers are keys, each once.

    Raises:
        ValueError: any other key. Hashing nested tuples, for one, has no limit to its depth.
    """
    if type(key) not in (str, int):
        raise ValueError(f"a dict in it has a {type(key).__name__} for a key")
    if key in target:
        raise ValueError(f"a dict in it has the key {str(key)[:80]!r} twice")
    target[key] = value


_OPERATIONS: dict[str, Callable[[Interpreter, Any], None]] = {
    "PROTO": lambda self, _: None,
    "FRAME": lambda self, _: None,
    "BININT": Interpreter._literal,
    "BININT1": Interpreter._literal,
    "BININT2": Interpreter._literal,
    "LONG1": Interpreter._literal,
    "BINFLOAT": Interpreter._literal,
    "BINUNICODE": Interpreter._literal,
    "SHORT_BINUNICODE": Interpreter._literal,
    "BINUNICODE8": Interpreter._literal,
    "NONE": lambda self, _: self._stack.append(None),
    "NEWTRUE": lambda self, _: self._stack.append(True),
    "NEWFALSE": lambda self, _: self._stack.append(False),
    "EMPTY_TUPLE": lambda self, _: self._stack.append(()),
    "EMPTY_LIST": lambda self, _: self._stack.append([]),
    "EMPTY_DICT": lambda self, _: self._stack.append({}),
    "TUPLE1": lambda self, _: self._tuple_of(1),
    "TUPLE2": lambda self, _: self._tuple_of(2),
    "TUPLE3": lambda self, _: self._tuple_of(3),
    "APPEND": lambda self, _: self._append([self._pop()]),
    "APPENDS": lambda self, _: self._append(self._pop_to_mark()),
    "SETITEMS": lambda self, _: self._set_items(self._pop_to_mark()),
    "MARK": Interpreter._mark,
    "TUPLE": Interpreter._tuple,
    "SETITEM": Interpreter._set_item,
    "BINPUT": Interpreter._put,
    "LONG_BINPUT": Interpreter._put,
    "MEMOIZE": Interpreter._put,
    "BINGET": Interpreter._get,
    "LONG_BINGET": Interpreter._get,
    "STACK_GLOBAL": Interpreter._stack_global,
    "REDUCE": Interpreter._reduce,
    "BUILD": Interpreter._build,
    "BINPERSID": Interpreter._persistent,
}
_OPCODES = {op.code.encode("latin-1"): op for op in pickletools.opcodes if op.name in {*_OPERATIONS, "GLOBAL", "STOP"}}
