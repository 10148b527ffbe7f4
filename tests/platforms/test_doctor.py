from __future__ import annotations

import ast
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

import npu_zoo
from npu_zoo.core.specs import KernelSpec
from npu_zoo.platforms import imports
from npu_zoo.platforms.doctor import Machine, chips_in_question, examine
from npu_zoo.platforms.findings import Finding, problems
from npu_zoo.platforms.imports import Probe, Remedies, check_libgomp, explain_failure, probe_imports
from npu_zoo.platforms.operators import (
    Needs,
    check_operators,
    operators_of_chip,
    operators_of_family,
    present_operators,
)
from npu_zoo.platforms.packages import Package, check_packages, check_python
from npu_zoo.platforms.toolkit import atb_command, cann_command
from npu_zoo.plugins.native.ascend import ASCEND_BACKENDS, ASCEND_KERNELS
from npu_zoo.registry import build_registry, find_candidates

PACKAGE = Path(npu_zoo.__file__).parent
KERNELS = {spec.name: spec for spec in ASCEND_KERNELS}
BACKENDS = {spec.name: spec for spec in ASCEND_BACKENDS}


def smi(*devices: tuple[str, int, int]) -> str:
    """The table of ``npu-smi info`` for devices of a SoC, used and whole memory in MB."""
    lines = ["| NPU     Name  | Health   | Power(W)  Temp(C)   Hugepages-Usage(page) |"]
    for number, (soc, used, size) in enumerate(devices):
        lines += [
            f"| {number}       {soc} | OK | 88.9  36   0 / 0 |",
            f"| 0             | 0000:C1:00.0 | 0   {used} / {size} |",
        ]
    return "\n".join(lines)


A2 = smi(("910B4", 2790, 32768), ("910B4", 31000, 32768))
DUO = smi(("310P3", 1851, 44280), ("310P3", 1310, 43693))
ENVIRON = {
    "HOME": "/root",
    "ASCEND_HOME_PATH": "/usr/local/Ascend/cann",
    "ASCEND_OPP_PATH": "/usr/local/Ascend/cann/opp",
    "ATB_HOME_PATH": "/usr/local/Ascend/nnal/atb/latest/atb/cxx_abi_1",
}


def write(path: Path, text: str = "") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def lay_out(root: Path, chip: str, *, driver: str = "25.5.1", cann: str = "9.1.0", devices: int = 2) -> Path:
    """A machine on which all is well, below a root."""
    ascend = root / "usr/local/Ascend"
    for name in [*(f"davinci{number}" for number in range(devices)), "davinci_manager", "devmm_svm", "hisi_hdc"]:
        write(root / "dev" / name)
    write(ascend / "driver/version.info", f"Version={driver}\nascendhal_version=7.35\n")
    write(ascend / "driver/lib64/driver/libascend_hal.so")
    write(ascend / "firmware/version.info", "Version=7.8.0.5.216\n")
    write(ascend / "cann/set_env.sh")
    write(ascend / "cann/aarch64-linux/ascend_toolkit_install.info", f"package_name=toolkit\nversion={cann}\n")
    write(ascend / f"cann/opp/built-in/op_impl/ai_core/tbe/kernel/{chip}/ops_math/cast.o")
    write(ascend / "nnal/atb/set_env.sh")
    (ascend / "nnal/atb/latest/atb/cxx_abi_1").mkdir(parents=True)
    return root


def packages(root: Path, *, operators: str | None = None, **versions: str) -> dict[str, Package]:
    """Installed packages; torch_npu's library holds the schemas of its operators."""
    site = root / "site-packages"
    found = {}
    for name, version in {"torch": "2.12.0+cpu", "torch_npu": "2.12.0", "transformers": "5.23.0", **versions}.items():
        if version:
            write(site / name / "__init__.py")
            found[name] = Package(version, site / name)
    names = operators if operators is not None else "\0".join(f"{name}(Tensor x)" for name in every_operator())
    write(site / "torch_npu/lib/libtorch_npu.so", f"\0{names}\0")
    return found


def every_operator() -> set[str]:
    return {name for spec in (*ASCEND_KERNELS, *ASCEND_BACKENDS) for name in spec.operators}


def imports_well(environ: Mapping[str, str], npu: bool) -> Probe:
    return Probe(("torch", "torch_npu"), 2) if npu else Probe(("torch",))


