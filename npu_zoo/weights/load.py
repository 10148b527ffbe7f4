"""Copies a checkpoint into a model's parameters, after checking that it is that model's."""

from __future__ import annotations

import fnmatch
import math
import re
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING

from npu_zoo.core.errors import EngineError, WeightsError
from npu_zoo.core.weights import Shard, WeightLoader

if TYPE_CHECKING:
    from torch import Tensor

_SHOWN = 20


@dataclass(frozen=True)
class ShapeComparison:
    """How a checkpoint's tensors differ from the ones a model takes.

    Attributes:
        missing: names that the model needs and the checkpoint lacks.
        unexpected: names that the checkpoint has and the model does not take.
        misshapen: name, shape in the checkpoint, shape in the model.
        absent: optional names that the checkpoint lacks.
        ignored: names that the checkpoint has and the model ignores.
    """

    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    misshapen: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...]
    absent: tuple[str, ...]
    ignored: tuple[str, ...]

    @property
    def fits(self) -> bool:
        """Whether nothing is missing, unexpected or misshapen."""
        return not (self.missing or self.unexpected or self.misshapen)

    def describe(self) -> str:
        """The differences in groups, each with its count."""
        shapes = [f"{name}: {list(found)} in the checkpoint, {list(due)} due" for name, found, due in self.misshapen]
        groups = [
            _group("missing", self.missing),
            _group("unexpected", self.unexpected),
            _group("of another shape", shapes),
        ]
        return "\n".join(group for group in groups if group)

    def require(self, directory: Path) -> None:
        """Raise the one WeightsError that lists every difference, if there is any."""
        if not self.fits:
            raise WeightsError(
                f"the checkpoint in {directory} is not this model's:\n{self.describe()}\n"
                "check --model and its variant against the checkpoint's config.json, or download the checkpoint again"
            )


def _group(title: str, lines: Sequence[str]) -> str:
    if not lines:
        return ""
    more = [f"… and {len(lines) - _SHOWN} more"] if len(lines) > _SHOWN else []
    return "\n    ".join([f"  {len(lines)} {title}:", *lines[:_SHOWN], *more])


@dataclass(frozen=True)
class LoadReport:
    """What was loaded.

    Attributes:
        tensors, bytes: how many tensors, and their bytes in the checkpoint's dtype.
        seconds: how long the copying took.
        absent: optional tensors that the checkpoint lacks; their destinations are as they were.
        ignored: the checkpoint's tensors that the model ignores.
    """

    tensors: int
    bytes: int
    seconds: float
    absent: tuple[str, ...]
    ignored: tuple[str, ...]


def compare_shapes(
    destinations: Mapping[str, Tensor],
    shapes: Mapping[str, tuple[int, ...]],
    *,
    optional: Iterable[str] = (),
    ignored: Sequence[str] = (),
    shards: Mapping[str, Shard] | None = None,
    elsewhere: Collection[str] = (),
) -> ShapeComparison:
    """Compare what a model takes with what a checkpoint has; the destinations may be on the meta device.

    Args:
        destinations: the checkpoint's tensor names and the views they are copied into.
        shapes: a loader's :meth:`~npu_zoo.core.weights.WeightLoader.shapes`.
        optional: names in ``destinations`` that the checkpoint may lack.
        ignored: patterns (``*``, ``?``) of names that the checkpoint may have beyond them.
        shards: of destinations that are parts, which part.
        elsewhere: what names begin with, up to a dot, that other ranks load.
    """
    whole = {name: shard.whole(tuple(destinations[name].shape)) for name, shard in (shards or {}).items()}
    optional = frozenset(optional)
    skip = re.compile("|".join(fnmatch.translate(pattern) for pattern in ignored) or r"(?!)")
    surplus = [name for name in shapes if name not in destinations and not _is_under(name, elsewhere)]
    lacking = [name for name in destinations if name not in shapes]
    common = [
        (name, shapes[name], whole.get(name, tuple(view.shape)))
        for name, view in destinations.items()
        if name in shapes
    ]
    return ShapeComparison(
        missing=tuple(name for name in lacking if name not in optional),
        unexpected=tuple(name for name in surplus if not skip.match(name)),
        misshapen=tuple((name, found, due) for name, found, due in common if found != due),
        absent=tuple(name for name in lacking if name in optional),
        ignored=tuple(name for name in surplus if skip.match(name)),
    )


