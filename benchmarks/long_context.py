"""What a decode step costs as the context grows, for every kind of cache, with the memory floor beside it.

    python benchmarks/long_context.py --records DIR [--threads 2] [--contexts 1024,2048,4096,8192,16352]

`npu-zoo bench offline` on random weights, one record a cache: each context is a prompt of random tokens that is really
computed, and the steps after it are timed one by one. The models have few layers and small feed-forward networks, so
that the cache is most of what a step reads, and the heads of the real ones: 16 of 128 with keys and values of their
own, or latents of 512 with a rotated key of 64. ``performance.py`` makes a table and a chart of the records.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

from harness.records import CONTEXT
from harness.shapes import SHAPES, Experts, Shape
from harness.suite import checkpoint_of

from npu_zoo.core.errors import NpuZooError, UsageError
from npu_zoo.evaluation.record import read_record, write_record

OUTPUT = 32
CONTEXTS = (1024, 2048, 4096, 8192, 16384 - OUTPUT)
HEADS = replace(
    SHAPES["1.3b"],
    name="context",
    model="deepseek_coder:custom",
    num_hidden_layers=2,
    intermediate_size=1024,
    vocab_size=1056,
    num_tokens=1000,
)
LATENTS = replace(
    SHAPES["mla-1b"],
    name="context-mla",
    num_hidden_layers=2,
    intermediate_size=1024,
    vocab_size=1056,
    num_tokens=1000,
    experts=Experts(8, 1, 2, 256, (2, 1)),
)


@dataclass(frozen=True)
class Cache:
    """One kind of cache, and the model that has it."""

    name: str
    shape: Shape
    attention: str
    dtype: str = "auto"

    @property
    def file(self) -> str:
        """Its record's."""
        return f"context-{self.name.replace(', ', '-')}.json"


CACHES = {
    cache.name: cache
    for cache in (
        Cache("paged", HEADS, "paged"),
        Cache("paged, int8", HEADS, "paged", "int8"),
        Cache("flash", HEADS, "flash"),
        Cache("flash, int8", HEADS, "flash", "int8"),
        Cache("latent", LATENTS, "paged"),
    )
}


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    add = parser.add_argument
    add("--caches", default="/".join(CACHES), help=f"separated by slashes: {'/'.join(CACHES)}")
    add("--contexts", default=",".join(map(str, CONTEXTS)), help="tokens of the prompts")
    add("--rounds", type=int, default=2, help="runs of each context, of which each computes its prompt")
    add("--threads", type=int, default=2, help="threads, and cores that the run is pinned to")
    add("--workdir", type=Path, default=Path("build/benchmarks"), help="cache of checkpoints")
    add("--records", type=Path, default=Path("build/benchmarks/records"), help="where records are kept")
    add("--resume", action="store_true", help="leave out what has a record already")
    return parser.parse_args(arguments)


def measure(cache: Cache, options: argparse.Namespace, target: Path) -> None:
    """Run one cache at all contexts, and put its record in place.

    Raises:
        NpuZooError: the run failed, or a context did not run.
    """
    lengths = [int(text) for text in options.contexts.split(",")]
    command = [
        *(sys.executable, "-m", "npu_zoo", "bench", "offline", "--model", cache.shape.model),
        *("--weights", str(checkpoint_of(options.workdir.resolve(), cache.shape)), "--hardware", "cpu"),
        *("--dtype", cache.shape.dtype, "--attention", cache.attention, "--kv-cache-dtype", cache.dtype),
        *("--cases", json.dumps([[length, OUTPUT] for length in lengths]), "--rounds", str(options.rounds)),
        *("--max-model-len", str(max(lengths) + OUTPUT), "--max-num-seqs", "1", "--threads", str(options.threads)),
        *("--kv-cache-memory", "1GiB", "--no-enable-prefix-caching", "--allow-experimental"),
    ]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "record.json"
        done = subprocess.run([*command, "--json", str(file)], stdout=subprocess.DEVNULL)
        if done.returncode:
            raise UsageError(f"bench offline ended with status {done.returncode} for the cache '{cache.name}'")
        record = read_record(file, "bench offline")
    # Where the checkpoint lies here tells a reader nothing.
    asked = {name: value for name, value in record.arguments.items() if name != "weights"}
    named = {**asked, "benchmark": CONTEXT, "cache": cache.name}
    write_record(record.model_copy(update={"arguments": named}), target)


def main(arguments: list[str] | None = None) -> int:
    """Run what is asked for; a record after each cache."""
    options = parse_arguments(arguments)
    names = options.caches.split("/")
    unknown = [name for name in names if name not in CACHES]
    if unknown:
        print(f"error: no cache {', '.join(unknown)}; there are {'/'.join(CACHES)}", file=sys.stderr)
        return 2
    # Children inherit it, and the machine's own figures are taken under it too.
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.threads])
    try:
        for name in names:
            target = options.records / CACHES[name].file
            if options.resume and target.exists():
                continue
            print(f"{time.strftime('%H:%M:%S')} {name}", file=sys.stderr, flush=True)
            measure(CACHES[name], options, target)
    except (OSError, NpuZooError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
