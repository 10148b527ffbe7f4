"""The process that programs are forked from: a warm interpreter of one thread that has imported what they use.

It reads requests from standard input and writes results to standard output, both as frames of JSON. It forks a child
per request, ends it at its time limit, and reads its report; it goes when its parent goes, its children go with it.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import gc
import importlib
import json
import mmap
import os
import resource
import secrets
import selectors
import signal
import struct
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from npu_zoo.evaluation.programs import confinement
from npu_zoo.evaluation.programs.execution import Job, run_and_report, set_aside

SYSTEM_FOLDERS = ("/lib", "/lib32", "/lib64", "/usr/lib", "/usr/lib32", "/usr/lib64", "/usr/share/zoneinfo")
SYSTEM_FILES = ("/dev/null", "/dev/urandom", "/etc/ld.so.cache", "/etc/localtime")
SECONDS_BETWEEN_LOOKS = 1.0
SECONDS_TO_END = 0.1
REPORT_LENGTH = 64 * 1024
CONFINED, UNCONFINED = b"confined: ", b"unconfined: "
"""What a report begins with, which is written before the program runs."""

PRELOADED = (
    "abc argparse array ast base64 binascii bisect builtins calendar cmath collections collections.abc colorsys "
    "concurrent.futures contextlib copy csv dataclasses datetime decimal difflib doctest email.message "
    "encodings.ascii encodings.cp1252 encodings.hex_codec encodings.idna encodings.latin_1 encodings.punycode "
    "encodings.rot_13 encodings.unicode_escape encodings.utf_16 encodings.utf_16_le encodings.utf_32 enum fractions "
    "functools glob graphlib hashlib heapq hmac html html.parser inspect io itertools json keyword linecache locale "
    "logging math mmap multiprocessing numbers operator os pathlib pickle platform pprint queue random re sched "
    "secrets select shutil signal socket sqlite3 statistics string struct subprocess tempfile textwrap threading time "
    "timeit tokenize traceback types typing unicodedata unittest unittest.mock urllib.parse uuid warnings weakref "
    "xml.etree.ElementTree zipfile zlib zoneinfo"
)

NUMPY = ("numpy", "numpy.fft", "numpy.linalg", "numpy.ma", "numpy.polynomial", "numpy.random", "numpy.testing")

PROBE = """
import ctypes, os, socket

def denied(attempt, *arguments):
    try:
        attempt(*arguments)
    except OSError:
        return True
    return False

