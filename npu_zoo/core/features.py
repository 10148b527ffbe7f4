"""The feature matrix: rows of sets over named axes, and the check of a request against them.

A row is a tuple of sets, and a request is supported when one row holds all of its values. Columns are not independent
(bfloat16 and a card without it can each be supported somewhere, their combination not), so cells never are either.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from npu_zoo.core.hardware import PRODUCTS, DType
from npu_zoo.core.parallel import Split

AXES: tuple[str, ...] = (
    "hardware",
    "dtype",
    "parallelism",
    "world_size",
    "attention",
    "quantization",
    "kv_cache_dtype",
    "long_sequence",
    "serving",
)
"""The axes in the order in which a refusal narrows them."""

KINDS: tuple[str, ...] = ("tp", "pp", "ep", "dp")
"""How ranks may share a model, in the order in which a layout names them; see :class:`npu_zoo.core.parallel.Split`."""

LAYOUTS_OF_FOUR: tuple[str, ...] = ("tp", "pp", "dp", "tp+pp", "tp+dp", "pp+dp")
"""Every layout of up to four ranks without experts."""

EXPERT_LAYOUTS_OF_FOUR: tuple[str, ...] = ("tp+ep", "ep+dp", "tp+pp+ep", "tp+ep+dp", "pp+ep+dp")
"""Those that share experts out."""

_LAYOUT_PART = re.compile(r"(tp|pp|ep|dp)([1-9]\d*)?")
_LAYOUT = re.compile(rf"{_LAYOUT_PART.pattern}(\+{_LAYOUT_PART.pattern})*")

AxisValue = str | int | bool
Attention = Literal["paged", "flash"]
Status = Literal["supported", "experimental"]
EvidenceLevel = Literal["claimed", "simulated", "measured"]

# What a user gives up most easily comes cheapest: alternatives are the requests at the smallest total cost.
_COST = {
    "serving": 1,
    "long_sequence": 1,
    "world_size": 2,
    "attention": 2,
    "parallelism": 2,
    "kv_cache_dtype": 3,
    "dtype": 4,
    "quantization": 5,
    "hardware": 12,
}


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class FeatureRow(_Frozen):
    """One row of a family's matrix: everything in the product of its sets is offered together.

    Attributes:
        sizes: the variant sizes that the row speaks of (``Variant.size``).
        parallelism: layouts of the world: the kinds that are more than one, in the order of :data:`KINDS` and each with
            or without its size. ``tp+pp`` offers every size of both, ``tp8+pp2`` that split alone, ``tp`` the world of
            one rank too.
        replicated_kv_heads: whether ranks hold copies of key-value heads where tensor parallel exceeds them; otherwise
            it may not.
        derived: the axes whose values follow from the source without being stated in it.
        source: the document that says so, ``derived`` from one, or ``zoo`` for what this project adds.
        status: ``experimental`` rows need ``--allow-experimental``.
        evidence: how far the claim is proven; anything above ``claimed`` needs an evidence record.
        evidence_devices: the world sizes that it was proven with; empty where the records do not tell.
    """

    sizes: tuple[str, ...] = Field(min_length=1)
    hardware: tuple[str, ...] = Field(min_length=1)
    dtype: tuple[DType, ...] = Field(min_length=1)
    world_size: tuple[int, ...] = Field(min_length=1)
    parallelism: tuple[str, ...] = ("tp",)
    replicated_kv_heads: bool = False
    attention: tuple[Attention, ...] = Field(min_length=1)
    quantization: tuple[str, ...] = ("none",)
    kv_cache_dtype: tuple[str, ...] = ("auto",)
    long_sequence: tuple[bool, ...] = (False,)
    serving: tuple[str, ...] = ("offline",)
    source: str
    derived: tuple[str, ...] = ()
    status: Status = "supported"
    evidence: EvidenceLevel = "claimed"
    evidence_devices: tuple[int, ...] = ()
    note: str = ""

    @field_validator("hardware")
    @classmethod
    def _known_products(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        unknown = sorted(set(value) - set(PRODUCTS))
        if unknown:
            raise ValueError(f"unknown hardware {', '.join(unknown)}; known: {', '.join(PRODUCTS)}")
        return value

    @field_validator("world_size")
    @classmethod
    def _positive(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if min(value) < 1:
            raise ValueError("world sizes start at 1")
        return value

    @field_validator("parallelism")
    @classmethod
    def _known_layouts(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for layout in value:
            kinds = [kind for kind, _ in _LAYOUT_PART.findall(layout)]
            if not _LAYOUT.fullmatch(layout) or kinds != [kind for kind in KINDS if kind in kinds]:
                raise ValueError(
                    f"unknown layout '{layout}'; join {', '.join(KINDS)} in this order, such as tp+ep or tp8+pp2"
                )
        return value

    def values(self, axis: str) -> tuple[AxisValue, ...]:
        """The row's values on one axis."""
        return tuple(getattr(self, axis))

    def describe(self) -> str:
        """Sizes, hardware and dtypes, which tell a reader which row it is."""
        return f"{', '.join(self.sizes)} on {', '.join(self.hardware)} in {', '.join(self.dtype)}"

    def on(self, world_size: int) -> FeatureRow:
        """The row as it stands for a world size: a claim, where it was proven with others alone."""
        if not self.evidence_devices or world_size in self.evidence_devices:
            return self
        return self.model_copy(update={"evidence": "claimed", "evidence_devices": ()})

    def offers(self, axis: str, value: AxisValue | tuple[AxisValue, ...]) -> bool:
        """Whether the row has the value; of a tuple of spellings, one is enough."""
        own = self.values(axis)
        return any(spelling in own for spelling in value) if isinstance(value, tuple) else value in own


