"""Which engines are named, and which are found in which environment."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from npu_zoo.core.errors import ConfigError, UsageError
from npu_zoo.evaluation.peers import engines
from npu_zoo.evaluation.peers.engines import (
    ENGINES,
    InstalledEngine,
    PeerEngine,
    find_engines,
    parse_interpreters,
    parse_names,
    probe,
)
from npu_zoo.evaluation.peers.worker.driver import DRIVERS


def test_every_engine_has_a_driver() -> None:
    assert set(ENGINES) == set(DRIVERS)


@pytest.mark.parametrize("text", ["npu-zoo,nosuch", "vllm,vllm", ","])
def test_names_that_are_none(text: str) -> None:
    with pytest.raises(UsageError, match="npu-zoo, transformers, vllm, llama"):
        parse_names(text)


def test_names_keep_their_order() -> None:
    assert parse_names("vllm, npu-zoo") == ["vllm", "npu-zoo"]


def test_interpreters() -> None:
    assert parse_interpreters([f"vllm={sys.executable}"]) == {"vllm": sys.executable}
    for pair in ("vllm", "vllm=", "vllm=/no/such/python"):
        with pytest.raises(UsageError, match="give NAME=PYTHON"):
            parse_interpreters([pair])


def test_an_interpreter_tells_versions_and_what_it_lacks() -> None:
    engine = PeerEngine("x", ("pydantic", "no_such_module"), ("pydantic", "no-such-package"), "how")
    found, missing = probe(engine)
    assert missing == ["no_such_module"]
    assert list(found.versions) == ["pydantic"]
    assert found.own


def test_what_is_no_interpreter_is_said() -> None:
    with pytest.raises(ConfigError, match="does not run as a Python interpreter for vllm"):
        probe(ENGINES["vllm"], "/bin/false")


@pytest.fixture
def only_own_and_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(engine: PeerEngine, python: str = sys.executable) -> tuple[InstalledEngine, list[str]]:
        there = engine.name in ("npu-zoo", "transformers") or python != sys.executable
        return InstalledEngine(engine.name, python), [] if there else list(engine.modules)

    monkeypatch.setattr(engines, "probe", answer)


@pytest.mark.usefixtures("only_own_and_transformers")
def test_unnamed_engines_that_are_missing_are_listed_with_how_to_install_them() -> None:
    found, missing = find_engines(None)
    assert [engine.name for engine in found] == ["npu-zoo", "transformers"]
    assert list(missing) == ["vllm", "llama.cpp"]
    assert "--engine-python vllm=" in missing["vllm"]
    assert "--gguf FILE" in missing["llama.cpp"]


@pytest.mark.usefixtures("only_own_and_transformers")
def test_a_named_engine_that_is_missing_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"vllm is not installed for .*: it lacks vllm; install vLLM"):
        find_engines(["npu-zoo", "vllm"])


@pytest.mark.usefixtures("only_own_and_transformers")
def test_each_engine_may_have_an_environment_of_its_own(tmp_path: Path) -> None:
    python = str(tmp_path / "python")
    found, missing = find_engines(None, {"vllm": python})
    assert [(engine.name, engine.python) for engine in found if not engine.own] == [("vllm", python)]
    assert list(missing) == ["llama.cpp"]
