from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

PRODUCT = os.environ.get("NPU_ZOO_SIMULATE", "")


def run(*arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "NPU_ZOO_SIMULATE": PRODUCT, **environ},
        capture_output=True,
        text=True,
        check=False,
    )


def test_commands_without_torch_stay_without_it() -> None:
    done = run("-X", "importtime", "-m", "npu_zoo", "list")
    assert done.returncode == 0, done.stderr
    assert "deepseek_coder" in done.stdout
    assert not [line for line in done.stderr.splitlines() if line.split("|")[-1].strip() in ("torch", "torch_npu")]


def test_a_model_runs_beside_the_simulated_device() -> None:
    done = run("-m", "npu_zoo", "run", "--model", "deepseek_coder", "--hardware", "cpu", "--prompt", "def add(a, b):",
               "--max-tokens", "4", "--temperature", "0")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_the_library_brings_the_device() -> None:
    done = run("-c", "from npu_zoo import LLM; import torch; print(torch.npu.device_count(), torch.ones(2).npu() + 1)")
    assert done.stdout.startswith("8 tensor([2., 2.], device='npu:0')"), done.stderr


def test_a_script_runs_and_reports(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("import sys, torch\nprint(sys.argv[1:], (torch.ones(2, device='npu') + 1).tolist())\n")
    done = run("-m", "npu_zoo.simulator", PRODUCT, str(script), "--flag")
    assert done.stdout == "['--flag'] [2.0, 2.0]\n"
    assert f"simulated {PRODUCT}: 2 operator launches" in done.stderr
    target = tmp_path / "report.json"
    done = run("-m", "npu_zoo.simulator", PRODUCT, str(script), NPU_ZOO_SIMULATE_REPORT=str(target))
    assert json.loads(target.read_text())["launches"] == {"aclnnAdds": 1, "aclnnInplaceOne": 1}


def test_devices_and_memory_are_chosen() -> None:
    done = run("-c", "import npu_zoo; npu_zoo.simulate(); import torch; print(torch.npu.device_count(), "
               "torch.npu.mem_get_info()[1])",
               NPU_ZOO_SIMULATE_DEVICES="2", NPU_ZOO_SIMULATE_MEMORY_GIB="0.5")  # fmt: skip
    assert done.stdout.strip() == f"2 {1 << 29}", done.stderr


def test_the_python_of_the_page_runs() -> None:
    page = (Path(__file__).parents[2] / "docs" / "simulator.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    if "310" in PRODUCT or "300i" in PRODUCT:
        block = block.replace("bfloat16", "float16")
    done = run("-c", block.replace("atlas_800i_a2", PRODUCT))
    assert done.returncode == 0, done.stderr
    assert "1  aclnnRmsNorm" in done.stdout


def test_a_model_runs_on_the_simulated_device_and_no_speed_is_printed() -> None:
    done = run("-m", "npu_zoo", "run", "--model", "deepseek_coder", "--hardware", PRODUCT, "--prompt", "def add(a, b):",
               "--max-tokens", "4", "--temperature", "0")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    assert "4 tokens on a simulated device, whose speed says nothing" in done.stderr
    assert "tokens/s" not in done.stderr


def test_launches_are_explained_for_a_model_that_is_not_here() -> None:
    duo = PRODUCT == "atlas_300i_duo"
    model = "deepseek_coder:6.7b" if duo else "deepseek_coder:33b"
    done = run("-m", "npu_zoo", "explain", "--model", model, "--hardware", PRODUCT, "--simulate", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["simulated"]
    heads = "16 heads, 16 for" if duo else "14 heads, 2 for"
    assert heads in found["shape"]
    assert found["graph"]["replays"] == found["graph"]["copies_back"] == 1
    assert found["eager"]["replays"] == 0
    assert found["eager"]["launches"]["aclnnAddRmsNorm"] == 4


def test_launches_of_the_demo_are_shown() -> None:
    done = run("-m", "npu_zoo", "explain", "--model", "deepseek_coder", "--hardware", PRODUCT, "--simulate",
               "--speculative-method", "prompt_lookup")  # fmt: skip
    assert done.returncode == 0, done.stderr
    shown = " ".join(done.stdout.split())
    assert "from a captured graph: 2 launches, 1 copy to the host" in shown
    assert "3 of each sequence: 2 launches, 0.125 to 0.5 a token, as all or none are right; without 0.5" in shown
    assert re.search(r"^8 +aclnnAddRmsNorm +a norm with the addition", done.stdout, re.MULTILINE)


def test_another_product_than_the_simulated_one_is_refused() -> None:
    other = "atlas_300i_duo" if PRODUCT != "atlas_300i_duo" else "atlas_800i_a2"
    done = run("-m", "npu_zoo", "explain", "--model", "wizardcoder", "--hardware", other, "--simulate")
    assert done.returncode == 4
    assert f"NPU_ZOO_SIMULATE={PRODUCT} is simulated, and {other} was asked for" in done.stderr
