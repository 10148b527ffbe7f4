"""How ``run`` writes what was generated: text for people, one JSON object a prompt for programs."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from npu_zoo.cli.prompts import Prompt
from npu_zoo.core.engine import CompletionOutput, Logprob, RequestOutput

COMPLETION_KEYS: dict[str, str] = {
    "text": "The completion.",
    "token_ids": "Its token ids.",
    "finish_reason": "stop, length, or abort where it was interrupted.",
    "stop_reason": "The stop string or token id that ended it; left out where none did.",
    "logprobs": "With --logprobs: per output token an object from token id to logprob, rank and decoded_token.",
}
RESULT_KEYS: dict[str, str] = {
    "index": "The prompt's place among all prompts, from 0.",
    "line": "The line of --prompts-file that the prompt stands in, from 1; only for such prompts.",
    "id": "The line's own id, where it has one; only for JSON lines.",
    "prompt": "The prompt; null where it is token ids or a conversation or has a hole to fill.",
    "messages": "Only where the prompt is a conversation.",
    "fim_prefix": "Only with a hole to fill: the text before it.",
    "fim_suffix": "Only with a hole to fill: the text after it.",
    "prompt_token_ids": "Only where the prompt was given as token ids.",
    **COMPLETION_KEYS,
    "outputs": f"Where --n is above 1: every completion, the first too, with its index, {', '.join(COMPLETION_KEYS)}.",
    "prompt_logprobs": "With --prompt-logprobs: the same per prompt token; null for the first.",
    "error.type": "Only where a line was refused, in place of a completion: the kind of error.",
    "error.message": "What is wrong with the line, and what to do.",
    "run": "What the line is a result of: input, model and parameters. Only with --output or JSON lines.",
    "timings.ttft_s": "Seconds to the first token; null where none came.",
    "timings.total_s": "Seconds in all; null where it did not finish.",
    "timings.tokens_per_s": "Output tokens of all completions per second; null where it did not finish.",
}
"""What :func:`result_data` holds."""

_HEADER_WIDTH = 60
# A terminal would obey these; a model must not drive it.
_CONTROL = {code: chr(0x2400 + code) for code in range(32) if chr(code) not in "\n\r\t"} | {127: "\u2421"}


def printable(text: str) -> str:
    """The text with control characters made visible, for a terminal."""
    return text.translate(_CONTROL)


@dataclasses.dataclass
class ResultWriter:
    """Writes results in the prompts' order, each as soon as it and all before it are finished.

    Attributes:
        as_json: one JSON object a line.
        echo: write a prompt before its completion.
        stream: write the text of the only completion while it grows.
        hold: write nothing before :meth:`finish`, so that progress can be shown on the same terminal.
    """

    prompts: Sequence[Prompt]
    as_json: bool = False
    echo: bool = False
    stream: bool = False
    hold: bool = False
    _finished: dict[int, RequestOutput] = dataclasses.field(default_factory=dict)
    _written: int = 0
    _streamed: int = 0

    def update(self, output: RequestOutput) -> None:
        """Take one step's output."""
        if self.stream:
            self._write_new_text(output.outputs[0].text)
        elif output.finished:
            self._finished[int(output.request_id)] = output
            while not self.hold and self._written in self._finished:
                self._write(self._written, self._finished[self._written])
                self._written += 1

    def finish(self, outputs: Sequence[RequestOutput]) -> None:
        """Write what has not been written yet; parts of an interrupted run too."""
        if self.stream:
            if outputs:
                self._write_new_text(outputs[0].outputs[0].text)
            if self._streamed:
                print(flush=True)
            return
        known = {**self._finished, **{int(output.request_id): output for output in outputs}}
        for index in sorted(known):
            if index >= self._written:
                self._write(index, known[index])
        sys.stdout.flush()

    def _write_new_text(self, text: str) -> None:
        if not self._streamed and text and self.echo:
            print(printable(self.prompts[0].text or ""), end="")
        print(printable(text[self._streamed :]), end="", flush=True)
        self._streamed = len(text)

    def _write(self, index: int, output: RequestOutput) -> None:
        prompt = self.prompts[index]
        if self.as_json:
            print(json_line(result_data(index, prompt, output)), flush=True)
            return
        show = printable if sys.stdout.isatty() else str
        for completion in output.outputs:
            if len(self.prompts) > 1 or len(output.outputs) > 1:
                number = f"{index + 1}.{completion.index + 1}" if len(output.outputs) > 1 else str(index + 1)
                print(show(f"==> [{number}] {_title(prompt)} <=="))
            text = show((prompt.text or "" if self.echo else "") + completion.text)
            print(text, end="" if text.endswith("\n") else "\n")
        sys.stdout.flush()


