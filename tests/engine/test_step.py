"""Micro-batches hold a step's tokens, all of them, once and in order."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from npu_zoo.engine.step import MICRO_BATCH_TOKENS, StepRow, micro_batches

ROWS = st.lists(st.tuples(st.integers(1, 300), st.integers(0, 2), st.integers(0, 5)), min_size=1, max_size=12)


def rows_of(drawn: list[tuple[int, int, int]], replicas: int) -> list[StepRow]:
    return [
        StepRow(
            tuple(range(count)),
            1000 * number,
            (number,),
            min(count, logits),
            wants_prompt=False,
            replica=replica % replicas,
        )
        for number, (count, replica, logits) in enumerate(drawn)
    ]


def sampled_positions(rows: list[StepRow]) -> list[int]:
    return [position for row in rows for position in row.positions[row.num_tokens - row.num_logits :]]


@given(drawn=ROWS, replicas=st.integers(1, 3), stages=st.integers(1, 4))
def test_every_token_is_computed_once_and_in_order(
    drawn: list[tuple[int, int, int]], replicas: int, stages: int
) -> None:
    rows = rows_of(drawn, replicas)
    batches = micro_batches(rows, replicas, stages)
    for replica in range(replicas):
        due = [(row.start + place, token) for row in rows if row.replica == replica
               for place, token in enumerate(row.token_ids)]  # fmt: skip
        pieces = [piece for batch in batches for piece in batch.rows[replica]]
        assert [(p.start + place, token) for p in pieces for place, token in enumerate(p.token_ids)] == due
        assert sampled_positions(pieces) == sampled_positions([row for row in rows if row.replica == replica])
        assert all(piece.num_tokens and piece.replica == replica for piece in pieces)


@given(drawn=ROWS, replicas=st.integers(1, 3), stages=st.integers(1, 4))
def test_parts_are_even_and_worth_their_weights(drawn: list[tuple[int, int, int]], replicas: int, stages: int) -> None:
    batches = micro_batches(rows_of(drawn, replicas), replicas, stages)
    assert 1 <= len(batches) <= stages
    for replica in range(replicas):
        tokens = [batch.replica_tokens[replica] for batch in batches]
        assert max(tokens) - min(tokens) <= 1
    if len(batches) > 1:
        assert all(max(batch.replica_tokens) >= MICRO_BATCH_TOKENS for batch in batches)
