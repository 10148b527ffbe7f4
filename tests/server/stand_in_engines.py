"""Engines that fail: in a way that is named in a file, which NPU_ZOO_TEST_FAULTS names."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from npu_zoo.core.config import EngineConfig
from npu_zoo.core.engine import Progress, RequestOutput
from npu_zoo.engine.engine import NativeEngine


class FaultyEngine(NativeEngine):
    def __init__(self, config: EngineConfig, progress: Progress | None = None) -> None:
        self.fail_at("start")
        super().__init__(config, progress)

    def step(self) -> list[RequestOutput]:
        self.fail_at("step")
        return super().step()

    def fail_at(self, moment: str) -> None:
        faults = Path(os.environ["NPU_ZOO_TEST_FAULTS"])
        fault = faults.read_text().split() if faults.exists() else ["", ""]
        if fault[0] == moment:
            if fault[1] == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            raise ValueError("the ninth layer is upside down")
