"""What a model takes from an earlier run: weights as kernels laid them out."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import json
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib.machinery import all_suffixes
from pathlib import Path
from threading import Lock, Thread

from torch import Tensor

from npu_zoo.compiled.library import library_path, obstacle
from npu_zoo.core.config import EngineConfig
from npu_zoo.core.engine import Progress
from npu_zoo.core.errors import WeightsError
from npu_zoo.core.parallel import Ranks
from npu_zoo.core.weights import WeightLoader
from npu_zoo.nn.kernels.compiled.memory import move_to_huge_pages
from npu_zoo.nn.model import CausalLM
from npu_zoo.registry import load_code
from npu_zoo.weights.packed import PackedRequest, file_states, read_packed, require_room, write_packed

_SOURCES = tuple(all_suffixes())
_PAUSE = 1e-3
"""Seconds between two parts, else the next one would have its turn before a step that waits."""


def packed_request(config: EngineConfig, ranks: Ranks) -> PackedRequest:
    """What a rank's packed weights are of."""
    place = ranks.place
    made_of = {
        "model": config.model_class,
        "dtype": config.dtype,
        "quantization": config.quantization_config.scheme if config.quantization_config else None,
        "mtp": config.mtp,
        "split": asdict(config.split),
        # Replicas of a model without experts have the same part.
        "part": [place.stage, place.tp_rank, *((place.ep_rank, place.moe_tp_rank) if config.model_config.moe else ())],
    }
    return PackedRequest(str(Path(config.weights).resolve()), json.dumps(made_of, sort_keys=True))


def packed_state(config: EngineConfig, loader: WeightLoader) -> str | None:
    """A digest of what packed weights depend on and what may change: files, options, code and processor.

    None where some of the code cannot be found, and so not be watched.
    """
    code = _code_state(config)
    if code is None:
        return None
    state = {
        "files": file_states(loader.files(), loader.directory),
        "config": config.model_config.model_dump(mode="json"),
        "quantization": config.quantization_config.model_dump(mode="json") if config.quantization_config else None,
        "kernels": [(choice.operation, choice.implementation) for choice in config.kernels],
        "code": code,
        "library": library_path().parent.name,
    }
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


@dataclass
class PackedWeights:
    """What came of keeping packed weights.

    Attributes:
        file: that they were taken from or kept in; None where they were not.
        remark: what a user should know, such as why a file was not taken; empty where there is nothing.
        memory: uint8, where a file that was taken is mapped; None where none was.
    """

    file: Path | None = None
    remark: str = ""
    memory: Tensor | None = None

    @property
    def mapped_bytes(self) -> int:
        """Of the file that was taken; the system takes them for memory that it could give away."""
        return 0 if self.memory is None else self.memory.nbytes

    @cached_property
    def settling(self) -> Settling | None:
        """What brings the mapped memory to huge pages; None where nothing is mapped, or no kernel reads it."""
        return None if self.memory is None or obstacle() else Settling(self.memory)

    def in_use(self) -> AbstractContextManager[None]:
        """A step's turn."""
        return self.settling.in_use() if self.settling else nullcontext()

    def close(self) -> None:
        """No step will have a turn any more."""
        if self.settling:
            self.settling.stop()


