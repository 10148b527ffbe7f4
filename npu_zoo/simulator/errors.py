"""What the simulated runtime raises.

::

    SimulatorError                 it cannot be started, or was asked for something that it does not have
    ├── Unavailable                torch_npu or a C compiler is missing: tests skip on it
    └── OperatorError              an operator was called
        ├── NoSemantics            it has no golden semantics here
        ├── RuleBroken             a documented rule of the operator or of the chip does not hold
        └── CaptureError           it cannot be part of a graph that is being captured
"""

from __future__ import annotations


class SimulatorError(RuntimeError):
    """The simulated runtime cannot do what was asked."""


class Unavailable(SimulatorError):
    """Something that the simulated runtime is built from is not installed."""


class OperatorError(SimulatorError):
    """A call of an operator was refused."""


class NoSemantics(OperatorError):
    """The operator exists in torch_npu, and the simulated runtime does not know what it computes."""


class RuleBroken(OperatorError):
    """A call breaks a documented rule.

    Attributes:
        operator: its qualified name, such as ``npu::npu_rms_norm``.
        rule: the rule's name in the table.
        source: the document that states it.
    """

    def __init__(self, operator: str, rule: str, found: str, source: str) -> None:
        self.operator, self.rule, self.source = operator, rule, source
        super().__init__(f"{operator}: {found} [rule {rule}; source: {source}]")


class CaptureError(OperatorError):
    """The operator cannot be part of a graph: its result's shape depends on data, or the host would wait for it."""
