"""``eval`` without a further command: tasks on one model."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Protocol

import typer
from pydantic import JsonValue

from npu_zoo.cli.evaluation.progress import EvalProgress
from npu_zoo.cli.loading import follows, loaded, tell_notes
from npu_zoo.cli.options import request_options
from npu_zoo.cli.output import note, print_table
from npu_zoo.core.config import EngineConfig
from npu_zoo.core.engine import Progress
from npu_zoo.core.errors import UsageError
from npu_zoo.dispatch import resolve
from npu_zoo.platforms.detection import is_simulated
from npu_zoo.settings import Settings

if TYPE_CHECKING:
    from npu_zoo.engine.llm import LLM
    from npu_zoo.evaluation.accuracy.logits import LogitFile
    from npu_zoo.evaluation.accuracy.responses import ResponseFile
    from npu_zoo.evaluation.accuracy.tasks import TaskOptions, TaskResult


class RunnableTask(Protocol):
    """A task of ours or of the harness."""

    @property
    def name(self) -> str:
        """As it was asked for."""

    def require_model(self, config: EngineConfig) -> None:
        """Refuse a model that cannot do it."""

    def check(self, options: TaskOptions) -> None:
        """Read the data set."""

    def run(self, llm: LLM, options: TaskOptions, progress: Progress) -> TaskResult | list[TaskResult]:
        """Run all samples."""


def _option(help_text: str, *flags: str, metavar: str | None = None, panel: str = "Tasks", **more: Any) -> Any:
    return typer.Option(*flags, help=help_text, metavar=metavar, rich_help_panel=panel, **more)


_COMPUTED_BY = ("max_model_len", "seed", "deterministic", "enforce_eager")
"""Settings that answers depend on, beside those that name the model in a record."""
_TASK_HELP = "boolq, humaneval, perplexity or any task of the evaluation harness; repeatable, or with commas."
_DATA_HELP = "The data set's file or folder; with several tasks TASK=PATH, repeatable."
_CHAT_HELP = "Put prompts through the chat template. Default: as the task is."
_JSON_HELP = "Write figures and every sample; an interrupted run goes on with the same command."
_LOGITS_HELP = "Write the logits of scored positions (safetensors), for `npu-zoo eval compare`."


@request_options(engine=True)
def run_tasks(
    context: typer.Context,
    settings: Settings,
    task: Annotated[list[str] | None, _option(_TASK_HELP, "--task", metavar="NAME")] = None,
    data: Annotated[list[str] | None, _option(_DATA_HELP, "--data", metavar="[TASK=]PATH")] = None,
    limit: Annotated[int | None, _option("Only the first so many samples.", "--limit", metavar="N", min=1)] = None,
    num_fewshot: Annotated[
        int | None, _option("Examples before each question.", "--num-fewshot", metavar="N", min=0)
    ] = None,
    chat: Annotated[bool | None, _option(_CHAT_HELP, "--chat/--no-chat")] = None,
    task_arg: Annotated[
        list[str] | None, _option("A task's own setting; repeatable.", "--task-arg", metavar="NAME=VALUE")
    ] = None,
    include_path: Annotated[
        Path | None, _option("A folder with further tasks in the harness's YAML.", "--include-path", metavar="DIR")
    ] = None,
    list_tasks: Annotated[bool, _option("Write the names of all tasks and end.", "--list-tasks")] = False,
    json: Annotated[Path | None, _option(_JSON_HELP, "--json", metavar="FILE", panel="Output")] = None,
    save_logits: Annotated[Path | None, _option(_LOGITS_HELP, "--save-logits", metavar="FILE", panel="Output")] = None,
    logit_positions: Annotated[
        int | None,
        _option("Most positions of one request. Default: 32.", "--logit-positions", metavar="N", min=1, panel="Output"),
    ] = None,
) -> None:
    """Measure how well a model does tasks.

    Without weights the bundled demo checkpoint runs. Data sets come from local files (--data), or for other tasks of
    the harness from the hub.
    """
    if context.invoked_subcommand is not None:
        return
    if list_tasks:
        _list_tasks(include_path)
        return
    names = _names(task or [])
    options = _options(names, data or [], limit, num_fewshot, chat, task_arg or [])
    _require_apart(json, save_logits)
    run = EvalRun(resolve(settings.args), options, include_path)
    run.config_arguments = settings.args.model_dump(mode="json", exclude_none=True)
    if follows():
        with loaded(run.config):  # which works for the first rank until the run is over, and does not come back
            return
    run.check()
    run.execute(json, save_logits, logit_positions)


class EvalRun:
    """Tasks whose data has been looked at, and where their results go."""

    def __init__(self, config: EngineConfig, options: Mapping[str, TaskOptions], include_path: Path | None) -> None:
        self.config, self.options = config, options
        self.config_arguments: dict[str, JsonValue] = {}
        self.tasks = [_load(name, include_path) for name in options]

    def check(self) -> None:
        """Read all data sets before a model is loaded."""
        tell_notes(self.config)
        for task in self.tasks:
            task.require_model(self.config)
            task.check(self.options[task.name])

    def execute(self, json: Path | None, save_logits: Path | None, positions: int | None) -> None:
        """Run the tasks, show the figures and write what was asked for."""
        from npu_zoo.evaluation.record import require_record_place

        if json is not None:
            require_record_place(json, "eval")
        with contextlib.ExitStack() as stack:
            logits = stack.enter_context(self._logit_file(save_logits, positions)) if save_logits else None
            responses = stack.enter_context(self._response_file(json)) if json and not logits else None
            with _telling_what_is_kept(responses):
                results = self._run(logits, responses)
            if logits is not None:
                logits.finish()
                if not logits.count:
                    note(f"{logits.path} holds no logits: these tasks keep none")
            self._report(results, json, save_logits)
            if responses is not None:
                responses.remove()

    def _run(self, logits: LogitFile | None, responses: ResponseFile | None) -> list[TaskResult]:
        results: list[TaskResult] = []
        with loaded(self.config) as llm, EvalProgress(timed=not is_simulated(self.config.device)) as progress:
            for task in self.tasks:
                options = dataclasses.replace(
                    self.options[task.name], logits=logits, responses=responses, seed=self.config.seed
                )
                found = task.run(llm, options, progress)
                results += found if isinstance(found, list) else [found]
        return results

    def _report(self, results: Sequence[TaskResult], json: Path | None, logits: Path | None) -> None:
        from npu_zoo.evaluation.accuracy.report import eval_record
        from npu_zoo.evaluation.record import write_record

        print_table(["task", "metric", "value", "stderr", "n"], _rows(results))
        for text in dict.fromkeys(text for result in results for text in result.notes):
            note(text)
        if json is not None:
            write_record(eval_record(results, self.config, self._arguments(), json, logits), json)

    def _arguments(self) -> dict[str, JsonValue]:
        tasks: dict[str, JsonValue] = {
            name: {
                "data": str(options.data) if options.data else None,
                "limit": options.limit,
                "num_fewshot": options.num_fewshot,
                "chat": options.chat,
                "arguments": dict(options.arguments),
            }
            for name, options in self.options.items()
        }
        return {"tasks": tasks, "engine": dict(self.config_arguments)}

    def _logit_file(self, path: Path, positions: int | None) -> LogitFile:
        from npu_zoo.evaluation.accuracy.logits import POSITIONS, LogitFile

        return LogitFile(path, f"{self.config.family}:{self.config.variant}", positions or POSITIONS)

    def _response_file(self, json: Path) -> ResponseFile:
        from npu_zoo.evaluation.accuracy.responses import ResponseFile

        responses = ResponseFile(_responses_path(json), answers_key(self.config))
        if responses.found:
            note(f"{responses.path} holds {responses.found} answers of an interrupted run, which goes on")
        return responses


def answers_key(config: EngineConfig) -> str:
    """All that answers depend on beside the request: the model, how it computes, and the packages that do."""
    from npu_zoo.evaluation.record import ModelUnderTest, installed_versions

    facts = {
        "model": ModelUnderTest.of(config).model_dump(mode="json"),
        "versions": installed_versions(["lm_eval"]),
        "kernels": {choice.operation: choice.implementation for choice in config.kernels},
        **{name: getattr(config, name) for name in _COMPUTED_BY},
    }
    return dumps(facts, sort_keys=True)


def _responses_path(record: Path) -> Path:
    return record.with_name(f"{record.name}.responses")


def _require_apart(record: Path | None, logits: Path | None) -> None:
    """Refuse outputs that would replace one another."""
    if record is None or logits is None:
        return
    if logits.resolve() in (record.resolve(), _responses_path(record).resolve()):
        raise UsageError(f"--save-logits {logits} is the place of --json {record} or its answers; name another file")


def _rows(results: Sequence[TaskResult]) -> Iterator[list[str]]:
    for result in results:
        for name, metric in result.metrics.items():
            error = "" if metric.stderr is None else f"± {metric.stderr:.4g}"
            yield [result.task, name, f"{metric.value:.6g}", error, str(metric.samples)]


def _load(name: str, include_path: Path | None) -> RunnableTask:
    from npu_zoo.evaluation.accuracy.harness import HarnessTask
    from npu_zoo.evaluation.accuracy.tasks import EVAL_TASKS, load_task

    return load_task(name) if name in EVAL_TASKS else HarnessTask(name, include_path)


def _list_tasks(include_path: Path | None) -> None:
    from npu_zoo.evaluation.accuracy.harness import harness_names
    from npu_zoo.evaluation.accuracy.tasks import EVAL_TASKS

    for name in [*EVAL_TASKS, *(name for name in harness_names(include_path) if name not in EVAL_TASKS)]:
        print(name)


def _names(given: Sequence[str]) -> list[str]:
    names = [name.strip() for text in given for name in text.split(",") if name.strip()]
    if not names:
        raise UsageError("no task is named: give --task with boolq, humaneval, perplexity or a task of the harness")
    return list(dict.fromkeys(names))


def _options(
    names: Sequence[str],
    data: Sequence[str],
    limit: int | None,
    num_fewshot: int | None,
    chat: bool | None,
    task_args: Sequence[str],
) -> dict[str, TaskOptions]:
    """What each task is told; a task's own settings go to those that know them."""
    from npu_zoo.evaluation.accuracy.tasks import TaskOptions

    paths = _paths(names, data)
    given = dict(_setting(text) for text in task_args)
    known = {name: _known_arguments(name) for name in names}
    strange = [name for name in given if not any(name in arguments for arguments in known.values())]
    if strange:
        there = {argument for arguments in known.values() for argument in arguments}
        what = f"there are {', '.join(sorted(there))}" if there else "they have none"
        raise UsageError(f"--task-arg {strange[0]}: no setting of {', '.join(names)}; {what}")
    return {
        name: TaskOptions(
            data=paths.get(name),
            limit=limit,
            num_fewshot=num_fewshot,
            chat=chat,
            arguments={key: value for key, value in given.items() if key in known[name]},
        )
        for name in names
    }


def _known_arguments(name: str) -> Mapping[str, str]:
    from npu_zoo.evaluation.accuracy.tasks import EVAL_TASKS, load_task

    return load_task(name).arguments if name in EVAL_TASKS else {}


def _paths(names: Sequence[str], data: Sequence[str]) -> dict[str, Path]:
    paths: dict[str, Path] = {}
    for text in data:
        name, equals, path = text.partition("=")
        if not (equals and name in names):
            if len(names) > 1:
                raise UsageError(f"--data {text}: there are several tasks; write --data TASK=PATH for each")
            name, path = names[0], text
        if name in paths:
            raise UsageError(f"--data is given twice for {name}; name one file or folder")
        paths[name] = Path(path)
    return paths


def _setting(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise UsageError(f"--task-arg {text}: write NAME=VALUE")
    return name, value


@contextlib.contextmanager
def _telling_what_is_kept(responses: ResponseFile | None) -> Iterator[None]:
    try:
        yield
    except BaseException:
        if responses is not None and responses.count:
            note(f"{responses.path} keeps {responses.count} answers; the same command goes on from there")
        raise
