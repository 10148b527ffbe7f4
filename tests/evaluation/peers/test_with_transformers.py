"""npu-zoo beside the real transformers on the demo checkpoint: in this process, and by the command."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from npu_zoo.cli.app import run_app
from npu_zoo.cli.bench.compare_run import read_wanted
from npu_zoo.core.config import EngineArgs
from npu_zoo.core.errors import ConfigError, UsageError
from npu_zoo.dispatch import resolve
from npu_zoo.evaluation.machine import describe_machine
from npu_zoo.evaluation.peers import session
from npu_zoo.evaluation.peers.cases import CATALOGUE, Case
from npu_zoo.evaluation.peers.engines import InstalledEngine
from npu_zoo.evaluation.peers.preparation import (
    cache_notes,
    fitting_cases,
    load_options,
    ordinary_tokens,
    usable_cores,
)
from npu_zoo.evaluation.peers.result import ComparisonBody
from npu_zoo.evaluation.peers.worker.driver import make_driver
from npu_zoo.evaluation.record import Machine, read_record
from npu_zoo.evaluation.work import ModelWork

MODEL = "deepseek_coder"
CASE = Case("short", "short", "total", 5, (3, 40), (2, 9), static_batch=2)


@pytest.fixture(scope="module")
def args() -> EngineArgs:
    return EngineArgs(model=MODEL, dtype="float32", hardware="cpu", threads=1)


def test_both_drivers_give_the_same_tokens_in_any_batches(args: EngineArgs) -> None:
    config = resolve(args)
    engines = [InstalledEngine("npu-zoo"), InstalledEngine("transformers")]
    options = load_options(engines, args, config, [CASE])
    requests = CASE.requests(ordinary_tokens(config), 0)
    own, other = (make_driver(engine.name) for engine in engines)
    own.load(options["npu-zoo"])
    other.load(options["transformers"])
    runs = [own.run(requests), other.run(requests, 1), other.run(requests, CASE.static_batch)]
    assert runs[0].token_ids == runs[1].token_ids == runs[2].token_ids
    for run in runs:
        assert run.output_lengths == [request.max_tokens for request in requests]
        assert run.start < run.first_token <= run.all_started <= run.end
    alike = [requests[0], requests[0]]
    assert other.cache_bytes(alike) == ModelWork.of(config).cache_per_token
    assert own.cache_bytes(alike) >= ModelWork.of(config).cache_per_token


def test_cases_that_do_not_fit_are_left_out(args: EngineArgs) -> None:
    config = resolve(args.model_copy(update={"max_model_len": 200}))
    kept, skipped = fitting_cases([CATALOGUE["decode-1"], CATALOGUE["mixed"]], config)
    assert [case.name for case in kept] == ["decode-1"]
    assert skipped == {"mixed": "needs 640 tokens, and the model takes 200"}
    with pytest.raises(UsageError, match="no case fits: mixed needs 640 tokens"):
        fitting_cases([CATALOGUE["mixed"]], config)


@pytest.mark.parametrize(
    ("update", "told"),
    [
        (
            {"device": "npu"},
            {"memory": "resident memory, or that of a CUDA device, and weights are in that of an NPU"},
        ),
        ({"device": "cuda"}, {}),
        ({"world_size": 2}, dict.fromkeys(("memory", "cache"), "one process, and the model is split over 2")),
    ],
    ids=["on an NPU", "on a CUDA device", "split"],
)
def test_what_a_process_does_not_hold_is_not_measured(update: dict[str, Any], told: dict[str, str]) -> None:
    config: Any = SimpleNamespace(**{"max_model_len": 4096, "device": "cpu", "world_size": 1, **update})
    kept, skipped = fitting_cases([CATALOGUE[name] for name in ("memory", "cache", "start")], config)
    assert {name: reason.removeprefix("measures ") for name, reason in skipped.items()} == told
    assert [case.name for case in kept] == [name for name in ("memory", "cache", "start") if name not in told]


def test_a_large_batch_runs_at_once_unless_asked_otherwise(args: EngineArgs) -> None:
    config, engines = resolve(args), [InstalledEngine("npu-zoo")]
    cases = [Case("large", "large", "decode", 3000, (4, 4), (5, 5))]
    options = load_options(engines, args, config, cases)["npu-zoo"]
    assert (options.max_num_seqs, options.max_num_batched_tokens) == (3000, 3000)
    asked = args.model_copy(update={"max_num_seqs": 8, "max_num_batched_tokens": 128})
    options = load_options(engines, asked, resolve(asked), cases)["npu-zoo"]
    assert (options.max_num_seqs, options.max_num_batched_tokens) == (8, 128)


def test_our_own_driver_tells_preemptions(args: EngineArgs) -> None:
    room = 6 * 16 * ModelWork.of(resolve(args)).cache_per_token
    small = args.model_copy(update={"kv_cache_memory": room, "block_size": 16})
    case = Case("crowded", "crowded", "decode", 4, (8, 8), (40, 40))
    own = make_driver("npu-zoo")
    own.load(load_options([InstalledEngine("npu-zoo")], small, resolve(small), [case])["npu-zoo"])
    assert own.run(case.requests(100, 0)).preemptions > 0


def test_cases_that_may_not_fit_into_the_cache_are_named(args: EngineArgs) -> None:
    cases, config = [CATALOGUE["decode-1"], CATALOGUE["decode-8"]], resolve(args)
    room = ModelWork.of(config).cache_per_token * 1000
    (note,) = cache_notes(cases, config, room)
    assert "decode-8" in note
    assert "decode-1 " not in note
    assert cache_notes(cases, config, 3 * room) == []


def test_prompts_hold_no_special_tokens(args: EngineArgs) -> None:
    config = resolve(args)
    described = json.loads((Path(config.weights) / "tokenizer.json").read_text())
    added = {token["id"] for token in described["added_tokens"]}
    assert added
    assert ordinary_tokens(config) <= min(added)


def test_llama_cpp_wants_a_gguf_file(args: EngineArgs, tmp_path: Path) -> None:
    config, engines = resolve(args), [InstalledEngine("llama.cpp")]
    file = tmp_path / "model.gguf"
    for given, told in ((None, "give --gguf FILE"), (file, "cannot be read")):
        with pytest.raises(ConfigError, match=told):
            load_options(engines, args, config, [CASE], gguf=given)
    file.write_bytes(b"safe")
    with pytest.raises(ConfigError, match="is no GGUF file"):
        load_options(engines, args, config, [CASE], gguf=file)
    file.write_bytes(b"GGUF and more")
    assert load_options(engines, args, config, [CASE], gguf=file)["llama.cpp"].weights == str(file)


def test_more_threads_than_cores_are_refused() -> None:
    with pytest.raises(UsageError, match="--threads 4096: only"):
        usable_cores(4096)


def _measured(*_: Any, **__: Any) -> Machine:
    return describe_machine(threads=1).model_copy(update={"bandwidth": 1e10, "peak": 1e11})


def test_the_command_compares_and_keeps_a_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(session, "measure_apart", _measured)
    file = tmp_path / "record.json"
    command = ["bench", "compare", "--model", MODEL, "--hardware", "cpu"]
    command += ["--dtype", "float32", "--threads", "1", "--engines", "npu-zoo,transformers", "--rounds", "1"]
    assert run_app([*command, "--cases", "decode-1,prefill-1x2048", "--max-model-len", "512", "--json", str(file)]) == 0
    out, err = capfd.readouterr()
    assert "decode, batch 1" in out
    assert "Needed at least:" in out
    assert "prefill-1x2048 is left out: it needs 2,049 tokens" in out
    assert "greedy tokens of transformers are npu-zoo's in 1 of 1 cases' first requests" in out
    assert "4/4 decode, batch 1, round 1: transformers; 0 s left" in err
    record = read_record(file, "bench compare")
    body = ComparisonBody.model_validate(record.body)
    (case,) = body.cases
    assert set(case.rounds[0]) == {"npu-zoo", "transformers"}
    run = case.runs[0]["npu-zoo"]
    rate = (sum(run["output_lengths"]) - run["tokens_at_all_started"]) / (run["end"] - run["all_started"])
    assert case.rounds[0]["npu-zoo"] == pytest.approx(rate)
    assert record.figures["decode-1 npu-zoo tokens/s"] == pytest.approx(rate)
    assert record.model is not None
    assert record.model.family == MODEL
    assert record.machine is not None
    assert case.floor is not None
    assert case.work is not None
    assert case.floor == pytest.approx(case.work.tokens / (case.work.bytes / 1e10))


def _session(args: EngineArgs, names: list[str], **options: Any) -> session.Session:
    request, config = session.checked_request(args)
    engines = [InstalledEngine(name) for name in names]
    cases = [CATALOGUE["prefill-1x512"].scaled(64), CASE]
    return session.Session.prepare(request, config, engines, cases, **{"rounds": 1, **options})


def test_an_interrupted_comparison_goes_on(args: EngineArgs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "measure_apart", _measured)
    first = _session(args, ["npu-zoo"])
    running = first.run()
    next(running)
    record = first.record({})
    running.close()
    faster = {"bandwidth": 4e10, "peak": 1e10}
    monkeypatch.setattr(session, "measure_apart", lambda *_, **__: _measured().model_copy(update=faster))
    second = _session(args, ["npu-zoo"])
    second.resume(record)
    assert [result.name for result in second.run()] == [CASE.name]
    done = second.body.cases
    assert [case.name for case in done] == ["prefill-1x512", CASE.name]
    assert done[0].rounds == first.body.cases[0].rounds
    assert second.machine is not None
    assert (second.machine.bandwidth, second.machine.peak) == (4e10, 1e11), "the better of both measurements"
    for case in done:
        assert case.work is not None
        assert case.floor == pytest.approx(case.work.tokens / max(case.work.bytes / 4e10, case.work.operations / 1e11))


def test_a_case_that_is_run_again_has_its_place_and_what_is_noted_of_it(
    args: EngineArgs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "measure_apart", _measured)
    first = _session(args, ["npu-zoo"])
    assert [result.name for result in first.run()] == ["prefill-1x512", CASE.name]
    first.body.notes = ["of that day"]
    record = first.record({})
    del record.body["cases"][0]
    second = _session(args, ["npu-zoo"])
    second.body.notes = ["of that day", "of another"]
    second.resume(record)
    assert [result.name for result in second.run()] == ["prefill-1x512"]
    assert [case.name for case in second.body.cases] == ["prefill-1x512", CASE.name]
    assert second.body.notes == ["of that day", "of another"]


@pytest.mark.parametrize(
    ("update", "names", "options", "told"),
    [
        ({"dtype": "bfloat16"}, ["npu-zoo"], {}, "other model, other engines or how they are started,"),
        ({}, ["npu-zoo", "transformers"], {}, "other engines or how they are started,"),
        ({}, ["npu-zoo"], {"rounds": 2}, "other rounds,"),
    ],
    ids=["model", "engines", "rounds"],
)
def test_another_comparison_is_not_gone_on_with(
    update: dict[str, Any], names: list[str], options: dict[str, Any], told: str, args: EngineArgs
) -> None:
    earlier = _session(args, ["npu-zoo"])
    earlier.machine = _measured()
    with pytest.raises(UsageError, match=told):
        _session(args.model_copy(update=update), names, **options).resume(earlier.record({}))


def test_a_comparison_whose_cache_was_taken_as_it_was_used_is_not_gone_on_with(args: EngineArgs) -> None:
    earlier = _session(args, ["npu-zoo"])
    earlier.machine = _measured()
    record = earlier.record({})
    assert record.body["engines"][0].pop("lasting_settings") == {"prefault_kv_cache": True}
    with pytest.raises(UsageError, match="of other engines or how they are started,"):
        _session(args, ["npu-zoo"]).resume(record)


def test_a_file_of_another_kind_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "mine.json"
    file.write_text("{}")
    assert run_app(["bench", "compare", "--model", MODEL, "--json", str(file)]) == 2
    assert "is no record" in capsys.readouterr().err
    assert file.read_text() == "{}"


def test_pairs_of_lengths_are_prefill_and_decode(capsys: pytest.CaptureFixture[str]) -> None:
    found = read_wanted("[[8,4], [16,1]]", "[[1,2],[1]]")
    assert [(case.name, case.metric, case.count, case.prompt, case.output) for case in found] == [
        ("prefill-1x16", "prefill", 1, (16, 16), (1, 1)),
        ("prefill-1x8", "prefill", 1, (8, 8), (1, 1)),
        ("decode-1x8+4", "decode", 1, (8, 8), (4, 4)),
        ("prefill-2x8", "prefill", 2, (8, 8), (1, 1)),
        ("decode-2x8+4", "decode", 2, (8, 8), (4, 4)),
    ]
    assert "pairs are run from large to small" in capsys.readouterr().err
    with pytest.raises(UsageError, match="--batch 4 goes with pairs of lengths"):
        read_wanted("mixed", "4")
