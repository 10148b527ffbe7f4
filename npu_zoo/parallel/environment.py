"""What a launcher such as torchrun says to the ranks that it started.

Source: torchrun (Elastic Launch), section "Environment Variables", docs.pytorch.org/docs/stable/elastic/run.html.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from npu_zoo.core.errors import ConfigError

LAUNCHED_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "TORCHELASTIC_RUN_ID")
"""Any of these says that a launcher has started this process."""

_SIZES = ("WORLD_SIZE", "LOCAL_WORLD_SIZE")
_NUMBERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT")
_NEEDED = (*_NUMBERS, "MASTER_ADDR")
_MAX_PORT = 65_535


@dataclass(frozen=True)
class LaunchEnvironment:
    """This process's place among ranks that somebody else started. Every node has as many of them.

    Attributes:
        rank: among all, from 0.
        world_size: ranks in all.
        local_rank: among those of this node, from 0.
        local_world_size: ranks of this node.
        master_addr: where rank 0 is.
        master_port: the port that the ranks meet at there.
        group_rank: the node's number, from 0.
        run_id: the launcher's name for the run; empty where it has none.
    """

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    master_addr: str
    master_port: int
    group_rank: int
    run_id: str = ""

    @classmethod
    def from_environ(
        cls, environ: Mapping[str, str], asked: Mapping[str, int] | None = None
    ) -> LaunchEnvironment | None:
        """Read torchrun's variables; None where no launcher has set any. An empty variable counts as unset.

        Args:
            environ: the process's environment.
            asked: sizes that were asked for, by name; their product is the number of ranks that they take.

        Raises:
            ConfigError: variables are missing, have no sense, or contradict each other or ``asked``; all are named.
        """
        given = {name: value.strip() for name, value in environ.items() if value.strip()}
        if not any(name in given for name in LAUNCHED_VARIABLES):
            return None
        numbers, faults = _read_numbers(given)
        missing = [name for name in _NEEDED if name not in given]
        if missing:
            faults.append(f"{', '.join(missing)}: unset, and torchrun sets them")
        faults += _contradictions(numbers)
        faults += _differences(numbers, asked or {})
        if faults:
            raise ConfigError(_message(given, faults))
        return cls(
            rank=numbers["RANK"],
            world_size=numbers["WORLD_SIZE"],
            local_rank=numbers["LOCAL_RANK"],
            local_world_size=numbers["LOCAL_WORLD_SIZE"],
            master_addr=given["MASTER_ADDR"],
            master_port=numbers["MASTER_PORT"],
            group_rank=numbers["RANK"] // numbers["LOCAL_WORLD_SIZE"],
            run_id=given.get("TORCHELASTIC_RUN_ID", ""),
        )

    @property
    def num_nodes(self) -> int:
        """The nodes of the run."""
        return self.world_size // self.local_world_size


def _read_numbers(given: Mapping[str, str]) -> tuple[dict[str, int], list[str]]:
    """The numbers that have sense by themselves, and what is wrong with the others."""
    numbers, faults = {}, []
    for name in (*_NUMBERS, "GROUP_RANK"):
        if name not in given:
            continue
        least, most = (1 if name in (*_SIZES, "MASTER_PORT") else 0), (_MAX_PORT if name == "MASTER_PORT" else math.inf)
        value = int(given[name]) if given[name].isascii() and given[name].isdigit() else -1
        if least <= value <= most:
            numbers[name] = value
        else:
            wanted = f"from {least} to {most}" if most == _MAX_PORT else f"from {least} on"
            faults.append(f"{name}={given[name]}: not a whole number {wanted}")
    return numbers, faults


def _contradictions(numbers: Mapping[str, int]) -> list[str]:
    faults = []
    for rank, size in (("RANK", "WORLD_SIZE"), ("LOCAL_RANK", "LOCAL_WORLD_SIZE")):
        if rank in numbers and size in numbers and numbers[rank] >= numbers[size]:
            faults.append(f"{_shown(numbers, rank, size)}: ranks go from 0 to {numbers[size] - 1}")
    if all(name in numbers for name in _SIZES) and numbers["WORLD_SIZE"] % numbers["LOCAL_WORLD_SIZE"]:
        faults.append(f"{_shown(numbers, *_SIZES)}: not every node has as many ranks; start as many on each")
    elif all(name in numbers for name in ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE")):
        faults += _misplaced(numbers)
    return faults


def _misplaced(numbers: Mapping[str, int]) -> list[str]:
    """Ranks are numbered node by node."""
    group_rank, local_rank = divmod(numbers["RANK"], numbers["LOCAL_WORLD_SIZE"])
    if numbers["LOCAL_RANK"] != local_rank:
        shown = _shown(numbers, "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        return [f"{shown}: this rank would have LOCAL_RANK={local_rank}"]
    if numbers.get("GROUP_RANK", group_rank) != group_rank:
        shown = _shown(numbers, "RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK")
        return [f"{shown}: this rank would be on node {group_rank}"]
    return []


def _differences(numbers: Mapping[str, int], asked: Mapping[str, int]) -> list[str]:
    wanted = math.prod(asked.values())
    if not asked or numbers.get("WORLD_SIZE", wanted) == wanted:
        return []
    factors = " × ".join(f"{name} {size}" for name, size in asked.items())
    return [f"WORLD_SIZE={numbers['WORLD_SIZE']}: {factors} takes {wanted} {'rank' if wanted == 1 else 'ranks'}"]


def _shown(numbers: Mapping[str, int], *names: str) -> str:
    return ", ".join(f"{name}={numbers[name]}" for name in names)


def _message(given: Mapping[str, str], faults: list[str]) -> str:
    telling = ", ".join(name for name in LAUNCHED_VARIABLES if name in given)
    lines = [f"the environment says that a launcher started this rank ({telling}), but not how:", *faults]
    return "\n  ".join(lines) + f"\nstart it with torchrun, or unset {telling} to have the ranks started from here"
