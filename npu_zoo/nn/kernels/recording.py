"""What a computation did, written down so that it can be done again on the same memory without going through Python.

Between two kernels of a decode step Python runs from memory that the weights have pushed out of the processor's caches,
which takes longer than some of the kernels. What a step of a batch size does is always the same, so it is written down
once: calls of the compiled library, which are replayed by one call of it, and torch's operators, which are called
again.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import struct
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from npu_zoo.nn.kernels.compiled.binding import ADDRESS, FLOAT, SIZE, Function, load_library

_replay = Function("zoo_replay", ADDRESS, SIZE)
_ALLOCATIONS = {"empty", "new_empty", "empty_strided", "new_empty_strided", "empty_like"}
_BY_VALUE = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)


class NotReplayableError(RuntimeError):
    """What was to be recorded depends on the values of tensors."""


class Recording:
    """A computation that can be replayed: it reads the tensors that it read, and writes those that it wrote.

    All memory that it took is kept for it.
    """

    def __init__(self) -> None:
        self._steps: list[Callable[[], Any]] = []
        self._held: list[Any] = []
        self._pending: list[tuple[int, int]] = []

    def replay(self) -> None:
        """Do it again."""
        for step in self._steps:
            step()

    @property
    def num_steps(self) -> int:
        """What Python has to call for one replay."""
        return len(self._steps)

    def hold(self, kept: Any) -> None:
        """Keep something alive for as long as this is."""
        self._held.append(kept)

    def add_call(self, function: Function, values: tuple[int | float | None, ...]) -> None:
        """Write down a call of the compiled library.

        Raises:
            NotReplayableError: the function cannot be called from words.
        """
        try:
            from_words = getattr(load_library(), f"{function.name}_from")
        except AttributeError:
            raise NotReplayableError(f"{function.name} has no form that can be replayed") from None
        words = np.array([_word(*pair) for pair in zip(function.arguments, values, strict=True)], dtype=np.int64)
        self._held.append(words)
        self._pending.append((ctypes.cast(from_words, ctypes.c_void_p).value or 0, words.ctypes.data))

    def add_step(self, step: Callable[[], Any]) -> None:
        """Write down something that Python has to call."""
        self.flush()
        self._steps.append(step)

    def flush(self) -> None:
        """Make one step of the calls since the last."""
        if self._pending:
            program = np.array(self._pending, dtype=np.int64)
            self._held.append(program)
            self._steps.append(functools.partial(_replay, program.ctypes.data, len(program)))
            self._pending = []


_active: list[Recording] = []


@contextlib.contextmanager
def record() -> Iterator[Recording]:
    """Write down what is computed in the block, which is computed as well.

    Raises:
        NotReplayableError: it depends on the values of tensors.
    """
    recording = Recording()
    _active.append(recording)
    Function.listener = recording.add_call
    try:
        with _Operators(recording):
            yield recording
    finally:
        Function.listener = None
        _active.remove(recording)
    recording.flush()


def depends_on_values() -> None:
    """Called by code that does one thing or another by the values of tensors, which no recording can hold.

    Raises:
        NotReplayableError: something is recorded now.
    """
    if _active:
        raise NotReplayableError("what is computed depends on the values of tensors")


class _Operators(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Writes torch's operators down."""

    def __init__(self, recording: Recording) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._recording = recording

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else the first operator imports torch's compiler, and a first text waits most of a second for it

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if any(tag in func.tags for tag in _BY_VALUE):
            raise NotReplayableError(f"{func} depends on the values of tensors")
        kwargs = kwargs or {}
        found = func(*args, **kwargs)
        self._recording.hold((args, kwargs, found))
        schema = func._schema
        if schema.is_mutable:
            self._recording.add_step(functools.partial(func, *args, **kwargs))
        elif func.overloadpacket.__name__ not in _ALLOCATIONS and not _is_view(found, args):
            self._recording.add_step(functools.partial(_compute_into, found, func, args, kwargs))
        return found


def _is_view(found: Any, args: tuple[Any, ...]) -> bool:
    """Whether a result lies in its operands' memory, as a reshape's may or may not."""
    memory = {x.untyped_storage().data_ptr() for x in _tensors(args)}
    return all(x.untyped_storage().data_ptr() in memory for x in _tensors((found,)))


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            if not value.is_mkldnn:  # whose memory nobody sees
                yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


def _compute_into(targets: Any, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    found = func(*args, **kwargs)
    pairs = [(targets, found)] if isinstance(targets, Tensor) else zip(targets, found, strict=True)
    for target, value in pairs:
        target.copy_(value)


def _word(kind: type, value: int | float | None) -> int:
    if kind is FLOAT:
        return int.from_bytes(struct.pack("<f", value or 0.0), "little")
    return int(value or 0)