libc = ctypes.CDLL(None, use_errno=True)
assert denied(socket.socket), "the network is in reach"
assert denied(os.fork), "processes can be made"
assert denied(open, "npu-zoo-probe", "w"), "files can be written"
assert denied(open, "/proc/self/status"), "any file can be read"
assert denied(os.kill, os.getppid(), 0), "other processes can be signalled"
assert libc.ptrace(0, 0, 0, 0) == -1, "processes can be traced"
"""


def frame(message: dict[str, Any]) -> bytes:
    """A message as it travels: its length in four bytes, then JSON."""
    body = json.dumps(message).encode("ascii")
    return struct.pack(">I", len(body)) + body


def take_frames(buffer: bytearray) -> Iterator[dict[str, Any]]:
    """Take the whole frames that a buffer begins with."""
    while len(buffer) >= 4:
        length = struct.unpack(">I", buffer[:4])[0]
        if len(buffer) < 4 + length:
            return
        yield json.loads(buffer[4 : 4 + length])
        del buffer[: 4 + length]


@dataclass
class Child:
    """A program that runs.

    Attributes:
        channel: the descriptor that its report comes from.
        secret: what a report of its end begins with.
    """

    request: dict[str, Any]
    pid: int
    channel: int
    secret: bytes
    started: float
    deadline: float
    report: bytearray = field(default_factory=bytearray)


class Template:
    """Forks, watches and ends the children."""

    def __init__(self, ruleset: int | None) -> None:
        self._ruleset = ruleset
        self._selector = selectors.DefaultSelector()
        self._children: dict[int, Child] = {}
        self._incoming, self._outgoing = bytearray(), bytearray()
        self._parent = os.getppid()

    def serve(self) -> None:
        """Until the parent closes its end or is gone."""
        for descriptor in (0, 1):
            os.set_blocking(descriptor, False)
        self._selector.register(0, selectors.EVENT_READ)
        try:
            while os.getppid() == self._parent:
                for key, _ in self._selector.select(self._patience()):
                    if key.fd == 0 and not self._receive():
                        return
                    if key.fd == 1:
                        self._send()
                    elif key.fd in self._children:
                        self._listen(self._children[key.fd])
                self._end_the_late()
        finally:
            for child in list(self._children.values()):
                self._reap(child)

    def probe(self) -> str:
        """What a child can reach that it must not; empty where the boundaries hold."""
        child = self._fork(
            {"id": -1, "seconds": 20.0, "cpu_seconds": 10, "memory": 2**28}
            | Job(source=PROBE, tests="", entry_point="")._asdict()
        )
        while self._read(child) and time.monotonic() < child.deadline:
            pass
        result = self._reap(child)
        return "" if result["status"] == "passed" else str(result["message"] or result["status"])

    def _patience(self) -> float:
        now = time.monotonic()
        return max(0.0, min([SECONDS_BETWEEN_LOOKS, *(child.deadline - now for child in self._children.values())]))

    def _receive(self) -> bool:
        data = os.read(0, 1 << 20)
        self._incoming += data
        for request in take_frames(self._incoming):
            child = self._fork(request)
            os.set_blocking(child.channel, False)
            self._children[child.channel] = child
            self._selector.register(child.channel, selectors.EVENT_READ)
        return bool(data)

    def _answer(self, result: dict[str, Any]) -> None:
        if not self._outgoing:
            self._selector.register(1, selectors.EVENT_WRITE)
        self._outgoing += frame(result)

    def _send(self) -> None:
        with contextlib.suppress(BlockingIOError):
            del self._outgoing[: os.write(1, self._outgoing)]
        if not self._outgoing:
            self._selector.unregister(1)

    def _fork(self, request: dict[str, Any]) -> Child:
        channel, report_to = os.pipe()
        token, write_token = os.pipe()
        secret = secrets.token_bytes(32)
        os.write(write_token, secret)
        os.close(write_token)
        template, now = os.getpid(), time.monotonic()
        pid = os.fork()
        if pid == 0:
            del secret
            self._become(request, template, token, report_to)
        os.close(token)
        os.close(report_to)
        return Child(request, pid, channel, secret, now, now + request["seconds"])

    def _become(self, request: dict[str, Any], template: int, token: int, channel: int) -> None:
        """Be a program; does not return."""
        leave = os._exit
        try:
            token, channel, reserve = self._confine(request, template, token, channel)
            run_and_report(Job(*(request[name] for name in Job._fields)), token, channel, reserve)
        finally:
            leave(1)

    def _confine(self, request: dict[str, Any], template: int, token: int, channel: int) -> tuple[int, int, mmap.mmap]:
        """Close the boundaries around this process, and say so before a program can say anything."""
        try:
            os.setsid()
            gc.freeze()  # garbage of the parent's may hold descriptors whose numbers are others' from here on
            token, channel, ruleset = _only_these(token, channel, self._ruleset)
            confinement.be_the_first_to_go()
            reserve = set_aside()
            confinement.limit_resources(request["memory"], request["cpu_seconds"])
            confinement.drop_capabilities()
            confinement.die_with_parent(template)
            confinement.lock(ruleset)
        except BaseException as error:
            os.write(channel, UNCONFINED + str(error).encode())
            raise
        os.write(channel, CONFINED)
        self.__dict__.clear()
        return token, channel, reserve

    def _listen(self, child: Child) -> None:
        if not self._read(child) or len(child.report) > REPORT_LENGTH:
            self._finish(child)

    def _read(self, child: Child) -> bool:
        with contextlib.suppress(BlockingIOError):
            data = os.read(child.channel, REPORT_LENGTH)
            child.report += data
            return bool(data)
        return True

    def _end_the_late(self) -> None:
        now = time.monotonic()
        for child in [child for child in self._children.values() if child.deadline <= now]:
            self._finish(child)

    def _finish(self, child: Child) -> None:
        self._selector.unregister(child.channel)
        del self._children[child.channel]
        self._answer(self._reap(child))

    def _reap(self, child: Child) -> dict[str, Any]:
        """End a child, which is one process without descendants, and say how it ended."""
        late = time.monotonic() >= child.deadline
        status, usage, closed = _wait(child.pid, 0.0 if late else SECONDS_TO_END)
        os.close(child.channel)
        seconds = time.monotonic() - child.started
        spent = usage.ru_utime + usage.ru_stime
        return {"id": child.request["id"], "seconds": seconds, **_outcome(child, status, late, closed, spent)}


def _wait(pid: int, patience: float) -> tuple[int, resource.struct_rusage, bool]:
    """A child's status, what it used, and whether its end had to be brought about, which is done after a while."""
    until = time.monotonic() + patience
    while time.monotonic() < until:
        ended, status, usage = os.wait4(pid, os.WNOHANG)
        if ended:
            return status, usage, False
        time.sleep(0.0005)
    os.kill(pid, signal.SIGKILL)
    _, status, usage = os.wait4(pid, 0)
    return status, usage, True


