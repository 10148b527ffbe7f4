"""Drafts by prompt lookup, against a search of the whole text."""

from __future__ import annotations

from collections.abc import Iterator

from hypothesis import given
from hypothesis import strategies as st

from npu_zoo.core.engine import CompletionOutput
from npu_zoo.core.sampling import SamplingParams
from npu_zoo.engine.sequence import Sequence
from npu_zoo.engine.speculation.prompt_lookup import NgramIndex, PromptLookupProposer
from npu_zoo.engine.speculation.proposer import DraftRequest

TOKENS = st.lists(st.integers(0, 3), min_size=1, max_size=40)


def searched(tokens: list[int], shortest: int, longest: int, count: int) -> list[int]:
    """What follows the last earlier occurrence of the longest suffix, by looking everywhere."""
    for size in range(min(longest, len(tokens) - 1), shortest - 1, -1):
        for begin in range(len(tokens) - size - 1, -1, -1):
            if tokens[begin : begin + size] == tokens[-size:]:
                text = list(tokens)
                for place in range(count):
                    text.append(text[begin + size + place])
                return text[len(tokens) :]
    return []


@given(
    tokens=TOKENS, cuts=st.lists(st.integers(1, 5)), bounds=st.tuples(st.integers(1, 4), st.integers(0, 3)),
    count=st.integers(1, 8),
)  # fmt: skip
def test_it_finds_what_a_search_finds_however_the_text_grows(
    tokens: list[int], cuts: list[int], bounds: tuple[int, int], count: int
) -> None:
    shortest, longest = bounds[0], sum(bounds)
    index = NgramIndex(shortest, longest)
    end = 0
    for cut in [*cuts, len(tokens)]:
        end = min(len(tokens), end + cut)
        assert index.follow(tokens[:end], count) == searched(tokens[:end], shortest, longest, count)


class Watched(list[int]):
    """Counts the tokens that are read."""

    read = 0

    def __getitem__(self, place):  # type: ignore[no-untyped-def]
        found = super().__getitem__(place)
        self.read += len(found) if isinstance(place, slice) else 1
        return found

    def __iter__(self) -> Iterator[int]:
        raise AssertionError("a pass over the whole text")


def test_a_step_costs_the_same_however_long_the_prompt_is() -> None:
    costs = []
    for length in (100, 10_000):
        tokens, index = Watched(place % 97 for place in range(length)), NgramIndex(2, 4)
        index.follow(tokens, 3)
        tokens.read = 0
        tokens.append(length % 97)
        assert index.follow(tokens, 3) == [(length + place) % 97 for place in (1, 2, 3)]
        costs.append(tokens.read)
    assert costs[0] == costs[1] < 40


def test_each_sequence_is_looked_up_in_its_own_text_up_to_its_limit() -> None:
    def sequence(*tokens: int) -> Sequence:
        return Sequence(0, list(tokens), 1, SamplingParams(), 8, 0, CompletionOutput(0))

    proposer = PromptLookupProposer(2, 4)
    first, second = sequence(1, 2, 3, 1, 2), sequence(1, 2, 9, 9, 1, 2)
    asked = [DraftRequest(first, 2), DraftRequest(second, 1), DraftRequest(sequence(5, 6, 7), 3)]
    assert proposer.propose(asked) == [[3, 1], [9], []]
    first.token_ids += [3, 4, 1, 2]
    assert proposer.propose([DraftRequest(first, 3)]) == [[3, 4, 1]]
