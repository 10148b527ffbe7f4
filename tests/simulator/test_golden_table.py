from __future__ import annotations

from pathlib import Path

import pytest

from npu_zoo.simulator.golden import GOLDEN, Fitted, golden, load_golden

TESTS = "\n".join(path.read_text() for path in (Path(__file__).parent.parent / "npu").glob("*.py"))


def base_names() -> list[str]:
    return sorted({name.split("::")[1].split(".")[0] for name in load_golden()})


@pytest.mark.parametrize("name", base_names())
def test_every_operator_is_held_against_an_independent_formula(name: str) -> None:
    assert name in TESTS


def test_what_cannot_run_its_kernel_says_why() -> None:
    for name, entry in load_golden().items():
        assert entry.native == (not entry.reason), name


def test_two_semantics_for_one_operator_are_refused() -> None:
    taken = next(iter(load_golden()))
    with pytest.raises(ValueError, match="golden semantics already"):
        golden(taken)(lambda: None)
    with pytest.raises(ValueError, match="reason"):
        golden("npu::nothing", native=False)
    assert "npu::nothing" not in GOLDEN


def test_a_result_of_open_size_fits_its_output() -> None:
    import torch

    short, long = torch.tensor([1, 2]), torch.tensor([3, 4, 5])
    for size, expected in ((3, [3, 4, 5]), (2, [1, 2]), (4, [1, 2, 0, 0]), (1, [1])):
        output = torch.full((size,), 9)
        Fitted(short, None, long).write(output)
        assert output.tolist() == expected
