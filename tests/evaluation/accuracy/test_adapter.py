"""The harness gets the same numbers from our engine as from transformers, on the same tiny checkpoint."""

from __future__ import annotations

from typing import Any

import pytest

from npu_zoo import LLM

pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance

from npu_zoo.evaluation.accuracy.adapter import EngineLM

LONG = "the quick brown fox jumps over the lazy dog and runs away from it into the woods " * 3


def requests(kind: str, *arguments: tuple[Any, ...]) -> list[Instance]:
    return [
        Instance(request_type=kind, doc={}, arguments=args, idx=0, metadata=("t", n, 1))
        for n, args in enumerate(arguments)
    ]


PAIRS = requests(
    "loglikelihood",
    ("a question. Answer:", " no"),
    ("a question. Answer:", " yes"),
    ("", "text without a context"),
    ("ends in spaces   ", "so they belong to the continuation"),
    (LONG, " is longer than the model takes"),
    ("a question. Answer:", " no"),
    ("<s>has its own bos", " once"),
)
TEXTS = requests("loglikelihood_rolling", ("short",), (LONG,), (LONG + "!",), ("",))


def test_loglikelihoods_are_those_of_transformers(llm: LLM, transformers_lm: Any) -> None:
    ours = EngineLM(llm)
    got, expected = ours.loglikelihood(PAIRS), transformers_lm.loglikelihood(PAIRS, disable_tqdm=True)
    assert [score for score, _ in got] == pytest.approx([score for score, _ in expected], abs=1e-4)
    assert [greedy for _, greedy in got] == [greedy for _, greedy in expected]
    assert ours.truncated == 1


def test_rolling_loglikelihoods_are_those_of_transformers(llm: LLM, transformers_lm: Any) -> None:
    got = EngineLM(llm).loglikelihood_rolling(TEXTS)
    assert got == pytest.approx(transformers_lm.loglikelihood_rolling(TEXTS, disable_tqdm=True), abs=1e-4)


def test_greedy_texts_are_those_of_transformers(llm: LLM, transformers_lm: Any) -> None:
    base = EngineLM(llm).generate_until(requests("generate_until", ("def f", {"max_gen_toks": 24})))[0]
    stop = base[len(base) // 2 :][:2]
    asked = requests(
        "generate_until",
        ("def f", {"max_gen_toks": 24}),
        ("def f", {"until": [stop], "max_gen_toks": 24, "do_sample": False}),
        (LONG, {"until": ["\n\n"], "max_gen_toks": 10}),
    )
    got = EngineLM(llm).generate_until(asked)
    assert got == transformers_lm.generate_until(asked, disable_tqdm=True)
    assert got[1] == base[: base.index(stop)]


def test_a_greedy_answer_is_a_greedy_continuation(llm: LLM) -> None:
    ours = EngineLM(llm)
    text = ours.generate_until(requests("generate_until", ("def f", {"max_gen_toks": 1})))[0]
    ((_, greedy),) = ours.loglikelihood(requests("loglikelihood", ("def f", text)))
    assert greedy or ours.tok_encode("def f" + text)[:-1] != ours.tok_encode("def f")
