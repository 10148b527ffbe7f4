"""What a process takes away from itself before it runs a program that nobody has read.

None of it needs a privilege, so that it holds for root in a container as for an ordinary user.
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import struct
from collections.abc import Sequence
from pathlib import Path

from npu_zoo.evaluation.programs.syscalls import syscall_filter, this_architecture

_SET_PDEATHSIG, _SET_DUMPABLE, _SET_SECCOMP, _SET_NO_NEW_PRIVS = 1, 4, 22, 38
_SECCOMP_MODE_FILTER = 2
_CAPABILITY_VERSION = 0x20080522

_LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 444, 445, 446  # the same on every architecture
_LANDLOCK_VERSION_FLAG = 1
_LANDLOCK_BENEATH = 1
_READ_FILE, _READ_DIR = 1 << 2, 1 << 3
_FILE_RIGHTS = {1: 13, 2: 14, 3: 15, 4: 15}
_FILE_RIGHTS_SINCE_5 = 16
_NET_RIGHTS = 0b11
_SCOPES = 0b11

_libc = ctypes.CDLL(None, use_errno=True)


class _Filter(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p))


def _checked(result: int, what: str) -> int:
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, f"{what}: {os.strerror(error)}")
    return result


def _syscall(number: int, *arguments: int | bytes | None) -> int:
    given = [ctypes.c_long(value) if isinstance(value, int) else value for value in arguments]
    return int(_libc.syscall(ctypes.c_long(number), *given))


def _prctl(what: str, option: int, *arguments: int) -> None:
    given = [ctypes.c_ulong(value) for value in (*arguments, 0, 0, 0, 0)[:4]]
    _checked(_libc.prctl(option, *given), what)


def landlock_version() -> int:
    """The version of Landlock's interface that the kernel has; 0 where it has none or has it switched off."""
    return max(_syscall(_LANDLOCK_CREATE, None, 0, _LANDLOCK_VERSION_FLAG), 0)


def landlock_ruleset(version: int, folders: Sequence[str], files: Sequence[str]) -> int:
    """A descriptor of rules by which only these are read and nothing is written; paths that do not exist are left out.

    Raises:
        OSError: the kernel refuses them.
    """
    rights = (1 << _FILE_RIGHTS.get(version, _FILE_RIGHTS_SINCE_5)) - 1
    attributes = struct.pack("=QQQ", rights, _NET_RIGHTS, _SCOPES)[: 8 if version < 4 else 16 if version < 6 else 24]
    ruleset = _checked(_syscall(_LANDLOCK_CREATE, attributes, len(attributes), 0), "landlock_create_ruleset")
    for path in folders:
        _allow_reading(ruleset, path, _READ_FILE | _READ_DIR)
    for path in files:
        _allow_reading(ruleset, path, _READ_FILE)
    return ruleset


def _allow_reading(ruleset: int, path: str, rights: int) -> None:
    if not Path(path).exists():
        return
    descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        rule = struct.pack("=Qi", rights, descriptor)
        _checked(_syscall(_LANDLOCK_ADD, ruleset, _LANDLOCK_BENEATH, rule, 0), f"landlock_add_rule for {path}")
    finally:
        os.close(descriptor)


def limit_resources(memory: int, cpu_seconds: int) -> None:
    """Bound this process's address space, over what it has now, and its processor time; all else is cut to nothing."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    space = pages * resource.getpagesize() + memory
    limits = {
        resource.RLIMIT_AS: space,
        resource.RLIMIT_CPU: cpu_seconds,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_FSIZE: 0,
        resource.RLIMIT_MEMLOCK: 0,
        resource.RLIMIT_MSGQUEUE: 0,
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_NPROC: 0,
        resource.RLIMIT_SIGPENDING: 64,
    }
    for kind, most in limits.items():
        hard = resource.getrlimit(kind)[1]
        value = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(kind, (value, value))


def drop_capabilities() -> None:
    """Root keeps its name and loses its powers."""
    header = struct.pack("=Ii", _CAPABILITY_VERSION, 0)
    _checked(_libc.capset(header, bytes(24)), "capset")


def die_with_parent(parent: int) -> None:
    """Be killed when the parent ends, which must still be this one."""
    _prctl("PR_SET_PDEATHSIG", _SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def be_the_first_to_go() -> None:
    """Where the machine runs out of memory, this process is ended before any other."""
    try:
        Path("/proc/self/oom_score_adj").write_text("1000")
    except OSError:
        return


def lock(ruleset: int | None) -> None:
    """Close the boundaries, for good; without a ruleset no file can be opened at all.

    Raises:
        OSError: the kernel refuses one of them.
    """
    architecture = this_architecture()
    if architecture is None:
        raise OSError(f"there is no filter of system calls for {os.uname().machine}")
    _prctl("PR_SET_NO_NEW_PRIVS", _SET_NO_NEW_PRIVS, 1)
    _prctl("PR_SET_DUMPABLE", _SET_DUMPABLE, 0)
    if ruleset is not None:
        _checked(_syscall(_LANDLOCK_RESTRICT, ruleset, 0), "landlock_restrict_self")
        os.close(ruleset)
    code = syscall_filter(architecture, os.getpid(), files=ruleset is not None)
    program = _Filter(len(code) // 8, code)
    _prctl("PR_SET_SECCOMP", _SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.addressof(program))
