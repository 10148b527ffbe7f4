"""The benchmark of speculative decoding runs, and fails where outputs differ."""

from __future__ import annotations

from typing import Any

import pytest
import speculative


@pytest.fixture(scope="module")
def engines() -> dict[str, Any]:
    return {
        way: speculative.LLM("deepseek_coder:demo", **speculative.OPTIONS, **speculative.WAYS[way])
        for way in ("none", "3 drafts")
    }


def test_a_case_has_all_ways_with_their_counts(engines: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speculative, "TOKENS", 16)
    plain, drafted = speculative.case(engines, "repeats itself", batch=2, rounds=2)
    assert (plain["ratio"], plain["drafts"]) == (1, 0)
    assert len(drafted["tokens_per_s"]) == 2
    assert drafted["draft_tokens"] >= drafted["accepted_tokens"] > drafted["drafts"] > 0


def test_other_tokens_fail_it(engines: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    whole, changed = speculative.run, iter(range(99))

    def run(*arguments: Any) -> Any:
        rate, tokens, counts = whole(*arguments)
        return rate, [[*own[:-1], next(changed)] for own in tokens], counts

    monkeypatch.setattr(speculative, "TOKENS", 4)
    monkeypatch.setattr(speculative, "run", run)
    with pytest.raises(AssertionError, match="3 drafts gives other tokens"):
        speculative.case(engines, "ordinary", batch=1, rounds=1)
