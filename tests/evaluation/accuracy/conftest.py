"""One tiny checkpoint, on our engine and on the harness's adapter of transformers."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from npu_zoo import LLM
from npu_zoo.testing import write_tiny_checkpoint

MAX_MODEL_LEN = 66


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = write_tiny_checkpoint(tmp_path_factory.mktemp("tiny"), "deepseek_coder", vocab_size=512)
    config = directory / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text("utf-8")), "model_type": "llama"}), "utf-8")
    return directory


@pytest.fixture(scope="module")
def llm(checkpoint: Path) -> Iterator[LLM]:
    options = {"hardware": "cpu", "dtype": "float32", "max_model_len": MAX_MODEL_LEN, "max_num_batched_tokens": 128}
    with LLM("deepseek_coder", str(checkpoint), block_size=16, kv_cache_memory="8MiB", **options) as started:
        yield started


@pytest.fixture(scope="module")
def transformers_lm(checkpoint: Path) -> Any:
    """The oracle: the harness's own adapter of transformers."""
    pytest.importorskip("lm_eval")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from lm_eval.models.huggingface import HFLM

        # transformers overlooks add_bos_token in the checkpoint's tokenizer_config.json, so it is said here.
        return HFLM(
            pretrained=str(checkpoint),
            dtype="float32",
            device="cpu",
            max_length=MAX_MODEL_LEN - 2,
            batch_size=4,
            add_bos_token=True,
        )
