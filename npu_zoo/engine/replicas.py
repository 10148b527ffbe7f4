"""Which replica of the attention a sequence belongs to, and room in that one's cache."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf

from npu_zoo.engine.block_manager import BlockManager, KVManager
from npu_zoo.engine.sequence import Sequence


class ReplicatedKV(KVManager):
    """One manager per replica. A sequence joins a replica with its first room and leaves it with its last.

    It joins the one that has most of its beginning cached, of several the one with most room, where it fits at all.
    """

    def __init__(self, managers: SequenceOf[KVManager]) -> None:
        self.managers = tuple(managers)

    def attach_prefix(self, sequence: Sequence) -> int:
        """See :class:`KVManager`; of the replica that has most of it."""
        offers = [(-self._cached(number, sequence), -m.num_free, number) for number, m in enumerate(self.managers)]
        sequence.replica = min(offers)[-1]
        return self._of(sequence).attach_prefix(sequence)

    def admit(self, sequence: Sequence, most: int) -> int | None:
        """See :class:`KVManager`."""
        willing = [number for number, manager in enumerate(self.managers) if not manager.refuses(sequence, most)]
        offers = [(-self._cached(number, sequence), -self.managers[number].num_free, number) for number in willing]
        for *_, number in sorted(offers):
            sequence.replica = number
            cached = self.managers[number].admit(sequence, most)
            if cached is not None:
                return cached
        return None

    def reserve(self, sequence: Sequence, num_tokens: int) -> bool:
        """See :class:`KVManager`."""
        return self._of(sequence).reserve(sequence, num_tokens)

    def shrink(self, sequence: Sequence, num_tokens: int) -> None:
        """See :class:`KVManager`."""
        self._of(sequence).shrink(sequence, num_tokens)

    def commit(self, sequence: Sequence, num_tokens: int, start: int | None = None) -> None:
        """See :class:`KVManager`."""
        self._of(sequence).commit(sequence, num_tokens, start)

    def settle(self) -> None:
        """See :class:`KVManager`."""
        for manager in self.managers:
            manager.settle()

    def discard_unsettled(self, sequences: Iterable[Sequence]) -> list[Sequence]:
        """See :class:`KVManager`."""
        waiting = list(sequences)
        lost = {
            sequence.number
            for number, manager in enumerate(self.managers)
            for sequence in manager.discard_unsettled([s for s in waiting if s.replica == number])
        }
        return [sequence for sequence in waiting if sequence.number in lost]

    def release(self, sequence: Sequence) -> None:
        """See :class:`KVManager`."""
        self._of(sequence).release(sequence)

    def shares_room(self, one: Sequence, other: Sequence) -> bool:
        """See :class:`KVManager`."""
        return one.replica == other.replica

    @property
    def num_free(self) -> int:
        """See :class:`KVManager`."""
        return sum(manager.num_free for manager in self.managers)

    @property
    def num_total(self) -> int:
        """See :class:`KVManager`."""
        return sum(manager.num_total for manager in self.managers)

    def check(self, sequences: Iterable[Sequence]) -> None:
        """Raise where a replica's books do not balance; see :meth:`BlockManager.check`."""
        living = list(sequences)
        for number, manager in enumerate(self.managers):
            if isinstance(manager, BlockManager):
                manager.check([sequence for sequence in living if sequence.replica == number])

    def _of(self, sequence: Sequence) -> KVManager:
        return self.managers[sequence.replica]

    def _cached(self, number: int, sequence: Sequence) -> int:
        cached = self.managers[number].attach_prefix(sequence)
        self.managers[number].release(sequence)
        return cached
