"""Plugins that end or hang whatever loads them fail by themselves, before they can take a validation along."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from npu_zoo.registry import PLUGINS_VARIABLE
from npu_zoo.testing.validation.probing import unloadable_plugins, without_plugins

pytestmark = pytest.mark.slow


def test_plugins_that_end_or_hang_are_told_and_the_others_validated(
    tmp_path: Path, install: Callable[..., None], validate: Callable
) -> None:
    install(tmp_path, "sound")
    for name, source in {"leaving": "import os; os._exit(0)", "sleeping": "import time; time.sleep(600)"}.items():
        install(tmp_path, name)
        (tmp_path / name / "__init__.py").write_text(source)
    plugins = [argument for name in ("sound", "leaving", "sleeping") for argument in ("--plugin", name)]
    ran = validate(tmp_path, *plugins, "--level", "build", "--timeout", "10")
    assert ran.code == 6
    messages = {name: [failure["message"] for failure in ran.failures_of(name)] for name in ("leaving", "sleeping")}
    assert len(messages["leaving"]) == len(messages["sleeping"]) == 1
    assert "a process that loads it ends, with code 0" in messages["leaving"][0]
    assert "a process that loads it did not come back within 10 s" in messages["sleeping"][0]
    assert ran.failures_of("sound") == []
    assert [claim for claim in ran.report["claims"] if claim["plugin"] == "sound" and claim["level"] == "build"]


def test_built_in_plugins_are_not_probed_and_nothing_is_changed_without_need(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(PLUGINS_VARIABLE, raising=False)
    assert "native" not in unloadable_plugins(timeout=30)
    with without_plugins([]):
        assert PLUGINS_VARIABLE not in os.environ
    with without_plugins(["gone"]):
        assert "gone" not in os.environ[PLUGINS_VARIABLE].split(",")
    assert PLUGINS_VARIABLE not in os.environ
