"""``npu-zoo pull`` against servers on this machine that answer as the hubs do."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from npu_zoo.cli import download_progress
from npu_zoo.cli.pull import PULL_KEYS
from npu_zoo.core.config import EngineArgs
from npu_zoo.dispatch import resolve
from npu_zoo.weights import http_client
from npu_zoo.weights.remote_files import WORK_FOLDER

ROOT = Path(__file__).parents[2]
_SPEC = importlib.util.spec_from_file_location("stand_in_hub", ROOT / "tests" / "weights" / "stand_in_hub.py")
assert _SPEC is not None
assert _SPEC.loader is not None
hub_server = sys.modules.setdefault("stand_in_hub", importlib.util.module_from_spec(_SPEC))
_SPEC.loader.exec_module(hub_server)
REPOSITORY, WEIGHTS, WANTED = hub_server.REPOSITORY, hub_server.WEIGHTS, hub_server.WANTED

MODEL = "deepseek_coder:1.3b-instruct"
FILE = "model.safetensors"
SECONDS = 60


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    for name in list(os.environ):
        if name.startswith(("HF_", "MODELSCOPE_")) or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.setattr(http_client, "BACKOFF_S", 0.005)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.chdir(tmp_path)
    with hub_server.serve() as served:
        monkeypatch.setenv("HF_ENDPOINT", served.endpoint)
        monkeypatch.setenv("MODELSCOPE_ENDPOINT", served.endpoint)
        yield served


def contents(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def wanted(hub: Any) -> dict[str, bytes]:
    return {path: hub.files[path] for path in WANTED}


@pytest.mark.parametrize(
    ("options", "shown"),
    [((), "Hugging Face"), (("--source", "huggingface"), "Hugging Face"), (("--source", "modelscope"), "ModelScope")],
)
def test_a_checkpoint_is_pulled(hub: Any, cli: Callable, tmp_path: Path, options: tuple[str, ...], shown: str) -> None:
    ran = cli("pull", "deepseek_coder:1.3b", *options, "--to", "out")
    assert ran.code == 0, ran.err
    assert contents(tmp_path / "out") == wanted(hub)
    size = sum(map(len, wanted(hub).values()))
    assert re.search(rf"repository +{REPOSITORY} on {shown}\n", ran.out)
    assert re.search(rf"to download +{size / 1e6:.1f} MB in 7 files\n", ran.out)
    assert re.search(r"free disk +[\d.]+ [GT]B\n", ran.out)
    left_out = " ".join(ran.out.split())
    assert "code, 48 bytes: modeling_model.py, inference/convert.py; --include-code takes them" in left_out
    assert "pickled weights, 700 bytes: pytorch_model.bin; --include-pickles takes them" in left_out
    assert ran.out.endswith(f"run it: npu-zoo run --model {MODEL} --weights out\n")
    assert "7 files downloaded and verified" in ran.err


def test_the_directory_has_the_repository_s_name_by_default(hub: Any, cli: Callable, tmp_path: Path) -> None:
    assert cli("pull", MODEL).code == 0
    assert contents(tmp_path / "deepseek-coder-1.3b-instruct") == wanted(hub)


def test_code_and_pickles_come_when_they_are_asked_for(hub: Any, cli: Callable, tmp_path: Path) -> None:
    ran = cli("pull", MODEL, "--to", "out", "--include-code", "--include-pickles")
    assert ran.code == 0, ran.err
    extra = {"modeling_model.py", "inference/convert.py", "pytorch_model.bin"}
    assert set(contents(tmp_path / "out")) == WANTED | extra


def test_a_dry_run_lists_and_writes_nothing(hub: Any, cli: Callable, tmp_path: Path) -> None:
    ran = cli("pull", MODEL, "--dry-run")
    assert ran.code == 0, ran.err
    assert re.search(r"model\.safetensors +1\.0 MB +missing\n", ran.out)
    assert "modeling_model.py" in ran.out
    assert "run it" not in ran.out
    assert list(tmp_path.iterdir()) == []
    assert hub.requests_for(FILE) == []


@pytest.mark.parametrize("dry_run", [True, False])
def test_json_holds_what_is_documented(hub: Any, cli: Callable, tmp_path: Path, dry_run: bool) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_bytes(hub_server.CONFIG)
    ran = cli("pull", MODEL, "--to", "out", "--json", *["--dry-run"] * dry_run)
    assert ran.code == 0, ran.err
    data = json.loads(ran.out)
    nested = {f"{name}[].{key}" for name in ("files", "left_out") for item in data[name] for key in item}
    assert set(data) | nested == set(PULL_KEYS)
    assert data["commit"] == hub_server.COMMIT
    states = {item["path"]: item["state"] for item in data["files"]}
    assert states == {**dict.fromkeys(WANTED, "missing" if dry_run else "downloaded"), "config.json": "present"}
    assert {item["path"]: item["reason"] for item in data["left_out"]}["pytorch_model.bin"] == "pickled weights"
    assert data["command"] == (None if dry_run else f"npu-zoo run --model {MODEL} --weights out")


def test_a_second_pull_downloads_nothing(hub: Any, cli: Callable) -> None:
    cli("pull", MODEL, "--to", "out")
    hub.seen.clear()
    ran = cli("pull", MODEL, "--to", "out")
    assert ran.code == 0, ran.err
    assert re.search(r"here already +7 files\n", ran.out)
    assert re.search(r"to download +nothing\n", ran.out)
    assert "run it" in ran.out
    assert hub.requests_for(FILE) == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("deepseek_coder",), "deepseek_coder:demo ships inside the package"),
        (("deepseek_coder",), "variants to pull: deepseek_coder:1.3b-base, deepseek_coder:1.3b-instruct"),
        (("deepseek_coder:custom",), "stands for any weights"),
        (("deepseek_codr",), "did you mean deepseek_coder?"),
        (("deepseek_coder:5b",), "has no variant '5b'"),
        (("wizardcoder:7b", "--source", "modelscope"), "no repository on modelscope; huggingface has WizardLMTeam/"),
        ((MODEL, "--source", "elsewhere"), "--source"),
        ((MODEL, "--jobs", "0"), "--jobs"),
        ((), "FAMILY[:VARIANT]"),
    ],
)
def test_a_malformed_request_ends_with_2(hub: Any, cli: Callable, arguments: tuple[str, ...], words: str) -> None:
    ran = cli("pull", *arguments)
    assert ran.code == 2
    assert words in ran.err
    assert ran.out == ""
    assert hub.seen == []


def test_a_refused_token_is_explained(hub: Any, cli: Callable) -> None:
    hub.token = "secret"
    ran = cli("pull", MODEL)
    assert ran.code == 5
    assert "HF_TOKEN" in ran.err
    assert "licence" in ran.err
    assert "hf auth login" in ran.err


def test_a_missing_revision_is_named(hub: Any, cli: Callable, tmp_path: Path) -> None:
    ran = cli("pull", MODEL, "--revision", "v9")
    assert ran.code == 5
    assert f"no revision v9 of {REPOSITORY} on Hugging Face" in ran.err
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_is_too_small_ends_with_4(
    hub: Any, cli: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(total=10, used=0, free=1000))
    for options in ((), ("--dry-run",)):
        ran = cli("pull", MODEL, *options)
        assert ran.code == 4
        assert re.search(r"free disk +1\.0 kB\n", ran.out)
        assert "1,000 free" in ran.err
    assert list(tmp_path.iterdir()) == []


def test_a_file_with_another_content_ends_with_5(hub: Any, cli: Callable, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_bytes(b"mine")
    ran = cli("pull", MODEL, "--to", "out")
    assert ran.code == 5
    assert "config.json" in ran.err
    assert contents(tmp_path / "out") == {"config.json": b"mine"}


def test_a_wrong_hash_ends_with_5(hub: Any, cli: Callable, tmp_path: Path) -> None:
    hub.faults[FILE] = [hub_server.body(WEIGHTS[:-1] + b"?")] * 2
    ran = cli("pull", MODEL, "--to", "out")
    assert ran.code == 5
    assert "is due" in ran.err
    assert not (tmp_path / "out" / FILE).exists()


def test_what_a_failure_left_is_continued_by_the_command_that_is_named(hub: Any, cli: Callable, tmp_path: Path) -> None:
    hub.faults[FILE] = [hub_server.cut(300_000), hub_server.status(404)]
    ran = cli("pull", MODEL, "--to", "out", "--include-code")
    assert ran.code == 5
    (command,) = re.findall(r"this goes on with it: (.*)", ran.err)
    program, *arguments = shlex.split(command)
    assert program == "npu-zoo"
    hub.seen.clear()
    ran = cli(*arguments)
    assert ran.code == 0, ran.err
    assert "300.0 kB of it here from before" in ran.out
    assert set(contents(tmp_path / "out")) == WANTED | {"modeling_model.py", "inference/convert.py"}
    assert [seen.headers.get("range") for seen in hub.requests_for(FILE)] == ["bytes=300000-"]


def test_pickled_weights_alone_need_their_option(hub: Any, cli: Callable, tmp_path: Path) -> None:
    del hub.files[FILE]
    ran = cli("pull", MODEL, "--to", "out")
    assert ran.code == 5
    assert "--include-pickles" in ran.err
    assert not (tmp_path / "out").exists()
    ran = cli("pull", MODEL, "--to", "out", "--include-pickles")
    assert ran.code == 0, ran.err
    assert "npu-zoo run" in ran.out


def test_a_source_without_hashes_is_told_of(hub: Any, cli: Callable) -> None:
    hub.hashes = False
    ran = cli("pull", MODEL, "--source", "modelscope", "--dry-run")
    assert re.search(r"note: ModelScope gives no hash of .*model\.safetensors.*their size alone", ran.err)


def test_lines_tell_how_far_it_is(hub: Any, cli: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download_progress, "SECONDS_BETWEEN_LINES", 0.0)
    ran = cli("pull", MODEL)
    assert re.search(r"[\d.]+ [kM]B of 1\.0 MB, \d/7 files, [\d.]+ [kMG]?B?(ytes)?.*/s, \d+ s left\n", ran.err)


def test_a_terminal_has_a_bar(hub: Any, cli: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    hub.faults[FILE] = [hub_server.body(WEIGHTS[:-1] + b"?")]
    ran = cli("pull", MODEL)
    assert ran.code == 0, ran.err
    assert "━" in ran.err
    assert "is due" in ran.err


def test_a_pulled_checkpoint_is_one_that_runs(hub: Any, cli: Callable, tmp_path: Path) -> None:
    demo = Path(resolve(EngineArgs(model="deepseek_coder:demo", hardware="cpu")).weights)
    hub.files = {path.name: path.read_bytes() for path in demo.iterdir() if path.is_file()}
    assert cli("pull", MODEL, "--to", "out").code == 0
    config = resolve(EngineArgs(model="deepseek_coder:custom", weights=str(tmp_path / "out"), hardware="cpu"))
    assert config.weights == str(tmp_path / "out")
    assert contents(tmp_path / "out")[FILE] == hub.files[FILE]


# In processes of their own


@contextmanager
def pulling(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    """A pull in a process that does not outlive the block."""
    with subprocess.Popen(
        [sys.executable, "-m", "npu_zoo", "pull", MODEL, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def size_of(path: Path) -> int:
    """Bytes of a file that another process may rename at any moment."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def wait_for_part(hub: Any, directory: Path, size: int) -> None:
    """Until the server holds the weights back and what it sent lies on the disk."""
    assert hub.held.wait(SECONDS)
    deadline = time.monotonic() + SECONDS
    while not any(size_of(part) >= size for part in (directory / WORK_FOLDER).glob("*.part")):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_killed_download_goes_on_where_it_was(hub: Any, tmp_path: Path) -> None:
    hub.faults[FILE] = [hub_server.hold(700_000)]
    with pulling("--to", "out") as process:
        wait_for_part(hub, tmp_path / "out", 256 * 1024)
        process.kill()
        process.communicate(timeout=SECONDS)
    assert process.returncode == -signal.SIGKILL
    assert not (tmp_path / "out" / FILE).exists()
    hub.seen.clear()
    with pulling("--to", "out") as process:
        out, err = process.communicate(timeout=SECONDS)
    assert process.returncode == 0, err
    assert "here from before" in out
    assert contents(tmp_path / "out") == wanted(hub)
    (seen,) = hub.requests_for(FILE)
    assert int(re.fullmatch(r"bytes=(\d+)-", seen.headers["range"])[1]) >= 256 * 1024


