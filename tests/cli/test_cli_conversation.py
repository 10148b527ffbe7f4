from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import typer

from npu_zoo.cli.answers import GrowingAnswer, LocalAnswerer
from npu_zoo.cli.chat import Conversation, _talk
from npu_zoo.core.engine import CompletionOutput, RequestMetrics, RequestOutput
from npu_zoo.core.errors import EngineError, PromptError
from npu_zoo.core.model_config import ReasoningFormat
from npu_zoo.core.sampling import SamplingParams

LIMIT = 40


class ParrotLLM:
    """Says the last message back letter by letter; a conversation is as long as its contents together."""

    def __init__(self) -> None:
        self.engine = SimpleNamespace(
            config=SimpleNamespace(max_model_len=LIMIT, reasoning=None, model="parrot", hardware="cpu"),
            render_chat=self.render,
        )
        self.seen: list[list[dict[str, Any]]] = []
        self.interrupt_at: int | None = None
        self.fail_at: int | None = None
        self.closed = 0
        self.opened = False

    def render(self, messages: Sequence[dict[str, Any]]) -> list[int]:
        return [0] * sum(len(message["content"]) for message in messages)

    def stream_chat(self, messages: Sequence[dict[str, Any]], params: SamplingParams) -> Iterator[RequestOutput]:
        self.seen.append(list(messages))
        if len(self.render(messages)) > LIMIT:
            raise PromptError("too long")
        return self._stream(messages[-1]["content"])

    def _stream(self, text: str) -> Iterator[RequestOutput]:
        try:
            for end in range(1, len(text) + 1):
                if end == self.interrupt_at:
                    os.kill(os.getpid(), signal.SIGINT)
                if end == self.fail_at:
                    raise EngineError("a rank died")
                output = CompletionOutput(0, text[:end])
                done = end == len(text)
                yield RequestOutput("0", None, [], [output], done, RequestMetrics(0.0), reasoning_open=self.opened)
        finally:
            self.closed += 1


def talk(llm: ParrotLLM, *lines: str | type[BaseException], system: str | None = None) -> Conversation:
    given = iter(lines)

    def read_line() -> str:
        line = next(given, EOFError)
        if isinstance(line, str):
            return line
        raise line

    conversation = Conversation(LocalAnswerer(llm, SamplingParams(max_tokens=4)), system)  # type: ignore[arg-type]
    conversation.loop(read_line)
    return conversation


def contents(messages: Sequence[dict[str, Any]]) -> list[str]:
    return [message["content"] for message in messages]


