"""API keys from a file and the environment."""

from __future__ import annotations

from pathlib import Path

import pytest

from npu_zoo.core.errors import ConfigError
from npu_zoo.protocol.errors import ApiError
from npu_zoo.server.keys import ApiKeys


def test_without_keys_everybody_is_served() -> None:
    keys = ApiKeys.load(None, {})
    assert not keys
    assert keys.check(None) is keys.check("Bearer anything") is None


def test_keys_of_a_file_and_of_the_environment(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# ours\nfirst\n\n  second  \n")
    keys = ApiKeys.load(file, {"NPU_ZOO_API_KEY": "third"})
    owners = {keys.check(f"Bearer {key}") for key in ("first", "second", "third")}
    assert len(owners) == 3
    assert keys.check("bearer first") in owners
    assert not any(key in str(owners) for key in ("first", "second", "third"))


@pytest.mark.parametrize("header", [None, "", "first", "Basic first", "Bearer", "Bearer fir", "Bearer firs\ud800t"])
def test_what_is_no_key_is_refused(header: str | None) -> None:
    with pytest.raises(ApiError, match="the API key") as refused:
        ApiKeys(["first"]).check(header)
    assert (refused.value.status, refused.value.code) == (401, "invalid_api_key")
    assert "first" not in str(refused.value)


@pytest.mark.parametrize(("content", "said"), [("# none\n", "holds no API key"), (None, "cannot read")])
def test_a_file_without_keys_is_refused(tmp_path: Path, content: str | None, said: str) -> None:
    file = tmp_path / "keys"
    if content is not None:
        file.write_text(content)
    with pytest.raises(ConfigError, match=said):
        ApiKeys.load(file, {})


@pytest.mark.parametrize("key", ["schlüssel", "a\tb", "k\x07"])
def test_a_key_that_no_header_can_hold_is_refused(tmp_path: Path, key: str) -> None:
    file = tmp_path / "keys"
    file.write_text(f"# ours\n\ngood\n{key}\n")
    with pytest.raises(ConfigError, match="line 4 of") as refused:
        ApiKeys.load(file, {})
    assert key not in str(refused.value)
    with pytest.raises(ConfigError, match="NPU_ZOO_API_KEY"):
        ApiKeys.load(None, {"NPU_ZOO_API_KEY": key})
