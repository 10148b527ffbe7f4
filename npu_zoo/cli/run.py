"""``run``: generate from prompts."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from npu_zoo.cli.help import json_output
from npu_zoo.cli.interrupts import interrupt_guard
from npu_zoo.cli.loading import follows, is_launched, loaded, tell_notes
from npu_zoo.cli.offline import LineOptions, OfflineRun, PromptsFormat, format_name, tell_beginning, tell_end
from npu_zoo.cli.options import request_options
from npu_zoo.cli.output import note
from npu_zoo.cli.progress import RunProgress
from npu_zoo.cli.prompt_file import PromptFile
from npu_zoo.cli.prompts import EXAMPLE, NO_PROMPT, Prompt, PromptOptions
from npu_zoo.cli.results import RESULT_KEYS, ResultWriter
from npu_zoo.cli.structured import structured_outputs
from npu_zoo.core.config import EngineConfig
from npu_zoo.core.engine import RequestOutput
from npu_zoo.core.errors import UsageError
from npu_zoo.core.sampling import SamplingParams
from npu_zoo.dispatch import resolve
from npu_zoo.platforms.detection import is_simulated
from npu_zoo.settings import Settings

if TYPE_CHECKING:
    from npu_zoo.engine.llm import LLM

DEFAULTS: dict[str, Any] = {"temperature": 0.0, "max_tokens": 128}
"""Greedy, so that a first try gives the same text everywhere."""


def _option(help_text: str, *flags: str, metavar: str | None = None, panel: str = "Prompts") -> Any:
    return typer.Option(*flags, help=help_text, metavar=metavar, rich_help_panel=panel)


FAILED = 1
"""The exit code where a line of a file failed."""

_STRUCTURED = "Structured output"
_FILE_HELP = "One prompt a line, JSON lines, or a batch file of OpenAI's; - is standard input."
_FORMAT_HELP = "txt, jsonl or batch. Default: by the file's suffix and its first line."
_NAME_HELP = "What the bodies of a batch file may call the model; repeatable. Default: FAMILY:VARIANT and FAMILY."
_OUTPUT_HELP = "Write results of --prompts-file as they finish, one JSON object a line; an interrupted run goes on."
_CHAT_HELP = "Put prompts through the chat template. Default: as the variant is."
_IDS_HELP = "A prompt as token ids; repeatable."


@json_output(RESULT_KEYS)
@request_options(engine=True, sampling=DEFAULTS)
def run(
    settings: Settings,
    prompt: Annotated[list[str] | None, _option("A prompt; repeatable.", "--prompt")] = None,
    prompts_file: Annotated[Path | None, _option(_FILE_HELP, "--prompts-file", metavar="FILE")] = None,
    prompts_format: Annotated[
        PromptsFormat, _option(_FORMAT_HELP, "--prompts-format", metavar="FORM")
    ] = PromptsFormat.auto,
    prompt_token_ids: Annotated[list[str] | None, _option(_IDS_HELP, "--prompt-token-ids", metavar="ID,…")] = None,
    fim_prefix: Annotated[str | None, _option("Text before the hole to fill.", "--fim-prefix")] = None,
    fim_suffix: Annotated[str | None, _option("Text after the hole.", "--fim-suffix")] = None,
    fim_prefix_file: Annotated[
        Path | None, _option("The text before it from a file.", "--fim-prefix-file", metavar="FILE")
    ] = None,
    fim_suffix_file: Annotated[
        Path | None, _option("The text after it from a file.", "--fim-suffix-file", metavar="FILE")
    ] = None,
    chat: Annotated[bool | None, _option(_CHAT_HELP, "--chat/--no-chat")] = None,
    served_model_name: Annotated[list[str] | None, _option(_NAME_HELP, "--served-model-name", metavar="NAME")] = None,
    json_schema: Annotated[
        Path | None, _option("A JSON schema that outputs follow.", "--json-schema", metavar="FILE", panel=_STRUCTURED)
    ] = None,
    regex: Annotated[
        str | None, _option("A regular expression that whole outputs match.", "--regex", panel=_STRUCTURED)
    ] = None,
    choice: Annotated[
        list[str] | None, _option("A text that may be an output; repeatable.", "--choice", panel=_STRUCTURED)
    ] = None,
    grammar: Annotated[
        Path | None,
        _option("A grammar, in llguidance's Lark, of outputs.", "--grammar", metavar="FILE", panel=_STRUCTURED),
    ] = None,
    output: Annotated[Path | None, _option(_OUTPUT_HELP, "--output", metavar="FILE", panel="Output")] = None,
    echo: Annotated[bool, _option("Write each prompt before its completion.", "--echo", panel="Output")] = False,
    as_json: Annotated[bool, _option("Write one JSON object a prompt.", "--json", panel="Output")] = False,
) -> None:
    """Generate from prompts.

    Prompts come from --prompt and --prompts-file, or all of standard input is one. Without weights the bundled demo
    checkpoint runs, and without a prompt it completes an example. With --output, results are written as they finish,
    and the same command goes on where it was interrupted; it ends with 1 where a line failed.
    """
    sampling_params = dataclasses.replace(
        settings.sampling_params(**DEFAULTS), structured_outputs=structured_outputs(json_schema, regex, choice, grammar)
    )
    config = resolve(settings.args)
    if prompts_file and follows():
        with loaded(config):  # which works for the first rank until the run is over, and does not come back
            return
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(PromptFile(prompts_file)) if prompts_file else None
        form = format_name(prompts_format, file, prompts_file) if file and prompts_file else PromptsFormat.txt.value
        options = PromptOptions(
            prompt, file, prompt_token_ids, fim_prefix, fim_suffix, fim_prefix_file, fim_suffix_file
        )
        if output or form != PromptsFormat.txt:
            lines = LineOptions(settings, sampling_params, chat, served_model_name or ())
            _run_lines(config, options, lines, form, output, echo)
        else:
            _run_prompts(config, options, sampling_params, chat, echo, as_json)


def _run_lines(
    config: EngineConfig, prompts: PromptOptions, options: LineOptions, form: str, output: Path | None, echo: bool
) -> None:
    """Run a file line by line; see :mod:`npu_zoo.cli.offline`."""
    file = prompts.require_file_alone()
    if echo:
        raise UsageError("--echo is for text, and these results are JSON that holds the prompts; leave it out")
    lines = OfflineRun(file, options.open_format(form, config), config)
    tell_notes(config)
    with lines.results(output) as results:
        tell_beginning(results, output)
        try:
            if results.remaining or is_launched():
                with loaded(config) as llm:
                    lines.execute(llm.engine, results, timed=not is_simulated(config.device))
        finally:
            tell_end(results, output)
    if results.failed:
        raise typer.Exit(FAILED)


def _run_prompts(
    config: EngineConfig,
    options: PromptOptions,
    sampling_params: SamplingParams,
    chat: bool | None,
    echo: bool,
    as_json: bool,
) -> None:
    """Run a few prompts, which are written in their order."""
    prompts = options.collect()
    tell_notes(config)
    if not prompts:
        prompts, echo = [_example(config)], True
    use_chat = _use_chat(chat, config, prompts)
    alone = len(prompts) == 1 and sampling_params.n == 1 and not as_json
    terminal = sys.stdout.isatty()
    writer = ResultWriter(
        prompts, as_json, echo, stream=alone and terminal, hold=terminal and not alone and sys.stderr.isatty()
    )
    with loaded(config) as llm:
        generate(llm, prompts, sampling_params, writer, chat=use_chat, timed=not is_simulated(config.device))


def _example(config: EngineConfig) -> Prompt:
    if not config.bundled:
        raise UsageError(NO_PROMPT)
    note("no prompt was given: this completes an example; yours goes after --prompt")
    return Prompt(text=EXAMPLE)


def _use_chat(asked: bool | None, config: EngineConfig, prompts: Sequence[Prompt]) -> bool:
    """Whether prompts go through the chat template; token ids and holes to fill never do."""
    texts = all(prompt.text is not None for prompt in prompts)
    if asked and not texts:
        raise UsageError("--chat takes prompts as text, not token ids or a hole to fill")
    return texts and (config.chat if asked is None else asked)


def generate(
    llm: LLM,
    prompts: Sequence[Prompt],
    sampling_params: SamplingParams,
    writer: ResultWriter,
    *,
    chat: bool,
    timed: bool = True,
) -> None:
    """Run all prompts, write the results, and the speed on stderr; an interrupt writes what there is and is raised."""
    progress = RunProgress(len(prompts), timed=timed)
    outputs: list[RequestOutput] = []
    try:
        with interrupt_guard() as guard, progress:

            def on_output(output: RequestOutput) -> None:
                with guard():
                    progress.update(output)
                    writer.update(output)

            outputs = _outputs(llm, prompts, sampling_params, on_output, chat=chat)
    except KeyboardInterrupt:
        outputs = llm.partial_outputs
        raise
    finally:
        writer.finish(outputs)
        if progress.tokens:
            print(progress.summary(), file=sys.stderr)


def _outputs(
    llm: LLM,
    prompts: Sequence[Prompt],
    sampling_params: SamplingParams,
    on_output: Callable[[RequestOutput], None],
    *,
    chat: bool,
) -> list[RequestOutput]:
    # A new LLM numbers its requests from 0 in the prompts' order, which is what ResultWriter reads from their ids.
    first = prompts[0]
    if first.fim is not None:
        return llm.infill(*first.fim, sampling_params, on_output=on_output)
    if first.token_ids is not None:
        ids = [list(prompt.token_ids or ()) for prompt in prompts]
        return llm.generate(ids, sampling_params, on_output=on_output)
    texts = [prompt.text or "" for prompt in prompts]
    if chat:
        conversations = [[{"role": "user", "content": text}] for text in texts]
        return llm.chat(conversations, sampling_params, on_output=on_output)
    return llm.generate(texts, sampling_params, on_output=on_output)
