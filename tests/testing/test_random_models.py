"""Random models of a family's own class."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file

from npu_zoo.registry import get_registry
from npu_zoo.testing.shapes import shareable_shape, write_random_model


@pytest.mark.parametrize("tied", [True, False])
def test_a_tied_head_is_not_stored(tied: bool, tmp_path: Path) -> None:
    """Readers that find a head of another content beside a tied embedding do not agree on which of both counts."""
    family = get_registry().families["deepseek_coder"]
    write_random_model(tmp_path, family, shareable_shape(family, tie_word_embeddings=tied))
    tensors = load_file(tmp_path / "model.safetensors")
    assert "model.embed_tokens.weight" in tensors
    assert ("lm_head.weight" in tensors) is not tied
