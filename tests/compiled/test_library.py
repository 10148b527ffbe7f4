"""The compiled library: whether it is there, how it is built, and what is said where it is not."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path
from typing import Any

import pytest

from npu_zoo.compiled import build as building
from npu_zoo.compiled import library
from npu_zoo.core.config import EngineArgs
from npu_zoo.core.errors import HardwareError
from npu_zoo.dispatch import create_engine, resolve

needs_compiler = pytest.mark.skipif(
    library.find_compiler() is None or not library._has_wide_vectors(),
    reason="there is no C++ compiler, or no AVX-512",
)

needs_dot_products = pytest.mark.skipif(
    "avx512_bf16" not in library._processor().split(), reason="the emulated unit is for a library of bfloat16 products"
)
EMULATED_TILES = Path(__file__).with_name("emulated_tiles.h")
TESTS_OF_TILES = (
    *("tests/nn/test_compiled.py", "tests/nn/test_compiled_experts.py", "tests/nn/attention/test_compiled.py"),
    "tests/nn/attention/test_compiled_latent.py",
)


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


@pytest.fixture
def quick_builds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Builds that nobody waits long for, nor needs to be fast."""
    monkeypatch.setattr(building, "OPTIONS", tuple("-O1" if option == "-O3" else option for option in building.OPTIONS))


def linear_kernel() -> str:
    config = resolve(EngineArgs(model="deepseek_coder", hardware="cpu", dtype="bfloat16"))
    return next(choice.kernel for choice in config.kernels if choice.operation == "linear")


def passed_over() -> str:
    config = resolve(EngineArgs(model="deepseek_coder", hardware="cpu", dtype="bfloat16"))
    choice = next(choice for choice in config.kernels if choice.operation == "linear")
    return next(reason for reason in choice.passed_over if reason.startswith("compiled_linear"))


def test_without_a_build_other_kernels_serve_and_the_reason_names_the_command(empty_cache: Path) -> None:
    assert linear_kernel() == "cpu_linear"
    assert library.obstacle() in passed_over()


@needs_compiler
def test_the_reason_names_the_command_that_builds(empty_cache: Path) -> None:
    assert "not built" in passed_over()
    assert library.COMMAND in passed_over()


