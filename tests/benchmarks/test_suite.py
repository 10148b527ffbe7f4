"""What engine.py runs of a shape, and how its command line is read."""

from __future__ import annotations

from pathlib import Path

import engine
import pytest
from harness import suite
from harness.shapes import SHAPES
from harness.suite import CASES, GROUPS, Setting, _compare, _overrides, parse_fewer, prepare

from npu_zoo.core.config import EngineArgs
from npu_zoo.core.errors import UsageError
from npu_zoo.evaluation.peers.engines import InstalledEngine
from npu_zoo.evaluation.peers.process import PeerError
from npu_zoo.evaluation.peers.result import EngineEntry

ENGINES = [InstalledEngine(name) for name in ("npu-zoo", "transformers", "vllm", "llama.cpp")]


def test_quantized_weights_are_compared_with_llama_cpp_at_batch_one() -> None:
    for name, gguf in (("w8a16", "q8_0"), ("w4a16", "q4_0"), ("w4a16-groups", "q4_0")):
        group = GROUPS[name]
        assert group.cases(CASES) == ["decode-1"]
        assert [found.name for found in group.engines(ENGINES)] == ["npu-zoo", "llama.cpp"]
        assert group.gguf == gguf
        assert engine.record_file(Path("folder"), "1.3b", group) == Path(f"folder/1.3b-{name}.json")


def test_a_start_that_packs_its_weights_has_a_record_of_its_own() -> None:
    group = GROUPS["unpacked"]
    assert group.cases(CASES) == ["start"]
    assert [found.name for found in group.engines(ENGINES)] == ["npu-zoo", "llama.cpp"]
    assert engine.record_file(Path("folder"), "1.3b", group) == Path("folder/1.3b-unpacked.json")


def test_plain_weights_have_every_case_and_engine() -> None:
    assert engine.record_file(Path("folder"), "1.3b", GROUPS["plain"]) == Path("folder/1.3b.json")
    assert GROUPS["plain"].cases(CASES) == list(CASES)
    assert GROUPS["plain"].engines(ENGINES) == ENGINES


class Asked(Exception):
    """Ends a preparation where npu-zoo is asked whether it takes the request."""


def test_groups_are_run_on_the_weights_that_they_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []
    monkeypatch.setattr(suite, "_call", commands.append)
    monkeypatch.setattr(suite, "checkpoint_of", lambda root, shape: root / "plain")

    def end(args: EngineArgs) -> None:
        raise Asked(Path(args.weights or "").name, args.packed_weights)

    monkeypatch.setattr(suite, "checked_request", end)
    asked = {}
    for name, group in GROUPS.items():
        with pytest.raises(Asked) as found:
            prepare(Setting(tmp_path, tuple(ENGINES[:1])), SHAPES["tiny"], group, [])
        asked[name] = found.value.args
    assert asked == {
        "plain": ("plain", "keep"),
        "unpacked": ("plain", "off"),
        "w8a16": ("plain-w8a16", "keep"),
        "w4a16": ("plain-w4a16", "keep"),
        "w4a16-groups": ("plain-w4a16-groups", "keep"),
    }
    assert [command[command.index("--quantize") + 1 :] for command in commands] == [
        ["w8a16"],
        ["w4a16"],
        ["w4a16", "--group-size", "32"],
    ]


def test_what_a_group_cannot_be_run_without_is_named() -> None:
    both = (InstalledEngine("npu-zoo"), InstalledEngine("llama.cpp", "python"))
    here, there = Setting(Path("work"), both), Setting(Path("work"), both, hardware="cuda")
    assert engine._missing(here, GROUPS["unpacked"], ["start"]) == ""
    assert engine._missing(there, GROUPS["unpacked"], ["start"]) == "weights are packed on CPUs alone"
    assert engine._missing(there, GROUPS["w8a16"], ["decode-1"]) == ""
    assert engine._missing(here, GROUPS["w8a16"], []) == "it has no case that was asked for"
    alone = Setting(Path("work"), both[:1])
    assert engine._missing(alone, GROUPS["plain"], ["start"]) == ""
    assert engine._missing(alone, GROUPS["w8a16"], ["decode-1"]) == "llama.cpp is not there"


