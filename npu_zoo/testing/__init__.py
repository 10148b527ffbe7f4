"""What tests of the zoo, and of plugins for it, are written with. Importing it imports no torch."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from npu_zoo.testing.agreement import Agreement, agree
    from npu_zoo.testing.assertions import (
        assert_kernels_match_reference,
        assert_matrix_builds,
        assert_spec_valid,
        isolated_registry,
    )
    from npu_zoo.testing.checkpoints import write_checkpoint
    from npu_zoo.testing.door import unchecked_config
    from npu_zoo.testing.ranks import run_ranks
    from npu_zoo.testing.reference import assert_matches_reference
    from npu_zoo.testing.shapes import tiny_config
    from npu_zoo.testing.tiny import write_tiny_checkpoint

__all__ = [
    "Agreement",
    "agree",
    "assert_kernels_match_reference",
    "assert_matches_reference",
    "assert_matrix_builds",
    "assert_spec_valid",
    "isolated_registry",
    "run_ranks",
    "tiny_config",
    "unchecked_config",
    "write_checkpoint",
    "write_tiny_checkpoint",
]

_HOMES = {
    "Agreement": "agreement",
    "agree": "agreement",
    "assert_kernels_match_reference": "assertions",
    "assert_matches_reference": "reference",
    "assert_matrix_builds": "assertions",
    "assert_spec_valid": "assertions",
    "isolated_registry": "assertions",
    "run_ranks": "ranks",
    "tiny_config": "shapes",
    "unchecked_config": "door",
    "write_checkpoint": "checkpoints",
    "write_tiny_checkpoint": "tiny",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'npu_zoo.testing' has no attribute '{name}'")
    return getattr(importlib.import_module(f"npu_zoo.testing.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
