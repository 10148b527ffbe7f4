"""Evidence records out of outcomes, and the memory of digests by which stale ones are told."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from npu_zoo.core.errors import UsageError
from npu_zoo.core.evidence import EvidenceRecord, read_records, row_digest
from npu_zoo.core.features import FeatureRow
from npu_zoo.core.specs import FamilySpec
from npu_zoo.registry import PluginRecord, Registry, get_registry
from npu_zoo.testing import evidence
from npu_zoo.testing.evidence import current_code, stale_records
from npu_zoo.testing.validation.claims import Outcome, Status
from npu_zoo.testing.validation.records import require_writable, write_records
from npu_zoo.testing.validation.scope import Part

BASE = get_registry().families["wizardcoder"]
ROWS = tuple(
    FeatureRow(
        sizes=("demo",), hardware=("cpu",), dtype=(dtype,), world_size=(1,), attention=("paged",), source="zoo"
    )
    for dtype in ("float32", "float16", "bfloat16")
)  # fmt: skip


def family_of(name: str, rows: tuple[FeatureRow, ...] = ROWS) -> FamilySpec:
    changes = {"name": name, "rows": rows, "records": (), "truth": "", "denials": ()}
    return BASE.model_copy(update=changes)


def part_of(target: str = "npu_zoo.plugins.wizardcoder", *families: FamilySpec) -> Part:
    registry = Registry()
    given = families or (family_of("orchid"),)
    registry.families = {family.name: family for family in given}
    names = {"register_families": list(registry.families)}
    return Part(PluginRecord("orchid", target, registered=names), registry)


def outcome(row: int, status: Status, cell: str = "cpu_float32_paged", family: str = "orchid") -> Outcome:
    figures = {"cell": cell, "devices": 1, "tokens": 12} if status == "holds" else {}
    part = part_of("", family_of(family))
    subject = part.subject(part.families[0], ROWS[row - 1])
    return Outcome("run", subject, "agrees", status, figures=figures)


def record(row: FeatureRow, level: str = "simulated", family: str = "orchid", code: str = "c" * 16) -> EvidenceRecord:
    return EvidenceRecord(
        family=family, row=row_digest(row), level=level, date="2026-01-01", shape={}, versions={}, code=code,
    )  # type: ignore[arg-type]  # fmt: skip


def write(file: Path, *records: EvidenceRecord) -> None:
    file.write_text(json.dumps([one.model_dump(mode="json") for one in records]))


def test_what_did_not_run_keeps_its_records_and_what_failed_loses_them(tmp_path: Path) -> None:
    file = tmp_path / "orchid.json"
    gone = ROWS[0].model_copy(update={"attention": ("flash",)})
    before = [record(ROWS[0]), record(ROWS[1]), record(ROWS[1], "measured"), record(ROWS[2]), record(gone)]
    write(file, *before)
    outcomes = [outcome(1, "holds"), outcome(1, "holds", "cpu_float32_flash"), outcome(2, "holds"), outcome(2, "fails")]
    (written,) = write_records([part_of()], outcomes, "simulated", tmp_path)
    assert (written.file, written.made, written.failed) == (file, 1, 1)
    found = read_records(file)
    assert [(one.row, one.level) for one in found] == [
        (row_digest(ROWS[0]), "simulated"),
        (row_digest(ROWS[1]), "measured"),
        (row_digest(ROWS[2]), "simulated"),
    ]
    assert found[0].code != "c" * 16
    assert found[0].figures == {"cpu_float32_paged_tokens": 12.0, "cpu_float32_flash_tokens": 12.0}
    assert found[1:] == (before[2], before[3])


def test_a_row_that_was_told_in_part_keeps_what_it_has(tmp_path: Path) -> None:
    file = tmp_path / "orchid.json"
    write(file, record(ROWS[0]))
    outcomes = [outcome(1, "holds"), outcome(1, "skipped"), outcome(2, "holds"), outcome(2, "skipped")]
    (written,) = write_records([part_of()], outcomes, "simulated", tmp_path)
    assert (written.made, written.failed) == (0, 0)
    assert read_records(file) == (record(ROWS[0]),)
    write_records([part_of()], [*outcomes, outcome(1, "fails")], "simulated", tmp_path)
    assert read_records(file) == ()


def test_nothing_is_written_where_nothing_ran(tmp_path: Path) -> None:
    assert write_records([part_of()], [outcome(1, "skipped")], "simulated", tmp_path) == []
    assert list(tmp_path.iterdir()) == []


def test_families_of_one_plugin_share_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "garden.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    part = part_of("garden", family_of("orchid"), family_of("tulip"))
    outcomes = [outcome(1, "holds"), outcome(2, "holds", family="tulip")]
    written = write_records([part], outcomes, "measured", versions={"cann": "9"})
    assert {one.file for one in written} == {tmp_path / "evidence.json"}
    assert [(r.family, r.level) for r in read_records(tmp_path / "evidence.json")] == [
        ("orchid", "measured"),
        ("tulip", "measured"),
    ]
    assert read_records(tmp_path / "evidence.json")[0].versions["cann"] == "9"
    write_records([part], outcomes[:1], "measured")
    assert [r.family for r in read_records(tmp_path / "evidence.json")] == ["tulip", "orchid"]


def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "orchid.json"
    write(file, record(ROWS[2]))
    before = file.read_bytes()

    def fail(*_: object) -> None:
        raise OSError("no room")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="no room"):
        write_records([part_of()], [outcome(1, "holds")], "simulated", tmp_path)
    assert file.read_bytes() == before
    assert list(tmp_path.iterdir()) == [file]


def test_where_records_cannot_be_written_is_told_beforehand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "orchid.json"
    file.write_text('{"a": 1}')
    with pytest.raises(UsageError, match=r"orchid\.json exists and holds no evidence records"):
        require_writable([part_of()], tmp_path)
    with pytest.raises(UsageError, match=r"cannot be made: .*; name another: --evidence DIR"):
        require_writable([part_of()], file / "folder")
    with pytest.raises(UsageError, match="where plugin orchid lies cannot be told; name a folder: --evidence DIR"):
        require_writable([part_of("")])
    require_writable([part_of()], tmp_path / "new" / "folder")
    assert (tmp_path / "new" / "folder").is_dir()
    monkeypatch.setattr("os.access", lambda path, mode: False)
    for folder in (None, tmp_path):
        with pytest.raises(UsageError, match=r"cannot be written to.*--evidence DIR"):
            require_writable([part_of()], folder)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of digests, which nothing in this process remembers."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(evidence, "_remembered", evidence._remembered.__wrapped__)
    return tmp_path / "cache" / "npu-zoo" / "source-digests.json"


def planted(folder: Path, monkeypatch: pytest.MonkeyPatch, source: str = "A = 1\n") -> tuple[FamilySpec, PluginRecord]:
    folder.mkdir(exist_ok=True)
    (folder / "planted_orchid.py").write_text(source)
    monkeypatch.syspath_prepend(folder)
    family = family_of("orchid").model_copy(update={"model": "planted_orchid:Model"})
    return family, PluginRecord("orchid", "planted_orchid")


def test_digests_are_remembered_and_a_changed_file_is_noticed(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family, plugin = planted(tmp_path / "site", monkeypatch)
    code = current_code(family, plugin)
    assert len(json.loads(cache.read_text())) > 20
    monkeypatch.setattr(evidence, "source_digest", _never)
    assert current_code(family, plugin) == code
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    proven = family.model_copy(update={"records": (record(ROWS[0], code=code),)})
    plugin_with_change = planted(tmp_path / "site", monkeypatch, "A = 1  # one\n")[1]
    assert stale_records(proven, plugin_with_change) == []
    planted(tmp_path / "site", monkeypatch, "A = 2\n")
    assert stale_records(proven, plugin_with_change) == list(proven.records)


def _never(source: bytes) -> str:
    raise AssertionError("read once more")


def test_a_damaged_memory_is_as_none(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    family, plugin = planted(tmp_path / "site", monkeypatch)
    code = current_code(family, plugin)
    for content in (b"", b"{", b"[1]", b'{"a": 1}', b"\xff\xfe"):
        cache.write_bytes(content)
        assert current_code(family, plugin) == code, content
        assert len(json.loads(cache.read_text())) > 20


def test_a_memory_that_cannot_be_kept_is_done_without(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family, plugin = planted(tmp_path / "site", monkeypatch)
    code = current_code(family, plugin)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert current_code(family, plugin) == code
    cache.unlink()
    cache.mkdir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert current_code(family, plugin) == code


def test_a_machine_without_a_home_is_done_without(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    family, plugin = planted(tmp_path / "site", monkeypatch)
    code = current_code(family, plugin)
    monkeypatch.delenv("XDG_CACHE_HOME")

    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    assert current_code(family, plugin) == code