@pytest.mark.parametrize(("shape", "trusted"), [("1.3b", False), ("moe-1b", True), ("mla-1b", False)])
def test_only_a_checkpoint_with_its_own_config_class_is_trusted(shape: str, trusted: bool, tmp_path: Path) -> None:
    if trusted:
        (tmp_path / "reference").mkdir()
    found = _overrides(SHAPES[shape], tmp_path, ENGINES, "grouped_mm")
    assert found["vllm"]["settings"] == ({"trust_remote_code": True} if trusted else {})
    assert found["transformers"]["weights"] == str(tmp_path / "reference" if trusted else tmp_path)
    settings = {"experts_implementation": "grouped_mm"} if SHAPES[shape].experts else {}
    assert found["transformers"]["settings"] == settings


def test_rounds_of_a_peer_are_read() -> None:
    assert parse_fewer(["vllm:start=1", "llama.cpp:mixed=2"]) == {("vllm", "start"): 1, ("llama.cpp", "mixed"): 2}


@pytest.mark.parametrize("text", ["vllm=1", "vllm:nosuch=1", "vllm:start", "vllm:start=0", "vllm:start=x"])
def test_a_mistake_in_rounds_is_named(text: str) -> None:
    with pytest.raises(UsageError, match=r"give ENGINE:CASE=ROUNDS"):
        parse_fewer([text])


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--cases", "decode-1,nosuch"], "no case nosuch; there are decode-1"),
        (["--groups", "w2"], "no group w2; there are plain"),
        (["--engines", "nosuch"], "no engine 'nosuch'"),
        (["--rounds", "0"], "at least 1"),
    ],
)
def test_a_mistake_is_named(arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        engine.parse_arguments(arguments)
    assert told in capsys.readouterr().err


def test_the_interpreter_of_llama_cpp_makes_its_files() -> None:
    setting = Setting(Path("work"), (InstalledEngine("npu-zoo"), InstalledEngine("llama.cpp", "/somewhere/python")))
    assert setting.llama_python == "/somewhere/python"
    assert Setting(Path("work"), (InstalledEngine("npu-zoo"),)).llama_python is None


def test_a_record_does_not_say_where_things_lie() -> None:
    options = {"weights": "/work/1.3b.gguf", "settings": {"weights": "/work/1.3b"}, "threads": 2}
    entry = EngineEntry(name="vllm", python="/somewhere/bin/python", versions={}, options=options)
    found = engine._without_places(entry, Path("/work"))
    assert found.python == "python"
    assert found.options == {"weights": "1.3b.gguf", "settings": {"weights": "1.3b"}, "threads": 2}


def test_each_form_of_each_checkpoint_has_a_file_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    called: list[list[str]] = []
    monkeypatch.setattr(suite, "_call", called.append)
    names = ("1.3b-bfloat16-v2", "1.5b-bfloat16-v2")
    found = [suite._gguf(tmp_path / name, scheme, "python") for name in names for scheme in ("", "q8_0", "q4_0")]
    assert len(set(found)) == len(found)
    assert found[0].name == "1.3b-bfloat16-v2.gguf"
    assert called[2][2:] == [str(found[0]), str(found[1]), "--quantize", "q8_0"]


def test_an_engine_whose_tokens_are_others_is_refused() -> None:
    own = [[1, 2], [3, 4], [5, 6], [7, 8]]
    assert _compare("vllm", [*own[:3], [7, 9]], own).equal == 3
    with pytest.raises(PeerError, match="greedy tokens of vllm differ in 2 of 4"):
        _compare("vllm", [[0, 0], [0, 0], *own[2:]], own)