def look(
    root: Path, npu_smi: str = "", environ: Mapping[str, str] = ENVIRON, hardware: str | None = None, **other: Any
) -> list[Finding]:
    settings: dict[str, Any] = {
        "environ": environ,
        "packages": other.get("packages") or packages(root),
        "npu_smi": npu_smi,
        "root": root,
        "python": "3.11.9",
        "architecture": "x86_64",
        "probe": imports_well,
        "may_open": lambda path: True,
        "port_in_use": lambda port: False,
        **other,
    }
    machine = Machine(**settings)
    chips = chips_in_question(machine, hardware)
    return examine(machine, hardware, {chip: operators_of_chip(chip, KERNELS, BACKENDS) for chip in chips})


def about(findings: list[Finding], topic: str) -> str:
    return "\n".join(
        f"{f.status}: {f.message}" + (f" -> {f.advice}" if f.advice else "") for f in findings if f.topic == topic
    )


def bad(findings: list[Finding]) -> list[Finding]:
    return [finding for finding in findings if finding.status in ("warning", "problem")]


# A machine on which all is well


def test_an_a2_on_which_all_is_well(tmp_path: Path) -> None:
    quiet = A2.replace("31000", "  310")
    findings = look(lay_out(tmp_path, "ascend910b"), quiet)
    assert bad(findings) == []
    assert "driver 25.5.1" in about(findings, "driver")
    assert "firmware 7.8.0.5.216" in about(findings, "driver")
    assert "device 1 (card 1): 910B4, 31.7 of 32.0 GiB free" in about(findings, "devices")
    assert "CANN 9.1.0 in /usr/local/Ascend/cann" in about(findings, "cann")
    assert "compiled kernels for ascend910b" in about(findings, "cann")
    assert "torch_npu 2.12.0 goes with CANN 9.1.0" in about(findings, "cann")
    assert "sees 2 devices" in about(findings, "torch_npu")
    assert "ascend910b: torch_npu has all 20 operators" in about(findings, "operators")
    assert "310p" not in about(findings, "operators")


def test_a_duo_on_which_all_is_well(tmp_path: Path) -> None:
    findings = look(lay_out(tmp_path, "ascend310p"), DUO)
    assert bad(findings) == []
    assert "310P3, 41.4 of 43.2 GiB free" in about(findings, "devices")
    assert "the ATB library in /usr/local/Ascend/nnal" in about(findings, "cann")


def test_without_an_npu_models_run_on_the_cpu(tmp_path: Path) -> None:
    findings = look(tmp_path, environ={}, packages=packages(tmp_path, torch_npu=""))
    assert bad(findings) == []
    assert about(findings, "devices") == "ok: no Ascend device: models run on the CPU"
    assert {finding.topic for finding in findings} == {"python", "torch", "torch_npu", "transformers", "devices"}


def test_a_product_that_is_asked_for_and_is_not_there(tmp_path: Path) -> None:
    findings = look(tmp_path, environ={}, hardware="atlas_300i_duo", packages=packages(tmp_path, torch_npu=""))
    topics = [finding.topic for finding in problems(findings)]
    assert topics == ["torch_npu", "driver", "cann", "cann"]
    assert "pip install 'npu-zoo[npu]'" in about(findings, "torch_npu")
    assert "no driver is installed" in about(findings, "driver")
    assert "CANN is not installed" in about(findings, "cann")
    assert "torch_npu._npu_*" in about(findings, "cann")


def test_the_cpu_of_a_machine_with_devices_needs_none_of_them(tmp_path: Path) -> None:
    findings = look(
        lay_out(tmp_path, "ascend910b", driver="20.0"), A2, hardware="cpu", packages=packages(tmp_path, torch_npu="")
    )
    assert problems(findings) == []
    assert "driver" not in {finding.topic for finding in findings}


def test_a_cann_that_is_at_fault_is_a_note_where_nothing_needs_it(tmp_path: Path) -> None:
    root = lay_out(tmp_path, "ascend910b", devices=0, driver="20.0")
    findings = look(root, "", {**ENVIRON, "ASCEND_OPP_PATH": ""})
    assert bad(findings) == []
    assert "note: ASCEND_OPP_PATH is unset" in about(findings, "cann")


def test_a_simulated_device_needs_no_driver(tmp_path: Path) -> None:
    findings = look(tmp_path, environ={"NPU_ZOO_SIMULATE": "atlas_800i_a2"}, hardware="atlas_800i_a2")
    assert problems(findings) == []
    assert "NPU_ZOO_SIMULATE=atlas_800i_a2" in about(findings, "devices")
    assert about(findings, "driver") == ""


# The driver and its devices


