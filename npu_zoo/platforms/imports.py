"""What importing torch and torch_npu comes to, found in another process, and why it fails."""

from __future__ import annotations

import itertools
import re
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from npu_zoo.platforms.findings import Finding, Status

AUTOLOAD = "TORCH_DEVICE_BACKEND_AUTOLOAD"
"""With 0, ``import torch`` does not import torch_npu along."""

_BACKEND = "Failed to load the backend extension"
_SIGN = "npu-zoo doctor: "
_TIMEOUT = 120
_PROGRAM = f"""
import sys
sys.path[:] = {{path!r}}
import npu_zoo
npu_zoo.simulate()
import torch
print({_SIGN!r} + "torch")
if {{npu!r}}:
    import torch_npu
    print({_SIGN!r} + "torch_npu")
    print({_SIGN!r} + str(torch.npu.device_count()))
"""


@dataclass(frozen=True)
class Probe:
    """What importing torch came to in a process of its own.

    Attributes:
        imported: the modules that could be imported.
        devices: how many devices torch_npu sees; None where it was not asked or did not answer.
        error: why it failed, on one line; empty where it did not.
    """

    imported: tuple[str, ...]
    devices: int | None = None
    error: str = ""


@dataclass(frozen=True)
class Remedies:
    """What to do about the usual failures of an import, as this machine has it.

    Attributes:
        cann, driver, atb: the command that puts their libraries on the search path, or how to install them.
        preload: the command that loads libgomp early.
        pair: the command that installs a torch of torch_npu's release.
        install: the command that installs what npu-zoo needs here.
    """

    cann: str
    driver: str
    atb: str
    preload: str
    pair: str
    install: str


def probe_imports(
    environ: Mapping[str, str], *, npu: bool, path: Sequence[str] | None = None, timeout: float = _TIMEOUT
) -> Probe:
    """Import torch, then torch_npu where it is asked for, in a process of its own.

    Args:
        environ: that process's environment.
        npu: whether to import torch_npu and count its devices.
        path: where it looks for modules; this process's own where None.
        timeout: seconds after which it is given up.
    """
    program = _PROGRAM.format(path=list(sys.path if path is None else path), npu=npu)
    command = [sys.executable, "-u", "-c", program]  # -u: what it said before a crash is not lost
    try:
        done = subprocess.run(command, capture_output=True, env=dict(environ), timeout=timeout, check=False)
    except subprocess.TimeoutExpired as expired:
        return Probe(*_answers(expired.stdout or b""), error=f"no answer after {timeout:g} s")
    except OSError as error:
        return Probe((), error=str(error))
    if done.returncode < 0:
        return Probe(*_answers(done.stdout), error=f"it was killed by {_signal_name(-done.returncode)}")
    return Probe(*_answers(done.stdout), error=_cause(done.stderr) if done.returncode else "")


def check_imports(probe: Probe, alone: Probe | None, remedies: Remedies, *, npu: bool, needed: bool) -> list[Finding]:
    """Whether torch and torch_npu can be imported, and why not.

    Args:
        probe: what an import of torch, and of torch_npu where ``npu``, came to.
        alone: the same without torch_npu's loading itself into torch; None where that was not tried.
        remedies: what to do about the usual failures.
        npu: whether torch_npu is installed.
        needed: whether an NPU is to be used.
    """
    if "torch" not in probe.imported:
        message, advice = explain_failure(probe.error, remedies)
        because = ""
        if npu and alone is not None and "torch" in alone.imported:
            because = ", because torch_npu loads itself into it"
            advice = advice if needed else f"to run on the CPU: export {AUTOLOAD}=0; for an NPU: {advice}"
        return [Finding("torch", "problem", f"`import torch` fails{because}: {message}", advice)]
    findings = [Finding("torch", "ok", "torch can be imported")]
    if npu and "torch_npu" not in probe.imported:
        message, advice = explain_failure(probe.error, remedies)
        status: Status = "problem" if needed else "warning"
        findings.append(Finding("torch_npu", status, f"`import torch_npu` fails: {message}", advice))
    elif npu:
        findings.append(_check_count(probe, needed=needed))
    return findings