def _outcome(child: Child, status: int, late: bool, closed: bool, spent: float) -> dict[str, str]:
    report, request = bytes(child.report), child.request
    begins = CONFINED + child.secret
    if report.startswith(begins):
        parts = report[len(begins) :].decode("utf-8", "replace").split("\0")
        if len(parts) == 3 and parts[0] in ("passed", "failed", "out of memory"):
            return dict(zip(("status", "message", "output"), parts, strict=True))
    if report.startswith(UNCONFINED):
        return _ended("unconfined", report.decode("utf-8", "replace"))
    if late:
        return _ended("timed out", f"it ran for more than {request['seconds']:g} s")
    if os.WIFEXITED(status):
        return _ended("failed", f"it ended with exit status {os.WEXITSTATUS(status)} before its tests did")
    number = os.WTERMSIG(status)
    if number == signal.SIGXCPU or (number == signal.SIGKILL and spent > request["cpu_seconds"] - 0.5):
        return _ended("timed out", f"it took more than {request['cpu_seconds']} s of processor time")
    if closed:
        return _ended("failed", "it tampered with the channel of its verdict")
    return _ended("killed", f"it was ended by {signal.Signals(number).name} before its tests had ended")


def _ended(status: str, message: str) -> dict[str, str]:
    return {"status": status, "message": message, "output": ""}


def _only_these(token: int, channel: int, ruleset: int | None) -> tuple[int, int, int | None]:
    """Put the descriptors at 3, 4 and 5, nothing at all behind 0, 1 and 2, and close every other."""
    # Copies at 10 and above, so that none is where another has to go.
    copies = [fcntl.fcntl(one, fcntl.F_DUPFD, 10) for one in (token, channel, ruleset) if one is not None]
    nothing = os.open("/dev/null", os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(nothing, standard)
    kept = [os.dup2(copy, at) for at, copy in enumerate(copies, 3)]
    os.closerange(3 + len(kept), os.sysconf("SC_OPEN_MAX"))
    return kept[0], kept[1], kept[2] if ruleset is not None else None


def _import_what_programs_use(numpy: str) -> str:
    """Import it, and numpy from its folder where there is one; its version, or else nothing."""
    for name in PRELOADED.split():
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    if not numpy:
        return ""
    sys.path.append(str(Path(numpy).parent))
    try:
        for name in NUMPY:
            importlib.import_module(name)
        return str(sys.modules["numpy"].__version__)
    except ImportError:
        return ""
    finally:
        sys.path.pop()


def _readable(numpy: str, folder: str) -> list[str]:
    paths = sysconfig.get_paths()
    return [
        *SYSTEM_FOLDERS,
        paths["stdlib"],
        paths["platstdlib"],
        f"{sys.base_prefix}/lib",
        *filter(None, [numpy]),
        folder,
    ]


def main() -> None:
    """Say hello, with what holds here, and serve."""
    numpy, landlock, temporary = sys.argv[1:]
    sys.path.pop(0)
    folder = tempfile.mkdtemp(prefix="npu-zoo-programs-", dir=temporary)
    os.chdir(folder)
    try:
        template, hello = _set_up(numpy, landlock == "1", folder)
        with contextlib.suppress(BrokenPipeError):
            os.write(1, frame(hello))
            template.serve()
    finally:
        os.chdir("/")
        with contextlib.suppress(OSError):
            Path(folder).rmdir()


def _set_up(numpy: str, landlock: bool, folder: str) -> tuple[Template, dict[str, Any]]:
    version = _import_what_programs_use(numpy)
    ctypes.CDLL(None)
    interface = confinement.landlock_version() if landlock else 0
    allowed = _readable(numpy if version else "", folder)
    ruleset = confinement.landlock_ruleset(interface, allowed, SYSTEM_FILES) if interface else None
    template = Template(ruleset)
    gc.collect()
    gc.freeze()
    return template, {"landlock": interface, "numpy": version, "folder": folder, "breach": template.probe()}
