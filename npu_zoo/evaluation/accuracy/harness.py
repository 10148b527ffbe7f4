"""Tasks of the language model evaluation harness, by name, with data sets from the hub or from local files."""

from __future__ import annotations

import contextlib
import difflib
import functools
import logging
import os
import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from npu_zoo.core.engine import Progress
from npu_zoo.core.errors import ConfigError, NpuZooError, UsageError
from npu_zoo.evaluation.accuracy.boolq import boolq_row
from npu_zoo.evaluation.accuracy.harness_results import task_results
from npu_zoo.evaluation.accuracy.local_data import Row, read_rows, split_files
from npu_zoo.evaluation.accuracy.local_task import StoredRows, require_labels, split_fields
from npu_zoo.evaluation.accuracy.sources import describe_data, file_digest, hash_note, require_data
from npu_zoo.evaluation.accuracy.tasks import EVAL_TASKS, TaskOptions, TaskResult

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

    from npu_zoo.core.config import EngineConfig
    from npu_zoo.engine.llm import LLM

LOCAL_FOLDERS = {"boolq": "super_glue/boolq"}
"""Tasks of the harness whose data comes from a file only, and where the harness keeps them."""
_SEED = 1234  # the harness's own, for numpy, torch and examples before the question
_SHOWN = 5
_HUB = "https://huggingface.co/datasets/"


