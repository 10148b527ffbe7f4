"""BoolQ's rows, in the forms that they come in, as the harness's task ``boolq`` takes them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from npu_zoo.core.errors import UsageError

_PASSAGE, _QUESTION = "Passage: ", "\nQuestion: "


def boolq_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """``passage``, ``question`` (without its mark) and ``label`` (0 is no) of a row.

    Args:
        row: the data set's own (``question``, ``passage``, ``answer``), SuperGLUE's (``label``), or llm-foundry's
            (``query``, ``choices``, ``gold``).

    Raises:
        UsageError: it is none of them.
    """
    found = _of_foundry(row) if "query" in row else (row.get("passage"), row.get("question"), _label(row))
    passage, question, label = found
    if not isinstance(passage, str) or not isinstance(question, str) or label not in (0, 1):
        raise UsageError(
            f"no row of BoolQ: it has {', '.join(row) or 'nothing'}; due are question, passage and answer (true or "
            "false), or label (0 or 1), or llm-foundry's query, choices and gold"
        )
    return {"passage": passage, "question": question.strip().removesuffix("?"), "label": int(label)}


def _label(row: Mapping[str, Any]) -> Any:
    answer = row.get("answer", row.get("label"))
    return {"yes": 1, "no": 0, "true": 1, "false": 0}.get(answer.lower()) if isinstance(answer, str) else answer


def _of_foundry(row: Mapping[str, Any]) -> tuple[Any, Any, Any]:
    query, choices, gold = row["query"], row.get("choices", ()), row.get("gold", -1)
    if not isinstance(query, str) or not query.startswith(_PASSAGE) or _QUESTION not in query:
        return None, None, None
    passage, _, question = query.removeprefix(_PASSAGE).rpartition(_QUESTION)
    fits = isinstance(choices, list) and isinstance(gold, int) and 0 <= gold < len(choices)
    named = choices[gold] if fits else None
    return passage, question, {"no": 0, "yes": 1}.get(str(named))
