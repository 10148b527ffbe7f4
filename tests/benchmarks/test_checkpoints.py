"""Checkpoints that the real transformers loads, and the whole script on a tiny model."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from harness.checkpoint import REFERENCE, ensure_checkpoint
from harness.shapes import SHAPES

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
SHAPE = dataclasses.replace(SHAPES["tiny"], dtype="float32")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ensure_checkpoint(tmp_path_factory.mktemp("checkpoints"), SHAPE)


def test_the_checkpoint_has_every_tensor_of_the_model(checkpoint: Path) -> None:
    from transformers import AutoModelForCausalLM

    factory: Any = AutoModelForCausalLM
    model, report = factory.from_pretrained(checkpoint, output_loading_info=True)
    assert not any(report.values()), report
    assert sum(value.numel() for value in model.parameters()) == SHAPE.parameters


@pytest.mark.parametrize("name", ["tiny-moe", "tiny-mla"])
def test_transformers_finds_every_tensor_of_experts_and_latents(name: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    shape = dataclasses.replace(SHAPES[name], dtype="float32")
    folder = ensure_checkpoint(tmp_path, shape)
    beside = folder / REFERENCE
    # Qwen2Moe alone has a gate on its shared expert: one row in every layer of experts.
    gates = shape.hidden_size * (shape.num_hidden_layers - 1) if beside.is_dir() else 0
    factory: Any = AutoModelForCausalLM
    model, report = factory.from_pretrained(beside if beside.is_dir() else folder, output_loading_info=True)
    assert beside.is_dir() == (name == "tiny-moe")
    assert not any(report.values()), report
    held = sum(value.numel() for value in model.state_dict().values())
    assert held == shape.parameters + gates


def test_the_tokenizer_round_trips(checkpoint: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    text = "def führer(n):\n\treturn  '深'\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    eos = json.loads((checkpoint / "config.json").read_text())["eos_token_id"]
    assert tokenizer.eos_token_id == eos
    assert SHAPE.num_tokens < len(tokenizer) <= SHAPE.vocab_size


def test_a_complete_checkpoint_is_kept_and_a_partial_one_is_not(checkpoint: Path) -> None:
    stamp = (checkpoint / "model.safetensors").stat().st_mtime_ns
    leftover = checkpoint.with_suffix(".part")
    leftover.mkdir()
    assert ensure_checkpoint(checkpoint.parent, SHAPE) == checkpoint
    assert (checkpoint / "model.safetensors").stat().st_mtime_ns == stamp
    other = dataclasses.replace(SHAPE, name="other")
    (checkpoint.parent / "other-float32-v2.part" / "stale").mkdir(parents=True)
    written = ensure_checkpoint(checkpoint.parent, other)
    assert not (written / "stale").exists()


@pytest.mark.long
def test_the_whole_script_on_a_tiny_model_and_on_its_record(tmp_path: Path) -> None:
    file = tmp_path / "records" / "tiny-moe.json"
    command = [sys.executable, str(BENCHMARKS / "engine.py"), "--shape", "tiny-moe", "--engines", "transformers"]
    command += ["--rounds", "2", "--threads", "1", "--workdir", str(tmp_path / "work"), "--records", str(file.parent)]

    def run(*more: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "PYTHONWARNINGS": "default"}
        return subprocess.run([*command, *more], capture_output=True, text=True, env=environment)

    done = run("--cases", "decode-8,shared-prefix")
    assert done.returncode == 0, done.stderr
    assert "decode, batch 8" in done.stdout
    assert "w8a16 is left out" in done.stderr
    record = json.loads(file.read_text())
    assert record["arguments"]["group"] == "plain"
    assert str(tmp_path) not in file.read_text()
    assert [len(case["rounds"][1]) for case in record["body"]["cases"]] == [2, 1]
    again = run("--cases", "decode-8,shared-prefix")
    assert again.returncode == 1
    assert "give --resume" in again.stderr
    record["body"]["cases"].pop()
    file.write_text(json.dumps(record))
    resumed = run("--cases", "decode-8,shared-prefix", "--resume")
    assert resumed.returncode == 0, resumed.stderr
    cases = json.loads(file.read_text())["body"]["cases"]
    assert [case["name"] for case in cases] == ["decode-8", "shared-prefix"]
    assert cases[0]["rounds"] == record["body"]["cases"][0]["rounds"]