def _is_under(name: str, prefixes: Collection[str]) -> bool:
    """Whether a name is one of some prefixes, or continues it after a dot."""
    return bool(prefixes) and any(prefix in prefixes for prefix in accumulate(name.split("."), "{}.{}".format))


def _share(shapes: Mapping[str, tuple[int, ...]], shards: Mapping[str, Shard], without: Collection[str]) -> float:
    """How much of a checkpoint's values is read."""
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    read = sum(
        size * (shards[name].stop - shards[name].start) / shards[name].size if name in shards else size
        for name, size in sizes.items()
        if name not in without
    )
    return read / max(1, sum(sizes.values()))


def load_weights(
    destinations: dict[str, Tensor],
    loader: WeightLoader,
    *,
    optional: Iterable[str] = (),
    ignored: Sequence[str] = (),
    shards: Mapping[str, Shard] | None = None,
    elsewhere: Collection[str] = (),
    held: Collection[str] = (),
    adopt: Callable[[str, Tensor], bool] | None = None,
    storage: Callable[[str], Tensor] | None = None,
    on_loaded: Callable[[str], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> LoadReport:
    """Copy every tensor of a checkpoint into its destination, converting the dtype.

    Args:
        destinations: the checkpoint's tensor names and the views they are copied into; a fused parameter gives its
            parts as views of its rows. Entries are removed as they are filled, so that their storage can be given up.
        optional, ignored, shards, elsewhere: as for :func:`compare_shapes`.
        held: destinations that have their values already, and are not read.
        adopt: offered a tensor whose destination is on the meta device, where the loader's tensors last; True where it
            was taken as it is, and need not be copied.
        storage: asked, just before it is filled, for the storage of a destination that is on the meta device.
        on_loaded: called with each tensor's name once it is filled.
        progress: called after each tensor with the bytes done and the bytes in all.

    Raises:
        WeightsError: before any tensor is read, with every missing, unexpected and misshapen tensor; or where a
            stored dtype cannot become the destination's.
        EngineError: a destination is on the meta device, where nothing can be copied to.
    """
    import torch

    shapes = loader.shapes()
    comparison = compare_shapes(
        destinations, shapes, optional=optional, ignored=ignored, shards=shards, elsewhere=elsewhere
    )
    comparison.require(loader.directory)
    others = frozenset(name for name in shapes if name not in destinations and _is_under(name, elsewhere))
    others |= frozenset(held)
    total = int(loader.total_bytes() * _share(shapes, shards or {}, others))
    done, count, started = 0, 0, time.monotonic()
    with torch.no_grad():
        for name, tensor in loader.tensors(shards, others):
            if name in destinations:
                destination = destinations.pop(name)
                offered = adopt is not None and destination.is_meta and loader.tensors_last
                if not (offered and adopt is not None and adopt(name, tensor)):
                    if destination.is_meta and storage is not None:
                        destination = storage(name)
                    _copy(name, destination, tensor, loader.directory)
                del destination
                count += 1
                if on_loaded is not None:
                    on_loaded(name)
            done += tensor.numel() * tensor.element_size()
            if progress is not None:
                progress(min(done, total), total)
    return LoadReport(count, done, time.monotonic() - started, comparison.absent, comparison.ignored)


def _copy(name: str, destination: Tensor, source: Tensor, directory: Path) -> None:
    if destination.is_meta:
        raise EngineError(f"the destination of {name} is on the meta device; allocate the model before loading it")
    plain = source.is_floating_point() and source.element_size() > 1
    if source.dtype != destination.dtype and not (plain and destination.is_floating_point()):
        stored, due = str(source.dtype).removeprefix("torch."), str(destination.dtype).removeprefix("torch.")
        raise WeightsError(
            f"{directory}: tensor {name} is stored as {stored} and cannot be loaded as {due}; "
            "a quantized checkpoint needs its --quantization, or must be converted to a plain one first"
        )
    destination.copy_(source)
