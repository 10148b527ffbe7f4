"""How ranks are placed under a split."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from npu_zoo.core.parallel import Place, Split, stage_layers

SIZES = st.integers(1, 6)


@st.composite
def splits(draw: st.DrawFn) -> Split:
    """Any split; ep divides the ranks of a stage."""
    tp, pp, dp = draw(SIZES), draw(SIZES), draw(SIZES)
    return Split(tp, pp, draw(st.sampled_from([n for n in range(1, tp * dp + 1) if tp * dp % n == 0])), dp)


def places(split: Split) -> list[Place]:
    return [split.place(rank) for rank in range(split.world_size)]


@given(splits())
def test_every_kind_of_group_has_each_rank_once(split: Split) -> None:
    sizes = {"tp_group": split.tp, "pp_group": split.pp, "ep_group": split.ep, "dp_group": split.dp}
    for kind, size in sizes.items():
        groups = {place.rank: getattr(place, kind) for place in places(split)}
        assert all(rank in group and len(group) == size for rank, group in groups.items())
        assert sorted(itertools.chain.from_iterable(set(groups.values()))) == list(range(split.world_size))
        assert all(groups[other] == group for group in groups.values() for other in group)


@given(splits())
def test_replicas_are_neighbours_and_stages_are_strided(split: Split) -> None:
    for place in places(split):
        assert list(place.tp_group) == list(range(place.tp_group[0], place.tp_group[0] + split.tp))
        assert [b - a for a, b in itertools.pairwise(place.pp_group)] == [split.stage_size] * (split.pp - 1)
        assert [b - a for a, b in itertools.pairwise(place.dp_group)] == [split.tp] * (split.dp - 1)
        assert [b - a for a, b in itertools.pairwise(place.ep_group)] == [split.moe_tp] * (split.ep - 1)


@given(splits())
def test_a_rank_s_place_in_its_groups_is_its_number(split: Split) -> None:
    for place in places(split):
        numbers = (place.tp_rank, place.stage, place.ep_rank, place.replica)
        groups = (place.tp_group, place.pp_group, place.ep_group, place.dp_group)
        assert [group[number] for group, number in zip(groups, numbers, strict=True)] == [place.rank] * 4


@given(splits(), st.integers(1, 4))
def test_the_ranks_of_a_stage_hold_every_part_of_every_expert_once(split: Split, share: int) -> None:
    num_experts = split.ep * share
    for stage in range(split.pp):
        ranks = (place for place in places(split) if place.stage == stage)
        held = Counter((expert, place.moe_tp_rank) for place in ranks for expert in place.experts(num_experts))
        assert held == Counter(itertools.product(range(num_experts), range(split.moe_tp)))


@given(splits(), st.integers(0, 40))
def test_stages_cover_the_layers_in_order_and_are_balanced(split: Split, more: int) -> None:
    layers = split.pp + more
    of_stage = {place.stage: place.layers(layers) for place in places(split)}
    assert [layer for stage in range(split.pp) for layer in of_stage[stage]] == list(range(layers))
    lengths = [len(found) for found in of_stage.values()]
    assert min(lengths) > 0
    assert max(lengths) - min(lengths) <= 1


def test_the_layers_of_28_in_8_stages() -> None:
    assert [len(stage) for stage in stage_layers(28, 8)] == [4, 4, 4, 4, 3, 3, 3, 3]


@pytest.mark.parametrize(
    ("split", "text"),
    [
        (Split(), "1"), (Split(8), "8"), (Split(8, ep=8), "8 (tp 8, ep 8)"), (Split(pp=2), "2 (pp 2)"),
        (Split(dp=4), "4 (dp 4)"), (Split(2, 2, 4, 2), "8 (tp 2, pp 2, ep 4, dp 2)"),
    ],
)  # fmt: skip
def test_a_split_in_words(split: Split, text: str) -> None:
    assert split.describe() == text
