"""The harness gets the same numbers from our engine as from transformers, on the same tiny checkpoint."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from npu_zoo import LLM

pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance

from npu_zoo.core.engine import Logprob, RequestMetrics, RequestOutput
from npu_zoo.core.errors import ConfigError, EngineError, PromptLengthError
from npu_zoo.core.sampling import SamplingParams
from npu_zoo.engine.engine import NativeEngine
from npu_zoo.engine.sampler import top_logprobs
from npu_zoo.evaluation.accuracy.adapter import EngineLM, Window
from npu_zoo.evaluation.accuracy.perplexity import Document, Perplexity, perplexities
from npu_zoo.evaluation.accuracy.responses import ResponseFile
from npu_zoo.evaluation.accuracy.scoring import Completion, Score
from npu_zoo.evaluation.accuracy.tasks import TaskOptions

BLOCK_SIZE = 16
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


@pytest.mark.parametrize("token", [0, 1, 2])
def test_of_equally_likely_tokens_the_first_is_greedy(token: int) -> None:
    logits = torch.tensor([[1.0, 2.0, 2.0]], dtype=torch.bfloat16)
    (found,) = top_logprobs(logits, [token], [4])
    entry = {token: Logprob(found.chosen[1], found.chosen[2]), **{name: Logprob(value, 1) for name, value in found.top}}
    output = RequestOutput("r", None, [5, token], [], True, RequestMetrics(0.0), prompt_logprobs=[None, entry])
    answer = Score([5], [token]).answer([output])
    assert isinstance(answer, list)
    assert answer[1] == (token == logits.argmax())


def test_a_model_that_gives_no_numbers_has_no_score(llm: LLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(llm.engine, NativeEngine)
    compute = llm.engine.runner.compute_logits
    monkeypatch.setattr(llm.engine.runner, "compute_logits", lambda hidden: compute(hidden) * math.nan)
    with ResponseFile(tmp_path / "r", "m") as kept:
        with pytest.raises(EngineError, match="try another --dtype"):
            EngineLM(llm, responses=kept).loglikelihood(PAIRS[:1])
        assert kept.count == 0
    with pytest.raises(EngineError, match="no numbers"):
        perplexities([Document("a", "text")], [[Window(math.nan, 2)]])


def test_answers_that_are_cut_elsewhere_are_others() -> None:
    params = SamplingParams(temperature=0.0)
    assert Completion([1], params, ends=["a"]).key != Completion([1], params, ends=["b"]).key


def test_a_context_is_computed_once(llm: LLM) -> None:
    before = llm.engine.stats().prefix_cache_hits
    context = "a context that is long enough for some whole blocks"
    choices = requests("loglikelihood", *((context, f" {word}") for word in ("no", "yes", "perhaps")))
    EngineLM(llm).loglikelihood([*choices[:1], *PAIRS[:2], *choices[1:]])
    whole = len(EngineLM(llm).tok_encode(context)) // BLOCK_SIZE * BLOCK_SIZE
    assert llm.engine.stats().prefix_cache_hits - before >= 2 * (whole - BLOCK_SIZE) > 0


@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_chats_are_rendered_as_transformers_does(llm: LLM, transformers_lm: Any, add_generation_prompt: bool) -> None:
    messages = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "The answer is"}]
    messages = messages[: 1 if add_generation_prompt else 2]
    got = EngineLM(llm).apply_chat_template(messages, add_generation_prompt)
    assert got == transformers_lm.apply_chat_template(messages, add_generation_prompt)
    assert EngineLM(llm).tok_encode(got) == transformers_lm.tok_encode(got)


def test_repeats_are_drawn_anew_and_again_the_same(llm: LLM) -> None:
    sampled = {"do_sample": True, "temperature": 1.0, "max_gen_toks": 12}
    asked = requests("generate_until", ("def f", sampled), ("def f", sampled))
    first, again = EngineLM(llm, seed=3).generate_until(asked), EngineLM(llm, seed=3).generate_until(asked)
    assert first == again
    assert first[0] != first[1]
    assert EngineLM(llm, seed=4).generate_until(asked) == [first[1], EngineLM(llm, seed=5).generate_until(asked)[0]]


def test_answers_that_leave_no_room_are_refused(llm: LLM) -> None:
    with pytest.raises(PromptLengthError, match=r"answers of 64 tokens.*raise --max-model-len"):
        EngineLM(llm).generate_until(requests("generate_until", ("def f", {"max_gen_toks": 64})))
    with pytest.raises(PromptLengthError, match=r"continuation of \d+ tokens"):
        EngineLM(llm).loglikelihood(requests("loglikelihood", ("a", LONG)))


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    (tmp_path / "a.txt").write_text("a text", "utf-8")
    with pytest.raises(ConfigError, match=r"pip install 'npu-zoo\[eval\]'"):
        Perplexity().check(TaskOptions(data=tmp_path))
