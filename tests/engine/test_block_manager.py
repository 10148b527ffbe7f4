"""Who holds which block, what is found again, and what is given up first."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from npu_zoo.core.engine import CompletionOutput
from npu_zoo.core.errors import EngineError
from npu_zoo.core.sampling import SamplingParams
from npu_zoo.engine.block_manager import BlockManager, SlotManager
from npu_zoo.engine.prompt_scores import PromptScores
from npu_zoo.engine.sequence import Sequence


def sequence_of(*token_ids: int) -> Sequence:
    return Sequence(0, list(token_ids), len(token_ids), SamplingParams(), 1, 0, CompletionOutput(0))


def computed(kv: BlockManager, *token_ids: int) -> Sequence:
    """A sequence whose tokens are all in the cache."""
    sequence = sequence_of(*token_ids)
    sequence.num_computed_tokens = kv.attach_prefix(sequence)
    assert kv.reserve(sequence, len(token_ids))
    kv.commit(sequence, len(token_ids))
    kv.settle()
    sequence.num_computed_tokens = len(token_ids)
    return sequence


def found(kv: BlockManager, *token_ids: int) -> int:
    """How many of the tokens the cache has; leaves it as it was, but for the order of use."""
    sequence = sequence_of(*token_ids)
    tokens = kv.attach_prefix(sequence)
    kv.release(sequence)
    return tokens


def manager(num_blocks: int = 8, block_size: int = 2, *, caching: bool = True) -> BlockManager:
    return BlockManager(num_blocks, block_size, enable_prefix_caching=caching)


def test_room_is_taken_in_blocks_and_comes_back() -> None:
    kv, sequence = manager(4), sequence_of(1, 2, 3, 4, 5)
    assert kv.reserve(sequence, 3)
    assert (len(sequence.slots), kv.num_free) == (2, 2)
    assert kv.reserve(sequence, 4)
    assert (len(sequence.slots), kv.num_free) == (2, 2)
    kv.release(sequence)
    assert (sequence.slots, kv.num_free, kv.num_total) == ([], 4, 4)


def test_without_room_nothing_changes() -> None:
    kv, sequence = manager(2), sequence_of(1, 2, 3, 4, 5)
    assert kv.reserve(sequence, 2)
    assert not kv.reserve(sequence, 5)
    assert (len(sequence.slots), kv.num_free) == (1, 1)
    kv.check([sequence])


def test_one_token_is_always_left_to_compute() -> None:
    kv = manager()
    computed(kv, 1, 2, 3, 4)
    assert [found(kv, *tokens) for tokens in ([1, 2], [1, 2, 3], [1, 2, 3, 4], [1, 2, 3, 4, 5])] == [0, 2, 2, 4]


def test_a_part_of_a_block_is_not_shared() -> None:
    kv = manager(block_size=4)
    computed(kv, 1, 2, 3, 4, 5, 6, 7)
    assert found(kv, 1, 2, 3, 4, 5, 6, 7, 8, 9) == 4
    assert found(kv, 1, 2, 3, 9, 9) == 0


def test_a_block_is_known_with_all_that_comes_before_it() -> None:
    kv = manager()
    computed(kv, 1, 2, 3, 4)
    assert found(kv, 9, 9, 3, 4, 0) == 0
    assert found(kv, 3, 4, 0) == 0
    assert found(kv, 1, 2, 4, 3, 0) == 2


FEW = st.lists(st.integers(0, 1), min_size=1, max_size=14)


@given(stored=FEW, asked=FEW, block_size=st.integers(1, 5))
def test_what_is_found_is_the_common_beginning_in_whole_blocks(
    stored: list[int], asked: list[int], block_size: int
) -> None:
    kv = manager(16, block_size)
    computed(kv, *stored)
    pairs = zip(stored, asked[:-1], strict=False)
    common = len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)))
    assert found(kv, *asked) == common // block_size * block_size


def test_a_block_in_use_twice_is_freed_by_the_last() -> None:
    kv = manager(4)
    first, second = computed(kv, 1, 2, 3), computed(kv, 1, 2, 4)
    assert first.slots[0] == second.slots[0]
    assert kv.num_free == 1
    kv.check([first, second])
    kv.release(first)
    assert kv.num_free == 2
    assert found(kv, 1, 2, 5) == 2
    kv.release(second)
    assert kv.num_free == 4


def test_what_was_unused_longest_goes_first_and_tails_before_beginnings() -> None:
    kv = manager(4)
    old, new = computed(kv, 1, 2, 3, 4), computed(kv, 5, 6, 7, 8)
    kv.release(old)
    kv.release(new)
    computed(kv, 0)
    assert (found(kv, 1, 2, 3, 4, 0), found(kv, 5, 6, 7, 8, 0)) == (2, 4)


def test_use_makes_a_block_young_again() -> None:
    kv = manager(4)
    old, new = computed(kv, 1, 2, 3, 4), computed(kv, 5, 6, 7, 8)
    kv.release(old)
    kv.release(new)
    assert found(kv, 1, 2, 3, 4, 0) == 4
    computed(kv, 0)
    assert (found(kv, 1, 2, 3, 4, 0), found(kv, 5, 6, 7, 8, 0)) == (4, 2)


def test_blocks_that_nobody_can_find_go_before_those_that_are_known() -> None:
    kv = manager(4)
    known, unknown = computed(kv, 1, 2, 3, 4), computed(kv, 5)
    kv.release(known)
    kv.release(unknown)
    computed(kv, 6, 7, 8)
    assert found(kv, 1, 2, 3, 4, 0) == 4


def test_without_caching_nothing_is_found() -> None:
    kv = manager(caching=False)
    computed(kv, 1, 2, 3, 4)
    assert found(kv, 1, 2, 3, 4, 5) == 0


def test_wanted_prompt_probabilities_pass_the_cache_by() -> None:
    kv = manager()
    computed(kv, 1, 2, 3, 4)
    sequence = sequence_of(1, 2, 3, 4, 5)
    sequence.prompt_scores = PromptScores(SamplingParams(prompt_logprobs=0), 5)
    assert kv.attach_prefix(sequence) == 0
    sequence.prompt_scores.next = 5
    assert kv.attach_prefix(sequence) == 4


@pytest.mark.parametrize(("start", "logits", "shared"), [(4, False, 2), (5, True, 4), (9, True, 4), (2, True, 0)])
def test_what_stands_before_the_wanted_positions_comes_from_the_cache(start: int, logits: bool, shared: int) -> None:
    kv = manager()
    computed(kv, 1, 2, 3, 4)
    sequence = sequence_of(1, 2, 3, 4, 5)
    params = SamplingParams(prompt_logprobs=0, prompt_logprobs_start=start, prompt_logits=logits)
    sequence.prompt_scores = PromptScores(params, 5)
    assert kv.attach_prefix(sequence) == shared


def test_what_was_not_computed_is_not_found() -> None:
    kv, sequence = manager(), sequence_of(1, 2, 3, 4)
    assert kv.reserve(sequence, 4)
    kv.commit(sequence, 4)
    assert kv.discard_unsettled([sequence]) == []
    kv.release(sequence)
    assert found(kv, 1, 2, 3, 4, 5) == 0
    kv.check([])


def test_who_counts_on_what_was_not_computed_is_named() -> None:
    kv, writer, reader = manager(), sequence_of(1, 2, 3), sequence_of(1, 2, 3)
    settled = computed(kv, 7, 8, 9)
    assert kv.reserve(writer, 3)
    kv.commit(writer, 3)
    reader.num_computed_tokens = kv.attach_prefix(reader)
    assert reader.num_computed_tokens == 2
    assert kv.discard_unsettled([settled, writer, reader]) == [reader]
    assert kv.discard_unsettled([settled, writer, reader]) == []


@pytest.mark.parametrize("damage", ["lost", "stray"])
def test_the_check_sees_what_does_not_balance(damage: str) -> None:
    kv = manager()
    sequence = computed(kv, 1, 2, 3)
    kv.check([sequence])
    slots = sequence.slots[:1] if damage == "lost" else [*sequence.slots, 7]
    with pytest.raises(EngineError, match=r"block \d has \d references"):
        kv.check([replace(sequence, slots=slots)])


def test_a_slot_holds_one_sequence_of_any_length() -> None:
    kv, first, second = SlotManager(1, 8), sequence_of(1, 2), sequence_of(3)
    assert kv.reserve(first, 2)
    assert kv.reserve(first, 8)
    assert not kv.reserve(second, 1)
    with pytest.raises(EngineError, match="9 tokens exceeds its slot of 8"):
        kv.reserve(first, 9)
    kv.release(first)
    assert kv.reserve(second, 1)
    assert (kv.num_free, kv.num_total) == (0, 1)
