from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import typer

from npu_zoo import hookimpl
from npu_zoo.cli import app as cli_app
from npu_zoo.cli import main
from npu_zoo.core.errors import (
    EngineError,
    HardwareError,
    NpuZooError,
    PluginError,
    UsageError,
    WeightsError,
)
from npu_zoo.registry import Candidate, Registry, build_registry


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("check",), 2, "no model was named"),
        (("check", "--model", "deepseek_codr"), 2, "did you mean deepseek_coder?"),
        (("check", "--model", "deepseek_coder:5b"), 2, "has no variant '5b'"),
        (("check", "--model", "deepseek_coder", "--tp", "two"), 2, "--tp"),
        (("check", "--model", "deepseek_coder", "--tp", "0"), 2, "tensor_parallel_size=0 (option --tp)"),
        (("check", "--model", "deepseek_coder", "--dtype", "fp8"), 2, "unknown dtype 'fp8'"),
        (("check", "--modle", "x"), 2, "--modle"),
        (("chekc",), 2, "chekc"),
        (("config",), 2, "npu-zoo config --help"),
        (("run", "--model", "deepseek_coder", "--config", "none.yaml"), 2, "none.yaml"),
        (("run", "--model", "deepseek_coder:33b", "--hardware", "atlas_300i_duo"), 3, "is not supported"),
        (("run", "--model", "deepseek_coder", "--hardware", "cpu", "--block-size", "7"), 4, "block size 7"),
        (("run", "--model", "deepseek_coder:1.3b", "--hardware", "cpu"), 5, "needs weights: --weights DIR"),
        (("run", "--model", "deepseek_coder", "--weights", "/no/such"), 5, "/no/such"),
    ],
)
def test_exit_codes(cli: Callable, arguments: tuple[str, ...], code: int, words: str) -> None:
    ran = cli(*arguments)
    assert ran.code == code
    assert "error: " in ran.err
    assert words in ran.err
    assert "Traceback" not in ran.err
    assert ran.out == ""


@pytest.fixture
def plugin_commands(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[typer.Typer], None]], Registry]:
    """Installs a throw-away plugin whose register_commands is the given function."""

    def install(register: Callable[[typer.Typer], None]) -> Registry:
        def register_commands(app: typer.Typer) -> None:
            register(app)

        plugin = SimpleNamespace(register_commands=hookimpl(register_commands))
        registry = build_registry([Candidate("extra", lambda: plugin)])
        monkeypatch.setattr(cli_app, "get_registry", lambda: registry)
        return registry

    return install


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (NpuZooError("asked"), 1),
        (UsageError("asked"), 2),
        (HardwareError("asked"), 4),
        (WeightsError("asked"), 5),
        (PluginError("asked"), 6),
        (EngineError("asked"), 1),
        (KeyboardInterrupt(), 130),
        (ZeroDivisionError("asked"), 1),
    ],
)
def test_every_error_has_its_code(cli: Callable, plugin_commands: Callable, error: BaseException, code: int) -> None:
    def fail() -> None:
        raise error

    plugin_commands(lambda app: app.command("fail")(fail) and None)
    ran = cli("fail")
    assert ran.code == code
    assert "Traceback" not in ran.err
    if isinstance(error, NpuZooError):
        assert ran.err == "error: asked\n"


def test_debug_shows_the_traceback(cli: Callable, plugin_commands: Callable) -> None:
    def fail() -> None:
        raise ZeroDivisionError("asked")

    plugin_commands(lambda app: app.command("fail")(fail) and None)
    assert "unexpected ZeroDivisionError: asked" in cli("fail").err
    ran = cli("--debug", "fail")
    assert ran.code == 1
    assert "Traceback" in ran.err
    assert "in fail" in ran.err


def test_a_plugins_command_runs_and_is_in_the_help(cli: Callable, plugin_commands: Callable) -> None:
    def hello() -> None:
        """Say hello."""
        print("hello")

    plugin_commands(lambda app: app.command()(hello) and None)
    assert cli("hello").out == "hello\n"
    assert "Say hello." in cli("--help").out


def test_a_plugins_command_cannot_take_a_name_of_the_zoo(cli: Callable, plugin_commands: Callable) -> None:
    def check() -> None:
        print("mine")

    plugin_commands(lambda app: app.command()(check) and None)
    ran = cli("check", "--help")
    assert "Check a request against the feature matrix." in ran.out
    assert "plugin extra: its command 'check' is left out" in ran.err


def test_of_two_commands_of_a_name_the_first_stays(cli: Callable, plugin_commands: Callable) -> None:
    def register(app: typer.Typer) -> None:
        app.command("twice")(lambda: print("first"))
        app.command("twice")(lambda: print("second"))

    plugin_commands(register)
    ran = cli("twice")
    assert ran.out == "first\n"
    assert "plugin extra: its command 'twice' is left out" in ran.err