def explain_failure(error: str, remedies: Remedies) -> tuple[str, str]:
    """What a failed import says, and what to do about it."""
    library = re.search(r"(lib\w+\.so[.\d]*): cannot open shared object file", error)
    if "static TLS block" in error:
        return f"the C library has no room left for libgomp's thread-local memory: {error}", remedies.preload
    if library and library.group(1).startswith(("libascend_hal", "libdcmi", "libdrvdsmi")):
        return f"{library.group(1)}, a library of the driver, is not found", remedies.driver
    if library and library.group(1).startswith("libatb"):
        return f"{library.group(1)}, a library of CANN's nnal package, is not found", remedies.atb
    if library and library.group(1).startswith(_OF_CANN):
        return f"{library.group(1)}, a library of CANN, is not found", remedies.cann
    if "undefined symbol" in error:
        return f"torch and torch_npu, or CANN and torch_npu, are not of one release: {error}", remedies.pair
    if "Two accelerators" in error:
        message = "torch has another accelerator beside the NPU, and torch_npu takes none beside itself"
        return message, "install torch's CPU build: pip install torch --index-url https://download.pytorch.org/whl/cpu"
    missing = re.search(r"No module named '([\w.]+)'", error)
    if missing:
        return f"the Python module {missing.group(1)} is missing", remedies.install
    return error, f"{remedies.install} --force-reinstall"


_OF_CANN = (
    "libhccl",
    "libascendcl",
    "libacl",
    "libge_",
    "libgraph",
    "libopapi",
    "libruntime",
    "libregister",
    "liberror_manager",
    "libplatform",
    "libascendalog",
    "libmsprofiler",
)


def check_libgomp(environ: Mapping[str, str], machine: str, torch: Path | None, root: Path) -> list[Finding]:
    """On aarch64, whether libgomp is loaded early enough."""
    if machine != "aarch64":
        return []
    preloaded = [part for part in re.split(r"[:\s]+", environ.get("LD_PRELOAD", "")) if "libgomp" in part]
    gone = [part for part in preloaded if part.startswith("/") and not (root / part.lstrip("/")).exists()]
    if gone:
        message = f"LD_PRELOAD names {gone[0]}, which is not there"
        return [Finding("libgomp", "warning", message, preload_command(torch, root))]
    if preloaded:
        return [Finding("libgomp", "ok", f"LD_PRELOAD loads {preloaded[0]}")]
    message = (
        "LD_PRELOAD loads no libgomp; on aarch64 an import can fail with 'cannot allocate memory in static TLS block'"
    )
    return [Finding("libgomp", "note", message, f"if it does: {preload_command(torch, root)}")]


def preload_command(torch: Path | None, root: Path) -> str:
    """The command that loads libgomp early: torch's own where it has one, else the system's."""
    own = [] if torch is None else [*torch.parent.glob("torch.libs/libgomp*.so*"), *torch.glob("lib/libgomp*.so*")]
    system = [root / "usr/lib/aarch64-linux-gnu/libgomp.so.1", root / "usr/lib64/libgomp.so.1"]
    found = next((path for path in [*sorted(own), *system] if path.exists()), None)
    if found is None:
        return "install libgomp (package libgomp1 or libgomp), then export LD_PRELOAD=PATH/libgomp.so.1"
    shown = found if found in own else Path("/") / found.relative_to(root)
    return f"export LD_PRELOAD={shown}"


def _check_count(probe: Probe, *, needed: bool) -> Finding:
    if probe.devices is None:
        message, advice = f"torch_npu can be imported and cannot count devices: {probe.error}", "npu-smi info"
        return Finding("torch_npu", "problem" if needed else "note", message, advice)
    if probe.devices == 0 and needed:
        message = "torch_npu can be imported and sees no device"
        advice = "see driver and devices below; ASCEND_RT_VISIBLE_DEVICES must not be empty of them"
        return Finding("torch_npu", "problem", message, advice)
    seen = "1 device" if probe.devices == 1 else f"{probe.devices} devices"
    return Finding("torch_npu", "ok", f"torch_npu can be imported and sees {seen}")


def _answers(stdout: bytes) -> tuple[tuple[str, ...], int | None]:
    lines = stdout.decode(errors="replace").splitlines()
    answers = [line.removeprefix(_SIGN) for line in lines if line.startswith(_SIGN)]
    counted = [int(answer) for answer in answers if answer.isdecimal()]
    return tuple(answer for answer in answers if not answer.isdecimal()), counted[0] if counted else None


def _cause(stderr: bytes) -> str:
    """The error that a traceback ends with, on one line; of a failed loading of torch_npu, what it is due to."""
    lines = [line.rstrip() for line in stderr.decode(errors="replace").splitlines() if line.strip()]
    errors = [number for number, line in enumerate(lines) if re.match(r"[\w.]*(Error|Exception)\b", line)]
    if not errors:
        return (lines or ["it failed without a message"])[-1].strip()
    wrapped = len(errors) > 1 and _BACKEND in lines[errors[-1]]
    first = errors[-2] if wrapped else errors[-1]
    message = itertools.takewhile(lambda line: not line.startswith("The above exception"), lines[first : first + 3])
    return " ".join(map(str.strip, message))


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
