"""Rows: moe."""

from __future__ import annotations

from npu_zoo.simulator.rules.table import Rule

RULES: list[Rule] = []