def test_an_interrupt_leaves_what_came_and_says_how_to_go_on(hub: Any, tmp_path: Path) -> None:
    hub.faults[FILE] = [hub_server.hold(700_000)]
    with pulling("--to", "out", "--source", "modelscope") as process:
        wait_for_part(hub, tmp_path / "out", 256 * 1024)
        start_of_end = time.monotonic()
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=SECONDS)
    assert time.monotonic() - start_of_end < 10
    assert process.returncode == 130, err
    assert "Traceback" not in err
    (command,) = re.findall(r"this goes on with it: npu-zoo pull (.*)", err)
    assert shlex.split(command) == [MODEL, "--source", "modelscope", "--to", "out"]
    with pulling("--to", "out", "--source", "modelscope") as process:
        _, err = process.communicate(timeout=SECONDS)
    assert process.returncode == 0, err
    assert contents(tmp_path / "out") == wanted(hub)


@pytest.mark.parametrize("source", ["huggingface", "modelscope"])
def test_a_pull_imports_nothing_heavy(hub: Any, tmp_path: Path, source: str) -> None:
    script = (
        "import sys; from npu_zoo.cli import main; code = main(sys.argv[1:]); "
        "heavy = ('torch', 'transformers', 'torch_npu', 'numpy', 'huggingface_hub', 'modelscope', 'prompt_toolkit');"
        "print(code, [name for name in heavy if name in sys.modules], file=sys.stderr)"
    )
    ran = subprocess.run(
        [sys.executable, "-c", script, "pull", MODEL, "--source", source, "--to", "out"],
        capture_output=True,
        text=True,
        timeout=SECONDS,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert ran.stderr.splitlines()[-1] == "0 []", ran.stderr
    assert contents(tmp_path / "out") == wanted(hub)
