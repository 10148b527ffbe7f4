"""What several tests of layers and kernels need."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture
def inference() -> Iterator[None]:
    """Without gradients, as layers and kernels run."""
    with torch.inference_mode():
        yield