def test_a_driver_without_devices(tmp_path: Path) -> None:
    root = lay_out(tmp_path, "ascend910b", devices=0)
    findings = look(root, hardware="atlas_800i_a2")
    assert "problem: driver 25.5.1 is installed and shows no device" in about(findings, "driver")


def test_a_container_without_all_that_it_needs(tmp_path: Path) -> None:
    root = lay_out(tmp_path, "ascend910b")
    (root / "dev/devmm_svm").unlink()
    (root / "usr/local/Ascend/driver/version.info").unlink()
    (root / "usr/local/Ascend/driver/lib64/driver/libascend_hal.so").unlink()
    (root / "usr/local/Ascend/driver/lib64/driver").rmdir()
    (root / "usr/local/Ascend/driver/lib64").rmdir()
    text = about(look(root, ""), "driver")
    assert "docker run --device /dev/devmm_svm" in text
    assert "-v /usr/local/Ascend/driver/version.info:" in text
    assert "-v /usr/local/Ascend/driver/lib64:" in text


def test_the_driver_s_libraries_by_its_own_script(tmp_path: Path) -> None:
    root = lay_out(tmp_path, "ascend910b")
    write(root / "usr/local/Ascend/driver/bin/setenv.bash")
    failed = Probe(("torch",), error="ImportError: libascend_hal.so: cannot open shared object file: No such file")
    findings = look(root, A2, probe=lambda environ, npu: failed)
    assert "-> source /usr/local/Ascend/driver/bin/setenv.bash" in about(findings, "torch_npu")


def test_devices_that_this_user_may_not_open(tmp_path: Path) -> None:
    root = lay_out(tmp_path, "ascend910b", devices=8)
    text = about(look(root, A2, may_open=lambda path: path.name == "davinci_manager"), "driver")
    assert "this user may not open /dev/davinci0, /dev/davinci1, /dev/davinci2 and others" in text
    assert "usermod -a -G HwHiAiUser" in text


def test_npu_smi_that_tells_nothing(tmp_path: Path) -> None:
    text = about(look(lay_out(tmp_path, "ascend910b"), "dcmi module initialize failed"), "devices")
    assert "warning: 2 device files, and npu-smi tells nothing of them" in text


def test_an_unknown_soc_is_named(tmp_path: Path) -> None:
    findings = look(lay_out(tmp_path, "ascend910b"), smi(("910_9391", 0, 65536), ("910B4", 0, 32768)))
    assert "the SoC 910_9391, which npu-zoo does not support" in about(problems(findings), "devices")


def test_several_chips_are_to_be_chosen(tmp_path: Path) -> None:
    findings = look(lay_out(tmp_path, "ascend910b"), smi(("910B4", 0, 32768), ("310P3", 0, 44280)))
    assert "devices of several chips: ascend310p, ascend910b" in about(findings, "devices")
    assert about(findings, "operators").count("ok: ") == 2


def test_another_product_than_was_asked_for(tmp_path: Path) -> None:
    findings = look(lay_out(tmp_path, "ascend910b"), A2, hardware="atlas_300i_duo")
    text = about(problems(findings), "devices")
    assert "atlas_300i_duo was asked for, and this is a chip of atlas_800i_a2 or atlas_800t_a2" in text


def test_memory_that_is_taken(tmp_path: Path) -> None:
    findings = look(lay_out(tmp_path, "ascend910b"), A2)
    assert [f.message for f in bad(findings)] == ["device 1 (card 1): 910B4, 1.7 of 32.0 GiB free"]
    assert "export ASCEND_RT_VISIBLE_DEVICES" in about(findings, "devices")


@pytest.mark.parametrize(("value", "status"), [("1", "ok"), ("0,5", "problem"), ("a", "problem"), ("0,0", "problem")])
def test_visible_devices(tmp_path: Path, value: str, status: str) -> None:
    environ = {**ENVIRON, "ASCEND_RT_VISIBLE_DEVICES": value}
    findings = look(lay_out(tmp_path, "ascend310p"), DUO, environ)
    assert [f.status for f in findings if "ASCEND_RT_VISIBLE_DEVICES" in f.message] == [status]


def test_a_misspelt_variable(tmp_path: Path) -> None:
    findings = look(tmp_path, environ={"ASCEND_RT_VISIBLE_DEVICE": "0"}, packages=packages(tmp_path, torch_npu=""))
    assert "nothing reads ASCEND_RT_VISIBLE_DEVICE -> rename it, if ASCEND_RT_VISIBLE_DEVICES" in about(
        findings, "environment"
    )


