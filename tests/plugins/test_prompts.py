"""The families' prompts: against the official templates over generated conversations, and literally where none is."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from npu_zoo.core.errors import PromptError
from npu_zoo.core.model_config import PromptFormat, ReasoningFormat
from npu_zoo.engine.tokenizer import Tokenizer
from npu_zoo.plugins.deepseek_moe.prompts import PROMPT as MOE_PROMPT
from npu_zoo.plugins.deepseek_v3.prompts import PROMPT as V3_PROMPT
from npu_zoo.plugins.deepseek_v3.prompts import R1_PROMPT, REASONING, V2_PROMPT
from npu_zoo.plugins.wizardcoder.prompts import PROMPT as WIZARD_PROMPT
from npu_zoo.testing.checkpoints import write_checkpoint

Messages = list[dict[str, str]]
Open = Callable[[PromptFormat], Tokenizer]
BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
PROMPTS = {"moe": MOE_PROMPT, "v2": V2_PROMPT, "v3": V3_PROMPT, "r1": R1_PROMPT, "wizardcoder": WIZARD_PROMPT}

# V2's own tokenizer_config.json is not among the data; its template is that of the earlier model.
OFFICIAL = {
    "moe": ("deepseek-llm-moe", "tokenizer_config.json", MOE_PROMPT),
    "v2": ("deepseek-llm-moe", "tokenizer_config.json", V2_PROMPT),
    "v3": ("deepseek-v3", "tokenizer_config.json", V3_PROMPT),
    "r1": ("deepseek-v3", "deepseek-r1.tokenizer_config.json", R1_PROMPT),
}
MARKERS = ("<think>", "</think>", "<｜User｜>", "<｜Assistant｜>", BOS, EOS, "User: ", "Assistant:", "{{ bos_token }}")
PIECES = (
    "",
    " ",
    "\n",
    "\n\n",
    "  x\t",
    "你好",
    "Führer 🚀👩‍💻",
    "def f():\n    return 1\n",
    "'\"\\",
    "{% if %}",
    *MARKERS,
)

pieces = st.sampled_from(PIECES)
contents = st.one_of(st.lists(pieces, max_size=4).map("".join), st.text(max_size=20), pieces)


@st.composite
def conversations(draw: st.DrawFn) -> Messages:
    """One to four turns, the last of them answered or not, with up to two system messages anywhere."""
    last_answered = draw(st.booleans())
    count = 2 * draw(st.integers(1, 4)) - (not last_answered)
    messages = [{"role": ("user", "assistant")[i % 2], "content": draw(contents)} for i in range(count)]
    for at in draw(st.lists(st.sampled_from([0, 0, 0, count]), max_size=2)):
        messages.insert(at, {"role": "system", "content": draw(contents)})
    return messages


@pytest.fixture(scope="module", params=OFFICIAL)
def pair(
    request: pytest.FixtureRequest, test_data: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Tokenizer, Tokenizer]:
    """A real tokenizer with its official template, and with ours in its place."""
    return open_pair(request.param, test_data, tmp_path_factory.mktemp("tokenizers"))


def open_pair(name: str, test_data: Path, made: Path) -> tuple[Tokenizer, Tokenizer]:
    folder, file, prompt = OFFICIAL[name]
    source = test_data / "tokenizers" / folder
    config = json.loads((source / file).read_text("utf-8"))
    bare = {key: value for key, value in config.items() if key != "chat_template"}
    for case, content in (("official", config), ("own", bare)):
        (made / case).mkdir()
        (made / case / "tokenizer.json").symlink_to(source / "tokenizer.json")
        (made / case / "tokenizer_config.json").write_text(json.dumps(content), "utf-8")
    own = Tokenizer(made / "own", chat_template=prompt.chat_template, chat_template_adds_bos=prompt.adds_bos)
    return Tokenizer(made / "official"), own


@settings(suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
@given(messages=conversations(), add_generation_prompt=st.booleans())
def test_our_template_equals_the_official_one_token_by_token(
    pair: tuple[Tokenizer, Tokenizer], messages: Messages, add_generation_prompt: bool
) -> None:
    official, own = pair
    assert (official.chat_template_source, own.chat_template_source) == ("checkpoint", "family")
    assert own.render_chat(messages, add_generation_prompt) == official.render_chat(messages, add_generation_prompt)
    ids = own.encode_chat(messages, add_generation_prompt)
    assert ids == official.encode_chat(messages, add_generation_prompt)
    spelt = sum(message["content"].count(BOS) for message in messages)
    assert ids[0] == own.bos_token_id
    assert ids.count(ids[0]) <= 1 + spelt


def test_the_official_template_reads_as_transformers_applies_it(pair: tuple[Tokenizer, Tokenizer]) -> None:
    from transformers import PreTrainedTokenizerFast

    official, own = pair
    theirs: Any = PreTrainedTokenizerFast.from_pretrained(official.directory)
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi, 你好"},
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\nHello"},
        {"role": "user", "content": "Once more\n"},
    ]
    for generation in (True, False):
        due = theirs.apply_chat_template(messages, add_generation_prompt=generation, return_dict=False)
        assert own.encode_chat(messages, generation) == due


@pytest.fixture(scope="module")
def open_tiny(tmp_path_factory: pytest.TempPathFactory) -> Open:
    """Opens a tiny tokenizer without a template under a family's prompt."""
    directory = tmp_path_factory.mktemp("tiny")
    markers = ("<｜User｜>", "<｜Assistant｜>", "<think>", "</think>")
    write_checkpoint(directory, bos_token=BOS, eos_token=EOS, added_tokens=markers)
    return lambda prompt: Tokenizer(
        directory, chat_template=prompt.chat_template, chat_template_adds_bos=prompt.adds_bos
    )


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


