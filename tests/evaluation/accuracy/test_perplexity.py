"""Perplexity against transformers and against a plain standard error."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import Any

import pytest

from npu_zoo import LLM

pytest.importorskip("lm_eval")

from npu_zoo.core.errors import UsageError
from npu_zoo.evaluation.accuracy.adapter import EngineLM
from npu_zoo.evaluation.accuracy.perplexity import Perplexity, ratio_error
from npu_zoo.evaluation.accuracy.tasks import TaskOptions

TEXTS = ["a first text of five", "another one,\nwith lines\n"]


def quiet(stage: str, done: int, total: int) -> None:
    pass


def test_perplexity_is_that_of_transformers(llm: LLM, transformers_lm: Any, tmp_path: Path) -> None:
    import torch

    data = tmp_path / "texts.jsonl"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in [*TEXTS, "  "]), "utf-8")
    total = tokens = 0
    for text in TEXTS:
        ids = transformers_lm.tok_encode(text, add_special_tokens=False)
        logits = transformers_lm.model(torch.tensor([[transformers_lm.prefix_token_id, *ids]])).logits
        total += logits[0, :-1].log_softmax(-1)[range(len(ids)), ids].sum().item()
        tokens += len(ids)
    result = Perplexity().run(llm, TaskOptions(data=data), quiet)
    found = {name: metric.value for name, metric in result.metrics.items()}
    assert found["token_perplexity"] == pytest.approx(math.exp(-total / tokens), rel=1e-4)
    assert found["word_perplexity"] == pytest.approx(math.exp(-total / (5 + 5)), rel=1e-4)
    size = sum(len(text) for text in TEXTS)
    assert found["byte_perplexity"] == pytest.approx(math.exp(-total / size), rel=1e-4)
    assert found["bits_per_byte"] == pytest.approx(math.log2(found["byte_perplexity"]))
    assert [sample["id"] for sample in result.samples] == ["0", "1"]


def test_long_texts_are_scored_whole(llm: LLM, tmp_path: Path) -> None:
    text = tmp_path / "long.txt"
    text.write_text("word " * 80, "utf-8")
    result = Perplexity().run(llm, TaskOptions(data=tmp_path), quiet)
    assert result.samples[0]["id"] == "long.txt"
    assert result.samples[0]["bytes"] == 400
    tokens = len(EngineLM(llm).tok_encode("word " * 80, add_special_tokens=False))
    assert result.samples[0]["tokens"] == tokens > llm.engine.config.max_model_len
    assert result.metrics["token_perplexity"].stderr is not None  # over windows


def test_the_standard_error_is_that_of_a_mean_where_weights_are_equal() -> None:
    values = [1.0, 4.0, 2.5, 7.0]
    expected = statistics.stdev(values) / math.sqrt(len(values))
    assert ratio_error([(value, 1) for value in values]) == pytest.approx(expected)
    assert ratio_error([(value * 3, 3) for value in values]) == pytest.approx(expected)
    assert ratio_error([(1.0, 2)]) is None


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("rows.jsonl", '{"txt": "a"}', "rows.jsonl, row 1: no text"),
        ("rows.jsonl", "[1]", "line 1: no JSON object"),
        ("blank.txt", " \n", "holds no text"),
        ("latin.txt", b"\xe9", "is no text in UTF-8"),
    ],
)
def test_what_holds_no_text_is_refused(tmp_path: Path, name: str, text: str | bytes, message: str) -> None:
    (tmp_path / name).write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(UsageError, match=message):
        Perplexity().check(TaskOptions(data=tmp_path / name))


def test_missing_data_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="give --data"):
        Perplexity().check(TaskOptions())
    with pytest.raises(UsageError, match="does not exist"):
        Perplexity().check(TaskOptions(data=tmp_path / "none"))