# CANN


@pytest.mark.parametrize("layout", ["cann", "ascend-toolkit", "cann-8.5.0"])
def test_cann_that_is_there_and_not_sourced(tmp_path: Path, layout: str) -> None:
    root = lay_out(tmp_path, "ascend310p")
    (root / "usr/local/Ascend/cann/set_env.sh").unlink()
    write(root / f"usr/local/Ascend/{layout}/set_env.sh")
    findings = look(root, DUO, {"HOME": "/root"})
    text = about(problems(findings), "cann")
    assert f"CANN lies in /usr/local/Ascend/{layout}, and this shell has not sourced it" in text
    assert f"-> source /usr/local/Ascend/{layout}/set_env.sh" in text
    assert "-> source /usr/local/Ascend/nnal/atb/set_env.sh" in text


def test_cann_in_the_home_of_a_user(tmp_path: Path) -> None:
    write(tmp_path / "home/user/Ascend/cann/set_env.sh")
    write(tmp_path / "home/user/Ascend/nnal/atb/set_env.sh")
    environ = {"HOME": "/home/user"}
    assert cann_command(tmp_path, environ) == "source /home/user/Ascend/cann/set_env.sh"
    assert atb_command(tmp_path, environ) == "source /home/user/Ascend/nnal/atb/set_env.sh"


def test_a_sourced_cann_that_is_gone(tmp_path: Path) -> None:
    environ = {**ENVIRON, "ASCEND_HOME_PATH": "/opt/cann"}
    text = about(look(lay_out(tmp_path, "ascend910b"), A2, environ), "cann")
    assert "problem: this shell's CANN is not there: ASCEND_HOME_PATH=/opt/cann" in text


def test_cann_without_its_operators_variable(tmp_path: Path) -> None:
    environ = {name: value for name, value in ENVIRON.items() if name != "ASCEND_OPP_PATH"}
    text = about(problems(look(lay_out(tmp_path, "ascend910b"), A2, environ)), "cann")
    assert "ASCEND_OPP_PATH is unset; torch_npu refuses to start" in text


@pytest.mark.parametrize("left", [[], ["ops_oam"]])
def test_cann_without_kernels_for_the_chip(tmp_path: Path, left: list[str]) -> None:
    root = lay_out(tmp_path, "ascend310p")
    for name in left:
        (root / "usr/local/Ascend/cann/opp/built-in/op_impl/ai_core/tbe/kernel/ascend910b" / name).mkdir(parents=True)
    text = about(look(root, A2), "cann")
    assert "no compiled kernels for ascend910b" in text
    assert "Ascend-cann-910b-ops" in text


@pytest.mark.parametrize(
    ("cann", "status", "words"),
    [
        ("9.1.1", "ok", "goes with CANN 9.1.0"),
        ("8.5.0", "warning", "this one is older"),
        ("9.2.0", "note", "this one is newer"),
        ("10.0.0", "note", "this one is newer"),
    ],
)
def test_cann_against_torch_npu(tmp_path: Path, cann: str, status: str, words: str) -> None:
    findings = look(lay_out(tmp_path, "ascend310p", cann=cann), DUO)
    (pair,) = [finding for finding in findings if finding.message.startswith("torch_npu 2.12.0 goes with")]
    assert pair.status == status
    assert words in pair.message


def test_a_torch_npu_whose_cann_nobody_has_named(tmp_path: Path) -> None:
    installed = packages(tmp_path, torch="2.13.0", torch_npu="2.13.0")
    findings = look(lay_out(tmp_path, "ascend310p"), DUO, packages=installed)
    assert "note: no document names the CANN of torch_npu 2.13.0 yet" in about(findings, "cann")


@pytest.mark.parametrize(("driver", "fits"), [("25.2.0", True), ("25.0.rc1.1", False), ("24.1.rc2", False)])
def test_a_driver_that_is_too_old_for_cann(tmp_path: Path, driver: str, fits: bool) -> None:
    findings = look(lay_out(tmp_path, "ascend310p", driver=driver), DUO)
    assert ("CANN 9.1 needs driver 25.2 or newer" in about(problems(findings), "driver")) is not fits


def test_the_atb_library_of_the_old_abi(tmp_path: Path) -> None:
    root = lay_out(tmp_path, "ascend310p")
    old = root / "usr/local/Ascend/nnal/atb/latest/atb/cxx_abi_0"
    old.mkdir()
    environ = {**ENVIRON, "ATB_HOME_PATH": f"/{old.relative_to(root)}"}
    text = about(problems(look(root, DUO, environ)), "cann")
    assert "-> source /usr/local/Ascend/nnal/atb/set_env.sh --cxx_abi=1" in text


