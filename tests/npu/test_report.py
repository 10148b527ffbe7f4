from __future__ import annotations

import json

import torch
import torch_npu

from npu_zoo.simulator.report import measure


def test_launches_copies_and_waits_are_counted() -> None:
    x = torch.randn(8, 8)
    with measure() as report:
        y = torch_npu.npu_rms_norm(x.npu() @ x.npu(), torch.ones(8, device="npu"))[0]
        y.cpu()
    assert report.launches == {"aclnnMatmul": 1, "aclnnInplaceOne": 1, "aclnnRmsNorm": 1}
    assert report.copies["host_to_device"] == (2, 512)
    assert report.copies["device_to_host"] == (1, 256)
    assert report.synchronisations == 3
    assert report.num_launches == 3
    assert report.cpu_fallbacks == {}


def test_hidden_launches_show() -> None:
    x = torch.randn(4, 4).npu()
    with measure() as plain:
        x.t() @ x
    with measure() as copied:
        x.t().contiguous() @ x
    assert copied.num_launches == plain.num_launches + 1


def test_marks_separate_steps() -> None:
    x = torch.randn(1 << 18).npu()
    with measure() as report:
        y = x + 1
        torch.npu.mstx.mark("prefill")
        for _ in range(2):
            y = y * 2
            y[0].item()
            torch.npu.mstx.mark("decode")
    assert [(step.name, step.num_launches, step.synchronisations) for step in report.steps] == [
        ("prefill", 1, 0),
        ("decode", 1, 1),
        ("decode", 1, 1),
    ]
    assert report.num_launches == 3
    assert report.peak_bytes >= 3 << 20


def test_reports_nest() -> None:
    x = torch.ones(4).npu()
    with measure() as outer:
        x + 1
        with measure() as inner:
            x + 1
    assert (outer.num_launches, inner.num_launches) == (2, 1)


def test_operators_whose_kernel_cannot_run_are_listed() -> None:
    x = torch.tensor([0.0, 1.0]).npu()
    with measure() as report:
        torch.nonzero(x)
    assert report.golden_only == {"aten::nonzero": 1}


def test_it_is_written_as_json_and_as_a_table() -> None:
    with measure() as report:
        torch.ones(4, device="npu") + 1
    text = report.to_text()
    assert "2 operator launches" in text
    assert "aclnnAdds" in text
    assert "second" not in text
    assert json.loads(report.to_json())["launches"] == report.launches
