"""``chat``: a conversation at the terminal."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import typer

from npu_zoo.cli.answers import Answerer, AnswerState, ConversationTooLongError, LocalAnswerer
from npu_zoo.cli.interrupts import InterruptFlag, interrupt_flag
from npu_zoo.cli.options import request_options
from npu_zoo.cli.output import faint, note
from npu_zoo.cli.progress import LoadingProgress
from npu_zoo.cli.results import printable
from npu_zoo.core.errors import NpuZooError, UsageError
from npu_zoo.dispatch import resolve
from npu_zoo.parallel.processes import exit_on_sigterm
from npu_zoo.settings import Settings, option_name

DEFAULTS: dict[str, Any] = {"temperature": 0.7, "top_p": 0.95, "max_tokens": 512}
API_KEY = "NPU_ZOO_API_KEY"
PROMPT = "> "
_OPTION = "option "  # what Settings.origins begins with for an option of this command line
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
    server: str | None = typer.Option(
        None,
        "--server",
        metavar="URL",
        help="Talk with a running server of OpenAI's API; --model is its name there then.",
        rich_help_panel="Server",
    ),
    api_key_env: str | None = typer.Option(
        None,
        "--api-key-env",
        metavar="VARIABLE",
        help=f"The environment variable with the server's API key. Default: {API_KEY}.",
        rich_help_panel="Server",
    ),
) -> None:
    """Talk with a model, here or behind a server; /help lists the commands of the conversation.

    Where standard input is no terminal, it ends with 1 if an answer failed.
    """
    if server is not None:
        _require_server_options(settings)
        from npu_zoo.cli.server_answers import OpenAIServer, ServerAnswerer

        model = settings.args.model if settings.origins["model"].startswith(_OPTION) else None
        client = OpenAIServer(server, _api_key(api_key_env))
        _talk(ServerAnswerer(client, model, settings.sampling), system)
        return
    if api_key_env is not None:
        raise UsageError("--api-key-env goes with --server; a model that runs here needs no key")
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
        _talk(LocalAnswerer(llm, sampling_params), system)


def _talk(answerer: Answerer, system: str | None) -> None:
    if sys.stdin.isatty():
        print(f"{answerer.title}; /help lists commands, Ctrl-D ends")
    conversation = Conversation(answerer, system)
    conversation.loop(_reader())
    if conversation.failed and not sys.stdin.isatty():
        raise typer.Exit(1)


def _require_server_options(settings: Settings) -> None:
    """Refuse options of a model that runs here; what a file or the environment says of one does not count."""
    own = [name for name, origin in settings.origins.items() if origin.startswith(_OPTION) and name != "model"]
    wrong = [option_name(name) for name in own if not name.startswith("sampling.")]
    if wrong:
        raise UsageError(f"{', '.join(wrong)}: the server has its model already; leave that out, or leave out --server")


def _api_key(variable: str | None) -> str | None:
    """The key of the variable, which must be set where it was named."""
    key = os.environ.get(variable or API_KEY, "").strip()
    if variable and not key:
        raise UsageError(f"--api-key-env {variable}: the variable is unset or empty; export the key in it")
    return key or None


class Conversation:
    """Turns of a conversation, and the loop that takes and answers them.

    Attributes:
        failed: whether an answer ended in an error.
    """

    def __init__(self, answerer: Answerer, system: str | None = None) -> None:
        self.answerer = answerer
        self.system = system
        self.messages: list[dict[str, str]] = []
        self.failed = False
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
            self.messages.append({"role": "user", "content": line})
            answer = self._answer()
            if answer is None:
                self.messages.pop()
            else:
                self.messages.append({"role": "assistant", "content": answer})

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

    def _answer(self) -> str | None:
        """Answer what was said last. What came before an interrupt or an error counts; None where nothing did."""
        try:
            self._shorten()
            return self._show_what_fits()
        except NpuZooError as error:
            self.failed = True
            print(f"error: {error}", file=sys.stderr)
            return None

    def _show_what_fits(self) -> str:
        """Show the answer to as much as a server takes; what it does not is forgotten once there is one."""
        first = 0
        while True:
            try:
                answer = self._show(self._history(first))
            except ConversationTooLongError:
                first += 2
                if first >= len(self.messages):
                    raise
            else:
                self._forget(first)
                return answer

    def _show(self, history: list[dict[str, str]]) -> str:
        """Show an answer as it comes; an error is raised only where there is nothing of one."""
        answer, shown = "", False
        try:
            with interrupt_flag() as interrupted, self._states(history, interrupted) as states:
                for state in states:
                    print(faint(printable(state.reasoning)) + printable(state.text), end="", flush=True)
                    answer, shown = state.answer, True
                    if interrupted():
                        break
        except NpuZooError as error:
            print("\n" if shown else "", end="", flush=True)
            if not answer:
                raise
            self.failed = True
            print(f"error: {error}; what came of the answer is kept", file=sys.stderr)
        else:
            print("\n(stopped)" if interrupted() else "", flush=True)
        return answer

    def _states(
        self, history: list[dict[str, str]], interrupted: InterruptFlag
    ) -> contextlib.closing[Generator[AnswerState, None, None]]:
        return contextlib.closing(self.answerer.answer(history, interrupted))

    def _history(self, first: int = 0) -> list[dict[str, str]]:
        """What is said to the model: the system message, and the messages from the first one on."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        return system + self.messages[first:]

    def _shorten(self) -> None:
        """Drop the oldest turns until the conversation and an answer fit."""
        dropped = 0
        while len(self.messages) > dropped + 1 and not self.answerer.fits(self._history(dropped)):
            dropped += 2
        self._forget(dropped)

    def _forget(self, count: int) -> None:
        del self.messages[:count]
        if count:
            print(f"(the {count} oldest message(s) no longer fit and are forgotten)", file=sys.stderr)


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
