"""``chat``: a conversation at the terminal."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from npu_zoo.cli.interrupts import interrupt_flag
from npu_zoo.cli.options import request_options
from npu_zoo.cli.output import faint, note
from npu_zoo.cli.progress import LoadingProgress
from npu_zoo.cli.results import printable
from npu_zoo.core.errors import NpuZooError
from npu_zoo.core.sampling import SamplingParams
from npu_zoo.dispatch import resolve
from npu_zoo.parallel.processes import exit_on_sigterm
from npu_zoo.settings import Settings

if TYPE_CHECKING:
    from npu_zoo.core.engine import RequestOutput
    from npu_zoo.core.model_config import ReasoningFormat
    from npu_zoo.engine.llm import LLM

DEFAULTS: dict[str, Any] = {"temperature": 0.7, "top_p": 0.95, "max_tokens": 512}
PROMPT = "> "
HELP = """\
/system TEXT   set the system message (without TEXT: remove it) and start over
/clear         forget the conversation
/exit          end; so does the end of input (Ctrl-D)
/help          show this
Ctrl-C stops an answer and keeps what has come of it."""


@request_options(engine=True, sampling=DEFAULTS, without=("n", "logprobs", "prompt_logprobs"))
def chat(
    settings: Settings,
    system: str | None = typer.Option(None, "--system", help="System message.", rich_help_panel="Prompts"),
) -> None:
    """Talk with a model; /help lists the commands of the conversation."""
    sampling_params = dataclasses.replace(settings.sampling_params(**DEFAULTS), n=1)
    config = resolve(settings.args)
    for text in config.notes:
        note(text)
    if not config.chat:
        note(f"{config.model} is not tuned for conversation; its answers may not be any")
    from npu_zoo.engine.llm import LLM

    with exit_on_sigterm(), LoadingProgress() as loading:
        llm = LLM.from_config(config, progress=loading)
    with exit_on_sigterm(), llm:
        if sys.stdin.isatty():
            print(f"{config.model} on {config.hardware}; /help lists commands, Ctrl-D ends")
        Conversation(llm, sampling_params, system).loop(_reader())


class ShownAnswer:
    """An answer as it grows, its reasoning told apart: dim at a terminal, plain elsewhere.

    Attributes:
        answer: what goes into the history: the text without its reasoning.
    """

    def __init__(self, reasoning: ReasoningFormat | None) -> None:
        self.answer = ""
        self._reasoning = reasoning
        self._text = ""

    def take(self, output: RequestOutput) -> str:
        """What is to be printed for a further state of the output."""
        text, opened = output.outputs[0].text, output.reasoning_open
        new, self._text = text[len(self._text) :], text
        if self._reasoning is None:
            self.answer = text
            return printable(new)
        self.answer = self._reasoning.split(text, opened=opened)[1]
        within = len(new) - min(len(new), len(self.answer))
        return faint(printable(new[:within])) + printable(new[within:])


class Conversation:
    """Turns of a conversation, and the loop that takes and answers them."""

    def __init__(self, llm: LLM, sampling_params: SamplingParams, system: str | None = None) -> None:
        self.llm = llm
        self.sampling_params = sampling_params
        self.system = system
        self.messages: list[dict[str, str]] = []
        self._over = False

    def loop(self, read_line: Callable[[], str]) -> None:
        """Read and answer until the end of input or ``/exit``."""
        interrupts = 0
        while not self._over:
            try:
                line = read_line().strip()
            except EOFError:
                print()
                return
            except KeyboardInterrupt:
                interrupts += 1
                print("\n(/exit or Ctrl-D ends)" if interrupts > 1 else "", flush=True)
                continue
            interrupts = 0
            self._take(line)

    def _take(self, line: str) -> None:
        if line.startswith("/"):
            self._command(line)
        elif line:
            try:
                self._answer(line)
            except NpuZooError as error:
                self.messages.pop()
                print(f"error: {error}", file=sys.stderr)

    def _command(self, line: str) -> None:
        name, _, rest = line.partition(" ")
        if name == "/exit":
            self._over = True
        elif name == "/clear":
            self.messages.clear()
            print("(the conversation is forgotten)")
        elif name == "/system":
            self.system = rest.strip() or None
            self.messages.clear()
            print("(system message set)" if self.system else "(no system message)")
        elif name == "/help":
            print(HELP)
        else:
            print(f"there is no command {name}; /help lists them", file=sys.stderr)

    def _answer(self, text: str) -> None:
        """Answer a message; what came before an interrupt stays in the history."""
        self.messages.append({"role": "user", "content": text})
        dropped = self._shorten()
        if dropped:
            print(f"(the {dropped} oldest message(s) no longer fit and are forgotten)", file=sys.stderr)
        shown = ShownAnswer(self.llm.engine.config.reasoning)
        with interrupt_flag() as interrupted, contextlib.closing(self._stream()) as outputs:
            for output in outputs:
                print(shown.take(output), end="", flush=True)
                if interrupted():
                    break
        print("\n(stopped)" if interrupted() else "", flush=True)
        self.messages.append({"role": "assistant", "content": shown.answer})

    def _stream(self) -> Any:
        return self.llm.stream_chat(self._history(), self.sampling_params)

    def _history(self) -> list[dict[str, str]]:
        system = [{"role": "system", "content": self.system}] if self.system else []
        return system + self.messages

    def _shorten(self) -> int:
        """Drop the oldest turns until the conversation and an answer fit; returns how many messages went."""
        limit = self.llm.engine.config.max_model_len
        room = min(self.sampling_params.max_tokens or limit, limit // 4)
        dropped = 0
        while len(self.messages) > 1 and len(self.llm.engine.render_chat(self._history())) + room > limit:
            del self.messages[:2]
            dropped += 2
        return dropped


def _reader() -> Callable[[], str]:
    """Line editing with history at a terminal, plain lines elsewhere."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        return input
    from prompt_toolkit import PromptSession

    session: PromptSession[str] = PromptSession(history=_history())
    return lambda: session.prompt(PROMPT)


def _history() -> Any:
    """The lines of earlier sessions, kept in a file that only the user can read; in memory where that fails."""
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    state = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    path = Path(state).expanduser() / "npu-zoo" / "chat-history"
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.touch(mode=0o600)
    except OSError:
        return InMemoryHistory()
    return FileHistory(str(path))
