"""What torchrun tells its ranks, and what is refused of it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from npu_zoo.core.errors import ConfigError
from npu_zoo.parallel.environment import LaunchEnvironment


def launched(**changes: str | None) -> dict[str, str]:
    """Rank 5 of two nodes with four ranks each, with changes; None takes a variable out."""
    variables: dict[str, str | None] = {
        "RANK": "5",
        "WORLD_SIZE": "8",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "4",
        "GROUP_RANK": "1",
        "MASTER_ADDR": "node0",
        "MASTER_PORT": "29500",
        "TORCHELASTIC_RUN_ID": "job-1",
        "PATH": "/bin",
    }
    return {name: value for name, value in {**variables, **changes}.items() if value is not None}


def refusal(environ: dict[str, str], asked: dict[str, int] | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        LaunchEnvironment.from_environ(environ, asked)
    return str(caught.value)


def test_a_launched_rank_knows_its_place() -> None:
    found = LaunchEnvironment.from_environ(launched(), {"tensor_parallel_size": 4, "pipeline_parallel_size": 2})
    assert found == LaunchEnvironment(
        rank=5,
        world_size=8,
        local_rank=1,
        local_world_size=4,
        master_addr="node0",
        master_port=29500,
        group_rank=1,
        run_id="job-1",
    )
    assert found.num_nodes == 2


@pytest.mark.parametrize(
    "environ", [{}, {"PATH": "/bin"}, {"MASTER_ADDR": "node0", "MASTER_PORT": "20030"}, {"RANK": "", "WORLD_SIZE": " "}]
)
def test_without_a_launcher_there_is_no_place(environ: dict[str, str]) -> None:
    assert LaunchEnvironment.from_environ(environ, {"tensor_parallel_size": 8}) is None


@given(nodes=st.integers(1, 9), size=st.integers(1, 9), data=st.data())
def test_every_place_of_every_run_is_accepted(nodes: int, size: int, data: st.DataObject) -> None:
    node, local = data.draw(st.integers(0, nodes - 1)), data.draw(st.integers(0, size - 1))
    numbers = {"RANK": node * size + local, "WORLD_SIZE": nodes * size, "LOCAL_RANK": local, "LOCAL_WORLD_SIZE": size}
    environ = launched(**{name: str(number) for name, number in numbers.items()}, GROUP_RANK=str(node))
    found = LaunchEnvironment.from_environ(environ, {"world_size": nodes * size})
    assert found is not None
    assert (found.rank, found.group_rank, found.local_rank, found.num_nodes) == (
        node * size + local,
        node,
        local,
        nodes,
    )


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"RANK": "8"}, "RANK=8, WORLD_SIZE=8: ranks go from 0 to 7"),
        ({"LOCAL_RANK": "4"}, "LOCAL_RANK=4, LOCAL_WORLD_SIZE=4: ranks go from 0 to 3"),
        ({"LOCAL_RANK": "2"}, "RANK=5, LOCAL_RANK=2, LOCAL_WORLD_SIZE=4: this rank would have LOCAL_RANK=1"),
        ({"GROUP_RANK": "0"}, "RANK=5, LOCAL_WORLD_SIZE=4, GROUP_RANK=0: this rank would be on node 1"),
        ({"WORLD_SIZE": "7"}, "WORLD_SIZE=7, LOCAL_WORLD_SIZE=4: not every node has as many ranks"),
        ({"LOCAL_WORLD_SIZE": "0"}, "LOCAL_WORLD_SIZE=0: not a whole number from 1 on"),
        ({"RANK": "-1"}, "RANK=-1: not a whole number from 0 on"),
        ({"RANK": "five"}, "RANK=five: not a whole number from 0 on"),
        ({"RANK": "٥"}, "RANK=٥: not a whole number from 0 on"),
        ({"MASTER_PORT": "65536"}, "MASTER_PORT=65536: not a whole number from 1 to 65535"),
        ({"MASTER_PORT": "0"}, "MASTER_PORT=0: not a whole number from 1 to 65535"),
        ({"MASTER_ADDR": None}, "MASTER_ADDR: unset, and torchrun sets them"),
        ({"LOCAL_RANK": None, "LOCAL_WORLD_SIZE": ""}, "LOCAL_RANK, LOCAL_WORLD_SIZE: unset"),
    ],
)
def test_what_has_no_sense_is_refused(changes: dict[str, str | None], told: str) -> None:
    message = refusal(launched(**changes))
    assert f"\n  {told}" in message
    assert message.endswith("to have the ranks started from here")


def test_every_fault_is_named_at_once() -> None:
    environ = launched(RANK="x", LOCAL_RANK="9", MASTER_PORT="70000", MASTER_ADDR=None)
    message = refusal(environ, {"tensor_parallel_size": 2, "pipeline_parallel_size": 2})
    for part in (
        "RANK=x",
        "LOCAL_RANK=9",
        "MASTER_PORT=70000",
        "MASTER_ADDR: unset",
        "WORLD_SIZE=8: tensor_parallel_size 2",
    ):
        assert part in message


def test_the_sizes_that_were_asked_for_are_held_against_the_launcher_s() -> None:
    told = refusal(launched(), {"tensor_parallel_size": 2, "pipeline_parallel_size": 2})
    assert "WORLD_SIZE=8: tensor_parallel_size 2 × pipeline_parallel_size 2 takes 4 ranks" in told
    assert "takes 1 rank\n" in refusal(launched(), {"tensor_parallel_size": 1})


VALUES = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=6) | st.integers(
    -2, 9
).map(str)


@given(st.dictionaries(st.sampled_from(sorted(launched())), VALUES | st.none()))
def test_whatever_stands_there_is_read_or_refused(changes: dict[str, str | None]) -> None:
    try:
        found = LaunchEnvironment.from_environ(launched(**changes))
    except ConfigError:
        return
    if found is not None:
        assert 0 <= found.local_rank < found.local_world_size <= found.world_size
        assert found.rank == found.group_rank * found.local_world_size + found.local_rank < found.world_size


PRINT_PLACE = """
import dataclasses, json, os, sys
from npu_zoo.parallel.environment import LaunchEnvironment
place = dataclasses.asdict(LaunchEnvironment.from_environ(os.environ, {"world_size": 2}))
open(f"{sys.argv[1]}/{place['rank']}.json", "w").write(json.dumps(place))
"""


@pytest.mark.slow
def test_torchrun_itself_is_understood(tmp_path: Path) -> None:
    pytest.importorskip("torch.distributed")
    program = tmp_path / "place.py"
    program.write_text(PRINT_PLACE)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--rdzv-id=a-run"]
    done = subprocess.run(
        [*command, str(program), str(tmp_path)], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    places = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert [(place["rank"], place["local_rank"], place["world_size"]) for place in places] == [(0, 0, 2), (1, 1, 2)]
    assert places[0]["master_port"] == places[1]["master_port"]
