"""docs/plugin-tutorial.md is done as it says: commands are run, files written and changes applied, in its order."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from npu_zoo.cli.plugin_project import Architecture, NewPlugin, write_project
from npu_zoo.registry import get_registry
from npu_zoo.testing import assert_spec_valid
from npu_zoo.uninstalled import installed_from

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "plugin-tutorial.md"
TEXT = PAGE.read_text(encoding="utf-8")
PROJECT = "npu-zoo-my-llama"
HOME = "/home/me"
"""Where the page lets its reader be."""

NPU_PYTHON = ROOT / ".venv-npu" / "bin" / "python"
CHANGES = ("diff", "python", "json")
PROGRESS = re.compile(r"^\d+/\d+ claims, .*\n", re.MULTILINE)
_BLOCK = re.compile(r"(?:^`(?P<file>[^`\n]+)`:\n\n)?^```(?P<kind>[\w ]+)\n(?P<body>.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Command:
    """A line of a console block with what it shows."""

    line: str
    shown: str

    @property
    def words(self) -> list[str]:
        return shlex.split(self.line, comments=True)

    @property
    def code(self) -> int:
        """What it ends with, which a comment behind it says unless it is 0."""
        told = re.search(r"  # exit code (\d+)$", self.line)
        return int(told.group(1)) if told else 0


@dataclass(frozen=True)
class Block:
    """A fenced block: commands, a file, or a change of files."""

    kind: str
    body: str
    file: str = ""

    @property
    def commands(self) -> list[Command]:
        entries = re.split(r"^\$ ", self.body, flags=re.MULTILINE)
        assert entries[0] == ""
        return [Command(line, shown) for line, _, shown in (entry.partition("\n") for entry in entries[1:])]


def blocks(*kinds: str) -> list[Block]:
    """The blocks of the page, of some kinds or of all."""
    found = [Block(match["kind"], match["body"], match["file"] or "") for match in _BLOCK.finditer(TEXT)]
    return [block for block in found if not kinds or block.kind in kinds]


def commands() -> list[Command]:
    return [command for block in blocks("console", "console npu") for command in block.commands]


def change(block: Block, project: Path) -> None:
    """Write the file of a block, or apply its change."""
    if block.kind == "diff":
        subprocess.run(["git", "apply", "-"], input=block.body, text=True, cwd=project, check=True)
    else:
        (project / block.file).write_text(block.body, encoding="utf-8")


@dataclass
class Shell:
    """Runs the page's commands in a folder and an environment of their own."""

    folder: Path
    python: Path
    cwd: Path = field(init=False)

    def __post_init__(self) -> None:
        self.cwd = self.folder

    def run(self, command: Command) -> None:
        program, *arguments = command.words
        if program == "cd":
            self.cwd = (self.cwd / arguments[0]).resolve()
        elif program == "rm":
            (self.cwd / arguments[0]).unlink()
        else:
            done = subprocess.run(
                [*self._program(program), *arguments],
                cwd=self.cwd,
                env=self._environment(),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                check=False,
            )
            assert done.returncode == command.code, f"{command.line}\n{done.stdout}"
            assert program == "pip" or self._matches(command, done.stdout), f"{command.line}\n{done.stdout}"

    def _program(self, name: str) -> list[str]:
        if name == "pip":
            return [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", str(self.python.parents[1])]
        modules = {"npu-zoo": ["npu_zoo"], "pytest": ["pytest", "-p", "no:cacheprovider"]}
        return [str(self.python), "-m", *modules[name]]

    def _environment(self) -> dict[str, str]:
        offline = {"PIP_NO_INDEX": "1", "PIP_NO_BUILD_ISOLATION": "0"}  # 0 says no to the isolation
        mine = {"PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(self.folder / ".cache"), "COLUMNS": "100"}
        return {**os.environ, **offline, **mine}

    def _matches(self, command: Command, printed: str) -> bool:
        """Compare what was printed with what is shown, whatever breaks its lines; ``…`` stands for anything."""
        shown, found = command.shown, PROGRESS.sub("", printed.replace(str(self.folder), HOME))
        pattern = ".*?".join(re.escape(" ".join(part.split())) for part in shown.split("…"))
        return re.fullmatch(re.sub(r"(\.\*\?)", r"\\s*\1\\s*", pattern), " ".join(found.split())) is not None


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An empty one."""
    place = tmp_path / "me"
    place.mkdir()
    return place


@pytest.fixture
def project(folder: Path) -> Path:
    """The page's plugin as it is in the end."""
    write_project(NewPlugin("my_llama"), Architecture.llama, folder / PROJECT)
    for block in blocks(*CHANGES):
        change(block, folder / PROJECT)
    return folder / PROJECT


def test_the_page_has_blocks_of_every_kind() -> None:
    assert {block.kind for block in blocks()} == {"console", "console npu", *CHANGES}
    assert len(commands()) > 10
    assert all(block.file for block in blocks("python", "json"))


def test_commands_that_are_named_are_accepted(accept: Callable[[list[str]], None]) -> None:
    of_the_zoo = [command for command in commands() if command.words[0] == "npu-zoo"]
    inline = [shlex.split(line) for line in re.findall(r"`npu-zoo ([^`]+)`", _BLOCK.sub("", TEXT))]
    assert {command.words[0] for command in commands()} == {"npu-zoo", "pytest", "pip", "cd", "rm"}
    for words in [*(command.words[1:] for command in of_the_zoo), *inline]:
        accept(words)


def test_files_that_are_named_exist(project: Path) -> None:
    table = TEXT.split("| file | what it is |")[1].split("\n\n")[0]
    named = [name for line in table.splitlines()[1:] for name in re.findall(r"`([^`]+)`", line.split("|")[1])]
    listed = commands()[0].shown.split("is written:\n")[1].split("next:")[0].split()
    assert sorted(named) == sorted(listed)
    for name in {*named, *re.findall(r"`((?:src|tests)/[\w./]+)`", TEXT)} - {"src/npu_zoo_my_llama/evidence.json"}:
        assert (project / name).is_file(), name


def test_the_plugin_that_comes_of_it_is_sound(project: Path, fresh_registry: None) -> None:
    with installed_from(project):
        record = get_registry().plugins["my_llama"]
        assert (record.error, record.remarks) == (None, [])
        assert record.registered == {"register_families": ["my_llama"], "register_kernels": ["my_llama_rms_norm"]}
        assert_spec_valid("my_llama")
    ruff = [sys.executable, "-m", "ruff"]
    subprocess.run([*ruff, "check", "--no-cache", str(project)], check=True, capture_output=True)
    subprocess.run([*ruff, "format", "--check", "--no-cache", str(project)], check=True, capture_output=True)


@pytest.mark.long
def test_the_page_is_done_as_it_says(folder: Path, tmp_path: Path) -> None:
    walk(Shell(folder, environment(tmp_path, sysconfig.get_path("purelib"))), "console")


@pytest.mark.long
def test_what_needs_torch_npu_is_done_as_it_says(folder: Path, tmp_path: Path) -> None:
    if not NPU_PYTHON.exists():
        pytest.skip(f"there is no {NPU_PYTHON}, which `make test-npu` makes")
    asked = [str(NPU_PYTHON), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    packages = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
    shell = Shell(folder, environment(tmp_path, packages))
    write_project(NewPlugin("my_llama"), Architecture.llama, folder / PROJECT)
    shell.run(Command(f"pip install -q -e ./{PROJECT}", ""))
    shell.run(Command(f"cd {PROJECT}", ""))
    walk(shell, "console npu")


def walk(shell: Shell, kind: str) -> None:
    """Go through the page, and run the commands of one kind of block."""
    for block in blocks():
        if block.kind in CHANGES:
            change(block, shell.folder / PROJECT)
        elif block.kind == kind:
            for command in block.commands:
                shell.run(command)


def environment(folder: Path, packages: str) -> Path:
    """An interpreter of its own that also finds the packages in a folder."""
    place = folder / "environment"
    venv.EnvBuilder(symlinks=True).create(place)
    purelib = Path(sysconfig.get_path("purelib", vars={"base": str(place), "platbase": str(place)}))
    (purelib / "shared.pth").write_text(f"import site; site.addsitedir({packages!r})\n", encoding="utf-8")
    return place / "bin" / "python"