def test_an_a2_runs_without_the_atb_library(tmp_path: Path) -> None:
    environ = {name: value for name, value in ENVIRON.items() if name != "ATB_HOME_PATH"}
    assert "note: the ATB library" in about(look(lay_out(tmp_path, "ascend910b"), A2, environ), "cann")


# Python and packages


def test_pythons() -> None:
    assert check_python("3.9.18").status == "problem"
    assert check_python("3.14.0").status == "ok"
    assert check_python("3.14.0", "2.12.0").status == "ok"
    late = check_python("3.14.0", "2.10.0")
    assert (late.status, late.message) == ("warning", "Python 3.14.0; torch_npu 2.10 is built for 3.10 to 3.13")


def test_no_torch_at_all_is_no_problem_until_an_npu_is_to_be_used() -> None:
    bare = check_packages({}, needed=False)
    assert problems(bare) == []
    assert "pip install 'npu-zoo[run]'" in about(bare, "torch")
    assert [f.topic for f in problems(check_packages({}, needed=True))] == ["torch", "torch_npu", "transformers"]


@pytest.mark.parametrize(
    ("versions", "topic", "words"),
    [
        ({"torch": "2.8.0"}, "torch", "npu-zoo takes >=2.9,<2.15 -> pip install 'torch>=2.9,<2.15'"),
        ({"torch_npu": "2.15.0", "torch": "2.15.0"}, "torch_npu", "pip install 'torch-npu>=2.9,<2.15'"),
        ({"transformers": "4.57.0"}, "transformers", "npu-zoo takes >=5.20,<6"),
        ({"torch": "2.13.0+cpu", "torch_npu": "2.12.0"}, "torch_npu", "pip install torch==2.12.0 torch-npu==2.12.0"),
    ],
)
def test_versions_that_do_not_fit(tmp_path: Path, versions: dict[str, str], topic: str, words: str) -> None:
    findings = problems(check_packages(packages(tmp_path, **versions), needed=False))
    assert words in about(findings, topic)


def test_a_pair_of_another_patch_is_a_warning(tmp_path: Path) -> None:
    findings = check_packages(packages(tmp_path, torch="2.12.1"), needed=True)
    assert [(f.topic, f.status) for f in bad(findings)] == [("torch_npu", "warning")]


def test_packages_that_are_half_there(tmp_path: Path) -> None:
    halves = {"torch": Package("2.12.0", None), "transformers": Package("", tmp_path)}
    findings = check_packages(halves, needed=False)
    assert "problem: 2.12.0 is registered, and its code is not there" in about(findings, "torch")
    assert "warning: " in about(findings, "transformers")


# Imports, really tried in another process


REMEDIES = Remedies("CANN!", "DRIVER!", "ATB!", "PRELOAD!", "PAIR!", "INSTALL!")


def fake(folder: Path, module: str, code: str) -> Path:
    write(folder / module / "__init__.py", code)
    return folder


def try_imports(folder: Path, *, npu: bool = False, timeout: float = 60) -> Probe:
    path = [str(folder), *(entry for entry in sys.path if entry)]
    return probe_imports({**os.environ, "PYTHONPATH": ""}, npu=npu, path=path, timeout=timeout)


def test_a_torch_that_can_be_imported(tmp_path: Path) -> None:
    assert try_imports(fake(tmp_path, "torch", "")) == Probe(("torch",))


def test_torch_npu_counts_its_devices_and_may_print(tmp_path: Path) -> None:
    fake(tmp_path, "torch", "class npu:\n    @staticmethod\n    def device_count(): return 8\n")
    fake(tmp_path, "torch_npu", "print('Warning: ASCEND_HOME_PATH environment variable is not set.')")
    assert try_imports(tmp_path, npu=True) == Probe(("torch", "torch_npu"), 8)


