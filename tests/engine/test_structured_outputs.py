"""Outputs that have to keep a form: held against Python's own readers of the same forms."""

from __future__ import annotations

import itertools
import json
import re
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest

from npu_zoo import LLM, SamplingParams
from npu_zoo.api import ReasoningFormat
from npu_zoo.core.engine import CompletionOutput
from npu_zoo.core.errors import UsageError
from npu_zoo.core.sampling import StructuredOutputs

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 3},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
REGEX = r"[a-f]{2,4}-(yes|no)-\d{3}"
CHOICES = ("alpha", 'with "quotes"\nand a line', "é｜", "al")
GRAMMAR = 'start: "f(" NUMBER ("," NUMBER)? ")"\nNUMBER: /[0-9]{1,3}/'


def keeps(form: StructuredOutputs, text: str) -> bool:
    if form.json is not None:
        return bool(jsonschema_rs.is_valid(json.loads(form.json), json.loads(text)))
    if form.json_object:
        return isinstance(json.loads(text), dict)
    if form.regex is not None:
        return re.fullmatch(form.regex, text) is not None
    if form.choice:
        return text in form.choice
    return re.fullmatch(r"f\([0-9]{1,3}(,[0-9]{1,3})?\)", text) is not None


FORMS = {
    "json": StructuredOutputs(json=json.dumps(SCHEMA)),
    "regex": StructuredOutputs(regex=REGEX),
    "choice": StructuredOutputs(choice=CHOICES),
    "grammar": StructuredOutputs(grammar=GRAMMAR),
}
PARAMS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "seeded": {"seed": 5, "n": 3},
    "penalties": {"temperature": 0, "repetition_penalty": 1.5, "presence_penalty": 1},
    "longer than it can be": {"temperature": 0, "min_tokens": 150},
    "no end of text": {"seed": 9, "ignore_eos": True},
    "narrow": {"seed": 1, "top_k": 3, "top_p": 0.5, "min_p": 0.1},
}


def complete(llm: LLM, form: StructuredOutputs, **params: Any) -> list[CompletionOutput]:
    sampling = SamplingParams(**{"max_tokens": 180, "structured_outputs": form, **params})
    return llm.generate("def f(x):", sampling)[0].outputs


@pytest.mark.parametrize("params", PARAMS.values(), ids=PARAMS)
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_an_output_keeps_its_form(llm: LLM, form: StructuredOutputs, params: dict[str, Any]) -> None:
    for output in complete(llm, form, **params):
        assert output.finish_reason == "stop"
        assert keeps(form, output.text)


def test_any_json_object(llm: LLM) -> None:
    form = StructuredOutputs(json_object=True)
    outputs = [complete(llm, form, seed=seed, logit_bias={})[0] for seed in range(4)]
    finished = [output for output in outputs if output.finish_reason == "stop"]
    assert all(keeps(form, output.text) for output in finished)
    assert all(output.text.lstrip().startswith("{") for output in outputs)


def test_forms_do_not_depend_on_what_runs_beside_them(llm: LLM) -> None:
    params = [SamplingParams(temperature=0, max_tokens=120, structured_outputs=form) for form in FORMS.values()]
    params.append(SamplingParams(temperature=0, max_tokens=120))
    together = [output.outputs[0].token_ids for output in llm.generate(["def f(x):"] * len(params), params)]
    alone = [llm.generate("def f(x):", one)[0].outputs[0].token_ids for one in params]
    assert together == alone


def test_a_form_survives_preemption(launch: Callable[..., LLM], checkpoint: Path) -> None:
    prompts = ["def f(x):" * repeat for repeat in (1, 3, 5, 7)]
    form = StructuredOutputs(regex="([a-f]{3}-){20}end")
    params = SamplingParams(temperature=0, max_tokens=150, structured_outputs=form)
    with launch(checkpoint, kv_cache_memory=20 * 16 * 512) as small, launch(checkpoint) as large:
        outputs = small.generate(prompts, params)
        assert small.engine.stats().num_preemptions > 0
        expected = large.generate(prompts, params)
    assert [o.outputs[0].token_ids for o in outputs] == [o.outputs[0].token_ids for o in expected]
    assert all(keeps(form, o.outputs[0].text) for o in outputs)