def test_a_processor_with_narrow_vectors_keeps_other_kernels(
    empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(library, "_processor", lambda: "x86_64\nflags\t\t: fpu sse2 avx avx2 fma")
    assert "AVX-512" in passed_over()
    assert not library.can_be_built()


def test_without_a_compiler_the_reason_says_so(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "_processor", lambda: "x86_64\nflags : avx512f avx512bw avx512vl")
    monkeypatch.setenv("PATH", str(empty_cache))
    monkeypatch.delenv("CXX", raising=False)
    assert "no C++ compiler" in library.obstacle()
    assert not library.can_be_built()
    assert not building.build_in_background()
    with pytest.raises(HardwareError, match=r"g\+\+"):
        building.build()


@needs_compiler
def test_a_build_is_used_and_not_repeated(empty_cache: Path, quick_builds: None) -> None:
    path = building.build()
    built = path.stat().st_mtime_ns
    assert library.obstacle() == ""
    assert linear_kernel() == "compiled_linear"
    assert building.build().stat().st_mtime_ns == built
    assert building.build(force=True).stat().st_mtime_ns > built
    assert [entry.name for entry in path.parent.iterdir()] == [library.NAME]


@needs_compiler
def test_a_failed_build_is_told_and_not_tried_again_by_itself(
    empty_cache: Path, quick_builds: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(building, "OPTIONS", ("--no-such-option",))
        with pytest.raises(HardwareError, match="no-such-option"):
            building.build()
    assert "failed" in library.obstacle()
    assert "no-such-option" in (library.library_folder() / library.FAILURE).read_text()
    assert not library.can_be_built()
    building.build(force=True)
    assert library.obstacle() == ""


@needs_compiler
def test_a_build_that_outlives_its_start_is_waited_for(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[subprocess.Popen[bytes]] = []
    genuine = subprocess.Popen

    def start(command: list[str], **options: Any) -> subprocess.Popen[bytes]:
        started.append(genuine([sys.executable, "-c", "import time; time.sleep(600)"], **options))
        return started[0]

    monkeypatch.setattr(building.subprocess, "Popen", start)
    assert building.build_in_background()
    process, pid = weakref.ref(started[0]), started.pop().pid
    try:
        gc.collect()
        running = process()
        assert running is not None
    finally:
        os.kill(pid, signal.SIGKILL)
    deadline = time.monotonic() + 60
    while running.returncode is None and time.monotonic() < deadline:  # nobody asks here: who waits tells
        time.sleep(0.01)
    assert running.returncode == -signal.SIGKILL


@needs_compiler
def test_the_first_engine_builds_in_the_background_and_does_not_wait(
    empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[list[str]] = []

    class Recorded(subprocess.Popen[bytes]):
        def __init__(self, command: list[str], **options: Any) -> None:
            started.append(command)
            super().__init__([sys.executable, "-c", ""], **options)

    monkeypatch.setattr(building.subprocess, "Popen", Recorded)
    config = resolve(EngineArgs(model="deepseek_coder", hardware="cpu", dtype="bfloat16"))
    assert any(library.COMMAND in note for note in config.notes)
    create_engine(config).shutdown()
    assert len(started) == 1
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(empty_cache))
    subprocess.run(started[0], check=True, cwd=Path(__file__).parents[2])
    assert library.obstacle() == ""


@needs_compiler
def test_the_library_has_no_threads_of_its_own(empty_cache: Path, quick_builds: None) -> None:
    """A second OpenMP beside torch's would be a second pool of threads that spin."""
    listed = subprocess.run(["ldd", str(building.build())], capture_output=True, text=True, check=True).stdout
    assert "libgomp" not in listed
    assert "libomp" not in listed


@needs_compiler
def test_it_runs_without_the_instructions_of_this_processor(tmp_path: Path, quick_builds: None) -> None:
    """Plain vectors alone give the products that this processor's instructions give, which test_compiled holds."""
    target = tmp_path / library.NAME
    plain = [option for option in building.OPTIONS if not option.startswith("-march")]
    compiler = library.find_compiler()
    assert compiler is not None
    subprocess.run([compiler, *plain, "-fopenmp", "-shared", *map(str, library.sources()), "-o", target], check=True)
    program = (
        "import ctypes, sys, torch\n"
        "library = ctypes.CDLL(sys.argv[1])\n"
        "assert library.zoo_start() == 0 and library.zoo_instructions() == 0\n"
        "from npu_zoo.nn.kernels.compiled import binding\n"
        "binding.load_library = lambda: library\n"
        "from npu_zoo.nn.kernels.compiled.linear import PanelLinear\n"
        "weight = torch.randn(50, 70).bfloat16()\n"
        "packed = PanelLinear.pack(weight)\n"
        "for rows in (1, 2, 3, 8, 17, 40):\n"
        "    x = torch.randn(rows, 70).bfloat16()\n"
        "    due = x.float() @ weight.float().T\n"
        "    assert (PanelLinear.apply(x, packed).float() - due).abs().max() < 2e-2 * due.abs().max(), rows\n"
        "from npu_zoo.nn.kernels.compiled.quantized import PanelInt4Linear, PanelInt8Linear\n"
        "from npu_zoo.nn.kernels.quantized import QuantizedWeight\n"
        "kernels, sizes = (PanelInt4Linear, PanelInt8Linear), ((128, 64), (96, 32))\n"
        "for kernel, inputs, group in [(kernel, *size) for kernel in kernels for size in sizes]:\n"
        "    codes, scale = torch.randint(-8, 8, (50, inputs), dtype=torch.int8), torch.rand(50, inputs // group)\n"
        "    packed = kernel.pack(QuantizedWeight(codes, scale, kernel.bits, torch.bfloat16))\n"
        "    weight = codes * scale.repeat_interleave(group, 1)\n"
        "    for rows in (1, 3, 40):\n"
        "        x = torch.randn(rows, inputs).bfloat16()\n"
        "        due = x.float() @ weight.T\n"
        "        assert (kernel.apply(x, packed).float() - due).abs().max() < 2e-2 * due.abs().max(), rows\n"
    )
    subprocess.run([sys.executable, "-c", program, str(target)], check=True, cwd=Path(__file__).parents[2])


@needs_compiler
@needs_dot_products
def test_what_is_written_for_a_matrix_unit_is_right_where_there_is_none(empty_cache: Path, quick_builds: None) -> None:
    """Kernels' own tests, on a library whose tiles are emulated; the real ones run where the processor has them."""
    compiler, target = library.find_compiler(), library.library_path()
    assert compiler is not None
    options = [*building.OPTIONS, "-fopenmp"]
    tiles = ["-D__AMX_TILE__", "-D__AMX_BF16__", "-D__AMX_INT8__", "-include", str(EMULATED_TILES)]
    target.parent.mkdir(parents=True)
    # What asks the system for the real unit is compiled without one.
    beginning, asks = [compiler, *options], target.with_name("library.o")
    subprocess.run([*beginning, "-c", str(library.SOURCES / "library.cpp"), "-o", asks], check=True)
    others = [str(source) for source in library.sources() if source.name != "library.cpp"]
    subprocess.run([*beginning, *tiles, "-shared", *others, asks, "-o", target], check=True)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *TESTS_OF_TILES]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stdout[-4000:]
    assert " passed" in done.stdout
