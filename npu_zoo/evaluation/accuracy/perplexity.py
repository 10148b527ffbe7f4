"""``perplexity``: how well a model predicts texts."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from pydantic import JsonValue

from npu_zoo.core.engine import Progress
from npu_zoo.core.errors import UsageError
from npu_zoo.evaluation.accuracy.local_data import data_files, read_rows, text_of
from npu_zoo.evaluation.accuracy.scoring import LogitSink, require_probability
from npu_zoo.evaluation.accuracy.sources import describe_data
from npu_zoo.evaluation.accuracy.tasks import EvalTask, Metric, TaskOptions, TaskResult

if TYPE_CHECKING:
    from npu_zoo.engine.llm import LLM
    from npu_zoo.evaluation.accuracy.adapter import EngineLM, Window

_ROWS = (".jsonl", ".jsonl.gz", ".json", ".parquet")
_TEXTS = (".txt", ".md", ".py", *_ROWS)
_LARGEST = 700.0  # whose exponential a float still holds


@dataclass(frozen=True)
class Document:
    """A text, and what it is known by."""

    id: str
    text: str

    @property
    def words(self) -> int:
        """As the harness counts them: what stands between white space."""
        return len(re.split(r"\s+", self.text))

    @property
    def bytes(self) -> int:
        """In UTF-8."""
        return len(self.text.encode())


class Perplexity(EvalTask):
    """Word, byte and token perplexity of the texts in ``--data``, each in windows as long as the model takes.

    No beginning-of-text token is scored, since no text has one.
    """

    name: ClassVar[str] = "perplexity"

    def check(self, options: TaskOptions) -> None:
        """Read the texts; see the base class."""
        from npu_zoo.evaluation.accuracy.harness import need_harness

        _documents(options)
        need_harness()

    def run(self, llm: LLM, options: TaskOptions, progress: Progress) -> TaskResult:
        """Score all texts; see the base class."""
        from npu_zoo.evaluation.accuracy.adapter import EngineLM

        lm = EngineLM(llm, progress=progress, responses=options.responses, logits=options.logits)
        documents = _documents(options)
        scored = _score(lm, documents, options)
        return TaskResult(
            task=self.name,
            metrics=perplexities(documents, scored),
            samples=[_sample(*found) for found in zip(documents, scored, strict=True)],
            notes=["--num-fewshot changes nothing in perplexity: there are no questions"]
            if options.num_fewshot
            else [],
            data=describe_data(options.data, data_files(options.data, _TEXTS)) if options.data else {},
        )


def perplexities(documents: Sequence[Document], scored: Sequence[Sequence[Window]]) -> dict[str, Metric]:
    """The figures over all texts, weighted by their length.

    One that no float can hold, as words of a text without spaces may have it, is left out. The standard error is that
    of a ratio of sums over texts, or over windows where there is one text alone.

    Raises:
        EngineError: a log-probability is no number.
    """
    windows = [window for text in scored for window in text]
    texts = [(sum(w.logprob for w in text), sum(w.tokens for w in text)) for text in scored]
    tokens = sum(window.tokens for window in windows)
    logprob = sum(window.logprob for window in windows)
    require_probability(logprob, Perplexity.name)
    error = ratio_error(texts if len(texts) > 1 else windows)
    counts = {"token": tokens, "word": sum(d.words for d in documents), "byte": sum(d.bytes for d in documents)}
    found = {
        f"{unit}_perplexity": _exponential(-logprob / count, error and error * tokens / count, len(documents))
        for unit, count in counts.items()
        if -logprob / count < _LARGEST
    }
    bits = tokens / counts["byte"] / math.log(2)
    per_byte = Metric(value=-logprob / tokens * bits, stderr=error and error * bits, samples=len(documents))
    return {**found, "bits_per_byte": per_byte}


def ratio_error(parts: Sequence[tuple[float, int]]) -> float | None:
    """The standard error of the sum of values through the sum of weights (Cochran, Sampling Techniques, 6.4).

    None where there are fewer than two parts.
    """
    if len(parts) < 2:
        return None
    weights = sum(weight for _, weight in parts)
    ratio = sum(value for value, _ in parts) / weights
    squares = sum((value - ratio * weight) ** 2 for value, weight in parts)
    return math.sqrt(squares * len(parts) / (len(parts) - 1)) / weights


def _exponential(mean: float, error: float | None, samples: int) -> Metric:
    value = math.exp(mean)
    return Metric(value=value, stderr=None if error is None else value * error, samples=samples)


def _score(lm: EngineLM, documents: Sequence[Document], options: TaskOptions) -> list[list[Window]]:
    texts = [lm.tok_encode(document.text, add_special_tokens=False) for document in documents]
    logits = options.logits
    sinks = None if logits is None else [LogitSink(logits, Perplexity.name, document.id) for document in documents]
    return lm.score_texts(texts, sinks)


def _sample(document: Document, windows: Sequence[Window]) -> dict[str, JsonValue]:
    return {
        "task": Perplexity.name,
        "id": document.id,
        "prompt_hash": hashlib.sha256(document.text.encode()).hexdigest(),
        "loglikelihood": sum(window.logprob for window in windows),
        "tokens": sum(window.tokens for window in windows),
        "words": document.words,
        "bytes": document.bytes,
    }


def _documents(options: TaskOptions) -> list[Document]:
    if options.data is None:
        raise UsageError(
            "task perplexity reads its texts from files: give --data with a text file, JSON lines with a text each, "
            "or a folder of them"
        )
    files = data_files(options.data, _TEXTS)
    documents = [document for file in files for document in _read(file, alone=len(files) == 1)]
    if not documents:
        raise UsageError(f"--data {options.data} holds no text")
    return documents[: options.limit]


def _read(file: Path, *, alone: bool) -> list[Document]:
    if not file.name.endswith(_ROWS):
        text = text_of(file)
        return [Document(file.name, text)] if text.strip() else []
    documents = []
    for number, row in enumerate(read_rows(file)):
        body = row.get("text")
        if not isinstance(body, str):
            raise UsageError(f'{file}, row {number + 1}: no text; each row has one under "text"')
        if body.strip():
            documents.append(Document(str(number) if alone else f"{file.name}:{number}", body))
    return documents