@pytest.mark.parametrize(
    ("code", "message", "advice"),
    [
        (
            "raise ImportError('libhccl.so: cannot open shared object file: No such file')",
            "libhccl.so, a library of CANN",
            "CANN!",
        ),
        ("raise ImportError('libatb.so: cannot open shared object file: No such file')", "nnal package", "ATB!"),
        ("raise OSError('libascend_hal.so: cannot open shared object file')", "a library of the driver", "DRIVER!"),
        ("raise OSError('libgomp-d22c.so.1: cannot allocate memory in static TLS block')", "libgomp", "PRELOAD!"),
        ("raise ImportError('libtorch_npu.so: undefined symbol: _ZN2at')", "not of one release", "PAIR!"),
        ("import no_such_module_as_this", "no_such_module_as_this is missing", "INSTALL!"),
        ("raise RuntimeError('Two accelerators cannot be used at the same time')", "another accelerator", "whl/cpu"),
        ("raise ValueError('something\\nover two lines')", "ValueError: something over two lines", "--force-reinstall"),
        ("import os; os.abort()", "it was killed by SIGABRT", "--force-reinstall"),
        ("import sys; sys.exit(3)", "it failed without a message", "--force-reinstall"),
        ("import sys; sys.exit('no licence')", "no licence", "--force-reinstall"),
    ],
)
def test_a_broken_torch_is_explained(tmp_path: Path, code: str, message: str, advice: str) -> None:
    probe = try_imports(fake(tmp_path, "torch", code))
    assert probe.imported == ()
    (finding,) = imports.check_imports(probe, None, REMEDIES, npu=False, needed=False)
    assert finding.status == "problem"
    assert message in finding.message
    assert advice in finding.advice


def test_a_torch_that_never_ends(tmp_path: Path) -> None:
    probe = try_imports(fake(tmp_path, "torch", "import time; time.sleep(60)"), timeout=0.5)
    assert probe == Probe((), error="no answer after 0.5 s")


def test_what_was_imported_before_a_crash_is_known(tmp_path: Path) -> None:
    fake(tmp_path, "torch", "")
    probe = try_imports(fake(tmp_path, "torch_npu", "import os; os.abort()"), npu=True)
    assert probe.imported == ("torch",)
    (_, finding) = imports.check_imports(probe, None, REMEDIES, npu=True, needed=True)
    assert (finding.topic, finding.status) == ("torch_npu", "problem")


BACKEND = """
import os
if os.environ.get("TORCH_DEVICE_BACKEND_AUTOLOAD", "1") == "1":
    try:
        raise ImportError("libhccl.so: cannot open shared object file: No such file or directory")
    except ImportError as error:
        raise RuntimeError("Failed to load the backend extension: torch_npu. You can disable it") from error
"""


@pytest.mark.parametrize("needed", [False, True])
def test_a_torch_that_torch_npu_breaks(tmp_path: Path, needed: bool) -> None:
    site = fake(tmp_path, "torch", BACKEND)
    path = [str(site), *(entry for entry in sys.path if entry)]

    def probe(environ: Mapping[str, str], npu: bool) -> Probe:
        return probe_imports(environ, npu=npu, path=path)

    installed = {**packages(tmp_path), "torch": Package("2.12.0", site / "torch")}
    root = lay_out(tmp_path / "root", "ascend910b", devices=2 if needed else 0)
    findings = look(root, A2 if needed else "", dict(os.environ), packages=installed, probe=probe)
    text = about(problems(findings), "torch")
    assert "because torch_npu loads itself into it: libhccl.so, a library of CANN, is not found" in text
    assert "source /usr/local/Ascend/cann/set_env.sh" in text
    assert ("export TORCH_DEVICE_BACKEND_AUTOLOAD=0" in text) is not needed


def test_torch_npu_that_sees_no_device(tmp_path: Path) -> None:
    nothing = Probe(("torch", "torch_npu"), 0)
    findings = look(lay_out(tmp_path, "ascend910b"), A2, probe=lambda environ, npu: nothing)
    assert "problem: torch_npu can be imported and sees no device" in about(findings, "torch_npu")


def test_an_unknown_library_is_quoted() -> None:
    message, _ = explain_failure("ImportError: libfoo.so.1: cannot open shared object file", REMEDIES)
    assert "libfoo.so.1" in message


# libgomp


def test_libgomp_is_of_interest_on_aarch64_alone(tmp_path: Path) -> None:
    assert check_libgomp({}, "x86_64", tmp_path, tmp_path) == []


@pytest.mark.parametrize("place", ["torch.libs/libgomp-98df74fd.so.1.0.0", "torch/lib/libgomp-d22c30c5.so.1"])
def test_torch_s_own_libgomp_comes_first(tmp_path: Path, place: str) -> None:
    own = write(tmp_path / "site" / place)
    write(tmp_path / "usr/lib/aarch64-linux-gnu/libgomp.so.1")
    (finding,) = check_libgomp({}, "aarch64", tmp_path / "site" / "torch", tmp_path)
    assert finding.status == "note"
    assert f"export LD_PRELOAD={own}" in finding.advice


