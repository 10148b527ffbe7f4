from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

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


def test_a_changed_page_fails_with_the_difference(tmp_path: Path) -> None:
    (tmp_path / "scripts").mkdir()
    (tmp_path / "docs").mkdir()
    (tmp_path / "scripts" / SCRIPT.name).write_bytes(SCRIPT.read_bytes())
    for name in ("matrix.md", "cli.md"):
        (tmp_path / "docs" / name).write_text((ROOT / "docs" / name).read_text().replace("atlas_800t_a2", "atlas"))
    ran = check(tmp_path / "scripts" / SCRIPT.name)
    assert ran.returncode == 1
    assert "atlas_800t_a2" in ran.stdout
    assert "generate_docs.py" in ran.stderr
