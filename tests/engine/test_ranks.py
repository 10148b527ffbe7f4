"""Ranks in processes of their own give what one rank gives, and one that fails ends them all."""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from npu_zoo import LLM, SamplingParams
from npu_zoo.cli import main
from npu_zoo.core.config import EngineArgs, EngineConfig
from npu_zoo.core.errors import EngineError, WorkerError
from npu_zoo.core.parallel import Split
from npu_zoo.dispatch import resolve
from npu_zoo.registry import get_registry
from npu_zoo.testing.agreement import agree
from npu_zoo.testing.door import unchecked_config
from npu_zoo.testing.shapes import shareable_shape, write_random_model
from npu_zoo.testing.speculation import KnownTexts, draft_from

PROMPTS = [list(range(5, 45)), [7, 8, 9], list(range(30, 47))]


GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)


def config_of(family: str, split: Split | int, **options: Any) -> EngineConfig:
    split = Split(split) if isinstance(split, int) else split
    sizes = {
        "tensor_parallel_size": split.tp, "pipeline_parallel_size": split.pp, "expert_parallel_size": split.ep,
        "data_parallel_size": split.dp,
    }  # fmt: skip
    asked = {"model": f"{family}:demo", "hardware": "cpu", "dtype": "float32", "max_model_len": 128, **options}
    return resolve(EngineArgs(**asked, **sizes))


def tokens_of(llm: LLM) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in llm.generate(PROMPTS, GREEDY)]


def workers(llm: LLM) -> dict[int, int]:
    return dict(llm.engine.runner._workers.pids)  # type: ignore[attr-defined]


def gone(pid: int) -> bool:
    status = Path(f"/proc/{pid}/status")
    return not status.exists() or "State:\tZ" in status.read_text()


DENSE = [Split(2), Split(pp=2), Split(pp=3), Split(2, pp=2), Split(dp=2), Split(dp=2, pp=2)]
EXPERTS = [
    Split(2), Split(pp=2), Split(pp=3), Split(2, pp=2), Split(2, ep=2), Split(2, pp=2, ep=2), Split(dp=2, ep=2),
    Split(2, dp=2, ep=2), Split(2, dp=2, ep=4),
]  # fmt: skip


def check_splits(family: str, splits: list[Split]) -> None:
    with LLM.from_config(config_of(family, 1)) as one:
        due = tokens_of(one)
        for split in splits:
            with LLM.from_config(config_of(family, split)) as several:
                pids = workers(several)
                assert len(pids) == split.world_size - 1
                assert tokens_of(several) == due, split
                assert agree(one, several, PROMPTS).within(1e-3), split
            assert all(gone(pid) for pid in pids.values())


def test_ranks_are_one_model() -> None:
    """Stages are in the tests below, and those of two hosts in tests/parallel/test_two_hosts.py."""
    check_splits("deepseek_moe", [Split(2, dp=2, ep=4)])


@pytest.mark.long
@pytest.mark.parametrize(
    ("family", "splits"),
    [("deepseek_coder", DENSE), ("wizardcoder", DENSE), ("deepseek_moe", EXPERTS), ("deepseek_v3", EXPERTS)],
    ids=["deepseek_coder", "wizardcoder", "deepseek_moe", "deepseek_v3"],
)
def test_every_split_is_one_model(family: str, splits: list[Split]) -> None:
    check_splits(family, splits)


def wide_model(family: str, directory: Path) -> Path:
    """Random weights with heads and experts for four ranks, which the demos have not."""
    spec = get_registry().families[family]
    return write_random_model(directory, spec, shareable_shape(spec))


@pytest.mark.long
@pytest.mark.parametrize("family", ["deepseek_coder", "wizardcoder", "deepseek_moe", "deepseek_v3"])
def test_four_ranks_of_a_layer_are_one_model(family: str, tmp_path: Path) -> None:
    options = {
        "model": f"{family}:custom", "weights": str(wide_model(family, tmp_path / "weights")),
        "skip_tokenizer_init": True, "allow_experimental": True,
    }  # fmt: skip
    experts = [Split(4, ep=2), Split(4, ep=4)] if family in ("deepseek_moe", "deepseek_v3") else []
    with LLM.from_config(config_of(family, 1, **options)) as one:
        due = tokens_of(one)
    for split in [Split(2), Split(4), *experts]:
        with LLM.from_config(config_of(family, split, **options)) as several:
            assert tokens_of(several) == due, split


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"max_num_batched_tokens": 16, "max_num_seqs": 4}, id="chunks"),
        pytest.param({"attention": "flash"}, id="flash", marks=pytest.mark.long),
    ],
)
def test_two_ranks_in_other_ways(options: dict[str, Any]) -> None:
    one, two = config_of("deepseek_coder", 1, **options), config_of("deepseek_coder", 2, **options)
    with LLM.from_config(one) as whole, LLM.from_config(two) as ranks:
        assert agree(whole, ranks, PROMPTS).within(1e-3)
        assert agree(whole, ranks, PROMPTS[:1]).within(1e-3)  # from the prefix cache, where there is one


def test_completions_of_one_prompt_in_stages() -> None:
    prompt = [number % 90 + 5 for number in range(129)]  # two blocks, which both completions have, and one token more
    params = SamplingParams(temperature=0.8, n=2, seed=3, max_tokens=8, ignore_eos=True)
    found = []
    for split in (Split(), Split(pp=2)):
        with LLM.from_config(config_of("deepseek_coder", split, max_model_len=256)) as llm:
            outputs = llm.generate([prompt, prompt], params)
            found.append([completion.token_ids for output in outputs for completion in output.outputs])
    assert found[0] == found[1]