def test_libgomp_of_the_system(tmp_path: Path) -> None:
    (none,) = check_libgomp({}, "aarch64", None, tmp_path)
    assert "install libgomp" in none.advice
    write(tmp_path / "usr/lib64/libgomp.so.1")
    (finding,) = check_libgomp({}, "aarch64", None, tmp_path)
    assert "export LD_PRELOAD=/usr/lib64/libgomp.so.1" in finding.advice


def test_a_preloaded_libgomp(tmp_path: Path) -> None:
    write(tmp_path / "usr/lib64/libgomp.so.1")
    environ = {"LD_PRELOAD": "/usr/lib/libjemalloc.so:/usr/lib64/libgomp.so.1"}
    assert check_libgomp(environ, "aarch64", None, tmp_path)[0].status == "ok"
    (tmp_path / "usr/lib64/libgomp.so.1").unlink()
    assert check_libgomp(environ, "aarch64", None, tmp_path)[0].status == "warning"


# Operators


OF_TORCH_NPU = [s for s in (*ASCEND_KERNELS, *ASCEND_BACKENDS) if ".reference:" not in s.implementation]
"""What is registered for an NPU and is more than torch's own operators."""


def calls_of_torch_npu(tree: ast.AST) -> set[str]:
    functions = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return {
        function.attr
        for function in functions
        if isinstance(function, ast.Attribute)
        and isinstance(function.value, ast.Name)
        and function.value.id == "torch_npu"
    }


