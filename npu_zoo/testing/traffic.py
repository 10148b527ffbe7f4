"""What steps make ranks tell each other: the closed form for rows as an engine computes them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

from npu_zoo.communication import Operation, StepShape, step_operations
from npu_zoo.core.config import EngineConfig
from npu_zoo.core.parallel import Split
from npu_zoo.engine.step import StepRow, micro_batches


def step_shape(rows: Sequence[StepRow], split: Split) -> StepShape:
    """A step's rows as the closed form takes them."""
    batches = tuple(batch.replica_tokens for batch in micro_batches(rows, split.dp, split.pp))
    sampled = tuple(sum(row.num_logits for row in rows if row.replica == replica) for replica in range(split.dp))
    return StepShape(batches, sampled)


def due_operations(
    config: EngineConfig,
    rank: int,
    steps: Iterable[Sequence[StepRow]],
    arrived: Callable[[int], Sequence[int]] | None = None,
) -> Iterator[Operation]:
    """What a rank does with others in some steps, by the closed form.

    Args:
        arrived: see :func:`npu_zoo.communication.step_operations`, by the number of the step.
    """
    place = config.split.place(rank)
    for number, rows in enumerate(steps):
        came = None if arrived is None else arrived(number)
        shape = step_shape(rows, place.split)
        yield from step_operations(config.model_config, place, shape, config.dtype, config.expert_dispatch, came)
