"""The scheduler and the block manager together, against a cache that remembers what was written where."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from npu_zoo.core.engine import CompletionOutput
from npu_zoo.core.sampling import SamplingParams
from npu_zoo.engine.block_manager import BlockManager, KVManager, SlotManager
from npu_zoo.engine.replicas import ReplicatedKV
from npu_zoo.engine.scheduler import ScheduledRow, Scheduler
from npu_zoo.engine.sequence import Sequence

MAX_MODEL_LEN = 24


class Simulation:
    """Runs the scheduler with a cache whose every position holds the tokens that it was computed from.

    Keys and values depend on all tokens before them, so a read is right only where the whole beginning is the reader's.
    """

    def __init__(self, kv: KVManager, slot_size: int, budget: int, max_num_seqs: int, chunked: bool = True) -> None:
        self.kv, self.slot_size = kv, slot_size
        self.budget, self.max_num_seqs, self.chunked = budget, max_num_seqs, chunked
        self.scheduler = Scheduler(
            kv, max_num_seqs=max_num_seqs, max_num_batched_tokens=budget, enable_chunked_prefill=chunked
        )
        self.cache: dict[tuple[int, int], tuple[int, ...]] = {}
        self.share_within_step = True
        self.live: list[Sequence] = []
        self.finished: list[Sequence] = []

    def add(self, prompt: list[int], max_tokens: int, priority: int = 0) -> Sequence:
        max_tokens = min(max_tokens, MAX_MODEL_LEN - len(prompt))
        output = CompletionOutput(0)
        sequence = Sequence(0, list(prompt), len(prompt), SamplingParams(), max_tokens, 0, output, priority=priority)
        self.live.append(sequence)
        self.scheduler.add(sequence)
        return sequence

    def abort(self, sequence: Sequence) -> None:
        self.live.remove(sequence)
        self.scheduler.remove(sequence)

    def interrupted_step(self, right: int = 0, wrong: int = 0) -> None:
        """A step that ends with nonsense in the cache where it would have written."""
        for row in self.scheduler.schedule(self.drafts(right, wrong)):
            for position in range(row.start, row.start + row.num_tokens):
                self.cache[self.place(row.sequence, position)] = ()

    def step(self, right: int = 0, wrong: int = 0) -> list[ScheduledRow]:
        """A step, with so many right drafts of every sequence that can have some, and wrong ones behind them."""
        drafts = self.drafts(right, wrong)
        rows = self.scheduler.schedule(drafts)
        self.check_rows(rows)
        for row in rows:
            assert list(row.drafts) == drafts.get(row.sequence.number, [])[: len(row.drafts)]
        if not self.share_within_step:
            for row in rows:
                self.check_reads(row, row.start)
        for row in rows:
            for position in range(row.start, row.start + row.num_tokens):
                self.cache[self.place(row.sequence, position)] = self.tokens(row)[: position + 1]
        for row in rows:
            self.check_reads(row, row.start + row.num_tokens)
        self.kv.settle()
        sampling = [row for row in rows if row.samples]
        for row in rows:
            row.sequence.num_computed_tokens += row.num_known - row.samples
        for row in sampling:
            self.accept(row)
        return rows

    def accept(self, row: ScheduledRow) -> None:
        """Give a sequence its next token, and as many more as its drafts are right."""
        sequence = row.sequence
        drafts = iter(row.drafts)
        while True:
            token = follower(sequence.token_ids)
            sequence.token_ids.append(token)
            sequence.num_computed_tokens = sequence.num_tokens - 1
            if sequence.num_output_tokens >= sequence.max_tokens or next(drafts, None) != token:
                break
        if row.drafts:
            self.scheduler.keep_accepted(row)
            assert len(sequence.slots) == -(-sequence.num_computed_tokens // self.slot_size)
        if sequence.num_output_tokens >= sequence.max_tokens:
            self.abort(sequence)
            self.finished.append(sequence)

    def drafts(self, right: int, wrong: int) -> dict[int, list[int]]:
        """As an engine asks for them: of what decodes, never more than can still be of use."""
        found = {}
        for sequence in self.scheduler.running:
            room = sequence.max_tokens - sequence.num_output_tokens - 1
            if sequence.num_tokens - sequence.num_computed_tokens == 1 and room > 0:
                guessed = list(sequence.token_ids)
                for place in range(min(right + wrong, room)):
                    guessed.append((follower(guessed) + (place >= right)) % 3)
                found[sequence.number] = guessed[sequence.num_tokens :]
        return found

    def tokens(self, row: ScheduledRow) -> tuple[int, ...]:
        return (*row.sequence.token_ids, *row.drafts)

    def check_rows(self, rows: list[ScheduledRow]) -> None:
        assert rows or not self.live
        assert sum(row.num_tokens for row in rows) <= self.budget
        assert len(self.scheduler.running) <= self.max_num_seqs
        assert len({row.sequence.number for row in rows}) == len(rows)
        for row in rows:
            assert row.num_tokens > 0
            assert row.start == row.sequence.num_computed_tokens
            assert self.chunked or row.samples
            assert len(row.sequence.slots) * self.slot_size >= row.start + row.num_tokens

    def check_reads(self, row: ScheduledRow, end: int) -> None:
        for position in range(end):
            found = self.cache[self.place(row.sequence, position)]
            assert found == self.tokens(row)[: position + 1]

    def check_sharing(self) -> None:
        """Several sequences hold one block only where it is full for each, and at the same place."""
        for replica in {sequence.replica for sequence in self.live}:
            self.check_sharing_among([sequence for sequence in self.live if sequence.replica == replica])

    def check_sharing_among(self, live: list[Sequence]) -> None:
        places: dict[int, int] = {}
        shared: set[int] = set()
        for sequence in live:
            for index, block in enumerate(sequence.slots):
                assert places.setdefault(block, index) == index
                if block in shared or sum(block in other.slots for other in live) > 1:
                    shared.add(block)
                    assert (index + 1) * self.slot_size <= sequence.num_tokens
                    assert sequence.num_computed_tokens >= (index + 1) * self.slot_size

    def place(self, sequence: Sequence, position: int) -> tuple[int, int]:
        block = sequence.slots[position // self.slot_size]
        return sequence.replica * 1000 + block, position % self.slot_size


def follower(token_ids: list[int]) -> int:
    """The token that follows: equal beginnings go on equally, so that generated blocks are shared as well."""
    return sum(token_ids) % 3


def simulation(**changes: Any) -> Simulation:
    options: dict[str, Any] = {
        "num_blocks": 12, "block_size": 2, "caching": True, "budget": 24, "max_num_seqs": 4, "chunked": True,
        "replicas": 1, "share_within_step": True,
    } | changes  # fmt: skip
    managers = [
        BlockManager(
            options["num_blocks"], options["block_size"], enable_prefix_caching=options["caching"],
            share_within_step=options["share_within_step"],
        )
        for _ in range(options["replicas"])
    ]  # fmt: skip
    kv = managers[0] if len(managers) == 1 else ReplicatedKV(managers)
    run = Simulation(kv, options["block_size"], options["budget"], options["max_num_seqs"], options["chunked"])
    run.share_within_step = options["share_within_step"]
    return run


PROMPTS = st.lists(st.integers(0, 2), min_size=1, max_size=20)
"""Of few tokens, so that beginnings are often equal."""


class Machine(RuleBasedStateMachine):
    """Requests come, go, and are interrupted, in any order, in a cache with room for little more than one."""

    @initialize(
        block_size=st.integers(1, 5),
        spare=st.integers(0, 12),
        caching=st.booleans(),
        chunked=st.booleans(),
        budget=st.integers(1, 30),
        max_num_seqs=st.integers(1, 5),
        replicas=st.integers(1, 3),
        share_within_step=st.booleans(),
    )
    def begin(self, block_size: int, spare: int, budget: int, chunked: bool, **more: Any) -> None:
        budget = budget if chunked else budget + MAX_MODEL_LEN
        num_blocks = -(-MAX_MODEL_LEN // block_size) + spare
        self.run = simulation(num_blocks=num_blocks, block_size=block_size, budget=budget, chunked=chunked, **more)

    @rule(prompt=PROMPTS, max_tokens=st.integers(1, 8))
    def add(self, prompt: list[int], max_tokens: int) -> None:
        self.run.add(prompt, max_tokens)

    @rule(right=st.integers(0, 4), wrong=st.integers(0, 2))
    def step(self, right: int, wrong: int) -> None:
        self.run.step(right, wrong)
        self.run.check_sharing()

    @rule(right=st.integers(0, 2), wrong=st.integers(0, 2))
    def interrupted_step(self, right: int, wrong: int) -> None:
        self.run.interrupted_step(right, wrong)

    @precondition(lambda self: self.run.live)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        self.run.abort(data.draw(st.sampled_from(self.run.live)))

    @invariant()
    def books_balance(self) -> None:
        if hasattr(self, "run"):
            self.run.kv.check(self.run.live)  # type: ignore[attr-defined]

    def teardown(self) -> None:
        if not hasattr(self, "run"):
            return
        bound = 100 + 50 * len(self.run.live)
        while self.run.live and bound:
            self.run.step()
            bound -= 1
        assert self.run.live == []
        assert self.run.kv.num_free == self.run.kv.num_total


TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=60, stateful_step_count=40)


def requests() -> st.SearchStrategy[list[tuple[list[int], int]]]:
    return st.lists(st.tuples(PROMPTS, st.integers(1, 8)), min_size=1, max_size=12)


def drain(run: Simulation) -> Iterator[list[ScheduledRow]]:
    for _ in range(2000):
        if not run.live:
            return
        yield run.step()
    raise AssertionError(f"{len(run.live)} sequences do not finish")


@given(arriving=requests(), chunked=st.booleans(), budget=st.integers(1, 30))
def test_the_first_that_came_gets_on_in_every_step(
    arriving: list[tuple[list[int], int]], chunked: bool, budget: int
) -> None:
    run = simulation(chunked=chunked, budget=budget if chunked else budget + MAX_MODEL_LEN)
    for prompt, max_tokens in arriving:
        run.add(prompt, max_tokens)
    for _ in range(2000):
        if not run.live:
            break
        first, preemptions = run.live[0], run.live[0].preemptions
        assert first in [row.sequence for row in run.step()]
        assert first.preemptions == preemptions
    assert len(run.finished) == len(arriving)


@given(arriving=requests())
def test_room_for_all_means_no_preemption(arriving: list[tuple[list[int], int]]) -> None:
    run = simulation(num_blocks=4 * MAX_MODEL_LEN // 2, max_num_seqs=4)
    for prompt, max_tokens in arriving:
        run.add(prompt, max_tokens)
    for _ in drain(run):
        assert all(sequence.preemptions == 0 for sequence in run.live)


@given(arriving=requests(), num_slots=st.integers(1, 4))
def test_slots_are_handed_out_and_come_back(arriving: list[tuple[list[int], int]], num_slots: int) -> None:
    run = Simulation(SlotManager(num_slots, MAX_MODEL_LEN), MAX_MODEL_LEN, budget=7, max_num_seqs=8)
    for prompt, max_tokens in arriving:
        run.add(prompt, max_tokens)
    for _ in drain(run):
        held = [slot for sequence in run.live for slot in sequence.slots]
        assert len(set(held)) == len(held) == num_slots - run.kv.num_free
        assert all(sequence.preemptions == 0 for sequence in run.live)
    assert run.kv.num_free == num_slots


def test_a_long_prompt_is_split_and_single_tokens_go_first() -> None:
    run = simulation(budget=6)
    run.add([1, 2], 5)
    run.step()
    run.add([0] * 16, 2)
    shares = [[(row.start, row.num_tokens) for row in run.step()] for _ in range(3)]
    assert shares == [[(2, 1), (0, 5)], [(3, 1), (5, 5)], [(4, 1), (10, 5)]]


def test_single_tokens_go_first_among_new_ones_too() -> None:
    run = simulation()
    for prompt in ([1, 2, 0], [2], [1, 1], [0]):
        run.add(prompt, 3)
    assert [row.num_tokens for row in run.step()] == [1, 1, 3, 2]


def test_the_last_that_came_gives_way() -> None:
    run = simulation(num_blocks=12, caching=False, budget=24)
    first, last = run.add([1] * 10, 12), run.add([2] * 10, 12)
    for _ in drain(run):
        assert first.preemptions == 0
    assert last.preemptions > 0
    assert [s.num_output_tokens for s in run.finished] == [12, 12]


def test_what_waits_behind_a_request_without_room_does_not_overtake_it() -> None:
    run = simulation(caching=False)
    run.add([1] * 16, 4)
    large, small = run.add([2] * 16, 1), run.add([0], 1)
    rows = run.step()
    assert [row.sequence for row in rows] == [run.live[0]]
    for _ in drain(run):
        if small in run.finished:
            assert large in run.finished


def test_no_chunk_is_computed_before_there_is_room_for_the_whole_prompt() -> None:
    run = simulation(caching=False, budget=4)
    run.add([1] * 12, 8)
    long = run.add([2] * 16, 1)
    for rows in drain(run):
        assert long.preemptions == 0
        assert all(row.num_tokens <= 4 for row in rows)
    assert run.finished[-1] is long


def test_who_shares_blocks_of_an_interrupted_step_computes_them_anew() -> None:
    run = simulation(num_blocks=24)
    writer, reader = run.add([1] * 9, 4), run.add([1] * 9, 4)
    run.interrupted_step()
    assert set(reader.slots) & set(writer.slots)
    run.abort(writer)
    for _ in drain(run):
        pass
    assert reader in run.finished


def test_nothing_of_an_interrupted_step_is_shared_later() -> None:
    run = simulation(num_blocks=24)
    run.add([1] * 9, 4)
    run.interrupted_step()
    run.abort(run.live[0])
    later = run.add([1] * 9, 4)
    rows = run.step()
    assert [(row.sequence, row.start) for row in rows] == [(later, 0)]


@pytest.mark.parametrize("caching", [True, False])
def test_blocks_are_shared_only_where_that_is_asked_for(caching: bool) -> None:
    run = simulation(caching=caching, num_blocks=24)
    first, second = run.add([1] * 9, 4), run.add([1] * 9, 4)
    run.step()
    assert len(set(first.slots) & set(second.slots)) == (4 if caching else 0)


def test_sequences_spread_over_replicas_and_follow_their_beginnings() -> None:
    run = simulation(replicas=2, num_blocks=20)
    first, second = run.add([0, 1, 2, 0, 1], 2), run.add([2, 2, 2, 2, 2], 2)
    run.step()
    assert {first.replica, second.replica} == {0, 1}
    third = run.add([0, 1, 2, 0, 2], 2)
    run.step()
    assert third.replica == first.replica
    assert third.num_cached_tokens == 4


def test_a_full_replica_keeps_nobody_from_another() -> None:
    run = simulation(replicas=2, num_blocks=12)
    large = [run.add([first, 1] * 9, 6) for first in (0, 2)]
    run.step()
    assert {sequence.replica for sequence in large} == {0, 1}
    for _ in drain(run):
        pass
    assert [sequence.preemptions for sequence in large] == [0, 0]


@given(arriving=requests(), data=st.data())
def test_priorities_say_who_is_admitted_and_who_gives_way(
    arriving: list[tuple[list[int], int]], data: st.DataObject
) -> None:
    run = simulation(num_blocks=MAX_MODEL_LEN // 2)
    for prompt, max_tokens in arriving:
        run.add(prompt, max_tokens, data.draw(st.integers(-1, 1)))
        if data.draw(st.booleans()):
            run.step()
    while run.live:
        before, preemptions = list(run.scheduler.running), {s.number: s.preemptions for s in run.live}
        run.step()
        running = run.scheduler.running
        assert running == sorted(running, key=lambda s: (s.priority, s.number))
        waiting = [s for s in run.live if s not in running]
        admitted = [s for s in running if s not in before]
        gave_way = [s for s in waiting if s.preemptions > preemptions[s.number]]
        assert all(a.rank < w.rank for a in admitted for w in waiting)
        assert all(r.rank < p.rank for r in running for p in gave_way)
        assert run.scheduler.num_waiting == len(waiting)
    assert run.scheduler.num_preemptions == sum(s.preemptions for s in run.finished)


def test_waiting_sequences_that_are_given_up_leave_the_others_in_order() -> None:
    run = simulation(max_num_seqs=1)
    first, *others = [run.add([1, 2], 2, priority) for priority in (0, 2, 1, 2, 1)]
    run.step()
    assert run.scheduler.running == [first]
    run.abort(others[1])
    for _ in drain(run):
        assert run.scheduler.num_waiting == len(run.live) - len(run.scheduler.running)
    assert [s.number for s in run.finished] == [s.number for s in (first, others[3], others[0], others[2])]


def test_right_drafts_save_steps_and_wrong_ones_are_computed_anew() -> None:
    run = simulation(num_blocks=30)
    sequence = run.add([1, 2, 0], 10)
    run.step()
    run.step(right=3)
    assert sequence.num_output_tokens == 5
    run.step(right=1, wrong=2)
    assert sequence.num_output_tokens == 7
    (row,) = run.step()
    assert (row.start, row.num_tokens) == (sequence.num_prompt_tokens + 6, 1)


def test_accepted_blocks_are_shared_and_rejected_ones_are_not() -> None:
    run = simulation(num_blocks=30, block_size=4)
    sequence = run.add([1, 2], 9)
    run.step()
    run.step(right=3)  # computes positions 2 to 5, of which the sequence's own is the first alone
    assert sequence.num_computed_tokens == 6
    other = run.add([*sequence.token_ids[:5], 1], 1)
    rejected = [*sequence.token_ids, *run.drafts(0, 2)[sequence.number]]
    assert len(rejected) == 9  # two full blocks and one token
    run.step(wrong=2)
    assert other.num_cached_tokens == 4
    third = run.add(rejected, 1)
    run.step()
    assert third.num_cached_tokens == 4


@given(arriving=requests(), right=st.integers(0, 4), wrong=st.integers(0, 3), chunked=st.booleans())
def test_drafts_change_no_output(arriving: list[tuple[list[int], int]], right: int, wrong: int, chunked: bool) -> None:
    plain, drafted = (simulation(chunked=chunked) for _ in range(2))
    for run in (plain, drafted):
        for prompt, max_tokens in arriving:
            run.add(prompt, max_tokens)
    for _ in drain(plain):
        pass
    for _ in range(2000):
        if not drafted.live:
            break
        drafted.step(right, wrong)
    outputs = [sorted(s.token_ids for s in run.finished) for run in (plain, drafted)]
    assert outputs[0] == outputs[1]


def test_the_budget_bounds_drafts() -> None:
    run = simulation(budget=6, num_blocks=30)
    for _ in range(2):
        run.add([1, 2], 8)
    run.step()
    rows = run.step(right=3)
    assert [len(row.drafts) for row in rows] == [3, 1]


def test_nobody_waits_for_drafts() -> None:
    run = simulation(budget=6, num_blocks=30)
    run.add([1, 2], 8)
    run.step()
    run.add([2, 1, 1], 8)
    assert [(row.num_known, len(row.drafts)) for row in run.step(right=5)] == [(1, 2), (3, 0)]


def test_nobody_gives_room_up_for_drafts() -> None:
    run = simulation(num_blocks=4, block_size=2, caching=False)
    first, second = run.add([1, 2, 0], 4), run.add([2, 1, 1], 4)
    run.step()
    rows = run.step(right=3)  # the fourth token fills each one's second block, and there is no third for drafts
    assert [row.drafts for row in rows] == [(), ()]
    assert first.preemptions == second.preemptions == 0
