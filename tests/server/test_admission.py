"""The queue's bound, and what a single client may do."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from npu_zoo.protocol.errors import ApiError
from npu_zoo.server.admission import AdmissionQueue, ClientLimits


def refusal(queue: AdmissionQueue, count: int) -> ApiError:
    with pytest.raises(ApiError) as refused, queue.admit(count):
        pass
    return refused.value


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 4)), max_size=60), st.integers(1, 4), st.integers(0, 6))
def test_no_more_is_admitted_than_there_is_room_for(steps: list[tuple[bool, int]], running: int, waiting: int) -> None:
    queue = AdmissionQueue(running, waiting)
    held: list[tuple[int, contextlib.ExitStack]] = []
    for leave, count in steps:
        if leave and held:
            held.pop(0)[1].close()
        elif count <= running + waiting - sum(number for number, _ in held):
            held.append((count, contextlib.ExitStack()))
            held[-1][1].enter_context(queue.admit(count))
        else:
            error = refusal(queue, count)
            assert error.status == (400 if count > running + waiting else 429)
            assert error.status == 400 or 1 <= int(error.headers["Retry-After"]) <= 60
        assert queue.admitted == sum(number for number, _ in held)
    for _, stack in held:
        stack.close()
    assert queue.admitted == 0


def test_a_request_that_fails_leaves_its_place() -> None:
    queue = AdmissionQueue(1, 0)
    with pytest.raises(ZeroDivisionError), queue.admit(1):
        raise ZeroDivisionError
    assert queue.admitted == 0


def test_requests_at_once_are_counted_by_client() -> None:
    limits = ClientLimits(concurrency=2)
    with limits.request("a"), limits.request("a"), limits.request("b"):
        with pytest.raises(ApiError, match="2 requests of yours run") as refused, limits.request("a"):
            pass
        assert (refused.value.status, refused.value.code) == (429, "concurrency_limit_exceeded")
    with limits.request("a"):
        pass


def test_requests_a_minute_are_counted_by_client() -> None:
    limits = ClientLimits(rate=3)
    for client in "aaabbb":
        with limits.request(client):
            pass
    with pytest.raises(ApiError, match="3 requests a minute") as refused, limits.request("a"):
        pass
    assert (refused.value.status, refused.value.code) == (429, "rate_limit_exceeded")
    assert 1 <= int(refused.value.headers["Retry-After"]) <= 60
