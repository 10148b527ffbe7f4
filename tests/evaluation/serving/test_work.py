"""What is asked, and the files that say it."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from random import Random
from typing import Any

import pytest

from npu_zoo.core.errors import UsageError
from npu_zoo.evaluation.serving.datasets import read_dataset, with_answer_lengths
from npu_zoo.evaluation.serving.requests import RequestForm, parse_extra_body
from npu_zoo.evaluation.serving.work import (
    Ask,
    GivenAsks,
    LengthRange,
    RandomIds,
    RandomWords,
    TextLength,
    Workload,
)


def take(workload: Workload, count: int, seed: int = 0) -> list[Ask]:
    return list(itertools.islice(workload.asks(Random(seed)), count))


def test_random_ids_have_the_lengths_that_were_asked_for() -> None:
    workload = RandomIds(LengthRange(3, 9), LengthRange(5, 6), range(100, 110))
    asks = take(workload, 300)
    assert asks == take(workload, 300) != take(workload, 300, seed=1)
    assert {len(ask.prompt) for ask in asks} == set(range(3, 10)) == {ask.asked_prompt_tokens for ask in asks}
    assert {ask.max_tokens for ask in asks} == {5, 6}
    assert {token for ask in asks for token in ask.prompt} == set(range(100, 110))


def test_words_are_as_many_as_the_server_s_count_says() -> None:
    length = TextLength.fitted((8, 8 * 1.5 + 10), (72, 72 * 1.5 + 10))
    (ask,) = take(RandomWords(LengthRange(100, 100), LengthRange(1, 1), length), 1)
    assert isinstance(ask.prompt, str)
    assert len(ask.prompt.split()) == 60
    assert length.words(5) == 1
    assert length.shortest == 12


def test_given_prompts_are_shuffled_once_and_go_on_from_level_to_level() -> None:
    asks = [Ask(str(number)) for number in range(8)]
    workload, same = GivenAsks(asks), GivenAsks(asks)
    first, second = take(workload, 5), take(workload, 6, seed=1)
    assert first == take(same, 5)
    assert sorted(ask.prompt for ask in first + second[:3]) == sorted(ask.prompt for ask in asks)
    assert second[3:] == first[:3]
    assert workload.given == 11


def test_bodies_of_both_routes() -> None:
    turn = [{"role": "user", "content": "hi"}]
    form = RequestForm("chat", "m", ignore_eos=True, include_usage=False, extra_body={"temperature": 1})
    body = json.loads(form.encode(Ask("hi")))
    assert body == {"model": "m", "messages": turn, "temperature": 1, "stream": True, "ignore_eos": True}
    assert json.loads(form.encode(Ask(turn, 7))) == {**body, "max_tokens": 7}
    with pytest.raises(UsageError, match="--endpoint chat"):
        RequestForm("completions", "m").encode(Ask(turn))
    with pytest.raises(UsageError, match="--endpoint completions"):
        form.encode(Ask([32, 14]))


@pytest.mark.parametrize("text", ["{", "[]", "1", '{"n": 2}', '{"stream": false}', '{"prompt": "x"}'])
def test_an_extra_body_that_would_spoil_the_figures(text: str) -> None:
    with pytest.raises(UsageError, match="--extra-body"):
        parse_extra_body(text)


def test_json_lines(tmp_path: Path) -> None:
    file = tmp_path / "work"
    messages = [{"role": "user", "content": "hi"}]
    lines: list[Any] = [{"prompt": "a\u2028b", "max_tokens": 3}, {"messages": messages}, {"prompt": [1, 2]}]
    file.write_text("\ufeff" + "\n\n".join(map(json.dumps, lines)) + "\r\n", encoding="utf-8")
    assert read_dataset(file) == ([Ask("a\u2028b", 3), Ask(messages), Ask([1, 2])], None)


def test_conversations_give_first_turns_and_the_lengths_of_their_answers(tmp_path: Path) -> None:
    file = tmp_path / "sharegpt.json"
    human, gpt = {"from": "human", "value": "hi"}, {"from": "gpt", "value": "x" * 40}
    turns = [[human, gpt, human], [gpt, human], [human], []]
    file.write_text(json.dumps([{"id": "1", "conversations": one} for one in turns]))
    (ask,), left_out = read_dataset(file)
    assert left_out is not None
    assert left_out.startswith("3 of 4 conversations were left out: ")
    assert with_answer_lengths([ask, Ask("b")]) == [Ask("hi", 10, answer="x" * 40), Ask("b")]
    assert with_answer_lengths([ask], 1000.0)[0].max_tokens == 1


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'{"prompt": "a"}\n{"prompt": }', "work:2: no JSON"),
        (b'{"prompt": "a"}\n\n[1]', "work:3: a line is an object"),
        (b'{"text": "a"}', 'work:1: a line is an object with "prompt" or "messages"'),
        (b'{"prompt": "a", "messages": []}', "work:1: a line is an object"),
        (b'{"prompt": ""}', "work:1: prompt is"),
        (b'{"prompt": ["a"]}', "work:1: prompt is"),
        (b'{"prompt": [true]}', "work:1: prompt is"),
        (b'{"messages": ["a"]}', "work:1: messages is"),
        (b'{"messages": []}', "work:1: messages is"),
        (b'{"prompt": "a", "max_tokens": 0}', "work:1: max_tokens is a whole number from 1 on, not 0"),
        (b'{"prompt": "a", "max_tokens": true}', "work:1: max_tokens"),
        (b'[{"conversations": []}, {"text": 1}]', "work, entry 2: it is"),
        (b'[{"conversations": [{"from": "human"}]}]', "work, entry 1: it is"),
        (b'[{"conversations": [', "work: no JSON"),
        (b'[{"conversations": []}]', "1 of 1 conversations were left out"),
        (b"", "holds no prompt"),
        (b"\xff", "not UTF-8 at byte 0"),
        (b'{"prompt": "' + b"[" * 10 + b'"}\n' + b"[" * 10**5, "work:2: no JSON"),
    ],
)
def test_a_file_that_is_none_is_refused_with_the_place(tmp_path: Path, content: bytes, said: str) -> None:
    file = tmp_path / "work"
    file.write_bytes(content)
    with pytest.raises(UsageError) as raised:
        read_dataset(file)
    assert said in str(raised.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot read"):
        read_dataset(tmp_path / "none")
