"""Which attention backend serves a chip, and why others do not."""

from __future__ import annotations

from typing import Any

import pytest

from npu_zoo.core.errors import HardwareError
from npu_zoo.core.model_config import ModelConfig
from npu_zoo.core.specs import AttentionBackendSpec
from npu_zoo.registry import get_registry
from npu_zoo.selection import select_attention

SHAPE = ModelConfig(
    architecture="LlamaForCausalLM",
    hidden_size=96,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=2,
    head_dim=48,
    vocab_size=99,
    max_position_embeddings=512,
)


def backend(name: str, chip: str, priority: int, **more: Any) -> AttentionBackendSpec:
    return AttentionBackendSpec(
        name=name,
        kind="paged",
        chip=chip,
        dtypes=("float16",),
        implementation="nowhere.attention:Backend",
        priority=priority,
        **more,
    )


def chosen(chip: str, *backends: AttentionBackendSpec) -> str:
    return select_attention({b.name: b for b in backends}, "paged", chip, "float16", SHAPE, None).backend


@pytest.mark.parametrize("chip", ["cpu", "cuda", "ascend910b"])
def test_the_highest_priority_that_serves_is_taken(chip: str) -> None:
    anywhere, low, high = backend("anywhere", "any", 0), backend("low", chip, 5), backend("high", chip, 20)
    assert chosen(chip, anywhere) == "anywhere"
    assert chosen(chip, anywhere, low, high) == "high"
    assert chosen(chip, anywhere, low, backend("high", chip, 20, head_dims=(64,))) == "low"


def test_what_runs_anywhere_serves_a_cpu_but_is_no_silent_fallback_on_an_accelerator() -> None:
    anywhere = backend("anywhere", "any", 0)
    assert chosen("cpu", anywhere, backend("own", "cpu", 20, head_dims=(64,))) == "anywhere"
    with pytest.raises(HardwareError, match=r"own: head size 48 is none of 64; anywhere: ascend910b has backends of"):
        chosen("ascend910b", anywhere, backend("own", "ascend910b", 20, head_dims=(64,)))


@pytest.mark.parametrize(("kind", "name"), [("paged", "torch_paged"), ("flash", "torch_flash")])
def test_no_backend_is_registered_twice(kind: Any, name: str) -> None:
    """Plain torch serves a CPU in float16, which the compiled backends do not take, by its one name."""
    backends = get_registry().attention_backends
    assert select_attention(backends, kind, "cpu", "float16", SHAPE, None).backend == name
    implementations = [b.implementation for b in backends.values() if b.chip in ("any", "cpu")]
    assert len(set(implementations)) == len(implementations)