class HarnessTask:
    """One name of the harness's: a task, or a group or tag of several.

    Args:
        include_path: a folder with further tasks, in the harness's YAML.
    """

    def __init__(self, name: str, include_path: Path | None = None) -> None:
        self.name = name
        self._include_path = include_path
        self._loaded: dict[str, Any] = {}
        self._data: dict[str, Any] = {}
        self._notes: list[str] = []

    def require_model(self, config: EngineConfig) -> None:
        """Any model does: the harness asks for nothing else than its texts and log-probabilities."""

    def check(self, options: TaskOptions) -> None:
        """Load the task with its data set.

        Raises:
            ConfigError: the harness is not installed.
            UsageError: it has no such task, the task runs generated code, or its data set is not at hand.
        """
        need_harness()
        with _quiet():
            manager = self._manager()
            self._require_known(manager)
            self._refuse_code(manager)
            overrides = self._overrides(manager, options)
            _seed_everything()  # tasks may draw when they are loaded
            self._loaded = self._load(manager, overrides, options.limit)
            for task in self._loaded["tasks"].values():
                _require_no_code(task)
                _set_fewshot(task, options.num_fewshot)
                _require_examples(task)

    def run(self, llm: LLM, options: TaskOptions, progress: Progress) -> list[TaskResult]:
        """Run all samples; a group gives the results of its tasks and its own."""
        from lm_eval.evaluator import evaluate

        from npu_zoo.evaluation.accuracy.adapter import EngineLM

        def tell(stage: str, done: int, total: int) -> None:
            progress(f"{self.name}, {stage}", done, total)

        lm = EngineLM(llm, progress=tell, responses=options.responses, logits=options.logits, seed=options.seed)
        with _quiet(), _naming(self.name):
            _seed_everything()
            found = evaluate(
                lm=lm,
                task_dict=self._loaded,
                limit=options.limit,
                apply_chat_template=bool(options.chat),
                fewshot_as_multiturn=bool(options.chat),
            )
        return task_results(found, notes=[*self._notes, *_truncation(lm.truncated)], data=self._data)

    def _manager(self) -> TaskManager:
        """One that knows the name; to read all folders of the harness takes seconds, so the likely one comes first."""
        if self._include_path is None:
            return _narrow_manager(LOCAL_FOLDERS[self.name]) if self.name in LOCAL_FOLDERS else _manager(None)
        own = _manager(self._include_path, alone=True)
        known = own.task_index
        complete = self.name in known and all(name in known for name in _members(own, self.name))
        return own if complete else _manager(self._include_path)

    def _require_known(self, manager: TaskManager) -> None:
        if self.name in manager.task_index:
            return
        names = [*manager.all_tasks, *EVAL_TASKS]
        nearest = difflib.get_close_matches(self.name, names, n=4) or sorted(EVAL_TASKS)
        raise UsageError(
            f"there is no task {self.name}; the nearest names are {', '.join(nearest)} (--list-tasks shows all)"
        )

    def _refuse_code(self, manager: TaskManager) -> None:
        unsafe = [name for name in _members(manager, self.name) if _config(manager, name).get("unsafe_code")]
        if unsafe:
            raise _runs_code(unsafe[0])

    def _overrides(self, manager: TaskManager, options: TaskOptions) -> dict[str, Any]:
        """What local data changes in the task."""
        if options.data is None and self.name not in LOCAL_FOLDERS:
            return {}
        data = require_data(self.name, options.data)
        files = split_files(data)
        fields = split_fields(files, _config(manager, self._only_member(manager)))
        used = {name: files[name] for name in fields.values() if name}
        rows = StoredRows({name: [row for file in named for row in self._rows(file)] for name, named in used.items()})
        every = [file for named in used.values() for file in named]
        self._data = describe_data(data, every)
        self._notes = [note for file in every if (note := hash_note(self.name, file, file_digest(file)))]
        return {"custom_dataset": rows.data_set, **fields}

    def _only_member(self, manager: TaskManager) -> str:
        """The task that rows are of; a group's tasks have rows of their own each."""
        members = list(dict.fromkeys(_members(manager, self.name)))
        if len(members) == 1:
            return members[0]
        shown = ", ".join(members[:_SHOWN]) + (" …" if len(members) > _SHOWN else "")
        raise UsageError(
            f"--data has the rows of one task, and {self.name} stands for {len(members)}: {shown}; name the task that "
            "the rows are of, or several with --data TASK=PATH for each"
        )

    def _rows(self, file: Path) -> list[Row]:
        rows = read_rows(file)
        if self.name != "boolq":
            return rows
        return [_named_row(file, number, row) for number, row in enumerate(rows, 1)]

    def _load(self, manager: TaskManager, overrides: Mapping[str, Any], limit: int | None) -> dict[str, Any]:
        from lm_eval.tasks._factory import TaskFactory

        try:
            index = manager.task_index
            built = TaskFactory().build(index[self.name], overrides=dict(overrides) or None, registry=index)
            loaded: dict[str, Any] = manager.load(built)
            if overrides:
                for task in loaded["tasks"].values():
                    require_labels(task, limit)
        except NpuZooError:
            raise
        except Exception as error:
            raise UsageError(self._cannot_load(manager, error, local=bool(overrides))) from error
        return loaded

    def _cannot_load(self, manager: TaskManager, error: Exception, *, local: bool) -> str:
        reason = f"{type(error).__name__}: {error}"
        if isinstance(error, ModuleNotFoundError):
            return f"task {self.name} needs {error.name}, which is not installed ({reason})"
        if local:
            return f"task {self.name} cannot be made of the rows in --data: {reason}"
        paths = {str(_config(manager, name).get("dataset_path")) for name in _members(manager, self.name)} - {"None"}
        shown = ", ".join(f"{_HUB}{path}" for path in sorted(paths)[:3])
        return (
            f"task {self.name} cannot load its data set ({reason}). Download {shown or 'it'} where there is a network "
            "and carry the cache over (HF_HOME), or give its rows as JSON lines or Parquet with --data"
        )


def need_harness() -> None:
    """Make sure that the harness is installed.

    Raises:
        ConfigError: it is not.
    """
    # Its bars would be drawn over ours; tqdm reads this when it is imported.
    os.environ.setdefault("TQDM_DISABLE", "1")
    try:
        import lm_eval  # noqa: F401
    except ModuleNotFoundError as error:
        if error.name != "lm_eval":
            raise
        raise ConfigError(
            "tasks run through the language model evaluation harness, which is not installed: "
            "pip install 'npu-zoo[eval]'"
        ) from None


def harness_names(include_path: Path | None = None) -> list[str]:
    """All tasks, groups and tags of the harness.

    Raises:
        ConfigError: it is not installed.
    """
    need_harness()
    with _quiet():
        return list(_manager(include_path).all_tasks)


