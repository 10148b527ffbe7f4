"""What ends a completion, what comes with it, and which prompts are taken."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from npu_zoo import LLM, SamplingParams
from npu_zoo.core.engine import CompletionOutput
from npu_zoo.core.errors import PromptError, UsageError
from npu_zoo.engine.engine import NativeEngine
from npu_zoo.engine.sampler import SampledTokens, Sampler
from npu_zoo.engine.sequence import Sequence

Launch = Callable[..., LLM]
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)


def engine_of(llm: LLM) -> NativeEngine:
    assert isinstance(llm.engine, NativeEngine)
    return llm.engine


@pytest.fixture(autouse=True)
def _no_leak(llm: LLM) -> Iterator[None]:
    yield
    assert engine_of(llm).kv.num_free == engine_of(llm).kv.num_total


@dataclass
class Script(Sampler):
    """Says the same to everybody, whatever the model thinks; notes which ids were held back."""

    token_ids: list[int]
    held: list[set[int]] = field(default_factory=list)

    def sample(
        self,
        logits: Tensor,
        sequences: list[Sequence],
        stop_ids: list[tuple[int, ...]],  # type: ignore[override]
    ) -> SampledTokens:
        self.held.append(set(stop_ids[0]))
        return SampledTokens([self.token_ids[s.num_output_tokens] for s in sequences], [None] * len(sequences))


@pytest.fixture
def say(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> Callable[..., CompletionOutput]:
    """Run a prompt whose completion is the given text (or token ids), and return what is reported of it."""

    def say(text: str | list[int], prompt: str = "x", **params: object) -> CompletionOutput:
        tokenizer = engine_of(llm).tokenizer
        assert tokenizer is not None
        token_ids = tokenizer.encode(text, add_special_tokens=False) if isinstance(text, str) else text
        script = Script([*token_ids, *tokenizer.eos_token_ids])
        monkeypatch.setattr(llm.engine, "sampler", script)
        return llm.generate(prompt, SamplingParams(**{"max_tokens": 100, **params}))[0].outputs[0]  # type: ignore[arg-type]

    return say


def token(llm: LLM, text: str) -> int:
    tokenizer = engine_of(llm).tokenizer
    assert tokenizer is not None
    (token_id,) = tokenizer.encode(text, add_special_tokens=False)
    return token_id


Say = Callable[..., CompletionOutput]


def test_end_of_text(llm: LLM, say: Say) -> None:
    output = say("return 1")
    assert (output.text, output.finish_reason, output.stop_reason) == ("return 1", "stop", None)
    assert output.token_ids[-1] == token(llm, "<｜end▁of▁sentence｜>")


def test_end_of_text_is_shown_where_special_tokens_are(say: Say) -> None:
    assert say("ab", skip_special_tokens=False).text == "ab<｜end▁of▁sentence｜>"


def test_end_of_text_is_passed_over_on_request(say: Say) -> None:
    output = say("ab<｜end▁of▁sentence｜>cd", ignore_eos=True, max_tokens=6)
    assert (output.text, output.finish_reason, len(output.token_ids)) == ("abcd", "length", 6)


def test_the_most_tokens(say: Say) -> None:
    output = say("return value", max_tokens=3)
    assert (len(output.token_ids), output.finish_reason) == (3, "length")


def test_tokens_fill_the_context_where_no_limit_is_given(llm: LLM) -> None:
    output = llm.generate([[5] * 200], SamplingParams(temperature=0, max_tokens=None, ignore_eos=True))[0].outputs[0]
    assert (len(output.token_ids), output.finish_reason) == (56, "length")


@pytest.mark.parametrize(
    ("stop", "text", "reason"),
    [
        ("n 1", "retur", "n 1"),
        (" ", "return", " "),
        ("return", "", "return"),
        (["zzz", "1 +", "urn"], "ret", "urn"),
        (["turn", "return"], "", "return"),
        ("2", "return 1 + ", "2"),
    ],
)
def test_stop_strings_across_tokens(say: Say, stop: str | list[str], text: str, reason: str) -> None:
    output = say("return 1 + 2", stop=stop)
    assert (output.text, output.finish_reason, output.stop_reason) == (text, "stop", reason)


def test_a_stop_string_can_stay(say: Say) -> None:
    assert say("return 1 + 2", stop="1", include_stop_str_in_output=True).text == "return 1"


def test_a_beginning_of_a_stop_string_is_given_out_in_the_end(say: Say) -> None:
    output = say("value: 12", stop="123")
    assert (output.text, output.stop_reason) == ("value: 12", None)


def test_a_stop_string_in_the_prompt_stops_nothing(say: Say) -> None:
    assert say("abc", prompt="END of EN", stop="END").text == "abc"


def test_stop_token_ids(llm: LLM, say: Say) -> None:
    output = say("a;b;c", stop_token_ids=[token(llm, ";")])
    assert (output.text, output.finish_reason, output.stop_reason) == ("a;", "stop", token(llm, ";"))


def test_characters_of_several_tokens_come_whole(llm: LLM, say: Say) -> None:
    assert say("naïve 数据 🙂").text == "naïve 数据 🙂"
    assert len(say("数据", max_tokens=4).token_ids) == 4
    assert say("数据", max_tokens=4).text == "数�"


def test_nothing_ends_a_text_before_min_tokens(llm: LLM, say: Say) -> None:
    eos, semicolon = token(llm, "<｜end▁of▁sentence｜>"), token(llm, ";")
    output = say("a;bbc;d", min_tokens=4, stop_token_ids=[semicolon])
    assert (output.text, output.stop_reason) == ("a;bbc;", semicolon)
    script = engine_of(llm).sampler
    assert isinstance(script, Script)
    assert script.held == [{eos, semicolon}] * 4 + [set()] * 2
    output = say("a;bbc;d", min_tokens=4, stop=";")
    assert (output.text, output.stop_reason) == ("a;bbc", ";")


def test_min_tokens_really_come(llm: LLM) -> None:
    anything = tuple(range(250))
    params = SamplingParams(max_tokens=9, min_tokens=5, stop_token_ids=anything, seed=1)
    output = llm.generate("x", params)[0].outputs[0]
    assert len(output.token_ids) > 5
    assert not set(output.token_ids[:5]) & set(anything)
    output = llm.generate("x", replace(params, min_tokens=0))[0].outputs[0]
    assert len(output.token_ids) < 5


def test_log_probabilities_name_the_chosen_token_first(llm: LLM) -> None:
    output = llm.generate("def f", SamplingParams(seed=3, max_tokens=10, logprobs=3, ignore_eos=True))[0].outputs[0]
    assert output.logprobs is not None
    for chosen, entries in zip(output.token_ids, output.logprobs, strict=True):
        assert next(iter(entries)) == chosen
        assert len(entries) == (3 if entries[chosen].rank <= 3 else 4)
        others = sorted(entries.values(), key=lambda entry: entry.rank)
        assert [e.rank for e in others][:3] == [1, 2, 3]
        assert [e.logprob for e in others] == sorted((e.logprob for e in others), reverse=True)
    tokenizer = engine_of(llm).tokenizer
    assert tokenizer is not None
    assert all(e.decoded_token == tokenizer.token_text(i) for entries in output.logprobs for i, e in entries.items())


def test_zero_log_probabilities_are_those_of_the_chosen_token(llm: LLM) -> None:
    output = llm.generate("def f", SamplingParams(temperature=0, max_tokens=4, logprobs=0))[0].outputs[0]
    assert [list(entries) for entries in output.logprobs or []] == [[i] for i in output.token_ids]
    assert llm.generate("def f", GREEDY)[0].outputs[0].logprobs is None


def test_probabilities_of_the_prompt_pass_the_cache_by(llm: LLM) -> None:
    prompt = [7] * 70
    llm.generate([prompt], GREEDY)
    assert llm.generate([prompt], GREEDY)[0].metrics.cached_tokens > 0
    outputs = [llm.generate([prompt], SamplingParams(max_tokens=1, prompt_logprobs=n))[0] for n in (0, 2)]
    for output, wanted in zip(outputs, (0, 2), strict=True):
        assert output.metrics.cached_tokens == 0
        assert output.prompt_logprobs is not None
        assert (len(output.prompt_logprobs), output.prompt_logprobs[0]) == (70, None)
        assert all(entries and 7 in entries and len(entries) >= wanted for entries in output.prompt_logprobs[1:])
    assert llm.generate([prompt], GREEDY)[0].prompt_logprobs is None


def test_prompt_probabilities_of_several_completions(llm: LLM) -> None:
    output = llm.generate([[7] * 20], SamplingParams(n=3, max_tokens=2, prompt_logprobs=0))[0]
    assert len(output.prompt_logprobs or []) == 20
    assert [o.index for o in output.outputs] == [0, 1, 2]


def test_ids_beyond_the_tokenizer(llm: LLM, say: Say) -> None:
    """The embedding has more rows than the tokenizer has tokens: such ids have no text, and do no harm."""
    tokenizer = engine_of(llm).tokenizer
    assert tokenizer is not None
    assert tokenizer.vocab_size < 319
    assert len(llm.generate([[319, 5, 318]], GREEDY)[0].outputs[0].token_ids) == 12
    output = say([token(llm, "a"), 319, token(llm, "b")])
    assert (output.text, len(output.token_ids)) == ("ab", 4)


def test_metrics_are_in_order(llm: LLM) -> None:
    metrics = llm.generate("x", GREEDY)[0].metrics
    assert metrics.first_token_time is not None
    assert metrics.finished_time is not None
    assert metrics.arrival_time <= metrics.first_token_time <= metrics.finished_time


def test_text_prompts_get_the_first_token_once(llm: LLM) -> None:
    bos = token(llm, "<｜begin▁of▁sentence｜>")
    outputs = llm.generate(["ab", "<｜begin▁of▁sentence｜>ab"], GREEDY)
    assert outputs[0].prompt_token_ids[0] == bos
    assert outputs[0].prompt_token_ids == outputs[1].prompt_token_ids
    assert [output.prompt for output in outputs] == ["ab", "<｜begin▁of▁sentence｜>ab"]
    assert llm.generate([[40, 41]], GREEDY)[0].prompt_token_ids == [40, 41]
    assert llm.generate([[40, 41]], GREEDY)[0].prompt is None


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([[]], "the prompt is empty"),
        ([[5] * 256], r"256 tokens, and max_model_len=256 leaves room for 255"),
        (["a b" * 200], r"max_model_len=256 leaves room for 255 and one of output"),
        ([[5, 320]], r"320, which is no token id; ids are 0 to 319"),
        ([[-1]], r"-1, which is no token id"),
        ([[True]], "True, which is no token id"),
        ([[5, "a"]], "'a', which is no token id"),
        ([[5], []], "the prompt is empty"),
        (["\ud800"], "which is no character"),
    ],
)
def test_prompts_that_the_model_cannot_take(llm: LLM, prompt: list[list[int]], message: str) -> None:
    with pytest.raises(PromptError, match=message):
        llm.generate(prompt, GREEDY)
    assert not llm.engine.has_unfinished_requests()


def test_the_longest_prompt(llm: LLM) -> None:
    output = llm.generate([[5] * 255], GREEDY)[0].outputs[0]
    assert (len(output.token_ids), output.finish_reason) == (1, "length")


def test_one_prompt_is_a_list_of_one_and_none_is_none(llm: LLM) -> None:
    outputs = [llm.generate(prompts, GREEDY) for prompts in ("ab", ["ab"], [40, 41], [[40, 41]], (40, 41), [])]
    assert [len(output) for output in outputs] == [1, 1, 1, 1, 1, 0]
    assert outputs[2][0].outputs == outputs[3][0].outputs == outputs[4][0].outputs


def test_each_prompt_may_have_its_own_parameters(llm: LLM) -> None:
    params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in (1, 2, 3)]
    outputs = llm.generate(["a", "b", "c"], params)
    assert [len(output.outputs[0].token_ids) for output in outputs] == [1, 2, 3]
    with pytest.raises(UsageError, match="2 sampling parameters for 3 prompts"):
        llm.generate(["a", "b", "c"], params[:2])


def test_a_request_id_is_used_once_at_a_time(llm: LLM) -> None:
    llm.engine.add_request("mine", [5], GREEDY)
    with pytest.raises(UsageError, match="'mine' is in use"):
        llm.engine.add_request("mine", [6], GREEDY)
    llm.engine.abort_request("mine")
    llm.engine.add_request("mine", [6], GREEDY)
    output = llm.engine.abort_request("mine")
    assert output is not None
    assert (output.finished, output.prompt_token_ids) == (True, [6])
    assert llm.engine.abort_request("mine") is None


def test_without_a_tokenizer_ids_go_in_and_come_out(launch: Launch, checkpoint: Path, llm: LLM) -> None:
    bare = launch(checkpoint, skip_tokenizer_init=True)
    params = SamplingParams(temperature=0, max_tokens=5, logprobs=1)
    output = bare.generate([[40, 41]], params)[0]
    assert output.outputs[0].token_ids == llm.generate([[40, 41]], params)[0].outputs[0].token_ids
    assert output.outputs[0].text == ""
    with pytest.raises(PromptError, match="text prompt needs the tokenizer"):
        bare.generate("ab")
    with pytest.raises(UsageError, match="stop strings need the tokenizer"):
        bare.generate([[40]], SamplingParams(stop="a"))
    assert not bare.engine.has_unfinished_requests()


def test_a_deterministic_engine_asks_torch_for_it(launch: Launch, checkpoint: Path) -> None:
    assert not torch.are_deterministic_algorithms_enabled()
    try:
        with launch(checkpoint, deterministic=True) as other:
            assert torch.are_deterministic_algorithms_enabled()
            assert other.generate(["def f("], GREEDY)[0].outputs[0].token_ids
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
