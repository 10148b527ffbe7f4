"""What the documents say of each operator on each chip, as rows of data, and how a call is held against them.

A row speaks of one use of an operator: the operator at all, a dtype, a layout, a block size. For each chip it has one
of three values: yes (documented), no (documented as not working, or outside what is documented as working) and
undocumented (no document allows it, and the field uses it). A call that makes a use whose value is no is refused; one
whose value is undocumented goes through and is named in the report.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch

from npu_zoo.simulator.errors import RuleBroken

CHIPS = ("ascend910b", "ascend310p")

_MODULES = (
    "products",
    "fused_attention",
    "fused_attention_pages",
    "fused_attention_masks",
    "fused_attention_latents",
    "fused_attention_int8",
    "atb_attention",
    "flash_attention",
    "cache",
    "layout",
    "moe_gating",
    "moe_routing",
    "grouped_products",
    "norm",
    "quantization",
    "quantized_products",
    "weight_only_products",
    "rotary",
    "sampling",
    "collective",
)

ND, FRACTAL_NZ = 2, 29


class Value(Enum):
    """Whether a use is documented to work on a chip."""

    YES = "yes"
    NO = "no"
    UNDOCUMENTED = "undocumented"


YES, NO, UNDOCUMENTED = Value.YES, Value.NO, Value.UNDOCUMENTED

EVERY_OPERATOR = "*"


def on(*chips: str, value: Value = NO) -> Mapping[str, Value]:
    """The same value on each of these chips (on all where none is given)."""
    return dict.fromkeys(chips or CHIPS, value)


@dataclass(frozen=True)
class Call:
    """One call of an operator, before anything was computed.

    Attributes:
        operator: the qualified name with its overload, such as ``npu::npu_rms_norm``.
        chip: ``ascend910b`` or ``ascend310p``.
        arguments: every argument by the name of the schema, defaults filled in. While dtypes, shapes and layouts are
            checked the tensors are the device's own; while values are checked they are CPU tensors.
        notes: what one detector worked out of this call for the others.
    """

    operator: str
    chip: str
    arguments: Mapping[str, Any]
    notes: dict[str, Any] = field(default_factory=dict, compare=False)

    def __getitem__(self, name: str) -> Any:
        """The argument of that name."""
        return self.arguments[name]

    def get(self, name: str) -> Any:
        """The argument of that name, None where this overload has none."""
        return self.arguments.get(name)

    def tensors(self, *names: str) -> dict[str, torch.Tensor]:
        """The arguments of these names that are tensors (all arguments where no name is given)."""
        chosen = names or tuple(self.arguments)
        return {name: self.arguments[name] for name in chosen if isinstance(self.get(name), torch.Tensor)}


Detect = Callable[[Call], "str | None"]


@dataclass(frozen=True)
class Rule:
    """One row.

    Attributes:
        name: unique, ``operator.subject``, such as ``npu_rms_norm.gamma_shape``.
        operators: the qualified names that it speaks of, one without an overload for all its overloads; ``*`` for
            every operator.
        use: the use of the operator that the row judges, as a sentence.
        values: by chip; a chip that is missing is not spoken of.
        source: the document (and where it is long, the place in it) or the file of the field's code.
        detect: what in a call makes that use, with the figures found; None where the call does not make it.
        of_values: whether ``detect`` reads the contents of tensors, and so is run only when the operator is.
    """

    name: str
    operators: tuple[str, ...]
    use: str
    values: Mapping[str, Value]
    source: str
    detect: Detect
    of_values: bool = False


class RuleTable:
    """The rules that can speak of the calls on one chip.

    Attributes:
        undocumented: how often each undocumented use was made, by (operator, rule).
    """

    def __init__(self, rules: list[Rule], chip: str) -> None:
        self.chip = chip
        self.undocumented: dict[tuple[str, str], int] = {}
        self._spoken: dict[tuple[str, bool], list[Rule]] = {}
        self._resolved: dict[tuple[str, bool], list[Rule]] = {}
        for rule in rules:
            if rule.values.get(chip, YES) is not YES:
                for operator in rule.operators:
                    self._spoken.setdefault((operator, rule.of_values), []).append(rule)

    def check(self, operator: str, arguments: Mapping[str, Any], *, of_values: bool = False) -> None:
        """Hold a call against the rules of its operator.

        Raises:
            RuleBroken: it makes a use that is documented as not working, or outside what is documented.
        """
        rules = self._resolved.get((operator, of_values))
        if rules is None:
            rules = self._resolved[operator, of_values] = self._of(operator, of_values)
        if not rules:
            return
        call = Call(operator, self.chip, arguments)
        for rule in rules:
            found = rule.detect(call)
            if found is None:
                continue
            if rule.values[self.chip] is NO:
                raise RuleBroken(operator, rule.name, f"{found} on {self.chip}", rule.source)
            key = (operator, rule.name)
            self.undocumented[key] = self.undocumented.get(key, 0) + 1

    def _of(self, operator: str, of_values: bool) -> list[Rule]:
        base = operator.partition(".")[0]
        names = dict.fromkeys((base, operator, EVERY_OPERATOR))
        return [rule for name in names for rule in self._spoken.get((name, of_values), ())]


def load_rules() -> list[Rule]:
    """All rows. Each module of this package holds a list ``RULES``.

    Raises:
        ValueError: two rows have the same name.
    """
    rules: list[Rule] = []
    for module in _MODULES:
        rules += importlib.import_module(f"npu_zoo.simulator.rules.{module}").RULES
    names = [rule.name for rule in rules]
    if len(names) != len(set(names)):
        raise ValueError(f"rules of the same name: {sorted({name for name in names if names.count(name) > 1})}")
    return rules


def format_of(tensor: torch.Tensor) -> int:
    """The storage format of a tensor on the device: 2 is ND, 29 is FRACTAL_NZ."""
    import torch_npu

    return int(torch_npu.get_npu_format(tensor)) if tensor.device.type == "npu" else ND