class Denial(_Frozen):
    """A cell in which a source says no: quoted when a request meets it, even where the zoo offers it itself."""

    sizes: tuple[str, ...]
    hardware: tuple[str, ...]
    axis: str
    values: tuple[AxisValue, ...]
    source: str
    reason: str = ""


class Conflict(_Frozen):
    """Two values, on any axes or engine options, that exclude each other; symmetric by construction."""

    first: tuple[str, AxisValue]
    second: tuple[str, AxisValue]
    reason: str

    def hits(self, request: Mapping[str, Any]) -> bool:
        """Whether the request holds both values."""
        return all(request.get(axis) == value for axis, value in (self.first, self.second))


class Reason(_Frozen):
    """Why a request is refused on one axis, and what is left there."""

    axis: str
    value: AxisValue
    supported: tuple[AxisValue, ...]
    message: str


class Verdict(_Frozen):
    """The answer to one request: supported, or every failing axis and the nearest requests that would pass."""

    model: str
    request: dict[str, AxisValue]
    supported: bool
    status: Status = "supported"
    reasons: tuple[Reason, ...] = ()
    alternatives: tuple[dict[str, AxisValue], ...] = ()
    row: FeatureRow | None = None

    def describe(self) -> str:
        """The refusal in words, one reason a line, then the alternatives."""
        lines = [reason.message for reason in self.reasons]
        if self.alternatives:
            lines.append("nearest supported requests:")
            lines += ["  " + _flags(alternative, self.request) for alternative in self.alternatives]
        return "\n".join(lines)


def layout_names(split: Split) -> tuple[str, str]:
    """The spellings under which a row may offer a split: with its sizes, and by its kinds alone."""
    sizes = {kind: int(getattr(split, kind)) for kind in KINDS}
    shared = {kind: size for kind, size in sizes.items() if size > 1} or {"tp": 1}
    return "+".join(f"{kind}{size}" for kind, size in shared.items()), "+".join(shared)


def splits_of(layout: str, world_size: int) -> tuple[Split, ...]:
    """Every split of a world that a row's layout offers, those of few stages, few replicas and many experts first."""
    parts = dict(_LAYOUT_PART.findall(layout))
    if layout == "tp":
        return (Split(world_size),)
    any_size = [size for size in range(2, world_size + 1) if world_size % size == 0]
    sizes = ([1] if kind not in parts else [int(parts[kind])] if parts[kind] else any_size for kind in KINDS)
    splits = (Split(*chosen) for chosen in itertools.product(*sizes))
    fit = (split for split in splits if split.world_size == world_size and split.stage_size % split.ep == 0)
    return tuple(sorted(fit, key=lambda split: (split.pp, split.dp, -split.ep)))


