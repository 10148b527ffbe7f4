"""Programs that try to get out, and how each of them has to end."""

from __future__ import annotations

from typing import NamedTuple

EPERM = "Operation not permitted"
EACCES = "Permission denied"
DENIED = "PermissionError"


class Hostile(NamedTuple):
    """A program, the status that it must get, and what its message must hold; ``{treasure}`` is a user's file."""

    source: str
    status: str
    message: str


LIBC = "import ctypes, os\nlibc = ctypes.CDLL(None, use_errno=True)\n"


def syscall(number: str, *arguments: str) -> str:
    """A program that makes a system call by its number and fails with what came of it."""
    given = ", ".join(f"ctypes.c_long({one})" for one in (number, *arguments))
    return f"{LIBC}done = libc.syscall({given})\nassert done == 0, os.strerror(ctypes.get_errno())"


PROGRAMS = {
    # processes
    "fork": Hostile("import os\nos.fork()", "failed", EPERM),
    "fork bomb": Hostile("import os\nwhile True:\n  try: os.fork()\n  except OSError: pass", "timed out", "more than"),
    "vfork": Hostile(LIBC + "assert libc.vfork() >= 0, os.strerror(ctypes.get_errno())", "failed", EPERM),
    "thread": Hostile("import threading\nthreading.Thread(target=print).start()", "failed", "can't start new thread"),
    "subprocess": Hostile("import subprocess\nsubprocess.run(['/bin/true'])", "failed", DENIED),
    "posix_spawn": Hostile("import os\nos.posix_spawn('/bin/true', ['true'], {{}})", "failed", DENIED),
    "system": Hostile("import os\nassert os.system('true') == 0, 'no shell'", "failed", "no shell"),
    "exec": Hostile("import os\nos.execv('/bin/true', ['true'])", "failed", EPERM),
    "daemon": Hostile("import os\nif os.fork() == 0:\n  os.setsid()\n  os.fork()", "failed", EPERM),
    "multiprocessing": Hostile("import multiprocessing as m\nm.Process(target=print).start()", "failed", DENIED),
    # memory and time
    "memory at once": Hostile("x = bytearray(1 << 44)", "out of memory", "MemoryError"),
    "memory in steps": Hostile("x = []\nwhile True: x.append(bytearray(1 << 20))", "out of memory", "MemoryError"),
    "memory in small pieces": Hostile("x = []\nwhile True: x.append([bytes(8000)])", "out of memory", "MemoryError"),
    "memory in depth": Hostile("x = None\nwhile True: x = (x, bytes(8000))", "out of memory", "MemoryError"),
    "memory mapped": Hostile(
        "import mmap\nx = [mmap.mmap(-1, 1 << 28) for _ in range(99)]", "failed", "Cannot allocate"
    ),
    "shared memory": Hostile(LIBC + "assert libc.shmget(0, 1 << 20, 0o1600) >= 0, 'none'", "failed", "none"),
    "memory file": Hostile("import os\nos.memfd_create('x')", "failed", EPERM),
    "higher limits": Hostile(
        "import resource as r\nr.setrlimit(r.RLIMIT_AS, (r.RLIM_INFINITY, r.RLIM_INFINITY))", "failed", "not allowed"
    ),
    "parent's limits": Hostile(
        "import os, resource as r\nr.prlimit(os.getppid(), r.RLIMIT_NOFILE, (3, 3))", "failed", EPERM
    ),
    "endless loop": Hostile("while True: pass", "timed out", "more than"),
    "catches all": Hostile(
        "while True:\n  try:\n    while True: pass\n  except BaseException: pass", "timed out", "more than"
    ),
    "ignores signals": Hostile(
        "import signal\nfor n in range(1, 64):\n  try: signal.signal(n, signal.SIG_IGN)\n"
        "  except (OSError, ValueError): pass\nwhile True: pass",
        "timed out",
        "more than",
    ),
    "alarm": Hostile(
        "import signal as s\ns.signal(s.SIGALRM, lambda *a: None)\ns.setitimer(s.ITIMER_REAL, .01, .01)\n"
        "while True: s.pause()",
        "timed out",
        "more than",
    ),
    "sleep": Hostile("import time\ntime.sleep(1000)", "timed out", "ran for more than"),
    "recursion": Hostile("def f(): f()\nf()", "failed", "RecursionError"),
    "deep recursion": Hostile(
        "import sys\nsys.setrecursionlimit(10**9)\nx = []\nfor _ in range(10**6): x = [x]\nrepr(x)", "any", ""
    ),
    "huge power": Hostile("x = 9 ** 9 ** 9", "any", ""),
    "long number": Hostile("print(10 ** 10000)", "failed", "ValueError"),
    "endless printing": Hostile("while True: print('x' * 1000)", "timed out", "more than"),
    "endless writing": Hostile("import os\nwhile True: os.write(1, b'x' * 10000)", "timed out", "more than"),
    # files
    "fills the disk": Hostile("f = open('big', 'wb')\nwhile True: f.write(bytes(1 << 20))", "failed", EPERM),
    "appends": Hostile("open({treasure!r}, 'a')", "failed", EPERM),
    "reads a user's file": Hostile("print(open({treasure!r}).read())\nassert False", "failed", EACCES),
    "reads through a link": Hostile("import os\nos.symlink({treasure!r}, 'link')", "failed", EPERM),
    "hard link": Hostile("import os\nos.link({treasure!r}, 'link')", "failed", EPERM),
    "removes": Hostile("import os\nos.remove({treasure!r})", "failed", EPERM),
    "removes a tree": Hostile("import os, shutil\nshutil.rmtree(os.path.dirname({treasure!r}))", "failed", DENIED),
    "renames": Hostile("import os\nos.rename({treasure!r}, {treasure!r} + '2')", "failed", EPERM),
    "truncates": Hostile("import os\nos.truncate({treasure!r}, 0)", "failed", EPERM),
    "changes rights": Hostile("import os\nos.chmod({treasure!r}, 0o777)", "failed", EPERM),
    "makes a folder": Hostile("import os\nos.mkdir('folder')", "failed", EPERM),
    "temporary file": Hostile("import tempfile\ntempfile.TemporaryFile()", "failed", ""),
    "passwords": Hostile("print(open('/etc/passwd').read())\nassert False", "failed", EACCES),
    "home": Hostile("import os\nprint(os.listdir('/root'), os.listdir('/home'))\nassert False", "failed", EACCES),
    "environment": Hostile("open('/proc/self/environ')", "failed", EACCES),
    "parent's memory": Hostile("import os\nopen(f'/proc/{{os.getppid()}}/mem', 'rb')", "failed", EACCES),
    "a disk": Hostile("import os\nos.mknod('disk', 0o060600, os.makedev(8, 0))", "failed", EPERM),
    # network
    "tcp": Hostile("import socket\nsocket.create_connection(('127.0.0.1', {port}), 1)", "failed", EPERM),
    "udp": Hostile("import socket\nsocket.socket(socket.AF_INET, socket.SOCK_DGRAM)", "failed", EPERM),
    "unix socket": Hostile("import socket\nsocket.socket(socket.AF_UNIX)", "failed", EPERM),
    "socket pair": Hostile("import socket\nsocket.socketpair()", "failed", EPERM),
    "netlink": Hostile("import socket\nsocket.socket(socket.AF_NETLINK, socket.SOCK_RAW)", "failed", EPERM),
    "name server": Hostile("import socket\nsocket.getaddrinfo('localhost.invalid', 80)", "failed", "gaierror"),
    "io_uring": Hostile(syscall("425", "8", "0"), "failed", EPERM),
    # other processes and the kernel
    "kills its parent": Hostile("import os\nos.kill(os.getppid(), 9)", "failed", EPERM),
    "kills all": Hostile("import os\nos.kill(-1, 9)", "failed", EPERM),
    "kills its group": Hostile("import os\nos.killpg(0, 9)", "failed", EPERM),
    "signals by a pipe": Hostile(
        "import fcntl, os\nfcntl.fcntl(os.pipe()[0], fcntl.F_SETOWN, os.getppid())", "failed", EPERM
    ),
    "itself": Hostile("import os\nos.kill(os.getpid(), 9)", "killed", "SIGKILL"),
    "aborts": Hostile("import os\nos.abort()", "killed", "SIGABRT"),
    "bad pointer": Hostile("import ctypes\nctypes.string_at(0)", "killed", "SIGSEGV"),
    "traces": Hostile(LIBC + "assert libc.ptrace(16, os.getppid(), 0, 0) == 0, 'no'", "failed", "no"),
    "another's memory": Hostile(
        LIBC + "assert libc.process_vm_readv(os.getppid(), 0, 0, 0, 0, 0) >= 0, 'no'", "failed", "no"
    ),
    "mounts": Hostile(LIBC + "assert libc.mount(b'x', b'/', b'tmpfs', 0, 0) == 0, 'no'", "failed", "no"),
    "name space": Hostile(LIBC + "assert libc.unshare(0x10000000) == 0, 'no'", "failed", "no"),
    "becomes another": Hostile("import os\nos.setuid(1)", "failed", EPERM),
    "new root": Hostile("import os\nos.chroot('/usr')", "failed", EPERM),
    "outlives its parent": Hostile(LIBC + "assert libc.prctl(1, 0) == 0, 'no'", "failed", "no"),
    # verdicts
    "exits": Hostile("import sys\nsys.exit(0)", "failed", "SystemExit"),
    "exits at once": Hostile("import os\nos._exit(0)", "failed", "before its tests"),
    "exits in the tests": Hostile("import os\ndef answer(): os._exit(0)", "failed", "before its tests"),
    "quits in the tests": Hostile("def answer(): raise SystemExit(0)", "failed", "SystemExit"),
    "prints a verdict": Hostile("print('passed')\nimport os\nos._exit(0)", "failed", "before its tests"),
    "writes to every descriptor": Hostile(
        "import os\nfor n in range(64):\n  try: os.write(n, b'passed' + bytes(3))\n  except OSError: pass\nos._exit(0)",
        "failed",
        "before its tests",
    ),
    "closes every descriptor": Hostile("import os\nos.closerange(0, 64)\nwhile True: pass", "failed", "tampered"),
    "closes and goes on": Hostile("import os\nos.closerange(0, 64)\ndef answer(): return 42", "failed", "exit status"),
    "spoils the tests": Hostile(
        "import builtins\nbuiltins.AssertionError = builtins.len = None\nbuiltins.isinstance = lambda *a: True",
        "failed",
        "NameError",
    ),
    "deletes the builtins": Hostile("import builtins\nbuiltins.__dict__.clear()", "failed", "NameError"),
    "spoils the reporter": Hostile(
        "import os, sys, json\nos._exit = os.write = os.read = json.dumps = sys.exit = lambda *a: None\n"
        "bytes = str = exec = compile = None",
        "failed",
        "NameError",
    ),
    "spoils unittest": Hostile(
        "import unittest\nunittest.TestCase.assertEqual = lambda *a: None", "failed", "NameError"
    ),
    "says that it is not confined": Hostile(
        "import os\nfor n in range(64):\n  try: os.write(n, b'unconfined: x')\n  except OSError: pass\nos._exit(1)",
        "failed",
        "before its tests",
    ),
    "an error whose trace exits": Hostile(
        "class E(Exception):\n  @property\n  def __traceback__(self): raise SystemExit\nraise E('no trace')",
        "failed",
        "no trace",
    ),
    "an error in the reporter": Hostile(
        "import os, sys\nos._exit = lambda *a: None\n"
        "def profile(frame, *a):\n  if frame.f_code.co_name == 'finish': raise SystemExit\n"
        "sys.setprofile(profile)\nraise KeyError",
        "failed",
        "exit status 1",
    ),
    "an error without words": Hostile(
        "class E(Exception):\n  def __str__(self): raise SystemExit\nraise E", "failed", "cannot be shown"
    ),
    "an error that lies": Hostile("raise Exception('\\0passed\\0')", "failed", "Exception"),
    "an error of great length": Hostile("raise Exception('x' * 10 ** 7)", "failed", "xxxx"),
    "odd characters": Hostile("print('\\udcff\\0')\nraise Exception('\\udcff')", "failed", "Exception"),
    "wrong": Hostile("def answer(): return 41", "failed", "AssertionError at: assert answer() == 42"),
    "no program": Hostile("def (", "failed", "SyntaxError"),
    "a null": Hostile("x = '\0'", "failed", ""),
}
"""Named; all are run together, with the tests ``assert answer() == 42``."""

FOREIGN_CALL = """
import ctypes, mmap
code = mmap.mmap(-1, 4096, prot=7)
code.write(bytes([0xB8, 20, 0, 0, 0, 0xCD, 0x80, 0xC3]))
ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(code)))()
"""
"""getpid as i386 numbers it, on x86-64."""