def system(content: str) -> dict[str, str]:
    return {"role": "system", "content": content}


TURNS = [system("S"), user("u"), assistant("<think>\nt\n</think>a"), user("v")]
ALPACA = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
LITERAL = {
    "moe": f"{BOS}S\n\nUser: u\n\nAssistant: <think>\nt\n</think>a{EOS}User: v\n\nAssistant:",
    "v2": f"{BOS}S\n\nUser: u\n\nAssistant: <think>\nt\n</think>a{EOS}User: v\n\nAssistant:",
    "v3": f"{BOS}S<｜User｜>u<｜Assistant｜><think>\nt\n</think>a{EOS}<｜User｜>v<｜Assistant｜>",
    "r1": f"{BOS}S<｜User｜>u<｜Assistant｜>a{EOS}<｜User｜>v<｜Assistant｜><think>\n",
    "wizardcoder": (
        "S\n\n### Instruction:\nu\n\n### Response:<think>\nt\n</think>a"
        + EOS
        + "\n\n### Instruction:\nv\n\n### Response:"
    ),
}


@pytest.mark.parametrize("name", LITERAL)
def test_several_turns_literally(open_tiny: Open, name: str) -> None:
    assert open_tiny(PROMPTS[name]).render_chat(TURNS) == LITERAL[name]


@pytest.mark.parametrize("name", PROMPTS)
@pytest.mark.parametrize("add_generation_prompt", [True, False])
@pytest.mark.parametrize("messages", [TURNS, TURNS[1:3], TURNS[1:2], [system(""), user("")]])
def test_bos_comes_exactly_once(open_tiny: Open, name: str, add_generation_prompt: bool, messages: Messages) -> None:
    tokenizer = open_tiny(PROMPTS[name])
    assert tokenizer.chat_template_source == "family"
    ids = tokenizer.encode_chat(messages, add_generation_prompt)
    assert ids[0] == tokenizer.bos_token_id
    assert ids.count(ids[0]) == 1


def test_alpaca_prompt_literally(open_tiny: Open) -> None:
    rendered = open_tiny(WIZARD_PROMPT).render_chat([user("Write quicksort.")])
    assert rendered == f"{ALPACA}\n\n### Instruction:\nWrite quicksort.\n\n### Response:"


@pytest.mark.parametrize("instruction", ["", "\n", " x ", "{{ bos_token }}", "### Response:", "你好 🚀", "<b>&amp;'\""])
def test_alpaca_prompt_takes_the_instruction_as_it_is(open_tiny: Open, instruction: str) -> None:
    rendered = open_tiny(WIZARD_PROMPT).render_chat([user(instruction)])
    assert rendered == f"{ALPACA}\n\n### Instruction:\n{instruction}\n\n### Response:"