def split_flags(split: Split) -> str:
    """The options that ask for a split, such as ``--tp 8 --pp 2``."""
    return " ".join(f"--{kind} {getattr(split, kind)}" for kind in layout_names(split)[1].split("+"))


class FeatureMatrix(_Frozen):
    """All rows of one family with the sources' denials and the pairwise conflicts."""

    rows: tuple[FeatureRow, ...]
    denials: tuple[Denial, ...] = ()
    conflicts: tuple[Conflict, ...] = ()

    def of_size(self, size: str, *, experimental: bool = True) -> tuple[FeatureRow, ...]:
        """The rows that speak of a size."""
        return tuple(r for r in self.rows if size in r.sizes and (experimental or r.status == "supported"))

    def check(
        self,
        model: str,
        size: str,
        request: Mapping[str, AxisValue | tuple[AxisValue, ...]],
        *,
        allow_experimental: bool = False,
        options: Mapping[str, Any] | None = None,
        alternatives: bool = True,
    ) -> Verdict:
        """Check one request.

        Args:
            model: how the request names the model; only for messages.
            size: the variant's size.
            request: a value for every axis of :data:`AXES`; ``parallelism`` may be a tuple of equal spellings.
            allow_experimental: take experimental rows too.
            options: engine options beside the axes that conflicts may name.
            alternatives: whether a refusal names the nearest requests that would pass, which takes most of its time.

        Returns:
            A verdict; it never raises.
        """
        shown = {axis: _first(value) for axis, value in request.items()}
        conflicts = self._conflict_reasons({**(options or {}), **shown})
        rows = self.of_size(size, experimental=allow_experimental)
        row, reasons = _narrow(model, rows, request)
        if row is not None and not conflicts:
            row = row.on(int(shown["world_size"]))
            return Verdict(model=model, request=shown, supported=True, status=row.status, row=row)
        reasons = tuple(self._with_denial(reason, size, shown) for reason in reasons)
        if row is None and not allow_experimental and not conflicts:
            reasons = self._with_experimental(model, size, request, reasons)
        nearest = _nearest(rows, request, self.conflicts, options or {}) if alternatives else ()
        return Verdict(model=model, request=shown, supported=False, reasons=reasons + conflicts, alternatives=nearest)

    def _conflict_reasons(self, request: Mapping[str, Any]) -> tuple[Reason, ...]:
        reasons = []
        for conflict in self.conflicts:
            if conflict.hits(request):
                (axis, value), (other, other_value) = conflict.first, conflict.second
                text = f"{axis}={value} excludes {other}={other_value}: {conflict.reason}"
                reasons.append(Reason(axis=axis, value=value, supported=(), message=text))
        return tuple(reasons)

    def _with_denial(self, reason: Reason, size: str, request: Mapping[str, AxisValue]) -> Reason:
        for denial in self.denials:
            where = size in denial.sizes and (request["hardware"] in denial.hardware or denial.axis == "hardware")
            if where and denial.axis == reason.axis and reason.value in denial.values:
                because = f": {denial.reason}" if denial.reason else ""
                text = f"{reason.message} (the {denial.source} says no{because})"
                return reason.model_copy(update={"message": text})
        return reason

    def _with_experimental(
        self, model: str, size: str, request: Mapping[str, Any], reasons: tuple[Reason, ...]
    ) -> tuple[Reason, ...]:
        row, _ = _narrow(model, self.of_size(size), request)
        if row is None:
            return reasons
        text = "the zoo offers this as experimental; --allow-experimental runs it"
        return tuple(r.model_copy(update={"message": f"{r.message}; {text}"}) for r in reasons)


def _narrow(
    model: str, rows: tuple[FeatureRow, ...], request: Mapping[str, AxisValue | tuple[AxisValue, ...]]
) -> tuple[FeatureRow | None, tuple[Reason, ...]]:
    """Narrow the rows axis by axis; a failing axis leaves the rows as they are, so that later axes are judged too."""
    left, reasons, context = rows, [], ""
    for axis in AXES:
        value = request[axis]
        matching = tuple(row for row in left if row.offers(axis, value))
        if matching:
            if len(matching) < len(left) or axis in ("hardware", "dtype"):
                context += _context(axis, _first(value), context)
            left = matching
            continue
        supported = _union(left, axis)
        rest = f"; supported: {joined(supported)}" if supported else "; no row offers any"
        text = f"{axis}={_spell(_first(value))} is not supported by {model}{context}{rest}"
        reasons.append(Reason(axis=axis, value=_first(value), supported=supported, message=text))
    return (left[0], ()) if not reasons and left else (None, tuple(reasons))


