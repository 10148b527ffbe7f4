"""The lines that the page of files of prompts shows are taken as they stand there."""

from __future__ import annotations

import json
import re
from pathlib import Path

from npu_zoo.cli.batch_format import BatchLines
from npu_zoo.cli.prompt_file import Line
from npu_zoo.cli.prompt_formats import PROMPT_KEYS, JsonLines, looks_like
from npu_zoo.core.sampling import SamplingParams
from npu_zoo.protocol.bodies import validate_request
from npu_zoo.protocol.requests import ChatCompletionRequest, CompletionRequest

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "offline.md").read_text(encoding="utf-8")
MODELS = {"/v1/chat/completions": ChatCompletionRequest, "/v1/completions": CompletionRequest}


def shown() -> list[Line]:
    blocks = re.findall(r"```json\n(.*?)```", PAGE, re.DOTALL)
    return [Line(i, i + 1, text) for block in blocks for i, text in enumerate(block.splitlines())]


def test_the_lines_are_taken() -> None:
    forms = {"jsonl": JsonLines(SamplingParams(), chat=False), "batch": BatchLines({}, ["m"])}
    seen = dict.fromkeys(forms, 0)
    for line in shown():
        name = looks_like(Path("lines.jsonl"), line)
        forms[name].check(line)
        seen[name] += 1
        data = json.loads(line.text)
        if name == "batch":
            validate_request(MODELS[data["url"]], data["body"])
    assert min(seen.values()) > 1


def test_every_kind_of_prompt_is_shown() -> None:
    keys = {key for line in shown() for key in json.loads(line.text)}
    assert set(PROMPT_KEYS) <= keys
