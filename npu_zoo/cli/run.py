"""``run``: generate from prompts."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from npu_zoo.cli.help import json_output
from npu_zoo.cli.interrupts import interrupt_guard
from npu_zoo.cli.options import request_options
from npu_zoo.cli.output import note
from npu_zoo.cli.progress import LoadingProgress, RunProgress
from npu_zoo.cli.prompts import EXAMPLE, NO_PROMPT, Prompt, PromptOptions
from npu_zoo.cli.results import RESULT_KEYS, ResultWriter
from npu_zoo.core.config import EngineConfig
from npu_zoo.core.engine import RequestOutput
from npu_zoo.core.errors import UsageError
from npu_zoo.core.sampling import SamplingParams
from npu_zoo.dispatch import resolve
from npu_zoo.parallel.processes import exit_on_sigterm
from npu_zoo.platforms.ports import MASTER_PORT
from npu_zoo.settings import Settings

if TYPE_CHECKING:
    from npu_zoo.engine.llm import LLM

DEFAULTS: dict[str, Any] = {"temperature": 0.0, "max_tokens": 128}
"""Greedy, so that a first try gives the same text everywhere."""


def _option(help_text: str, *flags: str, metavar: str | None = None, panel: str = "Prompts") -> Any:
    return typer.Option(*flags, help=help_text, metavar=metavar, rich_help_panel=panel)


_CHAT_HELP = "Put prompts through the chat template. Default: as the variant is."
_IDS_HELP = "A prompt as token ids; repeatable."


@json_output(RESULT_KEYS)
@request_options(engine=True, sampling=DEFAULTS)
def run(
    settings: Settings,
    prompt: Annotated[list[str] | None, _option("A prompt; repeatable.", "--prompt")] = None,
    prompts_file: Annotated[
        Path | None, _option("One prompt a line; - is standard input.", "--prompts-file", metavar="FILE")
    ] = None,
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
    echo: Annotated[bool, _option("Write each prompt before its completion.", "--echo", panel="Output")] = False,
    as_json: Annotated[bool, _option("Write one JSON object a prompt.", "--json", panel="Output")] = False,
) -> None:
    """Generate from prompts.

    Prompts come from --prompt and --prompts-file, or all of standard input is one. Without weights the bundled demo
    checkpoint runs, and without a prompt it completes an example.
    """
    options = PromptOptions(
        prompt, prompts_file, prompt_token_ids, fim_prefix, fim_suffix, fim_prefix_file, fim_suffix_file
    )
    sampling_params = settings.sampling_params(**DEFAULTS)
    config = resolve(settings.args)
    prompts = options.collect()
    for text in config.notes:
        note(text)
    if not prompts:
        prompts, echo = [_example(config)], True
    use_chat = _use_chat(chat, config, prompts)
    alone = len(prompts) == 1 and sampling_params.n == 1 and not as_json
    terminal = sys.stdout.isatty()
    writer = ResultWriter(
        prompts, as_json, echo, stream=alone and terminal, hold=terminal and not alone and sys.stderr.isatty()
    )
    from npu_zoo.engine.llm import LLM

    with exit_on_sigterm(), LoadingProgress() as loading:
        llm = LLM.from_config(config, progress=loading)
    with exit_on_sigterm(), llm:
        if config.world_size > 1 or config.device != "cpu":
            explained = llm.engine.explain()
            _tell_port(explained["master_port"])
            _tell_memory(explained, config)
        generate(llm, prompts, sampling_params, writer, chat=use_chat, timed=not _simulated(config))


def _tell_port(port: int | None) -> None:
    """Where ranks have met, if it is not where they were to."""
    if port is not None and port != int(os.environ.get("MASTER_PORT") or MASTER_PORT):
        note(f"port {MASTER_PORT} is in use; the ranks meet at {port} (`npu-zoo ports` shows by whom)")


def _tell_memory(explained: dict[str, Any], config: EngineConfig) -> None:
    """How a device's memory is shared out, where the engine measured it."""
    if explained.get("activation_bytes") is None:
        return
    weights, activations, cache = (
        f"{explained[f'{name}_bytes'] / 2**30:,.2f} GiB" for name in ("parameter", "reserved", "kv_cache")
    )
    note(
        f"memory of {config.hardware}: weights {weights}, {activations} kept for activations (measured), "
        f"keys and values {cache} for {explained['kv_cache_tokens']:,} tokens"
    )


def _simulated(config: EngineConfig) -> bool:
    return config.device == "npu" and bool(os.environ.get("NPU_ZOO_SIMULATE"))


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
