"""Files of answers and of logits: what a fault leaves, and what is not overwritten."""

from __future__ import annotations

import json
from pathlib import Path

import numpy
import pytest
from safetensors import safe_open

from npu_zoo.core.errors import ConfigError, NpuZooError
from npu_zoo.evaluation.accuracy.generation import generation_params
from npu_zoo.evaluation.accuracy.logits import LogitFile
from npu_zoo.evaluation.accuracy.responses import ResponseFile


def test_answers_are_there_again(tmp_path: Path) -> None:
    path = tmp_path / "a.responses"
    with ResponseFile(path, "m") as first:
        first.put("k", [1.5, True])
        with pytest.raises(ConfigError, match="written by another process"):
            ResponseFile(path, "m")
    with ResponseFile(path, "m") as again:
        assert (again.found, again.get("k"), again.get("other")) == (1, [1.5, True], None)
    with pytest.raises(ConfigError, match="another model"):
        ResponseFile(path, "n")


@pytest.mark.parametrize("cut", [1, 20, -1, -30])
def test_a_torn_line_is_cut_off(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "a.responses"
    with ResponseFile(path, "m") as file:
        file.put("k", "text")
    path.write_bytes(path.read_bytes()[:cut])
    with ResponseFile(path, "m") as file:
        assert file.found == 0
        file.put("k", "text")
    with ResponseFile(path, "m") as file:
        assert file.get("k") == "text"


@pytest.mark.parametrize("content", ["my notes", '{"format": "other"}\n', "[]\n", '{"model": 1'])
def test_a_file_of_the_users_is_left_alone(tmp_path: Path, content: str) -> None:
    path = tmp_path / "notes"
    path.write_text(content, "utf-8")
    with pytest.raises(ConfigError, match="holds no answers"):
        ResponseFile(path, "m")
    with pytest.raises(ConfigError, match="no file of logits"):
        LogitFile(path, "m")
    assert path.read_text("utf-8") == content


def test_logits_are_put_together_in_order(tmp_path: Path) -> None:
    path = tmp_path / "l.safetensors"
    rows = numpy.arange(20, dtype=numpy.float32).reshape(5, 4)
    for _ in range(2):  # the second one replaces the first one's file
        with LogitFile(path, "f:v", positions=2) as file:
            file.put("t", "1", rows[2:], part=1)
            file.put("t", "0", rows[:1])
            file.put("t", "1", rows[:1], part=0)
            file.finish()
    with safe_open(path, "numpy") as found:
        assert found.metadata() == {"format": "npu-zoo eval logits 1", "model": "f:v", "vocab_size": "4"}
        assert set(found.keys()) == {"t/0", "t/1"}
        assert (found.get_tensor("t/1") == rows[[0, 2, 3]]).all()
    with LogitFile(path, "f:v") as file:  # which is not finished
        file.put("t", "0", rows)
    with safe_open(path, "numpy") as found:
        assert set(found.keys()) == {"t/0", "t/1"}
    assert [p.name for p in tmp_path.iterdir()] == ["l.safetensors"]


def test_a_full_disk_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Path("/dev/full").open("wb", buffering=0) as full, LogitFile(tmp_path / "l", "m") as logits:
        logits._file.close()
        monkeypatch.setattr(logits, "_file", full)
        with pytest.raises(NpuZooError, match="No space left"):
            logits.put("t", "0", numpy.zeros((1, 4), numpy.float32))
    with pytest.raises(NpuZooError, match="the same command goes on"):
        _put_on_a_full_disk(tmp_path / "r", monkeypatch)


def _put_on_a_full_disk(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To close a file that could not be written fails, too."""
    with ResponseFile(path, "m") as kept:
        kept._file.close()
        monkeypatch.setattr(kept, "_file", Path("/dev/full").open("wb"))  # noqa: SIM115
        kept.put("k", 1)


def test_arguments_of_generation_are_taken_or_named() -> None:
    pytest.importorskip("lm_eval")
    params, until = generation_params({"until": "\n", "max_gen_toks": 7, "temperature": 0.5, "do_sample": True})
    assert (params.temperature, params.max_tokens, until) == (0.5, 7, ["\n"])
    assert generation_params({"do_sample": False, "temperature": 0.0, "num_beams": 1})[0].greedy
    assert generation_params({})[0].max_tokens == 256
    with pytest.raises(NpuZooError, match=r"num_beams=4, penalty_alpha=0\.6"):
        generation_params({"num_beams": 4, "penalty_alpha": 0.6, "until": []})


def test_known_files_have_whole_hashes() -> None:
    from npu_zoo.evaluation.accuracy.sources import DATA_FILES

    for file in {file for files in DATA_FILES.values() for file in files}:
        assert len(bytes.fromhex(file.sha256)) == 32
        assert file.url.startswith("https://") or not file.url
    assert json.dumps(sorted(DATA_FILES))
