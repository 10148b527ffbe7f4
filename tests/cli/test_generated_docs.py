from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from npu_zoo.cli.matrix import VERDICT_KEYS
from npu_zoo.cli.results import RESULT_KEYS

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "generate_docs.py"


def check(script: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(script), "--check"],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, **environment},
    )


def test_the_committed_pages_are_what_the_code_says() -> None:
    ran = check(SCRIPT, COLUMNS="40", NPU_ZOO_PLUGINS="no_such_plugin")
    assert ran.returncode == 0, ran.stdout + ran.stderr


def test_the_command_line_page_documents_every_key_of_json() -> None:
    page = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    for command, keys in (("run", RESULT_KEYS), ("check", VERDICT_KEYS)):
        section = page.split(f"## `npu-zoo {command}`")[1].split("\n## ")[0]
        documented = section.split("| key of --json | meaning |\n|---|---|\n")[1]
        assert [line.split("`")[1] for line in documented.splitlines() if line.startswith("|")] == list(keys)


def test_contributing_leaves_the_line_of_imports_to_the_design() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert "<-" not in text
    assert "[docs/design.md](docs/design.md)" in text
    design = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    house = design.split("## The house")[1].split("\n## ")[0]
    (line,) = [line for line in house.splitlines() if "<-" in line]
    rooms = re.findall(r"\w+", line)
    assert [r for r in rooms if not any((ROOT / "npu_zoo" / name).exists() for name in (r, f"{r}.py"))] == []


def test_a_changed_page_fails_with_the_difference(tmp_path: Path) -> None:
    (tmp_path / "scripts").mkdir()
    (tmp_path / "docs").mkdir()
    for name in ("generate_docs.py", "serving_pages.py", "speculative_page.py", "host_page.py"):
        (tmp_path / "scripts" / name).write_bytes(SCRIPT.with_name(name).read_bytes())
    (tmp_path / "benchmarks").mkdir()
    records = ("quantization", "convert", "parallel", "speculative", "soak", "serve", "host")
    for record in (f"{name}.json" for name in records):
        (tmp_path / "benchmarks" / record).write_bytes((ROOT / "benchmarks" / record).read_bytes())
    for name in ("matrix.md", "cli.md", "simulator-operators.md"):
        (tmp_path / "docs" / name).write_text((ROOT / "docs" / name).read_text().replace("atlas_800t_a2", "atlas"))
    ran = check(tmp_path / "scripts" / SCRIPT.name)
    assert ran.returncode == 1
    assert "atlas_800t_a2" in ran.stdout
    assert "generate_docs.py" in ran.stderr
