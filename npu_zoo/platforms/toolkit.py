"""The driver and CANN: what is installed, whether a shell has sourced it, and which versions.

Every path is looked up below a root, so that a test can lay one out; messages name it as it is on the machine.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from npu_zoo.platforms.ascend import ascend_devices
from npu_zoo.platforms.findings import Finding, Status
from npu_zoo.platforms.versions import least_driver, minor, newest_cann, numbers, releases_of

GUIDE = "docs/install-ascend.md"
_ASCEND = "usr/local/Ascend"
_CANN_SCRIPTS = ("cann/set_env.sh", "ascend-toolkit/set_env.sh", "cann-*/set_env.sh")
_ATB_SCRIPTS = ("nnal/atb/set_env.sh",)
_HOME_VARIABLES = ("ASCEND_HOME_PATH", "ASCEND_TOOLKIT_HOME")
_MANAGEMENT = ("davinci_manager", "devmm_svm", "hisi_hdc")
_KERNELS = "opp/built-in/op_impl/ai_core/tbe/kernel"
_ALWAYS_THERE = {"ops_oam", "config"}
"""What the toolkit brings into a chip's folder of kernels without the package of them."""


def can_open(path: Path) -> bool:
    """Whether this user may read and write a device file."""
    return os.access(path, os.R_OK | os.W_OK)


def cann_command(root: Path, environ: Mapping[str, str]) -> str:
    """The command that makes CANN's libraries known to a shell, or how to get CANN."""
    return _source(root, _scripts(root, environ, _CANN_SCRIPTS), f"install CANN's toolkit and its kernels: {GUIDE}")


def atb_command(root: Path, environ: Mapping[str, str]) -> str:
    """The same for the ATB library."""
    return _source(
        root, _scripts(root, environ, _ATB_SCRIPTS), f"install CANN's nnal package, of CANN's version: {GUIDE}"
    )


def driver_command(root: Path) -> str:
    """The same for the driver's libraries."""
    script = root / _ASCEND / "driver/bin/setenv.bash"
    if script.exists():
        return f"source {_shown(root, script)}"
    libraries = "/usr/local/Ascend/driver/lib64"
    return f"install the driver: {GUIDE}; in a container: docker run -v {libraries}:{libraries} …"


def driver_version(root: Path) -> str:
    """The driver's version (of the Ascend HDK); empty where it cannot be told."""
    return _entry(root / _ASCEND / "driver/version.info", "Version")


def cann_home(root: Path, environ: Mapping[str, str]) -> Path | None:
    """Where the CANN lies that this shell has sourced, below the root; None where it has sourced none."""
    value = next((environ[name] for name in _HOME_VARIABLES if environ.get(name)), "")
    return root / value.lstrip("/") if value else None


def cann_version(home: Path) -> str:
    """The version of a CANN toolkit; empty where it cannot be told."""
    return next((found for path in _install_files(home) if (found := _entry(path, "version"))), "")


def check_driver(root: Path, *, needed: bool, may_open: Callable[[Path], bool] = can_open) -> list[Finding]:
    """The driver, its device files and who may open them.

    Args:
        root: what paths are looked up below.
        needed: whether an NPU is to be used.
        may_open: whether this user may open a device file.
    """
    devices, version = ascend_devices(root / "dev"), driver_version(root)
    if not devices:
        return [_no_device(version, needed=needed)]
    findings = [_check_version_file(version), *_check_firmware(root)]
    if not (root / _ASCEND / "driver/lib64").is_dir():
        message = "the devices are there, and the driver's libraries are not: /usr/local/Ascend/driver/lib64"
        findings.append(Finding("driver", "problem", message, driver_command(root)))
    return [*findings, *_check_device_files(root, devices, may_open)]


