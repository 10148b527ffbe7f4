"""What a model takes from an earlier run: weights as kernels laid them out."""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from torch import Tensor

from npu_zoo.compiled.library import library_path
from npu_zoo.core.config import EngineConfig
from npu_zoo.core.engine import Progress
from npu_zoo.core.errors import WeightsError
from npu_zoo.core.parallel import Ranks
from npu_zoo.nn.model import CausalLM
from npu_zoo.registry import load_code
from npu_zoo.weights.packed import PackedSource, files_state, read_packed, write_packed

_Step = Callable[[int, int], None]


def packed_source(config: EngineConfig, ranks: Ranks) -> PackedSource:
    """What a rank's packed weights would be made of."""
    weights, place = Path(config.weights).resolve(), ranks.place
    request = {
        "model": config.model_class,
        "dtype": config.dtype,
        "quantization": config.quantization_config.scheme if config.quantization_config else None,
        "mtp": config.mtp,
        "split": asdict(config.split),
        # Replicas of a model without experts have the same part.
        "part": [place.stage, place.tp_rank, *((place.ep_rank, place.moe_tp_rank) if config.model_config.moe else ())],
    }
    state = {
        "files": files_state(weights),
        "config": config.model_config.model_dump(mode="json"),
        "quantization": config.quantization_config.model_dump(mode="json") if config.quantization_config else None,
        "kernels": [(choice.operation, choice.implementation) for choice in config.kernels],
        "code": [_digest_of_model(config.model_class), library_path().parent.name],
    }
    digest = hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()
    return PackedSource(str(weights), json.dumps(request, sort_keys=True), digest)


class Packing:
    """A model's packed weights: taken from an earlier run, or kept for later ones.

    Attributes:
        path: the file that they were taken from or kept in; None where they were not.
    """

    def __init__(self, config: EngineConfig, ranks: Ranks, progress: Progress | None = None) -> None:
        self.path: Path | None = None
        self._config, self._ranks, self._progress = config, ranks, progress

    def restore(self, model: CausalLM) -> frozenset[str]:
        """Give a model what was kept; where nothing was, and the run is to keep it, see to that.

        Nothing is kept of devices other than a CPU, and of kernels that take weights as they are.

        Returns:
            The names of the checkpoint's tensors that need not be loaded.

        Raises:
            WeightsError: what was kept is another model's. Or, once the model is loaded, it cannot be kept.
        """
        if self._config.packed_weights == "off" or self._config.device != "cpu":
            return frozenset()
        source = packed_source(self._config, self._ranks)
        tensors = read_packed(source, _step(self._progress, "mapping packed weights"))
        if tensors is None:
            if self._config.packed_weights == "keep":
                model.on_packed(functools.partial(self._keep, source))
            return frozenset()
        self.path = source.path
        try:
            return model.restore_packed(tensors)
        except WeightsError as error:
            raise WeightsError(f"{source.path}: {error}; remove the file") from None

    def _keep(self, source: PackedSource, tensors: dict[str, Tensor]) -> None:
        if tensors:
            self.path = write_packed(source, tensors, _step(self._progress, "keeping packed weights"))


def _step(progress: Progress | None, what: str) -> _Step | None:
    return functools.partial(progress, what) if progress else None


@functools.cache
def _digest_of_model(reference: str) -> str:
    """Of the code that decides how weights are stacked and laid out: packages that the model's classes come from."""
    files: set[Path] = set()
    for cls in load_code(reference).__mro__:
        if issubclass(cls, CausalLM):
            files.update(_sources_beside(cls))
    digest = hashlib.sha256()
    for file in sorted(files):
        digest.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()


def _sources_beside(cls: type) -> list[Path]:
    """Of a module in a package, all modules of that package."""
    file = inspect.getsourcefile(cls)
    if file is None:
        return []
    return [*Path(file).parent.rglob("*.py")] if "." in cls.__module__ else [Path(file)]