def test_a_limit_cuts_a_form_off_and_says_so(llm: LLM) -> None:
    output = complete(llm, StructuredOutputs(regex="a{100}b{100}"), temperature=0, max_tokens=2)[0]
    assert (output.finish_reason, set(output.text) <= {"a", "b"}) == ("length", True)


def test_a_form_that_ends_with_the_last_token_is_whole(llm: LLM) -> None:
    whole = complete(llm, FORMS["choice"], temperature=0)[0]
    cut = complete(llm, FORMS["choice"], temperature=0, max_tokens=len(whole.token_ids))[0]
    assert (cut.text, cut.finish_reason) == (whole.text, "stop")


def test_a_form_begins_after_the_reasoning(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = llm.generate("def f(x):", SamplingParams(temperature=0, max_tokens=40, ignore_eos=True))[0].outputs[0].text
    end = plain[10:14]
    start = plain.index(end) + len(end)
    reasoning = ReasoningFormat(start="f(x):", end=end)
    object.__setattr__(llm.engine.config, "reasoning", reasoning)
    try:
        output = complete(llm, FORMS["regex"], temperature=0, ignore_eos=True)[0]
    finally:
        object.__setattr__(llm.engine.config, "reasoning", None)
    assert output.text[:start] == plain[:start]
    assert any(keeps(FORMS["regex"], output.text[cut:]) for cut in range(start, len(output.text)))


FAULTS = {
    "regex that does not parse": (StructuredOutputs(regex="(ab"), "regex"),
    "nested regex": (StructuredOutputs(regex="(" * 20000 + "a" + ")" * 20000), "regex"),
    "schema that is no JSON": (StructuredOutputs(json='{"type": '), "json"),
    "schema of another type": (StructuredOutputs(json='"text"'), "json"),
    "schema that nothing meets": (StructuredOutputs(json='{"$ref": "#"}'), "json"),
    "schema from elsewhere": (StructuredOutputs(json='{"$ref": "http://127.0.0.1:9/schema"}'), "json"),
    "nested schema": (StructuredOutputs(json='{"not":' * 5000 + "{}" + "}" * 5000), "json"),
    "schema that explodes": (
        StructuredOutputs(
            json=json.dumps(
                {
                    "allOf": [
                        {
                            "anyOf": [
                                {
                                    "type": "object",
                                    "properties": {f"{i}.{j}": {"type": "string"}},
                                    "required": [f"{i}.{j}"],
                                }
                                for j in range(20)
                            ]
                        }
                        for i in range(12)
                    ]
                }
            )
        ),
        "json",
    ),
    "schema that is false": (StructuredOutputs(json="false"), "json"),
    "repetitions of what may be empty": (StructuredOutputs(regex="a*" * 30_000), "regex"),
    "longer than any": (StructuredOutputs(grammar="start: " + "a" * 600_000), "grammar"),
    "unknown rule": (StructuredOutputs(grammar="start: nothing"), "grammar"),
    "nested grammar": (StructuredOutputs(grammar="start: " + "(" * 20000 + '"a"' + ")" * 20000), "grammar"),
}


@pytest.mark.parametrize(("form", "kind"), FAULTS.values(), ids=FAULTS)
def test_forms_that_cannot_be_kept_are_refused(llm: LLM, form: StructuredOutputs, kind: str) -> None:
    with pytest.raises(UsageError, match=f"structured_outputs.{kind} cannot be used: ") as caught:
        complete(llm, form)
    assert len(str(caught.value)) < 500
    assert not llm.engine.has_unfinished_requests()
    assert complete(llm, FORMS["regex"], temperature=0)[0].finish_reason == "stop"


def test_a_schema_may_be_true(llm: LLM) -> None:
    for seed in range(4):
        output = complete(llm, StructuredOutputs(json="true"), seed=seed, max_tokens=60)[0]
        assert output.text
        assert output.finish_reason == "length" or json.dumps(json.loads(output.text))


def chain(length: int) -> StructuredOutputs:
    """Rules that each lead to the next one; more of them than a thread's usual stack has room for."""
    names = ["".join(letters) for letters in itertools.product("abcdefghijklmnopqrstuvwxyz", repeat=3)][:length]
    rules = [f'{name}: "a" {following} | "b"' for name, following in itertools.pairwise(names)]
    return StructuredOutputs(grammar="\n".join([f"start: {names[0]}", *rules, f'{names[-1]}: "c"']))


def test_rules_may_lead_far(llm: LLM) -> None:
    output = complete(llm, chain(4000), temperature=0, max_tokens=20)[0]
    assert re.fullmatch("a*b?", output.text)


def test_threads_share_a_guide_maker(llm: LLM) -> None:
    guides = llm.engine.prompts.guides  # type: ignore[attr-defined]
    forms = [StructuredOutputs(regex=f"[a-f]{{{number}}}") for number in range(1, 60)] * 3
    with ThreadPoolExecutor(8) as threads:
        masks = list(threads.map(lambda form: guides.make(form).mask(), forms))
    assert masks[: len(masks) // 3] * 3 == masks
    assert all(any(mask) for mask in masks)


def test_exactly_one_form_is_given() -> None:
    with pytest.raises(UsageError, match="has none of them"):
        StructuredOutputs()
    with pytest.raises(UsageError, match="has json_object and regex"):
        StructuredOutputs(json_object=True, regex="a")
    with pytest.raises(UsageError, match="choice holds an empty string"):
        StructuredOutputs(choice=("a", ""))


def test_a_biased_token_is_taken_or_never_taken(llm: LLM) -> None:
    params = {"temperature": 0, "max_tokens": 8, "ignore_eos": True}
    plain = llm.generate("def f(x):", SamplingParams(**params))[0].outputs[0].token_ids
    banned = dict.fromkeys(set(plain), -100)
    without = llm.generate("def f(x):", SamplingParams(**params, logit_bias=banned))[0].outputs[0].token_ids
    assert not set(without) & set(banned)
    wanted = next(token for token in itertools.count(5) if token not in plain)
    only = llm.generate("def f(x):", SamplingParams(**params, logit_bias={wanted: 100, 10**6: 5}))[0].outputs[0]
    assert only.token_ids == [wanted] * 8


@pytest.mark.parametrize("bias", [{1: 101.0}, {-1: 1.0}, {1: float("nan")}, {"1": 1.0}, [1]])
def test_a_bias_out_of_range_is_refused(bias: Any) -> None:
    with pytest.raises(UsageError, match="logit_bias"):
        SamplingParams(logit_bias=bias)


def test_a_choice_may_be_of_thousands(llm: LLM) -> None:
    texts = tuple(f"name {number}" for number in range(3000))
    output = complete(llm, StructuredOutputs(choice=texts), seed=3)[0]
    assert (output.finish_reason, output.text in texts) == ("stop", True)


def test_a_form_that_takes_too_long_ends_its_output_alone(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = itertools.count()
    monkeypatch.setattr(time, "thread_time", lambda: float(next(seconds)))
    slow = SamplingParams(temperature=0, max_tokens=100, structured_outputs=StructuredOutputs(regex="[a-f]{200}"))
    plain = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    ended, beside = (output.outputs[0] for output in llm.generate(["def f(x):"] * 2, [slow, plain]))
    assert ended.finish_reason == "error"
    assert "took more than 50 ms each" in str(ended.stop_reason)
    assert (beside.finish_reason, len(beside.token_ids)) == ("length", 40)