def json_line(data: Mapping[str, Any]) -> str:
    """JSON that stays one line for every reader: some also split at these separators."""
    text = json.dumps(data, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:  # half a character, which UTF-8 cannot hold
        text = json.dumps(data)
    return text.replace("\u2028", "\\u2028").replace("\u2029", "\\u2029").replace("\x85", "\\u0085")


def _title(prompt: Prompt) -> str:
    """The beginning of a prompt, in one line."""
    if prompt.token_ids is not None:
        text = "token ids " + ",".join(map(str, prompt.token_ids))
    else:
        text = " ".join((prompt.text or "").split())
    return text if len(text) <= _HEADER_WIDTH else text[: _HEADER_WIDTH - 1] + "…"


def prompt_data(index: int, prompt: Prompt) -> dict[str, Any]:
    """What a result says of its prompt."""
    data: dict[str, Any] = {"index": index, **({} if prompt.line is None else {"line": prompt.line})}
    if prompt.id is not None:
        data["id"] = prompt.id
    data["prompt"] = prompt.text
    if prompt.messages is not None:
        data["messages"] = list(prompt.messages)
    if prompt.fim is not None:
        data["fim_prefix"], data["fim_suffix"] = prompt.fim
    if prompt.token_ids is not None:
        data["prompt_token_ids"] = list(prompt.token_ids)
    return data


def result_data(index: int, prompt: Prompt, output: RequestOutput) -> dict[str, Any]:
    """One prompt's result under the names of :data:`RESULT_KEYS`; the first completion stands at the top."""
    completions = [_completion_data(completion) for completion in output.outputs]
    data = {**prompt_data(index, prompt), **completions[0]}
    if len(completions) > 1:
        data["outputs"] = [{"index": i, **completion} for i, completion in enumerate(completions)]
    if output.prompt_logprobs is not None:
        data["prompt_logprobs"] = [_logprobs(position) for position in output.prompt_logprobs]
    data["timings"] = timings(output)
    return data


def _completion_data(completion: CompletionOutput) -> dict[str, Any]:
    data: dict[str, Any] = {
        "text": completion.text,
        "token_ids": list(completion.token_ids),
        "finish_reason": completion.finish_reason,
    }
    if completion.stop_reason is not None:
        data["stop_reason"] = completion.stop_reason
    if completion.logprobs is not None:
        data["logprobs"] = [_logprobs(position) for position in completion.logprobs]
    return data


def _logprobs(position: dict[int, Logprob] | None) -> dict[int, Any] | None:
    return None if position is None else {token: dataclasses.asdict(found) for token, found in position.items()}


def timings(output: RequestOutput) -> dict[str, float | None]:
    """Seconds to the first token and in all, and tokens per second; None for what did not come to pass."""
    metrics = output.metrics
    first, end = metrics.first_token_time, metrics.finished_time
    total = None if end is None else end - metrics.arrival_time
    return {
        "ttft_s": None if first is None else round(first - metrics.arrival_time, 6),
        "total_s": None if total is None else round(total, 6),
        "tokens_per_s": round(count_tokens(output) / total, 3) if total else None,
    }


def count_tokens(output: RequestOutput) -> int:
    """Output tokens of all completions."""
    return sum(len(completion.token_ids) for completion in output.outputs)