def test_alpaca_turns_repeat_the_headings_and_end_each_answer(open_tiny: Open) -> None:
    tokenizer = open_tiny(WIZARD_PROMPT)
    answered = f"{ALPACA}\n\n### Instruction:\nu\n\n### Response:a{EOS}"
    assert tokenizer.render_chat([user("u"), assistant("a")], add_generation_prompt=False) == answered
    continued = tokenizer.render_chat([user("u"), assistant("a"), user("v")])
    assert continued == f"{answered}\n\n### Instruction:\nv\n\n### Response:"
    first = tokenizer.encode_chat([user("u")])
    ids = tokenizer.encode_chat([user("u"), assistant("a"), user("v")])
    assert ids[: len(first)] == first
    assert ids.count(tokenizer.eos_token_ids[0]) == 1


def test_alpaca_system_messages_stand_in_the_preambles_place(open_tiny: Open) -> None:
    tokenizer = open_tiny(WIZARD_PROMPT)
    one = tokenizer.render_chat([system("Answer in C."), user("u")])
    assert one == "Answer in C.\n\n### Instruction:\nu\n\n### Response:"
    two = tokenizer.render_chat([system("A"), system("B"), user("u")])
    assert two == "A\nB\n\n### Instruction:\nu\n\n### Response:"


def test_r1_history_keeps_what_follows_the_last_end_of_reasoning(open_tiny: Open) -> None:
    answers = {"a": "a", "t</think>a": "a", "<think>t</think>a</think>b": "b", "t</think>": "", "<think>t": "<think>t"}
    for said, kept in answers.items():
        rendered = open_tiny(R1_PROMPT).render_chat([user("u"), assistant(said)], add_generation_prompt=False)
        assert rendered == f"{BOS}<｜User｜>u<｜Assistant｜>{kept}{EOS}"


CALL = {"type": "function", "function": {"name": "f", "arguments": "{}"}}
ANSWER: dict[str, Any] = {"role": "tool", "content": "42"}
CALLING: dict[str, Any] = {"role": "assistant", "content": None, "tool_calls": [CALL]}


@pytest.mark.parametrize("message", [ANSWER, CALLING, {**CALLING, "content": "a"}])
def test_tools_are_refused_and_not_left_out(open_tiny: Open, message: dict[str, Any]) -> None:
    with pytest.raises(PromptError, match="chat template refuses"):
        open_tiny(PROMPTS["wizardcoder"]).render_chat([user("u"), message])


@pytest.mark.parametrize(("name", "opening", "between"), [("v3", "", "\n"), ("r1", "<think>\n", "")])
def test_calls_and_what_came_of_them_literally(open_tiny: Open, name: str, opening: str, between: str) -> None:
    call = "<｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n```json\n{}\n```<｜tool▁call▁end｜>"
    calls = f"<｜tool▁calls▁begin｜>{call}\n{call}<｜tool▁calls▁end｜>{EOS}"
    output = "<｜tool▁output▁begin｜>42<｜tool▁output▁end｜>"
    outputs = f"<｜tool▁outputs▁begin｜>{output}{between}{output}<｜tool▁outputs▁end｜>"
    both = {"role": "assistant", "content": "look", "tool_calls": [CALL, CALL]}
    messages: list[Any] = [user("u"), both, ANSWER, ANSWER]
    tokenizer = open_tiny(PROMPTS[name])
    due = f"{BOS}<｜User｜>u<｜Assistant｜>look{calls}{outputs}"
    assert tokenizer.render_chat(messages) == due
    assert tokenizer.render_chat([*messages, assistant("a")], add_generation_prompt=False) == f"{due}a{EOS}"
    assert tokenizer.render_chat([*messages, user("v")]).endswith(f"{output}<｜User｜>v<｜Assistant｜>{opening}")