class Settling:
    """Brings mapped memory to huge pages once a first step has read it, part by part between steps.

    A thread does, for the next step may be far off. It has no turn while a step has: it would take a processor from
    threads that wait for each other, and for seconds steps took ten times as long.

    Attributes:
        offset: what lies before it has been seen to.
    """

    def __init__(self, memory: Tensor) -> None:
        self.offset = 0
        self._memory, self._turn, self._stopped = memory, Lock(), False
        self._thread: Thread | None = None

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """A step's turn, after a part of a few milliseconds at most."""
        with self._turn:
            yield
        if self._thread is None:
            self._thread = Thread(target=self._move, name="huge pages", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """Leave the rest as it is."""
        self._stopped = True

    def _move(self) -> None:
        while self.offset < len(self._memory) and not self._stopped:
            with self._turn:
                self.offset = move_to_huge_pages(self._memory, self.offset)
            time.sleep(_PAUSE)


class Packing:
    """Takes a model's packed weights from an earlier run, or keeps them for later ones.

    Attributes:
        result: what came of it; all of it once the model is loaded.
    """

    def __init__(
        self, config: EngineConfig, ranks: Ranks, loader: WeightLoader, progress: Progress | None = None
    ) -> None:
        self.result = PackedWeights()
        self._config, self._ranks, self._loader, self._progress = config, ranks, loader, progress
        self._request = packed_request(config, ranks)

    def restore(self, model: CausalLM, parameter_bytes: int) -> frozenset[str]:
        """Give a model what was kept; where nothing was, and the run is to keep it, see to that.

        Nothing is kept of devices other than a CPU, and of kernels whose layout cannot be kept.

        Args:
            parameter_bytes: of the rank's weights, about as many as a file takes.

        Returns:
            The names of the checkpoint's tensors that need not be loaded.

        Raises:
            WeightsError: what was kept is another model's, or the disk has no room for what is to be kept.
        """
        path, keep = self._request.path, self._config.packed_weights == "keep"
        if self._config.packed_weights == "off" or not (keep or path.exists()):
            return frozenset()
        if self._config.device != "cpu":
            return self._nothing_kept("they are for CPUs alone")
        state = packed_state(self._config, self._loader)
        if state is None:
            return self._nothing_kept("the sources of the model's code cannot be found")
        mapped = read_packed(self._request, state, self._step("mapping packed weights"))
        if mapped is not None:
            self.result = PackedWeights(path, memory=mapped.memory)
            return self._restore(model, mapped.tensors)
        if not keep:
            self.result.remark = f"the packed weights in {path} are out of date; --packed-weights keep renews them"
        elif self._ranks.place.replica == 0 or self._config.model_config.moe:  # other replicas would keep the same
            require_room(parameter_bytes * self._ranks.local_size)
            model.on_packed(functools.partial(self._keep, state))
        return frozenset()

    def _restore(self, model: CausalLM, tensors: dict[str, Tensor]) -> frozenset[str]:
        try:
            return model.restore_packed(tensors)
        except WeightsError as error:
            raise WeightsError(f"{self._request.path}: {error}; remove the file") from None

    def _keep(self, state: str, tensors: dict[str, Tensor]) -> None:
        if not tensors:
            self._nothing_kept("no kernel of this run has a layout that can be")
        elif not self._is_as_it_was(state):
            self._nothing_kept("the checkpoint changed while it was loaded")
        else:
            self.result.file = write_packed(self._request, state, tensors, self._step("keeping packed weights"))

    def _is_as_it_was(self, state: str) -> bool:
        """Whether what was loaded is what was looked at: files are replaced, and links turned."""
        return packed_request(self._config, self._ranks) == self._request and (
            packed_state(self._config, self._loader) == state
        )

    def _nothing_kept(self, reason: str) -> frozenset[str]:
        if self._config.packed_weights == "keep":
            self.result.remark = f"no packed weights were kept: {reason}"
        return frozenset()

    def _step(self, what: str) -> Callable[[int, int], None] | None:
        return functools.partial(self._progress, what) if self._progress else None


def _code_state(config: EngineConfig) -> list[list[tuple[str, int, int]]] | None:
    """Of every package that decides how weights are read, stacked and laid out; None where one cannot be found."""
    classes = load_code(config.model_class).__mro__
    modules = {__name__, *(cls.__module__ for cls in classes if issubclass(cls, CausalLM))}
    references = [choice.implementation for choice in config.kernels] + [config.quantization_method or __name__]
    modules.update(reference.partition(":")[0] for reference in references)
    found = [_package_state(name) for name in sorted({module.partition(".")[0] for module in modules})]
    return None if None in found else [state for state in found if state is not None]


@functools.cache
def _package_state(name: str) -> list[tuple[str, int, int]] | None:
    try:
        spec = importlib.util.find_spec(name) if name != "__main__" else None
    except ValueError:  # of modules that were made while the program runs
        return None
    if spec is None:
        return None
    if spec.submodule_search_locations is None:
        sources = [Path(spec.origin or "")]
    else:
        folders = map(Path, spec.submodule_search_locations)
        sources = sorted(path for folder in folders for path in folder.rglob("*") if _is_source(path))
    return file_states(sources, sources[0].parent) if sources and all(path.is_file() for path in sources) else None


def _is_source(path: Path) -> bool:
    """What Python compiled for itself it made of a source, and whenever a module was first imported."""
    return path.name.endswith(_SOURCES) and path.parent.name != "__pycache__"
