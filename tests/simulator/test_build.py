from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from npu_zoo.simulator import build
from npu_zoo.simulator.build import Needs, needs_of
from npu_zoo.simulator.elf import read_library
from npu_zoo.simulator.errors import SimulatorError, Unavailable

WHEELS_VARIABLE = "TORCH_NPU_WHEELS"
NEEDS = Needs(
    libraries=frozenset({"libascendcl.so", "libhccl.so", "libge_runner.so"}),
    symbols=frozenset({"aclrtMalloc", "aclNeverHeardOf", "HcclCommInitAll"}),
    operators=frozenset({"aclnnAdd", "aclnnNewKernel"}),
)


@pytest.fixture(scope="module")
def stub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("built") / "stub"
    try:
        build.build(NEEDS, folder)
    except Unavailable as error:
        pytest.skip(str(error))
    return folder


def test_every_library_is_built_under_its_own_name(stub: Path) -> None:
    assert {path.name for path in stub.glob("*.so")} == NEEDS.libraries | {"libopapi.so", "libnnopbase.so"}
    assert "libascendcl.so" in read_library(stub / "libhccl.so").needed


def load(stub: Path, script: str) -> str:
    prelude = f"import ctypes\nlib = ctypes.CDLL({str(stub / 'libascendcl.so')!r}, ctypes.RTLD_GLOBAL)\n"
    prelude += "lib.aclGetRecentErrMsg.restype = ctypes.c_char_p\n"
    done = subprocess.run([sys.executable, "-c", prelude + script], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_an_unknown_function_fails_by_name(stub: Path) -> None:
    found = load(stub, "print(lib.HcclCommInitAll(), lib.aclGetRecentErrMsg().decode())")
    assert found == "207000 HcclCommInitAll: not part of the simulated Ascend runtime"


def test_a_launch_outside_of_golden_semantics_fails_by_name(stub: Path) -> None:
    script = f"ops = ctypes.CDLL({str(stub / 'libopapi.so')!r})\n"
    script += "print(ops.aclnnNewKernel(), lib.aclGetRecentErrMsg().decode())\n"
    script += "lib.sim_enter(); print(ops.aclnnNewKernel()); lib.sim_leave(); print(ops.aclnnAdd())"
    lines = load(stub, script).splitlines()
    assert lines[0].endswith("aclnnNewKernel: the simulated Ascend runtime has no semantics for it")
    assert lines[1] == "0"
    assert lines[2] != "0"


MEMORY = """
lib.sim_configure(b'Ascend910B4', 2, ctypes.c_uint64(1 << 20), ctypes.c_int64(1), ctypes.c_int64(1), ctypes.c_int64(1))
def malloc(size):
    p = ctypes.c_void_p()
    return lib.aclrtMalloc(ctypes.byref(p), ctypes.c_size_t(size), 0), p
"""


def test_memory_is_bounded_reused_and_checked(stub: Path) -> None:
    script = """
codes = [malloc(1 << 18) for _ in range(5)]
print([code for code, _ in codes])
print([lib.aclrtFree(p) for _, p in codes[1:3]], lib.aclrtFree(codes[1][1]))
print(malloc(1 << 19)[0], malloc(1)[0], malloc(0)[0])
lib.aclrtSetDevice(1); print(malloc(1 << 20)[0], lib.aclrtSetDevice(2))
"""
    assert load(stub, MEMORY + script).splitlines() == [
        "[0, 0, 0, 0, 207001]",
        "[0, 0] 107000",
        "0 207001 107000",
        "0 107000",
    ]


def test_copies_are_checked(stub: Path) -> None:
    script = """
_, d = malloc(64); host = ctypes.create_string_buffer(b'x' * 64)
c = lambda to, room, source, size, kind: lib.aclrtMemcpy(to, ctypes.c_size_t(room), source, ctypes.c_size_t(size), kind)
print(c(d, 64, host, 64, 1), c(d, 64, host, 64, 2), c(d, 32, host, 64, 1), c(host, 64, d, 64, 2))
"""
    assert load(stub, MEMORY + script) == "0 107000 107000 0"


def test_a_compiler_that_fails_is_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "broken-cc"
    broken.write_text("#!/bin/sh\necho no such luck >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CC", str(broken))
    with pytest.raises(SimulatorError, match="no such luck"):
        build.build(NEEDS, tmp_path / "out")


def test_a_missing_compiler_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    with pytest.raises(Unavailable, match="C compiler"):
        build.compiler()


def test_a_file_that_is_no_library_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.so").write_bytes(b"text")
    with pytest.raises(ValueError, match="ELF"):
        read_library(tmp_path / "x.so")
    with pytest.raises(SimulatorError, match="no libraries"):
        needs_of(tmp_path)


def test_the_stub_is_built_once_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stub: Path) -> None:
    package = tmp_path / "torch_npu"
    (package / "lib").mkdir(parents=True)
    (package / "lib" / "libtorch_npu.so").write_bytes((stub / "libhccl.so").read_bytes())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    first = build.stub_folder(package)
    stamp = (first / "libascendcl.so").stat().st_mtime_ns
    assert build.stub_folder(package) == first
    assert (first / "libascendcl.so").stat().st_mtime_ns == stamp
    os.utime(package / "lib" / "libtorch_npu.so", ns=(1, 1))
    assert build.stub_folder(package) != first
    assert not list((tmp_path / "cache").rglob("building-*"))


def wheels() -> list[Path]:
    folder = os.environ.get(WHEELS_VARIABLE)
    return sorted(Path(folder).iterdir()) if folder else []


@pytest.mark.skipif(not wheels(), reason=f"{WHEELS_VARIABLE} is unset: it names the folder with unpacked wheels")
@pytest.mark.parametrize("package", wheels(), ids=lambda path: path.name)
def test_releases_get_every_symbol_they_need(package: Path, tmp_path: Path) -> None:
    needs = needs_of(package / "torch_npu")
    assert {"libascendcl.so", "libhccl.so", "libatb.so"} <= needs.libraries
    assert {"aclnnAdd", "aclnnRmsNorm", "aclnnFusedInferAttentionScoreV3"} <= needs.operators
    build.build(needs, tmp_path / "stub")
    script = (
        "import ctypes, sys\nfrom pathlib import Path\nfrom npu_zoo.simulator.build import load_order\n"
        "folder = Path(sys.argv[1])\n"
        "libraries = [ctypes.CDLL(str(path), ctypes.RTLD_GLOBAL) for path in load_order(folder)]\n"
        "missing = [n for n in sys.argv[2].split() if not hasattr(libraries[0], n)]\n"
        "missing += [n for n in sys.argv[3].split() if not hasattr(libraries[1], n)]\n"
        "print(len(libraries), missing)"
    )
    arguments = [str(tmp_path / "stub"), " ".join(needs.symbols), " ".join(needs.operators)]
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == f"{len(needs.libraries | {'libopapi.so', 'libnnopbase.so'})} []", done.stderr
