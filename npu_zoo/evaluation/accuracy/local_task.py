"""Rows of local files as the data set of one of the harness's tasks."""

from __future__ import annotations

import itertools
import shutil
import tempfile
import weakref
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from npu_zoo.core.errors import UsageError
from npu_zoo.evaluation.accuracy.local_data import Row, split_of

_SPLITS = ("training_split", "validation_split", "test_split", "fewshot_split")


class StoredRows:
    """Splits of rows in files of the data set library, as long as the object lives.

    What a task makes of such a data set (``datasets.map``) is computed once and read again after that, as with one from
    the hub; a task that shuffles its choices would otherwise be asked one draw and judged by another.
    """

    def __init__(self, splits: Mapping[str, Sequence[Row]]) -> None:
        self._splits = {name: list(_complete(rows)) for name, rows in splits.items()}
        self._folder = Path(tempfile.mkdtemp(prefix="npu-zoo-eval-"))
        weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)

    def data_set(self, **settings: Any) -> Any:
        """What the harness takes for a data set; it gives its settings of the task, which rows do not depend on."""
        from datasets import Dataset, DatasetDict

        if not any(self._folder.iterdir()):
            made = DatasetDict({name: Dataset.from_list(rows) for name, rows in self._splits.items()})
            made.save_to_disk(self._folder)
        return DatasetDict.load_from_disk(self._folder)


def split_fields(splits: Collection[str], own: Mapping[str, Any]) -> dict[str, str | None]:
    """Which split a task takes for what; the examples before a question are of the training split where there is one.

    Questions are of the split that the task names for them: a test split that it does not name often has no labels. It
    becomes their test split, for then the harness leaves a question's own row out of its examples.

    Args:
        splits: that there are.
        own: the task's settings.
    """
    named = own.get("test_split") or own.get("validation_split")
    order = [*([split_of(named)] if isinstance(named, str) else []), "test", "validation", "data", "train"]
    questions = next(name for name in order if name in splits)
    examples = "train" if "train" in splits else questions
    return dict(zip(_SPLITS, (None, None, questions, examples), strict=True))


def require_labels(task: Any, limit: int | None) -> None:
    """Refuse rows whose label is none of their choices, such as the -1 of rows without one.

    Args:
        task: of the harness, with its data set; one that judges in a way of its own is not looked at.
        limit: how many rows are asked; None for all.

    Raises:
        UsageError: there is such a row; names it.
    """
    docs = getattr(task, "task_docs", None)
    if docs is None or task.OUTPUT_TYPE != "multiple_choice" or callable(task.config.process_results):
        return
    label_of = task.doc_to_text if task.multiple_input else task.doc_to_target
    for number, doc in enumerate(itertools.islice(docs, limit), 1):
        choices, label = task.doc_to_choice(doc), label_of(doc)
        labels = label if isinstance(label, list) else [label]
        if not labels or not all(_is_choice(one, choices) for one in labels):
            raise UsageError(
                f"task {task.config.task} cannot be made of the rows in --data: row {number} of its "
                f"{task.config.test_split} split has the label {label!r}, and its choices are "
                f"{', '.join(map(repr, choices))}; give rows with labels"
            )


def _is_choice(label: Any, choices: Sequence[str]) -> bool:
    return 0 <= label < len(choices) if isinstance(label, int) else label in choices


def _complete(rows: Sequence[Row]) -> Iterator[Row]:
    """Rows that all have the keys of all: the library takes those of the first one alone."""
    keys = dict.fromkeys(key for row in rows for key in row)
    return ({**keys, **row} for row in rows)
