"""What is run of a shape: groups of cases, the checkpoints that they need, and how each engine is started on them."""

from __future__ import annotations

import dataclasses
import multiprocessing
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.checkpoint import REFERENCE, ensure_checkpoint
from harness.shapes import Shape
from harness.targets import UNPACKED
from npu_zoo.core.config import EngineArgs
from npu_zoo.core.errors import ConfigError, UsageError
from npu_zoo.evaluation.peers.cases import CATALOGUE, Case
from npu_zoo.evaluation.peers.engines import SUBJECT, InstalledEngine
from npu_zoo.evaluation.peers.process import PeerError, PeerProcess
from npu_zoo.evaluation.peers.result import Correctness
from npu_zoo.evaluation.peers.session import Session, checked_request

LLAMA_CPP = "llama.cpp"
GGUF_SCRIPT = Path(__file__).with_name("gguf_file.py")
FLOAT32 = 0
"""GGML_TYPE_F32, in which llama.cpp keeps keys and values where tokens are compared."""

ENOUGH_EQUAL = 0.75
"""Of requests whose tokens must be the same; a near tie may fall on its other side in another order of sums."""

CORRECTNESS = Case("correctness", "correctness", "total", 8, (3, 90), (32, 32))
CASES = (
    *("start", "memory-1", "decode-1", "decode-8", "decode-32", "prefill-1x2048", "prefill-8x512"),
    *("shared-prefix", "mixed"),
)
"""Of a plain checkpoint, unless others are asked for."""


@dataclass(frozen=True)
class Group:
    """Cases on one form of a checkpoint.

    Attributes:
        scheme: npu-zoo's, for which only llama.cpp has a counterpart, ``gguf``; empty for plain weights.
        group_size: values of a channel that share a scale; None where the whole channel does.
        packed: whether npu-zoo finds weights as its kernels take them, which makes no difference but to its start.
    """

    name: str
    scheme: str = ""
    gguf: str = ""
    group_size: int | None = None
    packed: bool = True

    @property
    def plain(self) -> bool:
        """Whether every case and engine is of interest."""
        return not self.scheme and self.packed

    def cases(self, asked: Sequence[str]) -> list[str]:
        """Those of the asked ones that it runs."""
        only = "decode-1" if self.packed else "start"
        return [name for name in asked if self.plain or name == only]

    def engines(self, found: Sequence[InstalledEngine]) -> list[InstalledEngine]:
        """Those that can run it."""
        return [engine for engine in found if self.plain or engine.name in (SUBJECT, LLAMA_CPP)]


GROUPS = {
    group.name: group
    for group in (
        Group("plain"),
        Group(UNPACKED, packed=False),
        Group("w8a16", "w8a16", "q8_0"),
        Group("w4a16", "w4a16", "q4_0"),
        Group("w4a16-groups", "w4a16", "q4_0", 32),
    )
}

FEWER = {
    ("vllm", "start"): 1,
    ("vllm", "memory-1"): 1,
    **{(engine, case): 1 for engine in (LLAMA_CPP, "transformers") for case in ("mixed", "shared-prefix")},
}
"""Rounds of what takes a peer minutes and leaves no doubt."""


@dataclass(frozen=True)
class Setting:
    """What all groups of a run have in common.

    Attributes:
        workdir: where checkpoints are kept.
        engines: npu-zoo and its peers.
        experts: how transformers computes experts.
        fewer: rounds by engine and case, see :class:`~npu_zoo.evaluation.peers.comparison.Conditions`.
    """

    workdir: Path
    engines: tuple[InstalledEngine, ...]
    hardware: str = "cpu"
    threads: int = 2
    rounds: int = 3
    experts: str = "eager"
    fewer: Mapping[tuple[str, str], int] = dataclasses.field(default_factory=lambda: dict(FEWER))

    @property
    def llama_python(self) -> str | None:
        """The interpreter that has llama.cpp, where it takes part."""
        return next((engine.python for engine in self.engines if engine.name == LLAMA_CPP), None)


def prepare(setting: Setting, shape: Shape, group: Group, names: Sequence[str]) -> Session:
    """A comparison on a shape's checkpoint, which is written where it does not exist.

    Raises:
        NpuZooError: npu-zoo refuses it, or a peer's file cannot be made.
    """
    plain = checkpoint_of(setting.workdir, shape)
    weights = _quantized(plain, group) if group.scheme else plain
    engines = group.engines(setting.engines)
    gguf = _gguf(plain, group.gguf, setting.llama_python) if setting.llama_python else None
    asked = EngineArgs(
        model=shape.model,
        weights=str(weights),
        hardware=setting.hardware,
        dtype=shape.dtype,
        max_model_len=shape.max_model_len,
        kv_cache_memory=shape.kv_cache_memory,
        threads=setting.threads,
        packed_weights=("keep" if group.packed else "off") if setting.hardware == "cpu" else None,
        # Neither every scheme of every family nor a CUDA device is in the families' own sources.
        allow_experimental=True,
    )
    args, config = checked_request(asked)
    cases = [CATALOGUE[name].scaled(shape.divisor) for name in names]
    return Session.prepare(
        args,
        config,
        engines,
        cases,
        rounds=setting.rounds,
        fewer=setting.fewer,
        gguf=gguf,
        overrides=_overrides(shape, plain, engines, setting.experts),
    )