@functools.cache
def _manager(include_path: Path | None, *, alone: bool = False) -> TaskManager:
    """One that knows a folder of the user's, beside the harness's own or alone."""
    from lm_eval.tasks import TaskManager

    if include_path is not None and not include_path.is_dir():
        raise UsageError(f"--include-path {include_path} is no folder of tasks in YAML")
    return TaskManager(include_path=include_path, include_defaults=not alone)


@functools.cache
def _narrow_manager(folder: str) -> TaskManager:
    """One that knows a single folder of the harness, since to read all of them takes seconds."""
    import lm_eval.tasks

    return lm_eval.tasks.TaskManager(include_defaults=False, include_path=Path(lm_eval.tasks.__file__).parent / folder)


def _members(manager: TaskManager, name: str) -> Iterator[str]:
    """The tasks of a group or tag, and of the groups in it; a task alone is its own member."""
    entry = manager.task_index.get(name)
    if entry is None or entry.kind.name not in ("GROUP", "TAG"):
        yield name
        return
    listed = (entry.cfg or {}).get("task")
    for child in [*sorted(entry.tags), *(listed if isinstance(listed, list) else [])]:
        named = child if isinstance(child, str) else child.get("task", child.get("group"))
        if isinstance(named, str) and named != name:
            yield from _members(manager, named)


def _config(manager: TaskManager, name: str) -> Mapping[str, Any]:
    """A task's settings without running anything of it."""
    from lm_eval.tasks._yaml_loader import load_yaml

    entry = manager.task_index.get(name)
    if entry is None:  # a group's own, whose settings stand in the group
        return {}
    return load_yaml(entry.yaml_path, resolve_func=False) if entry.yaml_path else entry.cfg or {}


def _named_row(file: Path, number: int, row: Row) -> Row:
    try:
        return boolq_row(row)
    except UsageError as error:
        raise UsageError(f"{file}, row {number}: {error}") from None


def _set_fewshot(task: Any, num_fewshot: int | None) -> None:
    """As the harness's own command does; a task that says 0 stays there."""
    own = task.get_config("num_fewshot")
    if num_fewshot is not None and own != 0:
        task.set_config(key="num_fewshot", value=num_fewshot)
    elif own is None:
        task.set_config(key="num_fewshot", value=0)
    task.set_fewshot_seed(seed=_SEED)


def _runs_code(task: str) -> UsageError:
    return UsageError(
        f"task {task} of the harness runs generated programs without a sandbox; humaneval, humaneval_plus and "
        "humaneval_infilling run theirs in one"
    )


def _require_no_code(task: Any) -> None:
    """Tasks that are written inside a group, or in Python, say it only once they are made."""
    if getattr(task, "UNSAFE_CODE", False):
        raise _runs_code(str(task.config.task))


def _require_examples(task: Any) -> None:
    """Refuse more examples before a question than there are."""
    asked = int(task.get_config("num_fewshot") or 0)
    if not asked:
        return
    there = len(list(task.fewshot_docs()))
    own = task.fewshot_cfg.split is not None and task.fewshot_cfg.split == task.get_config("test_split")
    if asked > there - own:
        raise UsageError(
            f"task {task.config.task} puts {asked} examples before each question, and its data set has "
            f"{there - own} to take them from; give --num-fewshot"
        )


@contextlib.contextmanager
def _naming(task: str) -> Iterator[None]:
    """Say which task failed in the harness's own code."""
    try:
        yield
    except NpuZooError:
        raise
    except Exception as error:
        raise NpuZooError(
            f"task {task} failed in the harness: {type(error).__name__}: {error} (`npu-zoo --debug …` shows where)"
        ) from error


def _seed_everything() -> None:
    import numpy
    import torch

    random.seed(0)
    numpy.random.seed(_SEED)
    torch.manual_seed(_SEED)


def _truncation(count: int) -> list[str]:
    if not count:
        return []
    return [f"{count} prompt(s) lost their beginning: they are longer than the model takes (--max-model-len)"]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The harness's own remarks are about its settings, which are not the user's here."""
    logger = logging.getLogger("lm_eval")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