def calls_of_imported(tree: ast.AST) -> set[str]:
    """Those of functions that a module has from others of the package."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("npu_zoo.nn."):
            path = PACKAGE.parent / Path(*(node.module or "").split(".")).with_suffix(".py")
            names = {alias.name for alias in node.names}
            for defined in ast.parse(path.read_text(encoding="utf-8")).body if path.exists() else ():
                if isinstance(defined, ast.FunctionDef) and defined.name in names:
                    found |= calls_of_torch_npu(defined)
    return found


def modules_that_import_torch_npu() -> dict[str, set[str]]:
    found = {}
    for path in (PACKAGE / "nn").rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if calls := calls_of_torch_npu(tree):
            name = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
            found[name] = calls | calls_of_imported(tree)
    return found


def test_the_specs_name_the_operators_that_the_code_calls_and_no_other() -> None:
    named: dict[str, set[str]] = {}
    for spec in OF_TORCH_NPU:
        named.setdefault(spec.implementation.partition(":")[0], set()).update(spec.operators)
    called = modules_that_import_torch_npu()
    assert {"npu_zoo.nn.kernels.ascend", "npu_zoo.nn.attention.ascend_310p"} <= set(called)
    assert named == called


def test_every_spec_for_an_npu_names_its_operators() -> None:
    assert [spec.name for spec in OF_TORCH_NPU if not spec.operators] == []


def needs_of(model: str, chip: str) -> Needs:
    registry = build_registry(find_candidates(""))
    family, variant = registry.find(model)
    return operators_of_family(family, variant, chip, registry.kernels, registry.attention_backends)


def test_a_family_needs_the_operators_of_its_layers() -> None:
    dense = needs_of("deepseek_coder", "ascend910b")
    assert {"npu_rms_norm", "npu_fused_infer_attention_score", "npu_apply_rotary_pos_emb"} <= set(dense)
    assert not {name for name in dense if "moe" in name}
    assert "npu_interleave_rope" not in dense
    experts = needs_of("deepseek_moe", "ascend910b")
    assert set(experts) - set(dense) >= {"npu_moe_init_routing_v2", "npu_moe_token_unpermute", "npu_moe_gating_top_k"}
    latent = needs_of("deepseek_v3", "ascend910b")
    assert {"npu_interleave_rope", "npu_fused_infer_attention_score_v2", "npu_transpose_batchmatmul"} <= set(latent)
    assert "npu_apply_rotary_pos_emb" not in latent


def test_a_family_needs_the_operators_of_its_chip() -> None:
    duo = needs_of("deepseek_coder:6.7b", "ascend310p")
    assert {"_npu_paged_attention", "npu_format_cast", "npu_rms_norm"} <= set(duo)
    assert "npu_fused_infer_attention_score" not in duo
    assert needs_of("deepseek_v3", "ascend310p") == {}
    assert needs_of("deepseek_coder:custom", "ascend310p") == needs_of("deepseek_coder", "ascend310p")


def library(folder: Path, content: bytes, name: str = "libtorch_npu.so") -> Path:
    (folder / "lib").mkdir(exist_ok=True)
    (folder / "lib" / name).write_bytes(content)
    return folder


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"\0npu_swiglu(Tensor self, int dim=-1) -> Tensor\0", True),
        (b"npu_swiglu(Tensor self)", True),
        (b"\0npu_swiglu_backward(Tensor grad)\0", False),
        (b"\0aclnn_npu_swiglu(Tensor x)\0", False),
        (b"\0not_npu_swiglu(x)\0\0npu_swiglu(Tensor x)\0", True),
        (b"_ZN3atb10npu_swigluERKN2at6TensorE", True),
        (b"_ZN3atb10npu_swigluRKN2at6TensorE", False),
        (b"\0npu::npu_swiglu\0", True),
        (b"\0npu_swiglu.out(Tensor x, *, Tensor(a!) out)\0", True),
        (b"see npu_swiglu for more", False),
        (b"npu_swiglu", False),
        (b"", False),
    ],
)
def test_an_operator_in_a_library(tmp_path: Path, content: bytes, found: bool) -> None:
    assert present_operators(library(tmp_path, content), ["npu_swiglu"]) == ({"npu_swiglu"} if found else set())


def test_operators_are_looked_for_in_every_library(tmp_path: Path) -> None:
    library(tmp_path, b"\0npu_rms_norm(Tensor x)\0")
    library(tmp_path, b"ZN3atb20_npu_paged_attentionERK", "libop_plugin_atb.so")
    wanted = {"npu_rms_norm": ("norm",), "_npu_paged_attention": ("paged",), "npu_new": ("fast", "faster")}
    finding = check_operators(tmp_path, wanted, "ascend310p", "family")
    assert finding.status == "problem"
    assert finding.message == "family on ascend310p: this torch_npu does not have npu_new (for fast, faster)"


def test_libraries_that_cannot_be_read_are_no_missing_operator(tmp_path: Path) -> None:
    assert check_operators(tmp_path, {"npu_rms_norm": ("norm",)}, "ascend310p").status == "warning"


def test_a_missing_operator_is_found_in_a_look(tmp_path: Path) -> None:
    installed = packages(tmp_path, operators="npu_rms_norm(Tensor x)")
    findings = look(lay_out(tmp_path, "ascend310p"), DUO, packages=installed)
    assert "_npu_paged_attention (for ascend310p_paged, ascend310p_flash)" in about(problems(findings), "operators")


def test_kernels_of_another_plugin_count() -> None:
    own = KernelSpec(
        name="fast_norm",
        operation="rms_norm",
        chip="ascend310p",
        dtypes=("float16",),
        implementation="fast:norm",
        requires=("torch_npu",),
        operators=("npu_fast_norm",),
        priority=20,
    )
    registry = build_registry(find_candidates(""))
    family, _ = registry.find("deepseek_coder")
    kernels = {**registry.kernels, own.name: own}
    needs = operators_of_family(family, None, "ascend310p", kernels, registry.attention_backends)
    assert needs["npu_fast_norm"] == ("fast_norm",)
    assert "npu_rms_norm" not in needs


def test_chips_in_question(tmp_path: Path) -> None:
    def chips(npu_smi: str, hardware: str | None, *, installed: bool) -> tuple[str, ...]:
        found = packages(tmp_path) if installed else {}
        return chips_in_question(Machine({}, found, npu_smi, tmp_path), hardware)

    assert chips("", None, installed=False) == ()
    assert chips("", None, installed=True) == ("ascend910b", "ascend310p")
    assert chips(DUO, None, installed=True) == ("ascend310p",)
    assert chips(DUO, "atlas_800i_a2", installed=False) == ("ascend910b",)
    assert chips(DUO, "cpu", installed=True) == ()


Check = Callable[[Path], list[Finding]]


@pytest.mark.parametrize(
    "look_at",
    [
        lambda root: look(root, DUO, {}),
        lambda root: look(root, "", {}, "atlas_800i_a2", packages={"torch": Package("2.1.0", None)}),
        lambda root: look(root, smi(("910_9391", 0, 0)), {"LD_PRELOAD": "libgomp.so"}, architecture="aarch64"),
    ],
)
def test_what_is_wrong_has_its_advice(tmp_path: Path, look_at: Check) -> None:
    findings = bad(look_at(lay_out(tmp_path, "ascend910b", driver="1.0", cann="")))
    assert findings
    assert [f for f in findings if not f.advice and not f.message.startswith("CANN of unknown version")] == []