def _overrides(
    shape: Shape, weights: Path, engines: Sequence[InstalledEngine], experts: str
) -> dict[str, dict[str, Any]]:
    """How peers are started otherwise than npu-zoo is."""
    beside = weights / REFERENCE
    found: dict[str, dict[str, Any]] = {
        "transformers": {
            "weights": str(beside if beside.is_dir() else weights),
            "settings": {"experts_implementation": experts} if shape.experts else {},
        },
        # The checkpoint describes its own config class, as the hub's do.
        "vllm": {"settings": {"trust_remote_code": True} if beside.is_dir() else {}},
    }
    return {engine.name: found[engine.name] for engine in engines if engine.name in found}


def checkpoint_of(root: Path, shape: Shape) -> Path:
    """The checkpoint, made in a process of its own so that this one stays free of torch."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(ensure_checkpoint, root, shape).result()


def _quantized(plain: Path, group: Group) -> Path:
    target = plain.with_name(f"{plain.name}-{group.name}")
    if not target.is_dir():
        more = ["--group-size", str(group.group_size)] if group.group_size else []
        command = [sys.executable, "-m", "npu_zoo", "convert", str(plain), str(target), "--to", "hf-safetensors"]
        _call([*command, "--quantize", group.scheme, *more])
    return target


def _gguf(plain: Path, scheme: str, python: str) -> Path:
    """The checkpoint as llama.cpp takes it, made by its own interpreter."""
    whole = plain.with_name(f"{plain.name}.gguf")
    if not whole.is_file():
        _call([python, str(GGUF_SCRIPT), str(plain), str(whole)])
    if not scheme:
        return whole
    target = plain.with_name(f"{plain.name}-{scheme}.gguf")
    if not target.is_file():
        _call([python, str(GGUF_SCRIPT), str(whole), str(target), "--quantize", scheme])
    return target


def _call(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        last = " | ".join(done.stderr.strip().splitlines()[-3:])
        raise ConfigError(f"{' '.join(command)} ended with status {done.returncode}: {last}")


def correctness(setting: Setting, shape: Shape) -> dict[str, Correctness]:
    """Greedy tokens of a small float32 model on every engine that runs one, beside npu-zoo's.

    Raises:
        PeerError: an engine's are others.
    """
    engines = [engine for engine in setting.engines if engine.name != "vllm" or shape.latent is None]
    without = dataclasses.replace(setting, engines=tuple(engines))
    small = dataclasses.replace(shape, dtype="float32")
    session = prepare(without, small, GROUPS["plain"], ["decode-1"])
    requests = CORRECTNESS.requests(session.conditions.num_tokens, 0)
    tokens = {engine.name: _tokens(session, engine, requests) for engine in engines}
    return {name: _compare(name, found, tokens[SUBJECT]) for name, found in tokens.items() if name != SUBJECT}


def _tokens(session: Session, engine: InstalledEngine, requests: list[Any]) -> list[list[int]]:
    # Compilation takes longer than all else here, and says nothing of the tokens.
    exact = {"vllm": {"enforce_eager": True}, LLAMA_CPP: {"type_k": FLOAT32, "type_v": FLOAT32}}
    options = session.options[engine.name]
    longest = max(len(request.prompt) + request.max_tokens for request in requests)
    options = dataclasses.replace(
        options,
        max_model_len=max(options.max_model_len, longest),
        settings={**options.settings, **exact.get(engine.name, {})},
    )
    with PeerProcess(engine, session.conditions.threads, session.conditions.cores) as process:
        process.load(options)
        return process.run(requests, 1 if engine.name == "transformers" else 0).token_ids


def _compare(name: str, found: list[list[int]], own: list[list[int]]) -> Correctness:
    equal = sum(left == right for left, right in zip(found, own, strict=True))
    if equal < ENOUGH_EQUAL * len(own):
        raise PeerError(f"greedy tokens of {name} differ in {len(own) - equal} of {len(own)} requests: {found}, {own}")
    return Correctness(requests=len(own), equal=equal, tokens=sum(map(len, own)))


def parse_fewer(texts: Sequence[str]) -> dict[tuple[str, str], int]:
    """Rounds by engine and case, from ``vllm:start=1``.

    Raises:
        UsageError: a text is something else.
    """
    found = {}
    for text in texts:
        pair, _, count = text.partition("=")
        engine, _, case = pair.partition(":")
        if case not in CATALOGUE or not count.isdecimal() or not int(count):
            raise UsageError(f"--fewer {text}: give ENGINE:CASE=ROUNDS, such as vllm:start=1")
        found[engine, case] = int(count)
    return found
