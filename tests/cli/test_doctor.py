from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

import npu_zoo
from npu_zoo.cli import doctor
from npu_zoo.cli.doctor import REPORT_KEYS
from npu_zoo.platforms.doctor import Machine
from npu_zoo.platforms.findings import Finding

PACKAGE = Path(npu_zoo.__file__).parent
WITHOUT = ("torch", "transformers")


class Ran(NamedTuple):
    code: int
    out: str
    err: str


Cli = Callable[..., Ran]


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A machine with nothing on it."""
    machine = Machine({"HOME": "/root"}, {}, root=tmp_path, python="3.11.9", port_in_use=lambda port: False)
    monkeypatch.setattr(doctor, "this_machine", lambda: machine)


@pytest.mark.usefixtures("bare")
def test_a_bare_machine_is_fit_for_the_cpu(cli: Cli) -> None:
    ran = cli("doctor")
    assert ran.code == 0, ran.err
    lines = ran.out.splitlines()
    assert lines[0].split() == ["about", "state", "finding"]
    assert "python        ok       Python 3.11.9" in lines
    assert "devices       ok       no Ascend device: models run on the CPU" in lines
    assert any(line.strip() == "-> pip install 'npu-zoo[run]'" for line in lines)
    assert lines[-1] == "no problems, 2 warnings"
    assert max(map(len, lines)) <= 80


@pytest.mark.usefixtures("bare")
def test_a_bare_machine_is_unfit_for_an_npu(cli: Cli) -> None:
    ran = cli("doctor", "--hardware", "atlas_300i_duo", "--model", "deepseek_coder:6.7b")
    assert ran.code == 4
    assert "6 problems" in ran.out
    assert ran.err == ""
    topics = [line.split()[0] for line in ran.out.splitlines()[2:-2] if not line.startswith(" ")]
    assert topics == ["python", "torch", "torch_npu", "transformers", "driver", "cann", "ports"]


@pytest.mark.usefixtures("bare")
def test_json_has_the_documented_keys(cli: Cli) -> None:
    ran = cli("doctor", "--hardware", "atlas_800i_a2", "--json")
    report = json.loads(ran.out)
    assert ran.code == 4
    keys = {*report, *(f"findings[].{key}" for finding in report["findings"] for key in finding)}
    assert keys == set(REPORT_KEYS)
    assert report["problems"] == sum(finding["status"] == "problem" for finding in report["findings"]) > 0
    page = (PACKAGE.parent / "docs" / "cli.md").read_text(encoding="utf-8").split("## `npu-zoo doctor`")[1]
    assert [key for key in REPORT_KEYS if f"`{key}`" not in page] == []


@pytest.mark.usefixtures("bare")
def test_unknown_names(cli: Cli) -> None:
    hardware = cli("doctor", "--hardware", "atlas_900")
    assert (hardware.code, hardware.out) == (2, "")
    assert "unknown hardware 'atlas_900'; known: atlas_800i_a2" in hardware.err
    model = cli("doctor", "--model", "deepseek_coda")
    assert model.code == 2
    assert "no Ascend device" in model.out
    assert "did you mean deepseek_coder?" in model.err


@pytest.mark.usefixtures("bare", "fresh_registry")
def test_it_answers_where_a_plugin_is_broken(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NPU_ZOO_PLUGINS", "no_such_plugin")
    ran = cli("doctor")
    assert ran.code == 0
    assert "plugins       warning  plugin no_such_plugin: " in ran.out
    assert "3 warnings" in ran.out


def test_findings_stand_by_topic_with_what_to_do_beneath(capsys: pytest.CaptureFixture[str]) -> None:
    doctor.print_findings(
        [
            Finding("torch", "ok", "torch 2.13.0"),
            Finding("cann", "problem", "not sourced", "source set_env.sh"),
            Finding("torch", "problem", "cannot be imported"),
        ]
    )
    assert capsys.readouterr().out.splitlines() == [
        "about  state    finding",
        "-----  -------  --------------------",
        "torch  ok       torch 2.13.0",
        "       problem  cannot be imported",
        "cann   problem  not sourced",
        "                -> source set_env.sh",
        "",
        "2 problems, no warnings",
    ]


# In processes of their own, on this machine


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """This environment's packages without torch and transformers."""
    folder = tmp_path / "site"
    folder.mkdir()
    for name in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}:
        for path in Path(name).iterdir():
            own = path.name.startswith(("npu_zoo", "__editable__"))
            if not own and not path.name.startswith(WITHOUT) and path.suffix != ".pth":
                (folder / path.name).symlink_to(path)
    (folder / "npu_zoo").symlink_to(PACKAGE)
    return folder


def run(site: Path, *arguments: str) -> Ran:
    program = f"""
import sys
sys.path[:] = [path for path in sys.path if "site-packages" not in path] + [{str(site)!r}]
from npu_zoo.cli import main
code = main({list(arguments)!r})
sys.stdout.flush()
assert not {{"torch", "torch_npu", "transformers"}} & set(sys.modules)
sys.exit(code)
"""
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-S", "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environ, cwd=site, check=False)
    return Ran(done.returncode, done.stdout, done.stderr)


def findings(ran: Ran, topic: str) -> list[dict[str, str]]:
    assert ran.out, ran.err
    return [finding for finding in json.loads(ran.out)["findings"] if finding["topic"] == topic]


def test_without_torch(site: Path) -> None:
    ran = run(site, "doctor", "--json")
    assert ran.code == 0, ran.err
    (torch,) = findings(ran, "torch")
    assert torch["status"] == "warning"
    assert torch["advice"] == "pip install 'npu-zoo[run]'"


def test_with_a_torch_that_is_broken(site: Path) -> None:
    (site / "torch").mkdir()
    (site / "torch" / "__init__.py").write_text("raise OSError('libc10.so: invalid ELF header')")
    ran = run(site, "doctor", "--json")
    assert ran.code == 4, ran.err
    unversioned, broken = findings(ran, "torch")
    assert "no installed package" in unversioned["message"]
    assert broken["message"] == "`import torch` fails: OSError: libc10.so: invalid ELF header"


def test_with_a_torch_npu_of_another_release(site: Path) -> None:
    for name, version in (("torch", "2.13.0"), ("torch_npu", "2.12.0")):
        (site / name).mkdir()
        (site / name / "__init__.py").write_text("")
        (site / f"{name}-{version}.dist-info").mkdir()
        (site / f"{name}-{version}.dist-info" / "METADATA").write_text(f"Name: {name}\nVersion: {version}\n")
    (site / "torch_npu" / "__init__.py").write_text("raise ImportError('libtorch_npu.so: undefined symbol: _ZN2at')")
    ran = run(site, "doctor", "--json")
    assert ran.code == 4, ran.err
    pair, failed = findings(ran, "torch_npu")[1:]
    assert "not of one release" in pair["message"]
    assert pair["advice"] == failed["advice"] == "pip install torch==2.12.0 torch-npu==2.12.0"


def test_this_machine(cli: Cli) -> None:
    pytest.importorskip("torch")
    ran = cli("doctor", "--hardware", "cpu", "--json")
    assert ran.code == 0, ran.out
    assert {"topic": "torch", "status": "ok", "message": "torch can be imported", "advice": ""} in json.loads(ran.out)[
        "findings"
    ]
