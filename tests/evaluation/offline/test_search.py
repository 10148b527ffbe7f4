from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from npu_zoo.evaluation.offline.search import largest_batch


@given(st.integers(0, 300), st.integers(0, 300))
def test_it_is_what_trying_every_batch_finds(threshold: int, most: int) -> None:
    tried: list[int] = []

    def holds(batch: int) -> bool:
        tried.append(batch)
        return batch <= threshold

    expected = max((batch for batch in range(1, most + 1) if batch <= threshold), default=0)
    assert largest_batch(holds, most) == expected
    assert len(tried) == len(set(tried)) <= 2 * most.bit_length() + 1
    assert all(1 <= batch <= most for batch in tried)


@given(st.lists(st.booleans(), max_size=40))
def test_under_noise_the_answer_held_and_the_next_batch_did_not(outcomes: list[bool]) -> None:
    tried: dict[int, bool] = {}

    def holds(batch: int) -> bool:
        tried[batch] = outcomes[batch - 1]
        return tried[batch]

    found = largest_batch(holds, len(outcomes))
    assert found == 0 or tried[found]
    assert found == len(outcomes) or not tried[found + 1]