def check_cann(root: Path, environ: Mapping[str, str], torch_npu: str, *, needed: bool) -> list[Finding]:
    """CANN's toolkit: there, sourced, whole, and of the version that torch_npu and the driver go with.

    Args:
        root: what paths are looked up below.
        environ: the environment.
        torch_npu: the version of the installed torch_npu; empty where there is none.
        needed: whether an NPU is to be used.
    """
    bad: Status = "problem" if needed else "note"
    home = cann_home(root, environ)
    if home is None:
        scripts = _scripts(root, environ, _CANN_SCRIPTS)
        if not needed and not scripts:
            return []
        there = f"CANN lies in {_shown(root, scripts[0].parent)}, and this shell has not sourced it" if scripts else ""
        return [Finding("cann", bad, there or "CANN is not installed", cann_command(root, environ))]
    if not home.is_dir():
        message = f"this shell's CANN is not there: ASCEND_HOME_PATH={_shown(root, home)}"
        return [Finding("cann", "problem", f"{message}; torch_npu refuses to start", cann_command(root, environ))]
    version = cann_version(home)
    shown = f"CANN {version or 'of unknown version'} in {_shown(root, home)}"
    findings = [Finding("cann", "ok" if version else "warning", shown)]
    opp = environ.get("ASCEND_OPP_PATH", "")
    if not opp or not (root / opp.lstrip("/")).is_dir():
        message = f"ASCEND_OPP_PATH={opp} is not there" if opp else "ASCEND_OPP_PATH is unset"
        advice = cann_command(root, environ)
        findings.append(Finding("cann", "problem", f"{message}; torch_npu refuses to start", advice))
    if version:
        findings += _check_pair(torch_npu, version) + _check_least_driver(version, driver_version(root))
    return findings


def check_kernels(root: Path, environ: Mapping[str, str], chips: Iterable[str]) -> list[Finding]:
    """Whether the sourced CANN has compiled kernels for the chips; nothing where none is sourced."""
    home = cann_home(root, environ)
    if home is None or not (home / _KERNELS).parent.is_dir():
        return []
    return [_check_kernels(home / _KERNELS / chip, chip) for chip in chips]


def check_atb(root: Path, environ: Mapping[str, str], *, needed: bool) -> list[Finding]:
    """CANN's nnal package with the ATB library, which some operators of torch_npu stand on.

    Args:
        root: what paths are looked up below.
        environ: the environment.
        needed: whether an operator that is to be used stands on it.
    """
    bad: Status = "problem" if needed else "note"
    what = "its operators (torch_npu._npu_*) are needed here" if needed else "nothing here needs it"
    value = environ.get("ATB_HOME_PATH", "")
    if not value:
        scripts = _scripts(root, environ, _ATB_SCRIPTS)
        state = "there, and this shell has not sourced it" if scripts else "not installed"
        advice = atb_command(root, environ) if needed else ""
        return [Finding("cann", bad, f"the ATB library (package nnal) is {state}; {what}", advice)]
    if not (root / value.lstrip("/")).is_dir():
        return [Finding("cann", bad, f"ATB_HOME_PATH={value} is not there; {what}", atb_command(root, environ))]
    if value.rstrip("/").endswith("cxx_abi_0"):
        message = f"ATB_HOME_PATH={value}: the ATB library of the old C++ ABI, which torch is no longer built for"
        return [Finding("cann", bad, message, f"{atb_command(root, environ)} --cxx_abi=1")]
    return [Finding("cann", "ok", f"the ATB library in {value}")]


def _no_device(version: str, *, needed: bool) -> Finding:
    if not needed:
        return Finding("devices", "ok", "no Ascend device: models run on the CPU")
    if version:
        message = f"driver {version} is installed and shows no device (/dev/davinci*)"
        advice = "npu-smi info; in a container: docker run --device /dev/davinci0 …; after an installation: reboot"
    else:
        message = "no Ascend device (/dev/davinci*), and no driver is installed"
        advice = f"install driver, then firmware: {GUIDE}; in a container: docker run --device /dev/davinci0 …"
    return Finding("driver", "problem", message, advice)


def _check_version_file(version: str) -> Finding:
    if version:
        return Finding("driver", "ok", f"driver {version}")
    message = "the driver's version cannot be told: /usr/local/Ascend/driver/version.info is missing"
    path = "/usr/local/Ascend/driver/version.info"
    return Finding("driver", "warning", message, f"in a container: docker run -v {path}:{path} …")


