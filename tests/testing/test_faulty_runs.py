"""Plugins whose code computes something else, hangs, or takes its process along: its own claims fail and no others."""

from __future__ import annotations

import itertools
import json
import signal as signals
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

pytestmark = pytest.mark.slow

FORGETFUL = """
from npu_zoo.nn.decoder import LlamaForCausalLM
from npu_zoo.nn.norm import RMSNorm


class Forgotten(RMSNorm):
    def forward(self, x, residual=None):
        total = x if residual is None else x + residual
        return total, total


class Model(LlamaForCausalLM):
    def __init__(self, config, context):
        super().__init__(config, context)
        for layer in self.model.layers.values():
            layer.post_attention_layernorm.__class__ = Forgotten
"""

WRONG_TOGETHER = """
from npu_zoo.nn.decoder import LlamaForCausalLM


class Model(LlamaForCausalLM):
    def __init__(self, config, context):
        super().__init__(config, context)
        self.factor = 1.5 if context.tp.size == 2 else 1.0

    def compute_logits(self, hidden):
        return super().compute_logits(hidden) * self.factor
"""

KERNELS = """
import torch


def inputs(rows, dtype, seed):
    return (torch.randn(rows, 8, generator=torch.Generator().manual_seed(seed)).to(dtype),)


def scale(x):
    return x * 2


def sloppy(x):
    return x * 2.1 if x.dtype is torch.float16 else x * 2


def undefined(x):
    return x * float("nan") if x.dtype is torch.float32 else x * 2
"""

MISCALCULATING = """
KERNELS = [
    kernel("{name}_reference", "{name}.kernels:scale", inputs="{name}.kernels:inputs"),
    kernel("{name}_sloppy", "{name}.kernels:sloppy", chip="cpu", priority=5),
    kernel("{name}_undefined", "{name}.kernels:undefined", chip="cpu", priority=6),
]
"""


def selected(*names: str) -> list[str]:
    return list(itertools.chain.from_iterable(("--plugin", name) for name in names))


@pytest.fixture(scope="module")
def computed(tmp_path_factory: pytest.TempPathFactory, install: Callable[..., None], validate: Callable) -> Any:
    site = tmp_path_factory.mktemp("site")
    install(site, "forgetful", model=FORGETFUL)
    install(site, "torn", "FAMILY = family({}, {'world_size': (2, 4)})", model=WRONG_TOGETHER)
    install(site, "miscalculating", MISCALCULATING, **{"kernels.py": KERNELS})
    return validate(site, *selected("forgetful", "torn", "miscalculating"), "--only")


def test_a_kernel_that_differs_in_one_dtype_fails_in_that_dtype(computed: Any) -> None:
    found = {(c["name"], c["claim"].split()[3]): c for c in computed.report["claims"] if c["axis"] == "dtype"}
    fails = {key: c["message"] for key, c in found.items() if c["name"].startswith("kernel") and c["status"] == "fails"}
    assert set(fails) == {
        ("kernel miscalculating_sloppy", "float16"),
        ("kernel miscalculating_undefined", "float32"),
    }
    assert "results differ by 0." in fails["kernel miscalculating_sloppy", "float16"]
    assert "is finite where the reference is not" in fails["kernel miscalculating_undefined", "float32"]
    assert found["kernel miscalculating_reference", "float16"]["status"] == "holds"


def test_a_forgotten_norm_fails_against_transformers_alone(computed: Any) -> None:
    (failure,) = computed.failures_of("forgetful")
    assert (failure["axis"], failure["name"]) == ("model", "LlamaForCausalLM, grouped heads")
    assert failure["claim"] == "gives the logits and tokens of transformers' LlamaForCausalLM"
    assert "the reference with" in failure["message"] or "logits differ by" in failure["message"]


def test_what_is_wrong_on_two_ranks_fails_there_alone(computed: Any) -> None:
    failures = computed.failures_of("torn")
    assert [(c["row"], c["axis"], c["claim"]) for c in failures] == [(2, "world_size", "runs in float32 paged tp2")]
    assert "log-probabilities differ by" in failures[0]["message"]
    held = [c["claim"] for c in computed.report["claims"] if c["plugin"] == "torn" and c["status"] == "holds"]
    assert "runs in float32 paged tp4" in held
    assert computed.code == 6


