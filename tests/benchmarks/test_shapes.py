"""What shapes say of their models, against sums done by hand."""

from __future__ import annotations

import dataclasses
import math

import pytest
from harness.checkpoint import tensors
from harness.shapes import SHAPES, Experts, Latent, Shape

# One layer of 8 x 8 query, key, value and output matrices and 8 x 16 gate, up and down: 4 * 64 + 3 * 128 = 640.
SHAPE = dataclasses.replace(
    SHAPES["tiny"],
    hidden_size=8,
    intermediate_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=2,
    head_dim=4,
    vocab_size=10,
)
LAYER = 640


def test_the_1_3b_shape_has_the_parameters_of_the_real_model() -> None:
    assert SHAPES["1.3b"].parameters == 1_346_471_936


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_parameters_are_those_of_the_checkpoint(shape: Shape) -> None:
    sizes = [size for _, size in tensors(shape)]
    assert shape.parameters == sum(map(math.prod, sizes))


# A dense layer and one of 4 + 1 experts of 3 columns: 2 tokens at 2 experts each hit 4 * (1 - (1 / 2) ** 2) = 3.
MOE = dataclasses.replace(SHAPE, num_hidden_layers=2, experts=Experts(4, 1, 2, 3))
EXPERT, ROUTER = 3 * 8 * 3, 4 * 8
BOTH_LAYERS = LAYER + 256 + EXPERT + ROUTER


def test_experts_count_as_often_as_they_are_hit() -> None:
    assert Experts(4, 1, 2, 3).hit(1) == 2
    assert Experts(4, 1, 2, 3).hit(2) == 3
    assert MOE.read_parameters(2) == BOTH_LAYERS + 3 * EXPERT
    assert MOE.linear_parameters == BOTH_LAYERS + 2 * EXPERT


def test_latents_are_cached_instead_of_heads() -> None:
    assert dataclasses.replace(MOE, latent=Latent(6, 2, 4, 4, 5)).kv_bytes_per_token == 2 * (6 + 2) * 2


@pytest.mark.parametrize("name", ["moe-1b", "mla-1b"])
def test_shapes_of_a_billion_parameters_have_them(name: str) -> None:
    assert 0.9e9 < SHAPES[name].parameters < 1.2e9
