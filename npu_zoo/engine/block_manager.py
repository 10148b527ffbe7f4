"""Who owns which part of the KV cache.

Two managers with one interface: :class:`BlockManager` for the paged cache with prefix sharing (vLLM, arXiv:2309.06180),
:class:`SlotManager` for the contiguous one.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass

from npu_zoo.core.errors import EngineError
from npu_zoo.engine.sequence import Sequence


class KVManager(ABC):
    """Hands out room for keys and values. A sequence's room is in ``Sequence.slots``."""

    @abstractmethod
    def attach_prefix(self, sequence: Sequence) -> int:
        """Give a sequence without room whatever cached blocks its tokens begin with.

        At least one token is always left to compute, since its logits are needed.

        Returns:
            The number of tokens that need not be computed.
        """

    def admit(self, sequence: Sequence, most: int) -> int | None:
        """Give a sequence that waits room for all of it, with whatever cached blocks it begins with.

        Args:
            most: tokens that may be left to compute.

        Returns:
            The number of tokens that need not be computed; None, with nothing changed, where there is no room, or more
            would be left. To ask again costs little until something has changed.
        """
        cached = self.attach_prefix(sequence)
        if sequence.num_tokens - cached <= most and self.reserve(sequence, sequence.num_tokens):
            return cached
        self.release(sequence)
        return None

    def refuses(self, sequence: Sequence, most: int) -> bool:
        """Whether :meth:`admit` would answer None, as far as that is known without looking."""
        return False

    @abstractmethod
    def reserve(self, sequence: Sequence, num_tokens: int) -> bool:
        """Make room for the first ``num_tokens`` tokens; False, with nothing changed, where there is none."""

    @abstractmethod
    def shrink(self, sequence: Sequence, num_tokens: int) -> None:
        """Take back what a sequence holds beyond the room of its first ``num_tokens`` tokens."""

    @abstractmethod
    def commit(self, sequence: Sequence, num_tokens: int, start: int | None = None) -> None:
        """The first ``num_tokens`` tokens will be computed by the end of this step: their full blocks may be shared.

        Args:
            num_tokens: of ``Sequence.token_ids``, to which a draft belongs once it is accepted.
            start: where what was not committed before begins; by default where what is computed ends.
        """

    @abstractmethod
    def settle(self) -> None:
        """What was committed is computed now."""

    @abstractmethod
    def discard_unsettled(self, sequences: Iterable[Sequence]) -> list[Sequence]:
        """Nothing of what was committed and not settled may be shared: its step was interrupted.

        Returns:
            Those of the given sequences that had taken such a block for computed; their room must be released.
        """

    @abstractmethod
    def release(self, sequence: Sequence) -> None:
        """Take a sequence's room back."""

    def shares_room(self, one: Sequence, other: Sequence) -> bool:
        """Whether what one sequence gives up can serve another."""
        return True

    @property
    @abstractmethod
    def num_free(self) -> int:
        """Blocks or slots that could be handed out."""

    @property
    @abstractmethod
    def num_total(self) -> int:
        """All blocks or slots."""

    @property
    def usage(self) -> float:
        """The share that sequences hold, 0 to 1."""
        return 1.0 - self.num_free / self.num_total


@dataclass(frozen=True)
class _Refusal:
    """Why a sequence was not admitted, which holds until a block is freed or the awaited one is known.

    Attributes:
        number, num_tokens: of the sequence.
        missing: tokens that would have been left to compute, for which there may have been room.
        no_room: whether there was none.
        awaited: the digest of its first block that is not cached; None where all that may be shared are.
    """

    number: int
    num_tokens: int
    missing: int
    no_room: bool
    awaited: bytes | None