@pytest.mark.long
def test_the_sound_twin_passes(tmp_path: Path, install: Callable[..., None], validate: Callable) -> None:
    install(tmp_path, "sound", "FAMILY = family({'world_size': (1, 2)})")
    ran = validate(tmp_path, "--plugin", "sound")
    assert (ran.code, ran.failures, ran.report["complete"]) == (0, [], True), ran.out
    assert {c["level"] for c in ran.report["claims"]} == {"spec", "build", "run"}
    assert ran.report["counts"]["skipped"] == 0


ENDINGS = {
    "hanging": ("import time; time.sleep(600)", "it did not come back within 8 s, or ended its process with code 0"),
    "aborting": ("import os; os.abort()", "its process ended: SIGABRT"),
    "crashing": ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "its process ended: SIGSEGV"),
    "leaving": ("import sys; sys.exit(3)", "SystemExit: 3"),
    "interrupting": ("raise KeyboardInterrupt", "KeyboardInterrupt"),
    "swallowing": ("import torch; kept = [torch.empty(1 << 28) for _ in iter(int, 1)]", "RuntimeError: "),
    "speechless": (
        "raise type('Mute', (Exception,), {'__str__': lambda self: 1 / 0})()",
        "Mute: its own text cannot be made",
    ),
}
ENDING = """
from npu_zoo.nn.decoder import LlamaForCausalLM


class Model(LlamaForCausalLM):
    def forward(self, x, positions, context):
        {ending}
"""
NOT_OF_TRANSFORMERS = """
FAMILY = family(variants=(variant(architecture="OrchidForCausalLM"),), architectures=("OrchidForCausalLM",))
"""


@pytest.mark.long
def test_what_ends_its_process_fails_alone(tmp_path: Path, install: Callable[..., None], validate: Callable) -> None:
    for name, (ending, _) in ENDINGS.items():
        install(tmp_path, name, NOT_OF_TRANSFORMERS, model=ENDING.replace("{ending}", ending))
    install(tmp_path, "sound")
    (tmp_path / "tmp").mkdir()
    ran = validate(tmp_path, *selected(*ENDINGS, "sound"), "--only", "--timeout", "8", TMPDIR=str(tmp_path / "tmp"))
    assert ran.code == 6
    assert ran.report["complete"]
    for name, (_, message) in ENDINGS.items():
        (failure,) = ran.failures_of(name)
        assert (failure["row"], failure["axis"], failure["claim"]) == (1, "dtype", "runs in float32 paged")
        assert failure["message"].startswith(message)
    assert ran.failures_of("sound") == []
    assert list((tmp_path / "tmp").iterdir()) == []


HANGING = ENDING.replace("{ending}", "import os, time; open(os.environ['ARRIVED'], 'w').close(); time.sleep(600)")


@pytest.mark.parametrize("signal", ["SIGINT", "SIGKILL"])
def test_an_interrupted_validation_leaves_no_process_and_tells_what_it_knows(
    tmp_path: Path, install: Callable[..., None], site_environment: Callable[..., dict[str, str]], signal: str
) -> None:
    install(tmp_path, "hanging", NOT_OF_TRANSFORMERS, model=HANGING)
    arrived, report = tmp_path / "arrived", tmp_path / "report.json"
    command = [sys.executable, "-m", "npu_zoo", "validate", "--plugin", "hanging", "--jobs", "2", "--json", str(report)]
    environment = {**site_environment(tmp_path), "ARRIVED": str(arrived)}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    _wait_for(arrived)
    children = psutil.Process(process.pid).children(recursive=True)
    assert children
    process.send_signal(signals.Signals[signal])
    _, err = process.communicate(timeout=60)
    _, alive = psutil.wait_procs(children, timeout=10)
    assert alive == []
    if signal == "SIGINT":
        assert process.returncode == 130
        found = json.loads(report.read_text())
        assert found["complete"] is False
        assert len(found["claims"]) > 0
        assert not [claim for claim in found["claims"] if claim["status"] == "fails"]
        assert "interrupted: " in err


def _wait_for(file: Path) -> None:
    deadline = time.monotonic() + 60
    while not file.exists():
        assert time.monotonic() < deadline, f"{file.name} did not come"
        time.sleep(0.1)