def _check_firmware(root: Path) -> list[Finding]:
    version = _entry(root / _ASCEND / "firmware/version.info", "Version")
    return [Finding("driver", "ok", f"firmware {version}")] if version else []


def _check_device_files(root: Path, devices: list[int], may_open: Callable[[Path], bool]) -> list[Finding]:
    findings = []
    missing = [name for name in _MANAGEMENT if not (root / "dev" / name).exists()]
    if missing:
        advice = "in a container: docker run " + " ".join(f"--device /dev/{name}" for name in missing) + " …"
        message = "device files are missing: " + ", ".join(f"/dev/{name}" for name in missing)
        findings.append(Finding("driver", "problem", message, advice))
    names = [*(f"davinci{number}" for number in devices), *(name for name in _MANAGEMENT if name not in missing)]
    closed = [f"/dev/{name}" for name in names if not may_open(root / "dev" / name)]
    if closed:
        message = f"this user may not open {', '.join(closed[:3])}" + (" and others" if len(closed) > 3 else "")
        advice = "sudo usermod -a -G HwHiAiUser $USER, and log in anew"
        findings.append(Finding("driver", "problem", message, advice))
    return findings


def _check_pair(torch_npu: str, cann: str) -> list[Finding]:
    if not torch_npu:
        return []
    named = sorted({release.cann for release in releases_of(torch_npu) if release.cann}, key=numbers)
    if not named:
        message = f"no document names the CANN of torch_npu {torch_npu} yet; {newest_cann()} is the newest named at all"
        return [Finding("cann", "note", message)]
    goes_with = f"torch_npu {torch_npu} goes with CANN {' or '.join(named)}"
    if minor(cann) in map(minor, named):
        return [Finding("cann", "ok", goes_with)]
    if numbers(cann) > numbers(named[-1]):
        return [Finding("cann", "note", f"{goes_with}; this one is newer")]
    message = f"{goes_with}; this one is older, and operators may be missing in it"
    return [Finding("cann", "warning", message, f"install CANN {named[-1]}, or the torch_npu of this CANN: {GUIDE}")]


def _check_least_driver(cann: str, driver: str) -> list[Finding]:
    least = least_driver(cann)
    if not least or not driver or numbers(driver) >= numbers(least):
        return []
    message = f"CANN {minor(cann)} needs driver {least} or newer; this one is {driver}"
    return [Finding("driver", "problem", message, f"install a newer driver and its firmware: {GUIDE}")]


def _check_kernels(folder: Path, chip: str) -> Finding:
    if folder.is_dir() and any(path.name not in _ALWAYS_THERE for path in folder.iterdir()):
        return Finding("cann", "ok", f"compiled kernels for {chip}")
    package = chip.removeprefix("ascend")
    message = f"CANN seems to have no compiled kernels for {chip}; without them operators fail when they are launched"
    advice = f"install Ascend-cann-{package}-ops (before 8.5: Ascend-cann-kernels-{package}) of CANN's version"
    return Finding("cann", "warning", message, advice)


def _scripts(root: Path, environ: Mapping[str, str], patterns: Iterable[str]) -> list[Path]:
    home = environ.get("HOME", "").strip("/")
    bases = [root / _ASCEND, *([root / home / "Ascend"] if home else [])]
    return [path for base in bases for pattern in patterns for path in sorted(base.glob(pattern), reverse=True)]


def _source(root: Path, scripts: list[Path], otherwise: str) -> str:
    return f"source {_shown(root, scripts[0])}" if scripts else otherwise


def _shown(root: Path, path: Path) -> str:
    return f"/{path.relative_to(root)}"


def _install_files(home: Path) -> list[Path]:
    return [*sorted(home.glob("*-linux/ascend_toolkit_install.info")), *sorted(home.glob("ascend_*_install.info"))]


def _entry(path: Path, key: str) -> str:
    """The value of ``key=value`` in a file; empty where there is none."""
    try:
        lines = path.read_text(errors="replace").splitlines()
    except OSError:
        return ""
    values = (value for name, _, value in (line.partition("=") for line in lines) if name.strip() == key)
    return next(values, "").strip()