class BlockManager(KVManager):
    """Blocks of ``block_size`` tokens behind a block table.

    A full block is known by a digest of all tokens up to its end. A block that nobody refers to keeps its content and
    digest until it is handed out again, the one unused for the longest time first.

    Args:
        num_blocks, block_size: of the cache.
        enable_prefix_caching: whether blocks of equal beginnings are shared.
        share_within_step: whether a block may be shared in the step that computes it: right where all of the step's
            keys and values of a layer are written before any is read, which a pipeline's micro-batches do not.
    """

    def __init__(
        self, num_blocks: int, block_size: int, *, enable_prefix_caching: bool, share_within_step: bool = True
    ) -> None:
        self.block_size = block_size
        self._share_within_step = share_within_step
        self._committed: list[tuple[int, bytes]] = []
        self._caching = enable_prefix_caching
        self._references = [0] * num_blocks
        self._digest_of: list[bytes | None] = [None] * num_blocks
        self._block_of: dict[bytes, int] = {}
        self._unsettled: list[int] = []
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))
        self._refusal: _Refusal | None = None

    @property
    def num_free(self) -> int:
        """See :class:`KVManager`."""
        return len(self._free)

    @property
    def num_total(self) -> int:
        """See :class:`KVManager`."""
        return len(self._references)

    def attach_prefix(self, sequence: Sequence) -> int:
        """See :class:`KVManager`."""
        if not self._caching:
            return 0
        for index in range(sequence.num_shareable_tokens // self.block_size):
            block = self._block_of.get(self._digest(sequence, index))
            if block is None:
                break
            self._acquire(block)
            sequence.slots.append(block)
        return len(sequence.slots) * self.block_size

    def refuses(self, sequence: Sequence, most: int) -> bool:
        """Whether :meth:`admit` has found the same sequence without room, and nothing has changed since."""
        refusal = self._refusal
        if refusal is None or (refusal.number, refusal.num_tokens) != (sequence.number, sequence.num_tokens):
            return False
        return refusal.no_room or refusal.missing > most

    def admit(self, sequence: Sequence, most: int) -> int | None:
        """See :class:`KVManager`; a refusal is remembered, so that nobody waits at the cost of every step."""
        if self.refuses(sequence, most):
            return None
        cached = self.attach_prefix(sequence)
        missing = sequence.num_tokens - cached
        fits = missing <= most
        if fits and self.reserve(sequence, sequence.num_tokens):
            return cached
        index = cached // self.block_size
        awaited = sequence.digests[index] if index < len(sequence.digests) else None
        self.release(sequence)
        self._refusal = _Refusal(sequence.number, sequence.num_tokens, missing, fits, awaited)
        return None

    def reserve(self, sequence: Sequence, num_tokens: int) -> bool:
        """See :class:`KVManager`."""
        missing = -(-num_tokens // self.block_size) - len(sequence.slots)
        if missing > len(self._free):
            return False
        for _ in range(missing):
            block, _ = self._free.popitem(last=False)
            self._forget(block)
            self._references[block] = 1
            sequence.slots.append(block)
        return True

    def shrink(self, sequence: Sequence, num_tokens: int) -> None:
        """See :class:`KVManager`."""
        while len(sequence.slots) > -(-num_tokens // self.block_size):
            self._release_last(sequence)

    def commit(self, sequence: Sequence, num_tokens: int, start: int | None = None) -> None:
        """See :class:`KVManager`."""
        if not self._caching:
            return
        first = sequence.num_computed_tokens if start is None else start
        for index in range(first // self.block_size, num_tokens // self.block_size):
            block, digest = sequence.slots[index], self._digest(sequence, index)
            if not self._share_within_step:
                self._committed.append((block, digest))
            elif self._learn(block, digest):
                self._unsettled.append(block)

    def settle(self) -> None:
        """See :class:`KVManager`."""
        for block, digest in self._committed:
            self._learn(block, digest)
        self._committed.clear()
        self._unsettled.clear()

    def discard_unsettled(self, sequences: Iterable[Sequence]) -> list[Sequence]:
        """See :class:`KVManager`."""
        self._committed.clear()
        if not self._unsettled:
            return []
        lost = set(self._unsettled)
        for block in lost:
            self._forget(block)
        self._unsettled.clear()
        return [s for s in sequences if not lost.isdisjoint(s.slots[: s.num_computed_tokens // self.block_size])]

    def release(self, sequence: Sequence) -> None:
        """See :class:`KVManager`. The tail is freed first, so that common beginnings live longest."""
        # One by one, so that an interrupt in the middle and a second call free nothing twice.
        while sequence.slots:
            self._release_last(sequence)

    def _release_last(self, sequence: Sequence) -> None:
        block = sequence.slots.pop()
        self._references[block] -= 1
        if self._references[block] == 0:
            self._refusal = None
            self._free[block] = None
            if self._digest_of[block] is None:
                self._free.move_to_end(block, last=False)

    def _learn(self, block: int, digest: bytes) -> bool:
        """Know a block by its digest; False where it has one, or another block has this."""
        if self._digest_of[block] is not None or digest in self._block_of:
            return False
        self._digest_of[block] = digest
        self._block_of[digest] = block
        if self._refusal is not None and self._refusal.awaited == digest:
            self._refusal = None
        return True

    def _acquire(self, block: int) -> None:
        if self._references[block] == 0:
            del self._free[block]
        self._references[block] += 1

    def _forget(self, block: int) -> None:
        digest = self._digest_of[block]
        if digest is not None:
            del self._block_of[digest]
            self._digest_of[block] = None

    def _digest(self, sequence: Sequence, index: int) -> bytes:
        digests, size = sequence.digests, self.block_size
        while len(digests) <= index:
            start = len(digests) * size
            tokens = array("q", sequence.token_ids[start : start + size]).tobytes()
            parent = digests[-1] if digests else b""
            digests.append(hashlib.blake2b(parent + tokens, digest_size=16).digest())
        return digests[index]

    def check(self, sequences: Iterable[Sequence]) -> None:
        """Raise where the books do not balance; for tests and debugging.

        Args:
            sequences: all that hold room.

        Raises:
            EngineError: a block's references are not the sequences that hold it, or a free block is referred to.
        """
        held = Counter(block for sequence in sequences for block in sequence.slots)
        for block, references in enumerate(self._references):
            if references != held[block] or (references == 0) != (block in self._free):
                raise EngineError(
                    f"block {block} has {references} references, {held[block]} holders, free={block in self._free}"
                )
        known = {block: digest for block, digest in enumerate(self._digest_of) if digest is not None}
        if known != {block: digest for digest, block in self._block_of.items()}:
            raise EngineError("a block is known by a digest that is not its own")


class SlotManager(KVManager):
    """One contiguous stretch per sequence, of the longest sequence's length."""

    def __init__(self, num_slots: int, slot_size: int) -> None:
        self._slot_size = slot_size
        self._total = num_slots
        self._free = list(range(num_slots))[::-1]

    @property
    def num_free(self) -> int:
        """See :class:`KVManager`."""
        return len(self._free)

    @property
    def num_total(self) -> int:
        """See :class:`KVManager`."""
        return self._total

    def attach_prefix(self, sequence: Sequence) -> int:
        """Nothing is shared."""
        return 0

    def reserve(self, sequence: Sequence, num_tokens: int) -> bool:
        """See :class:`KVManager`."""
        if num_tokens > self._slot_size:
            raise EngineError(f"a sequence of {num_tokens} tokens exceeds its slot of {self._slot_size}")
        if not sequence.slots:
            if not self._free:
                return False
            sequence.slots.append(self._free.pop())
        return True

    def shrink(self, sequence: Sequence, num_tokens: int) -> None:
        """A sequence has one slot, however long it is."""

    def commit(self, sequence: Sequence, num_tokens: int, start: int | None = None) -> None:
        """Nothing is shared."""

    def settle(self) -> None:
        """Nothing is shared."""

    def discard_unsettled(self, sequences: Iterable[Sequence]) -> list[Sequence]:
        """Nothing is shared."""
        return []

    def release(self, sequence: Sequence) -> None:
        """See :class:`KVManager`."""
        while sequence.slots:
            self._free.append(sequence.slots.pop())
