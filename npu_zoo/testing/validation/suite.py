"""The whole suite: every claim of some plugins up to a level."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping

from npu_zoo.testing.validation import build, run, simulate, spec
from npu_zoo.testing.validation.claims import Claim, ClaimFails, Figures, Level, Subject, error_text, levels_up_to
from npu_zoo.testing.validation.scope import Part

_CLAIMS: Mapping[Level, Callable[[Part], Iterator[Claim]]] = {
    "spec": spec.claims,
    "build": build.claims,
    "run": run.claims,
    "simulate": simulate.claims,
}


def claims_of(parts: Iterable[Part], level: Level, *, only: bool = False) -> list[Claim]:
    """Every claim, level by level.

    Args:
        only: leave out the levels below.
    """
    parts = list(parts)
    levels = (level,) if only else levels_up_to(level)
    return [
        claim
        for one in levels
        for part in parts
        if one == "spec" or not part.record.error
        for claim in _listed(part if one == "spec" else part.readable, one)
    ]


def _listed(part: Part, level: Level) -> list[Claim]:
    """A part's claims of one level; where what it registers breaks their listing, the ones before, and that it does."""
    found: list[Claim] = []
    try:
        for claim in _CLAIMS[level](part):
            found.append(claim)  # noqa: PERF402
    except Exception as error:
        check = functools.partial(_fail, error_text(error))
        found.append(Claim(level, Subject(part.record.name, axis="plugin"), "its claims can be listed", check))
    return found


def _fail(message: str) -> Figures:
    raise ClaimFails(message)
