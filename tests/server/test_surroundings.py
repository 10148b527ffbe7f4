"""Servers beside each other, and in places that are not made for them."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from .raw_http import ask, wait_until
from .real_server import PATH, SHORT, SMALL

ROOT = Path(__file__).parent.parent.parent
SCRIPT = "import sys\nfrom npu_zoo.cli import main\nsys.exit(main())\n"
"""What an installer writes for the command; Python then imports from the script's folder and not from where one is."""

MISLEADING = ("npu_zoo/__init__", "json", "torch", "uvicorn", "logging", "sitecustomize")
WRONG = "raise SystemExit('a file of the working directory was imported')\n"


@contextlib.contextmanager
def launched(folder: Path, name: str, **environ: str) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """The command's process in a folder, and its address."""
    script, log = folder.parent / "npu-zoo", folder.parent / f"{name}.log"
    script.write_text(SCRIPT)
    command = [sys.executable, str(script), "serve", *SMALL, "--port", "0"]
    variables = {**os.environ, "PYTHONPATH": str(ROOT), **environ}
    with log.open("wb") as file, subprocess.Popen(command, cwd=folder, env=variables, stderr=file) as process:
        try:
            found = wait_until(lambda: process.poll() or re.search(r"is served at (\S+)/v1", log.read_text()))
            assert not isinstance(found, int), log.read_text()
            wait_until(lambda: ask(found[1], "GET", "/health/ready").status == 200)
            yield found[1], process
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0, log.read_text()
        finally:
            process.kill()


@pytest.mark.slow
@pytest.mark.skipif(sys.version_info < (3, 11), reason="Python before 3.11 imports from the working directory first")
def test_two_servers_in_a_folder_of_misleading_names_without_a_place_for_scratch_files(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    (folder / "npu_zoo").mkdir(parents=True)
    for name in MISLEADING:
        (folder / f"{name}.py").write_text(WRONG)
    with (
        launched(folder, "one", TMPDIR="/proc") as (one, process),
        launched(folder, "two", TMPDIR=str(folder / "missing" / ("long" * 40))) as (two, _),
    ):
        answers = [ask(url, "POST", PATH, SHORT) for url in (one, two)]
        assert answers[0].texts == answers[1].texts
        for child in psutil.Process(process.pid).children():
            child.kill()
        assert ask(two, "POST", PATH, SHORT).texts == answers[1].texts
        wait_until(lambda: ask(one, "GET", "/health/ready").status == 200)
        assert ask(one, "POST", PATH, SHORT).texts == answers[0].texts
    found = {str(path.relative_to(folder).with_suffix("")) for path in folder.rglob("*") if path.is_file()}
    assert found == set(MISLEADING)  # nothing was left here
