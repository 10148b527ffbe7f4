"""The filter of system calls that confined programs run behind, as classic BPF (seccomp(2)).

A list of what is allowed: everything else fails with EPERM. What it leaves out is the boundary: no process or thread
can be made, no socket, no file be opened for writing, nothing be executed, no other process be signalled or traced.
"""

from __future__ import annotations

import platform
import struct
from collections.abc import Callable, Iterator
from typing import NamedTuple


class Architecture(NamedTuple):
    """A processor architecture: what the kernel calls it in a filter, and its numbers of system calls."""

    audit: int
    numbers: dict[str, int]


def _numbers(text: str) -> dict[str, int]:
    pairs = (entry.split("=") for entry in text.split())
    return {name: int(number) for name, number in pairs}


X86_64 = Architecture(
    0xC000003E,
    _numbers(
        "access=21 alarm=37 brk=12 chdir=80 clock_getres=229 clock_gettime=228 clock_nanosleep=230 close=3 dup=32 "
        "dup2=33 dup3=292 epoll_create1=291 epoll_ctl=233 epoll_pwait=281 epoll_wait=232 eventfd2=290 exit=60 "
        "exit_group=231 faccessat=269 faccessat2=439 fadvise64=221 fchdir=81 fcntl=72 fstat=5 fstatfs=138 futex=202 "
        "getcpu=309 getcwd=79 getdents=78 getdents64=217 getegid=108 geteuid=107 getgid=104 getgroups=115 "
        "getitimer=36 getpid=39 getppid=110 getrandom=318 getresgid=120 getresuid=118 getrlimit=97 getrusage=98 "
        "gettid=186 gettimeofday=96 getuid=102 ioctl=16 kill=62 lseek=8 lstat=6 madvise=28 mmap=9 mprotect=10 "
        "mremap=25 munmap=11 nanosleep=35 newfstatat=262 open=2 openat=257 pause=34 pipe=22 pipe2=293 poll=7 ppoll=271 "
        "pread64=17 prlimit64=302 pselect6=270 pwrite64=18 read=0 readlink=89 readlinkat=267 readv=19 "
        "restart_syscall=219 rseq=334 rt_sigaction=13 rt_sigpending=127 rt_sigprocmask=14 rt_sigreturn=15 "
        "rt_sigsuspend=130 rt_sigtimedwait=128 sched_getaffinity=204 sched_yield=24 select=23 set_robust_list=273 "
        "set_tid_address=218 setitimer=38 sigaltstack=131 stat=4 statfs=137 statx=332 sysinfo=99 tgkill=234 time=201 "
        "times=100 tkill=200 umask=95 uname=63 write=1 writev=20"
    ),
)
AARCH64 = Architecture(
    0xC00000B7,
    _numbers(
        "brk=214 chdir=49 clock_getres=114 clock_gettime=113 clock_nanosleep=115 close=57 dup=23 dup3=24 "
        "epoll_create1=20 epoll_ctl=21 epoll_pwait=22 eventfd2=19 exit=93 exit_group=94 faccessat=48 faccessat2=439 "
        "fadvise64=223 fchdir=50 fcntl=25 fstat=80 fstatfs=44 futex=98 getcpu=168 getcwd=17 getdents64=61 getegid=177 "
        "geteuid=175 getgid=176 getgroups=158 getitimer=102 getpid=172 getppid=173 getrandom=278 getresgid=150 "
        "getresuid=148 getrlimit=163 getrusage=165 gettid=178 gettimeofday=169 getuid=174 ioctl=29 kill=129 lseek=62 "
        "madvise=233 mmap=222 mprotect=226 mremap=216 munmap=215 nanosleep=101 newfstatat=79 openat=56 pipe2=59 "
        "ppoll=73 pread64=67 prlimit64=261 pselect6=72 pwrite64=68 read=63 readlinkat=78 readv=65 restart_syscall=128 "
        "rseq=293 rt_sigaction=134 rt_sigpending=136 rt_sigprocmask=135 rt_sigreturn=139 rt_sigsuspend=133 "
        "rt_sigtimedwait=137 sched_getaffinity=123 sched_yield=124 set_robust_list=99 set_tid_address=96 setitimer=103 "
        "sigaltstack=132 statfs=43 statx=291 sysinfo=179 tgkill=131 times=153 tkill=130 umask=166 uname=160 write=64 "
        "writev=66"
    ),
)
ARCHITECTURES = {"x86_64": X86_64, "aarch64": AARCH64}