def test_a_plugin_cannot_replace_the_root_s_options(cli: Callable, plugin_commands: Callable) -> None:
    plugin_commands(lambda app: app.callback()(lambda: print("mine")) and None)
    ran = cli("--debug", "list")
    assert ran.code == 0
    assert "mine" not in ran.out
    assert "app.callback() is left out" in ran.err


def test_an_interrupt_during_the_imports_ends_with_130(monkeypatch: pytest.MonkeyPatch) -> None:
    class Interrupted(ModuleType):
        def __getattr__(self, name: str) -> object:
            raise KeyboardInterrupt

    monkeypatch.setitem(sys.modules, "npu_zoo.cli.app", Interrupted("npu_zoo.cli.app"))
    assert main(["list"]) == 130


def test_a_raising_register_commands_leaves_the_rest_working(cli: Callable, plugin_commands: Callable) -> None:
    def register(app: typer.Typer) -> None:
        app.command("half")(lambda: print("half done"))
        raise ValueError("broken")

    registry = plugin_commands(register)
    assert cli("--help").code == 0
    assert "broken" in str(registry.plugins["extra"].error)
    ran = cli("half")
    assert (ran.code, ran.out) == (2, "")


def test_a_plugins_record_names_the_commands_that_were_taken(cli: Callable, plugin_commands: Callable) -> None:
    def register(app: typer.Typer) -> None:
        app.command("hello_there")(lambda: None)
        app.command("check")(lambda: None)
        app.add_typer(typer.Typer(), name="more")

    registry = plugin_commands(register)
    assert registry.plugins["extra"].remarks == ["registers nothing"]
    cli("--help")
    assert registry.plugins["extra"].registered == {"register_commands": ["hello_there", "more"]}
    assert registry.plugins["extra"].remarks == []


def test_a_reader_that_goes_away_is_no_error() -> None:
    script = "from npu_zoo.cli import main; raise SystemExit(main(['matrix', '--json']))"
    reader, writer = os.pipe()
    os.close(reader)
    try:
        ran = subprocess.run([sys.executable, "-c", script], stdout=writer, stderr=subprocess.PIPE, timeout=60)
    finally:
        os.close(writer)
    assert ran.returncode == 1
    assert ran.stderr == b""


FORBIDDEN = ("torch", "transformers", "torch_npu", "numpy", "prompt_toolkit")


TORCH_FREE = [
    "--version",
    "--help",
    "run --help",
    "list",
    "list --json",
    "matrix",
    "matrix --format html",
    "check --model deepseek_coder:33b --hardware atlas_800i_a2",
    "check --model deepseek_coder:33b --hardware atlas_300i_duo",
    "explain --model deepseek_coder --hardware cpu",
    "plugins",
    "config show --origin",
]


def test_torch_free_commands_import_nothing_heavy() -> None:
    """What one of them imported would still be there after the next."""
    script = f"""
import sys
from npu_zoo.cli import main
for command in sys.argv[1:]:
    main(command.split())
    heavy = [name for name in {FORBIDDEN} if name in sys.modules]
    assert not heavy, (command, heavy)
print("all", file=sys.stderr)
"""
    ran = subprocess.run([sys.executable, "-c", script, *TORCH_FREE], capture_output=True, text=True, timeout=60)
    assert ran.stderr.splitlines()[-1] == "all", ran.stderr


def test_the_version_does_not_even_need_pydantic_or_the_registry() -> None:
    script = (
        "import sys; from npu_zoo.cli import main; main(['--version']); print(sorted(sys.modules), file=sys.stderr)"
    )
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    modules = ran.stderr
    assert "'npu_zoo.cli'" in modules
    assert "'npu_zoo.registry'" not in modules
    assert "'typer'" not in modules


def completions(line: str, word: int) -> list[str]:
    environment = {
        **os.environ,
        "_NPU_ZOO_COMPLETE": "complete_bash",
        "COMP_WORDS": line,
        "COMP_CWORD": str(word),
    }
    program = str(Path(sys.executable).parent / "npu-zoo")
    return subprocess.run([program], env=environment, capture_output=True, text=True, timeout=60).stdout.split()


def test_the_shell_completes_commands_and_values() -> None:
    assert completions("npu-zoo ma", 1) == ["matrix"]
    assert "deepseek_coder" in completions("npu-zoo run --model deepseek", 3)
    assert completions("npu-zoo check --hardware atlas_300", 3) == ["atlas_300i_duo"]
    assert completions("npu-zoo check --dtype bf", 3) == ["bfloat16", "bf16"]
    assert completions("npu-zoo explain --engine nat", 3) == ["native"]