def _context(axis: str, value: AxisValue, so_far: str) -> str:
    if axis == "hardware":
        return f" on {value}"
    return (", " if "with" in so_far else " with ") + (str(value) if axis == "dtype" else f"{axis}={_spell(value)}")


def _first(value: AxisValue | tuple[AxisValue, ...]) -> AxisValue:
    return value[-1] if isinstance(value, tuple) else value


def joined(values: Iterable[object]) -> str:
    """Values as a cell or sentence shows them; true and false in lower case."""
    return ", ".join(map(_spell, values))


def _spell(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _union(rows: Iterable[FeatureRow], axis: str) -> tuple[AxisValue, ...]:
    values = list(dict.fromkeys(value for row in rows for value in row.values(axis)))
    return tuple(sorted(values)) if all(isinstance(v, int) for v in values) else tuple(values)


def _distance(request: Mapping[str, Any], candidate: Mapping[str, AxisValue]) -> tuple[float, ...]:
    changed = [axis for axis in AXES if candidate[axis] not in _spellings(request[axis])]
    sizes = abs(int(candidate["world_size"]) - int(_first(request["world_size"])))
    return (sum(_COST[axis] for axis in changed), sizes, int(candidate["world_size"]))


def _spellings(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)


def _nearest(
    rows: Sequence[FeatureRow],
    request: Mapping[str, Any],
    conflicts: tuple[Conflict, ...],
    options: Mapping[str, Any],
) -> tuple[dict[str, AxisValue], ...]:
    # A value that the row offers may still have to go where a conflict speaks of it.
    contested = {axis for conflict in conflicts for axis, _ in (conflict.first, conflict.second)}
    found: dict[tuple[AxisValue, ...], tuple[float, ...]] = {}
    for row in rows:
        for candidate in _candidates(row, request, contested):
            if not any(conflict.hits({**options, **candidate}) for conflict in conflicts):
                found[tuple(candidate[axis] for axis in AXES)] = _distance(request, candidate)
    best = sorted(found, key=lambda values: (found[values], tuple(map(str, values))))[:3]
    return tuple(dict(zip(AXES, values, strict=True)) for values in best)


_SHARED = ("world_size", "parallelism")
"""The two axes that depend on each other: a world has only some layouts."""


def _candidates(row: FeatureRow, request: Mapping[str, Any], contested: set[str]) -> Iterator[dict[str, AxisValue]]:
    """A row's combinations, with the request's own value on every axis where the row has it and nothing contests it."""
    choices = []
    for axis in AXES:
        kept = [v for v in row.values(axis) if v in _spellings(request[axis])]
        fixed = kept and axis not in contested and (axis not in _SHARED or _keeps_both(row, request))
        choices.append(kept[:1] if fixed else list(row.values(axis)))
    for values in itertools.product(*choices):
        candidate = dict(zip(AXES, values, strict=True))
        if splits_of(str(candidate["parallelism"]), int(candidate["world_size"])):
            yield candidate


def _keeps_both(row: FeatureRow, request: Mapping[str, Any]) -> bool:
    return all(row.offers(axis, request[axis]) for axis in _SHARED)


def _flags(alternative: Mapping[str, AxisValue], request: Mapping[str, AxisValue]) -> str:
    """An alternative as the options that ask for it: the four that every request has, and what differs."""
    shown = ["hardware", "dtype", "world_size", "attention"]
    shown += [axis for axis in AXES if axis not in shown and alternative[axis] != request.get(axis)]
    if alternative["parallelism"] != "tp" and "parallelism" not in shown:  # a world size alone means tensor parallel
        shown.append("parallelism")
    return " ".join(
        _flag(axis, alternative[axis], int(alternative["world_size"])) for axis in shown if axis != "long_sequence"
    )


def _flag(axis: str, value: AxisValue, world_size: int) -> str:
    if axis == "parallelism":
        return split_flags(splits_of(str(value), world_size)[0])
    return f"--{axis.replace('_', '-')} {_spell(value)}"