def test_at_a_terminal_a_failed_answer_fails_no_conversation(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = iter(["too long " * LIMIT])

    def read_line() -> str:
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("npu_zoo.cli.chat._reader", lambda: read_line)
    answerer = LocalAnswerer(ParrotLLM(), SamplingParams(max_tokens=4))  # type: ignore[arg-type]
    monkeypatch.setattr("sys.stdin", SimpleNamespace(isatty=lambda: True))
    _talk(answerer, None)
    lines = iter(["too long " * LIMIT])
    monkeypatch.setattr("sys.stdin", SimpleNamespace(isatty=lambda: False))
    with pytest.raises(typer.Exit):
        _talk(answerer, None)


def test_turns_pile_up_until_the_end_of_input(capsys: pytest.CaptureFixture[str]) -> None:
    llm = ParrotLLM()
    conversation = talk(llm, "one", "", "two")
    assert contents(conversation.messages) == ["one", "one", "two", "two"]
    assert [message["role"] for message in llm.seen[1]] == ["user", "assistant", "user"]
    assert capsys.readouterr().out == "one\ntwo\n\n"


def test_exit_ends_and_clear_forgets(capsys: pytest.CaptureFixture[str]) -> None:
    llm = ParrotLLM()
    talk(llm, "one", "/clear", "two", "/exit", "three")
    assert [contents(seen) for seen in llm.seen] == [["one"], ["two"]]


def test_the_system_message_comes_first_and_starts_over() -> None:
    llm = ParrotLLM()
    talk(llm, "one", "/system be brief", "two", "/system", "three", system="old")
    assert [contents(seen) for seen in llm.seen] == [["old", "one"], ["be brief", "two"], ["three"]]
    assert llm.seen[0][0]["role"] == "system"


def test_help_and_unknown_commands_are_no_messages(capsys: pytest.CaptureFixture[str]) -> None:
    llm = ParrotLLM()
    talk(llm, "/help", "/exot")
    captured = capsys.readouterr()
    assert "/clear" in captured.out
    assert "there is no command /exot" in captured.err
    assert llm.seen == []


def test_an_interrupt_stops_the_answer_and_keeps_what_came(capsys: pytest.CaptureFixture[str]) -> None:
    llm = ParrotLLM()
    llm.interrupt_at = 3
    conversation = talk(llm, "abcdef")
    assert contents(conversation.messages) == ["abcdef", "abc"]
    assert "abc\n(stopped)" in capsys.readouterr().out
    assert llm.closed == 1
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_interrupt_at_the_prompt_clears_the_line_and_a_second_one_tells_how_to_end(
    capsys: pytest.CaptureFixture[str],
) -> None:
    llm = ParrotLLM()
    talk(llm, KeyboardInterrupt, "a", KeyboardInterrupt, KeyboardInterrupt)
    first, _, second = capsys.readouterr().out.partition("a\n")
    assert "/exit" not in first
    assert second.count("/exit") == 1


def test_the_oldest_turns_go_when_the_conversation_no_longer_fits(capsys: pytest.CaptureFixture[str]) -> None:
    llm = ParrotLLM()
    conversation = talk(llm, "a" * 10, "b" * 10, "c" * 10, system="s")
    assert [contents(seen) for seen in llm.seen] == [
        ["s", "a" * 10],
        ["s", "a" * 10, "a" * 10, "b" * 10],
        ["s", "b" * 10, "b" * 10, "c" * 10],
    ]
    assert len(conversation.messages) == 4
    assert "the 2 oldest message(s) no longer fit" in capsys.readouterr().err


def test_a_message_that_never_fits_is_refused_and_forgotten(capsys: pytest.CaptureFixture[str]) -> None:
    llm = ParrotLLM()
    conversation = talk(llm, "x" * 50, "y")
    assert "error: too long" in capsys.readouterr().err
    assert contents(conversation.messages) == ["y", "y"]


@pytest.mark.parametrize(
    ("said", "opened", "kept"),
    [
        ("<think>why</think>so", False, "so"),
        ("why</think>so", True, "so"),
        ("<think>cut off", False, ""),
        ("cut off", True, ""),
        ("no reason", False, "no reason"),
    ],
)
def test_reasoning_is_shown_and_stays_out_of_the_history(
    said: str, opened: bool, kept: str, capsys: pytest.CaptureFixture[str]
) -> None:
    llm = ParrotLLM()
    llm.engine.config.reasoning = ReasoningFormat(start="<think>", end="</think>")
    llm.opened = opened
    conversation = talk(llm, said)
    assert contents(conversation.messages) == [said, kept]
    assert capsys.readouterr().out == f"{said}\n\n"


def test_reasoning_is_told_apart_while_it_grows() -> None:
    growing = GrowingAnswer(ReasoningFormat(start="<think>", end="</think>"))
    states = ["<think>a", "<think>ab</think>", "<think>ab</think>c", "<think>ab</think>cd"]
    outputs = [RequestOutput("0", None, [], [CompletionOutput(0, s)], False, RequestMetrics(0.0)) for s in states]
    grown = [growing.take(output) for output in outputs]
    assert [state.reasoning for state in grown] == ["<think>a", "b</think>", "", ""]
    assert [state.text for state in grown] == ["", "", "c", "d"]
    assert grown[-1].answer == "cd"


def test_reasoning_is_dim_at_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    llm = ParrotLLM()
    llm.engine.config.reasoning = ReasoningFormat(start="<", end=">")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.delenv("NO_COLOR", raising=False)
    talk(llm, "<a>b")
    dim = "".join(f"\033[2m{letter}\033[22m" for letter in "<a>")
    assert capsys.readouterr().out == f"{dim}b\n\n"


def test_an_error_in_the_middle_keeps_what_came(capsys: pytest.CaptureFixture[str]) -> None:
    llm = ParrotLLM()
    llm.fail_at = 3
    conversation = talk(llm, "abcdef", "x")
    assert contents(conversation.messages) == ["abcdef", "ab", "x", "x"]
    captured = capsys.readouterr()
    assert "error: a rank died; what came of the answer is kept" in captured.err
    assert captured.out == "ab\nx\n\n"
