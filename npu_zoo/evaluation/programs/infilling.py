"""HumanEval as infilling: holes in canonical solutions, made as in arXiv:2207.14255."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from npu_zoo.evaluation.programs.humaneval import Problem


@dataclass(frozen=True)
class Hole:
    """A problem's canonical program with a part taken out.

    Attributes:
        id: the problem's, the form's name and the hole's number.
        prefix, suffix: what stands around the hole, the prompt included.
        middle: what was taken out.
    """

    problem: Problem
    id: str
    prefix: str
    middle: str
    suffix: str

    def source(self, filled: str) -> str:
        """The program with the hole filled."""
        return self.prefix + filled + self.suffix


def single_lines(problem: Problem, seed: int) -> Iterator[Hole]:
    """A hole for every line of the solution that is not blank: 1033 of HumanEval's."""
    lines = problem.canonical_solution.splitlines(keepends=True)
    for number, line in enumerate(lines):
        if line.strip():
            middle = line.rstrip("\n")
            before = problem.prompt + "".join(lines[:number])
            after = line[len(middle) :] + "".join(lines[number + 1 :])
            yield Hole(problem, f"{problem.task_id}/single_line/L{number}", before, middle, after)


SPANS = 10


def random_spans(problem: Problem, seed: int) -> Iterator[Hole]:
    """Ten holes per problem between two characters of the solution that are drawn."""
    draw = random.Random(f"{seed} {problem.task_id}")
    solution = problem.canonical_solution
    for number in range(SPANS):
        start, end = sorted(draw.sample(range(len(solution) + 1), 2))
        before, after = problem.prompt + solution[:start], solution[end:]
        yield Hole(problem, f"{problem.task_id}/random_span/{number}", before, solution[start:end], after)


class Form(NamedTuple):
    """A way of making holes in a problem, for a seed, and what ends the text that fills one."""

    holes: Callable[[Problem, int], Iterator[Hole]]
    stop: tuple[str, ...] = ()


FORMS = {"single_line": Form(single_lines, ("\n",)), "random_span": Form(random_spans)}
