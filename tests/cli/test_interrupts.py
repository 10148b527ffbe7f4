from __future__ import annotations

import os
import signal

import pytest

from npu_zoo.cli.interrupts import InterruptFlag, interrupt_flag, interrupt_guard


def press_ctrl_c() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def test_an_interrupt_waits_for_the_end_of_a_guarded_block() -> None:
    done = []

    def work() -> None:
        with interrupt_guard() as guard:
            with guard():
                press_ctrl_c()
                done.append("the block")
            done.append("after it")

    with pytest.raises(KeyboardInterrupt):
        work()
    assert done == ["the block"]


def test_outside_a_guarded_block_an_interrupt_comes_at_once() -> None:
    done = []

    def work() -> None:
        with interrupt_guard() as guard:
            with guard():
                done.append("the block")
            press_ctrl_c()
            done.append("after it")

    with pytest.raises(KeyboardInterrupt):
        work()
    assert done == ["the block"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_second_interrupt_is_not_held_back() -> None:
    seen = []

    def work() -> None:
        with interrupt_flag() as interrupted:
            press_ctrl_c()
            seen.append(interrupted())
            press_ctrl_c()

    with pytest.raises(KeyboardInterrupt):
        work()
    assert seen == [True]


def test_an_interrupt_ends_a_wait_at_once_and_is_remembered() -> None:
    seen = []

    def wait(interrupted: InterruptFlag) -> None:
        with interrupted.waiting():
            seen.append("the block")
            press_ctrl_c()
            seen.append("after it")

    with interrupt_flag() as interrupted:
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                wait(interrupted)
            assert interrupted()
    assert seen == ["the block"]


def test_after_a_wait_an_interrupt_is_a_flag_again() -> None:
    with interrupt_flag() as interrupted:
        with interrupted.waiting():
            pass
        press_ctrl_c()
        assert interrupted()