call_lists = st.lists(
    st.builds(
        lambda name, arguments: {"type": "function", "function": {"name": name, "arguments": arguments}},
        st.sampled_from(["f", "get_weather"]),
        st.sampled_from(["{}", '{"city": "Köln"}', '{"a": [1, {"b": null}]}']),
    ),
    min_size=1,
    max_size=3,
)
tool_turns = st.builds(
    lambda text, calls, results: [
        {"role": "assistant", "content": text, "tool_calls": calls},
        *({"role": "tool", "content": result} for result in results),
    ],
    st.none() | contents,
    call_lists,
    st.lists(contents, max_size=3),
)
spoken = st.builds(
    lambda role, text: [{"role": role, "content": text}], st.sampled_from(["user", "assistant"]), contents
)
tool_conversations = st.lists(spoken | tool_turns, min_size=1, max_size=6).map(
    lambda turns: list(itertools.chain(*turns))
)


@pytest.fixture(scope="module")
def r1_pair(test_data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Tokenizer]:
    return open_pair("r1", test_data, tmp_path_factory.mktemp("r1"))


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(messages=tool_conversations, add_generation_prompt=st.booleans())
def test_calls_stand_in_the_history_as_r1_s_own_template_has_them(
    r1_pair: tuple[Tokenizer, Tokenizer], messages: list[dict[str, Any]], add_generation_prompt: bool
) -> None:
    official, own = r1_pair
    assert own.render_chat(messages, add_generation_prompt) == official.render_chat(messages, add_generation_prompt)


SPLITS: list[tuple[str, bool, tuple[str, str]]] = [
    ("<think>t</think>a", False, ("t", "a")),
    ("\n<think>\nt\n</think>\n\na", False, ("\nt\n", "\n\na")),
    ("t</think>a", False, ("t", "a")),
    ("t</think>a", True, ("t", "a")),
    ("<think>t</think>a", True, ("t", "a")),
    ("<think></think>a", False, ("", "a")),
    ("</think>a", True, ("", "a")),
    ("<think>t</think>", False, ("t", "")),
    # Cut off inside the reasoning.
    ("<think>t", False, ("t", "")),
    ("<think>", False, ("", "")),
    ("t", True, ("t", "")),
    ("<think>t", True, ("t", "")),
    ("", True, ("", "")),
    ("<think>t</thin", False, ("t</thin", "")),
    # Without reasoning.
    ("a", False, ("", "a")),
    ("", False, ("", "")),
    ("a says <think> b", False, ("", "a says <think> b")),
    # The last end closes, as it does in a conversation's history.
    ("<think>t</think>u</think>a", False, ("t</think>u", "a")),
    ("t</think>u</think>a", True, ("t</think>u", "a")),
    # The prompt opened the reasoning, and the marker that the text spells is part of it.
    ("t says <think> u</think>a", True, ("t says <think> u", "a")),
    ("t says <think> u", True, ("t says <think> u", "")),
]


@pytest.mark.parametrize(("text", "opened", "expected"), SPLITS)
def test_reasoning_is_split_from_the_answer(text: str, opened: bool, expected: tuple[str, str]) -> None:
    assert REASONING.split(text, opened=opened) == expected


def test_other_markers_split_alike() -> None:
    reasoning = ReasoningFormat(start="[[", end="]]")
    assert reasoning.split("[[t]]a") == ("t", "a")
    assert reasoning.split("<think>t</think>a") == ("", "<think>t</think>a")


@given(thought=st.text(), answer=st.text())
def test_a_split_loses_nothing(thought: str, answer: str) -> None:
    assert REASONING.split(f"<think>{thought}</think>{answer}") == (thought, answer)
    assert REASONING.split(f"{thought}</think>{answer}", opened=True) == (thought, answer)


@given(pieces=st.lists(st.sampled_from(["<think>", "</think>", "a", " ", "\n"]), max_size=8))
def test_the_answer_is_what_r1_keeps_in_the_history(pieces: list[str]) -> None:
    text = "".join(pieces)
    if "</think>" in text:
        assert REASONING.split(text)[1] == text.split("</think>")[-1]


def test_a_history_without_its_reasoning_renders_as_r1s_template_would_leave_it(open_tiny: Open) -> None:
    tokenizer = open_tiny(R1_PROMPT)
    messages = [system("</think>S"), user("<think>u</think>v"), assistant("t</think>a"), user("w"), assistant("b")]
    stripped = REASONING.without_reasoning(messages)
    assert [message["content"] for message in stripped] == ["</think>S", "<think>u</think>v", "a", "w", "b"]
    assert tokenizer.render_chat(stripped) == tokenizer.render_chat(messages)