def test_ranks_end_with_an_engine_that_nobody_has() -> None:
    llm = LLM.from_config(config_of("deepseek_coder", 2))
    pids = workers(llm)
    del llm
    gc.collect()
    deadline = time.monotonic() + 10
    while not all(gone(pid) for pid in pids.values()) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert all(gone(pid) for pid in pids.values())


def test_an_engine_whose_first_rank_failed_takes_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    with LLM.from_config(config_of("deepseek_coder", 2)) as llm:
        pids = workers(llm)

        def fail(*arguments: object) -> None:
            raise MemoryError("no room")

        monkeypatch.setattr(llm.engine.runner, "_compute", fail)  # type: ignore[attr-defined]
        with pytest.raises(MemoryError):
            llm.generate(PROMPTS, GREEDY)
        assert all(gone(pid) for pid in pids.values())
        monkeypatch.undo()
        with pytest.raises(EngineError, match="not together after an earlier failure"):
            llm.generate(PROMPTS, GREEDY)


@pytest.fixture(scope="module")
def one_and_two() -> Iterator[tuple[LLM, LLM]]:
    """An engine of one rank, and one of two."""
    with LLM.from_config(config_of("deepseek_coder", 1)) as one, LLM.from_config(config_of("deepseek_coder", 2)) as two:
        yield one, two


def test_draws_do_not_depend_on_the_ranks(one_and_two: tuple[LLM, LLM]) -> None:
    params = SamplingParams(temperature=0.9, top_p=0.9, n=2, seed=5, max_tokens=12, ignore_eos=True)
    texts = [
        [completion.token_ids for output in llm.generate(PROMPTS, params) for completion in output.outputs]
        for llm in one_and_two
    ]
    assert texts[0] == texts[1]


@pytest.mark.parametrize("how", [pytest.param(signal.SIGKILL, marks=pytest.mark.long), signal.SIGSEGV])
def test_a_rank_that_dies_ends_the_run_with_its_name(how: signal.Signals) -> None:
    llm = LLM.from_config(config_of("deepseek_coder", 2))
    (pid,) = workers(llm).values()
    os.kill(pid, how)
    start = time.monotonic()
    with pytest.raises(WorkerError, match="rank 1"):
        llm.generate(PROMPTS, SamplingParams(max_tokens=50, ignore_eos=True))
    assert time.monotonic() - start < 10
    llm.shutdown()
    assert gone(pid)


def test_a_rank_that_cannot_start_is_named(tmp_path: Path) -> None:
    config = config_of("deepseek_coder", 2)
    broken = unchecked_config(config, model_class="npu_zoo.nowhere:Model")
    with pytest.raises(Exception, match=r"nowhere"):
        LLM.from_config(broken)


def test_ranks_share_the_weights(one_and_two: tuple[LLM, LLM]) -> None:
    whole, share = (llm.engine.explain() for llm in one_and_two)
    assert share["parameter_bytes"] < 0.54 * whole["parameter_bytes"]  # norms and the one key-value head are on both
    assert share["kv_cache_bytes"] <= whole["kv_cache_bytes"]


RUN = """
import sys
from npu_zoo.cli import main
from npu_zoo.parallel.processes import WorkerGroup
original = WorkerGroup.wait_ready
def tell(self, *arguments, **named):
    original(self, *arguments, **named)
    print(*self.pids.values(), flush=True)
WorkerGroup.wait_ready = tell
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    ("how", "code"),
    [
        (signal.SIGINT, 130),
        pytest.param(signal.SIGTERM, 143, marks=pytest.mark.long),
        pytest.param(signal.SIGKILL, -9, marks=pytest.mark.long),
    ],
)
def test_no_rank_outlives_the_command(how: signal.Signals, code: int) -> None:
    asked = ["run", "--model", "deepseek_coder", "--tp", "2", "--prompt", "x", "--max-tokens", "1900", "--ignore-eos"]
    process = subprocess.Popen(
        [sys.executable, "-c", RUN, *asked], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    assert process.stdout
    pid = int(process.stdout.readline())
    time.sleep(0.5)
    process.send_signal(how)
    assert process.wait(10) == code
    process.stdout.close()
    deadline = time.monotonic() + 5
    while not gone(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert gone(pid)


@pytest.mark.long  # `npu-zoo launch` in tests/parallel/test_two_hosts.py starts ranks in the same way
def test_ranks_that_torchrun_started(capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["run", "--model", "deepseek_coder", "--dtype", "float32", "--prompt", "def add(a, b):", "--json"]
    asked += ["--max-tokens", "8", "--ignore-eos"]
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [sys.executable, "-m", *launcher, "-m", "npu_zoo", *asked, "--tp", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert main(asked) == 0
    assert json.loads(done.stdout)["token_ids"] == json.loads(capsys.readouterr().out)["token_ids"]


@pytest.mark.parametrize(
    ("family", "split"),
    [("deepseek_coder", Split(2)), ("deepseek_coder", Split(pp=2)), ("deepseek_moe", Split(dp=2, ep=2))],
    ids=["tp", "pp", "dp"],
)
def test_drafts_are_verified_on_all_ranks(family: str, split: Split) -> None:
    prompts, params = [PROMPTS[0][:7] * 12, *PROMPTS], SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
    with LLM.from_config(config_of(family, 1)) as one:
        due = one.generate(prompts, params)
    drafts = {"speculative_method": "prompt_lookup", "adaptive_speculation": False}
    with LLM.from_config(config_of(family, split, **drafts)) as several:
        draft_from(several, KnownTexts([o.prompt_token_ids + o.outputs[0].token_ids for o in due], 0.8, 300))
        found = several.generate(prompts, params)
        assert [output.outputs[0].token_ids for output in found] == [output.outputs[0].token_ids for output in due]
        stats = several.engine.stats()
        assert 0 < stats.num_accepted_tokens < stats.num_draft_tokens
