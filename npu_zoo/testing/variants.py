"""A variant for tests that takes any checkpoint of a family's architecture, under the rows of a size of its own."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

from npu_zoo.core.features import FeatureRow
from npu_zoo.core.hardware import DTYPES
from npu_zoo.core.specs import FamilySpec, VariantSpec
from npu_zoo.registry import Registry, get_registry, registry_in_place

TINY = "tiny-checkpoint"
"""The name of the variant, and of its size."""

_ANYTHING = FeatureRow(
    sizes=(TINY,), hardware=("cpu",), dtype=DTYPES, world_size=(1,), attention=("paged", "flash"), source="zoo"
)


@contextlib.contextmanager
def with_tiny_variant(family: FamilySpec, rows: Sequence[FeatureRow] = (_ANYTHING,)) -> Iterator[Registry]:
    """Have a family's variant :data:`TINY` in this process, which the given rows speak of and nothing else.

    Args:
        rows: of which sizes are left out of account; one that offers float32, bfloat16 and float16 on one rank of a CPU
            where none is given.
    """
    own = tuple(row.model_copy(update={"sizes": (TINY,), "evidence": "claimed"}) for row in rows)
    variant = VariantSpec(name=TINY, size=TINY, title="A tiny checkpoint of a test")
    changes = {"variants": (*family.variants, variant), "rows": own, "denials": ()}
    with registry_in_place(get_registry().with_family(family.model_copy(update=changes))) as registry:
        yield registry
