"""Records: what they hold, where they may be written, and what is no record."""

from __future__ import annotations

from pathlib import Path

import pytest

from npu_zoo.checkpoint import fingerprints
from npu_zoo.core.config import EngineArgs
from npu_zoo.core.errors import UsageError
from npu_zoo.core.evidence import row_digest
from npu_zoo.dispatch import resolve
from npu_zoo.evaluation.record import (
    ModelUnderTest,
    ResultRecord,
    read_record,
    require_record_place,
    write_record,
)
from npu_zoo.registry import get_registry
from npu_zoo.testing.evidence import current_code


def test_a_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    config = resolve(EngineArgs(model="deepseek_coder", hardware="cpu", dtype="float32"))
    record = ResultRecord(kind="eval", model=ModelUnderTest.of(config), figures={"accuracy": 0.5}, body={"n": 2})
    write_record(record, tmp_path / "made" / "record.json")
    found = read_record(tmp_path / "made" / "record.json", "eval")
    assert found == record
    assert found.model is not None
    family = get_registry().families["deepseek_coder"]
    assert found.model.row in {row_digest(row) for row in family.rows}
    assert found.model.code == current_code(family, get_registry().plugins["deepseek_coder"])
    assert found.versions["torch"].startswith("2.")
    assert not found.model.simulated


def test_another_checkpoint_is_told_from_the_first(tmp_path: Path) -> None:
    config = resolve(EngineArgs(model="deepseek_coder", hardware="cpu", dtype="float32"))
    one = ModelUnderTest.of(config)
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in Path(config.weights).iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    args = EngineArgs(model="deepseek_coder:custom", weights=str(copy), hardware="cpu", dtype="float32")
    assert ModelUnderTest.of(resolve(args)).weights == one.weights
    (copy / "generation_config.json").write_text("{}")
    assert ModelUnderTest.of(resolve(args)).weights != one.weights


def test_checkpoints_of_one_training_are_told_apart(tmp_path: Path) -> None:
    """They have the same files of the same sizes."""
    small, large = tmp_path / "rank_0" / "model.ckpt", tmp_path / "model.safetensors"
    small.parent.mkdir()
    small.write_bytes(bytes(70_000))
    with large.open("wb") as file:
        file.truncate(40 << 20)
    seen = [fingerprints(tmp_path)]
    assert set(seen[0]) == {"rank_0/model.ckpt", "model.safetensors"}
    for path, start, length in (
        (small, 69_999, 1),
        (large, 0, 1),
        (large, (40 << 20) - 1, 1),
        (large, 9 << 20, 1 << 18),
    ):
        with path.open("r+b") as file:
            file.seek(start)
            file.write(b"x" * length)
        seen.append(fingerprints(tmp_path))
    assert len({tuple(sorted(found.items())) for found in seen}) == len(seen)


def test_nothing_else_is_written_over(tmp_path: Path) -> None:
    file = tmp_path / "notes.json"
    file.write_text("mine")
    with pytest.raises(UsageError, match="no record of a benchmark"):
        write_record(ResultRecord(kind="eval"), file)
    assert file.read_text() == "mine"
    file.write_text(ResultRecord(kind="bench serve").model_dump_json())
    with pytest.raises(UsageError, match="is a record of `npu-zoo bench serve`, and one of `npu-zoo eval` is due"):
        require_record_place(file, "eval")
    with pytest.raises(UsageError, match="is no file"):
        require_record_place(tmp_path, "eval")
    write_record(ResultRecord(kind="bench serve", figures={"x": 1.0}), file)
    assert read_record(file).figures == {"x": 1.0}
    assert [path.name for path in tmp_path.iterdir()] == ["notes.json"]


@pytest.mark.parametrize("place", ["/proc/record.json", "notes/record.json", f"{'long' * 99}.json"])
def test_a_place_that_cannot_be_written_is_refused_before_anything_runs(tmp_path: Path, place: str) -> None:
    (tmp_path / "notes").write_text("mine")
    with pytest.raises(UsageError, match="cannot be written"):
        require_record_place(tmp_path / place, "eval")
    require_record_place(tmp_path / "made" / "record.json", "eval")
    assert list((tmp_path / "made").iterdir()) == []


def test_a_file_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"nothing\.json cannot be read: No such file"):
        read_record(tmp_path / "nothing.json")