EPERM = 1
_LOAD, _JUMP_EQUAL, _JUMP_ANY_BIT, _RETURN = 0x20, 0x15, 0x45, 0x06
_ALLOW, _ERRNO, _KILL_PROCESS = 0x7FFF0000, 0x00050000, 0x80000000
_NUMBER_AT, _ARCHITECTURE_AT, _ARGUMENTS_AT = 0, 4, 16

_WRITING = 0o3 | 0o100 | 0o1000
"""O_WRONLY, O_RDWR, O_CREAT and O_TRUNC, which are the same on both architectures."""

_TERMINAL_QUESTIONS = (0x5401, 0x5413, 0x541B, 0x5450, 0x5451)
"""TCGETS, TIOCGWINSZ, FIONREAD, FIONCLEX and FIOCLEX."""

_DESCRIPTOR_COMMANDS = (0, 1, 2, 3, 4, 1030)
"""F_DUPFD, F_GETFD, F_SETFD, F_GETFL, F_SETFL and F_DUPFD_CLOEXEC; F_SETOWN would signal other processes."""

Instruction = tuple[int, int, int, int]


def _load(offset: int) -> Instruction:
    return (_LOAD, 0, 0, offset)


def _return(action: int) -> Instruction:
    return (_RETURN, 0, 0, action)


_DENY = _return(_ERRNO | EPERM)
_PASS = _return(_ALLOW)


def _one_of(argument: int, values: tuple[int, ...]) -> list[Instruction]:
    """Allow a call whose argument (its low 32 bits) is one of these."""
    checks = [step for value in values for step in ((_JUMP_EQUAL, 0, 1, value), _PASS)]
    return [_load(_ARGUMENTS_AT + 8 * argument), *checks, _DENY]


def _no_bit_of(argument: int, mask: int) -> list[Instruction]:
    return [_load(_ARGUMENTS_AT + 8 * argument), (_JUMP_ANY_BIT, 0, 1, mask), _DENY, _PASS]


_CONDITIONS: dict[str, Callable[[int], list[Instruction]]] = {
    "open": lambda _: _no_bit_of(1, _WRITING),
    "openat": lambda _: _no_bit_of(2, _WRITING),
    "ioctl": lambda _: _one_of(1, _TERMINAL_QUESTIONS),
    "fcntl": lambda _: _one_of(1, _DESCRIPTOR_COMMANDS),
    "kill": lambda pid: _one_of(0, (pid,)),
    "tkill": lambda pid: _one_of(0, (pid,)),
    "tgkill": lambda pid: _one_of(0, (pid,)),
    "prlimit64": lambda pid: _one_of(0, (0, pid)),
}


def syscall_filter(architecture: Architecture, pid: int, *, files: bool) -> bytes:
    """The filter's instructions, as ``struct sock_filter``.

    Args:
        pid: the confined process, which may signal itself.
        files: whether files may be opened, for reading; which ones is not the filter's to say.
    """
    program = [_load(_ARCHITECTURE_AT), (_JUMP_EQUAL, 1, 0, architecture.audit), _return(_KILL_PROCESS)]
    program.append(_load(_NUMBER_AT))
    for name, number in architecture.numbers.items():
        if files or name not in ("open", "openat"):
            program += _rule(number, _CONDITIONS[name](pid) if name in _CONDITIONS else [_PASS])
    return b"".join(struct.pack("<HBBI", *instruction) for instruction in [*program, _DENY])


def _rule(number: int, then: list[Instruction]) -> Iterator[Instruction]:
    yield (_JUMP_EQUAL, 0, len(then), number)
    yield from then


def this_architecture() -> Architecture | None:
    """The machine's; None where there is no filter for it."""
    return ARCHITECTURES.get(platform.machine())
