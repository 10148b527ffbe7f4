"""Which tokens of which sequences the next step computes (continuous batching, as in Orca, OSDI '22)."""

from __future__ import annotations

import bisect
import heapq
from collections.abc import Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, replace
from operator import attrgetter

from npu_zoo.engine.block_manager import KVManager
from npu_zoo.engine.sequence import Sequence

_STALE_PLACES = 64


@dataclass(frozen=True)
class ScheduledRow:
    """One sequence's share of a step: ``num_tokens`` tokens from ``start`` on, of which ``drafts`` are the last.

    Attributes:
        drafts: guesses of what follows the sequence's last token, which the row reaches then.
    """

    sequence: Sequence
    start: int
    num_tokens: int
    drafts: tuple[int, ...] = ()

    @property
    def num_known(self) -> int:
        """Tokens of the row that are the sequence's own."""
        return self.num_tokens - len(self.drafts)

    @property
    def samples(self) -> bool:
        """Whether the row reaches the end of what is known of the sequence; right until the sequence is given more."""
        return self.start + self.num_known == self.sequence.num_tokens

    @property
    def num_sampled(self) -> int:
        """Positions whose next token is drawn: the sequence's last token and each draft."""
        return (1 + len(self.drafts)) * self.samples


class Scheduler:
    """By priority, then first come, first served, within a budget of tokens and sequences per step.

    Running sequences go first; when they run out of room, the last one by priority and arrival gives its room up and
    is recomputed later, together with what it has generated. So the first of all always gets on. A sequence that waits
    takes room from none that runs.

    Attributes:
        running: in their order.
        prefix_queries, prefix_hits: tokens of sequences that were admitted for the first time, and how many of them
            were in the cache.
        num_preemptions: how often a sequence gave its room up.
    """

    def __init__(
        self, kv: KVManager, *, max_num_seqs: int, max_num_batched_tokens: int, enable_chunked_prefill: bool
    ) -> None:
        self.running: list[Sequence] = []
        self.prefix_queries = self.prefix_hits = self.num_preemptions = 0
        self._waiting = WaitingQueue()
        self._kv = kv
        self._max_num_seqs = max_num_seqs
        self._max_num_batched_tokens = max_num_batched_tokens
        self._chunked = enable_chunked_prefill

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence."""
        self._waiting.add(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence that finished or was aborted, and free its room."""
        if sequence in self.running:
            self.running.remove(sequence)
        else:
            self._waiting.discard(sequence)
        self._kv.release(sequence)

    def has_work(self) -> bool:
        """Whether any sequence waits or runs."""
        return bool(self._waiting or self.running)

    @property
    def num_waiting(self) -> int:
        """Sequences that wait for room."""
        return len(self._waiting)

    def schedule(self, drafts: Mapping[int, SequenceOf[int]] | None = None) -> list[ScheduledRow]:
        """The next step's rows, single tokens first; their room is reserved and their full blocks are shared.

        Args:
            drafts: guesses of what follows a sequence, by its number. They are verified as far as budget and free room
                go, after all that runs or can be admitted has what it needs: nobody waits or gives room up for one.
        """
        for sequence in reversed(self._kv.discard_unsettled(self.running)):
            self.running.remove(sequence)
            self._preempt(sequence)
        rows = self._schedule_running()
        self._admit(rows)
        if drafts:
            rows = self._add_drafts(rows, drafts)
        rows.sort(key=lambda row: row.num_known > 1)
        return rows

    def keep_accepted(self, row: ScheduledRow) -> None:
        """Once a sequence was given what stands of its drafts: share the blocks they fill, free the others' room."""
        sequence = row.sequence
        self._kv.commit(sequence, sequence.num_computed_tokens, row.start)
        self._kv.settle()
        self._kv.shrink(sequence, sequence.num_computed_tokens)

    def _schedule_running(self) -> list[ScheduledRow]:
        rows: list[ScheduledRow] = []
        budget, position = self._max_num_batched_tokens, 0
        while position < len(self.running) and budget > 0:
            sequence = self.running[position]
            num_tokens = min(sequence.num_tokens - sequence.num_computed_tokens, budget)
            if self._make_room(sequence, sequence.num_computed_tokens + num_tokens):
                rows.append(self._row(sequence, num_tokens))
                budget -= num_tokens
                position += 1
        return rows

    def _add_drafts(self, rows: list[ScheduledRow], drafts: Mapping[int, SequenceOf[int]]) -> list[ScheduledRow]:
        budget = self._max_num_batched_tokens - sum(row.num_tokens for row in rows)
        drafted = []
        for row in rows:
            own = tuple(drafts.get(row.sequence.number, ()))[:budget] if row.samples else ()
            if own and self._kv.reserve(row.sequence, row.start + row.num_tokens + len(own)):
                row = replace(row, num_tokens=row.num_tokens + len(own), drafts=own)
                budget -= len(own)
            drafted.append(row)
        return drafted

    def _make_room(self, sequence: Sequence, num_tokens: int) -> bool:
        """Room for a sequence, at the cost of those that came last; False where it was itself the last."""
        while not self._kv.reserve(sequence, num_tokens):
            victim = next(other for other in reversed(self.running) if self._kv.shares_room(other, sequence))
            self.running.remove(victim)
            self._preempt(victim)
            if victim is sequence:
                return False
        return True

    def _admit(self, rows: list[ScheduledRow]) -> None:
        budget = self._max_num_batched_tokens - sum(row.num_tokens for row in rows)
        while self._waiting and len(self.running) < self._max_num_seqs and budget > 0:
            sequence = self._waiting.first()
            # Room for all of it, or a later chunk would have to throw the earlier ones away.
            cached = self._kv.admit(sequence, sequence.num_tokens if self._chunked else budget)
            if cached is None:
                return
            num_tokens = min(sequence.num_tokens - cached, budget)
            self._waiting.discard(sequence)
            bisect.insort(self.running, sequence, key=attrgetter("rank"))
            sequence.num_computed_tokens = cached
            if not sequence.preemptions:
                sequence.num_cached_tokens = cached
                self.prefix_queries += sequence.num_tokens
                self.prefix_hits += cached
            rows.append(self._row(sequence, num_tokens))
            budget -= num_tokens

    def _row(self, sequence: Sequence, num_tokens: int) -> ScheduledRow:
        self._kv.commit(sequence, sequence.num_computed_tokens + num_tokens)
        return ScheduledRow(sequence, sequence.num_computed_tokens, num_tokens)

    def _preempt(self, sequence: Sequence) -> None:
        self._kv.release(sequence)
        sequence.num_computed_tokens = 0
        sequence.preemptions += 1
        self.num_preemptions += 1
        self._waiting.add(sequence)


class WaitingQueue:
    """Sequences in their order, where adding, taking and giving up one cost the logarithm of their number."""

    def __init__(self) -> None:
        self._queued: dict[int, Sequence] = {}
        self._order: list[tuple[int, int]] = []

    def __len__(self) -> int:
        return len(self._queued)

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence at its place."""
        self._queued[sequence.number] = sequence
        heapq.heappush(self._order, sequence.rank)

    def discard(self, sequence: Sequence) -> None:
        """Forget a sequence, if it is there."""
        self._queued.pop(sequence.number, None)
        if len(self._order) > 2 * len(self._queued) + _STALE_PLACES:
            self._order = [queued.rank for queued in self._queued.values()]
            heapq.heapify(self._order)

    def first(self) -> Sequence:
        """The sequence whose turn it is; there must be one."""
        while self._order[0][1] not in self._queued:  # those that were given up leave their place behind
            heapq.heappop(self._order)
        return self._queued[self._order[0][1]]
