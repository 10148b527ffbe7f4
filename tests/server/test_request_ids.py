from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from npu_zoo.server.request_ids import MAX_REQUEST_ID_LENGTH, request_id

MADE = re.compile(r"[0-9a-f]{32}")


@pytest.mark.parametrize("given", ["a", "7b0c-1", "trace:abc/def==", "user@host.1_2+3", "x" * MAX_REQUEST_ID_LENGTH])
def test_a_fit_id_is_kept(given: str) -> None:
    assert request_id(given) == given


@pytest.mark.parametrize(
    "given", [None, "", " ", "-a", "a b", "a\n", "a\r\nSet-Cookie: x", "é", "a\x00", "x" * (MAX_REQUEST_ID_LENGTH + 1)]
)
def test_another_is_replaced(given: str | None) -> None:
    assert MADE.fullmatch(request_id(given))


@given(st.text())
def test_an_id_can_go_into_a_header_and_a_log(text: str) -> None:
    found = request_id(text)
    assert found.isascii()
    assert found.isprintable()
    assert 0 < len(found) <= MAX_REQUEST_ID_LENGTH
    assert request_id(found) == found
