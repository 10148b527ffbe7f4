"""``ranktable``: HCCL's table of ranks, servers and devices, written and checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import typer

from npu_zoo.cli.help import ZooCommand, ZooGroup, json_output
from npu_zoo.cli.options import JsonFlag
from npu_zoo.cli.output import print_json, print_table
from npu_zoo.core.errors import ConfigError, UsageError
from npu_zoo.core.hardware import PRODUCTS, chip_of
from npu_zoo.parallel.ranktable import (
    RankTable,
    check_rank_table,
    make_rank_table,
    parse_server,
    read_hccn,
    write_rank_table,
)

CHECK_KEYS: dict[str, str] = {
    "file": "The file that was read.",
    "world_size": "Ranks of all servers.",
    "servers": "One object for each server, in order.",
    "servers[].server_id": "Its name or address.",
    "servers[].ranks": "Its ranks.",
    "servers[].devices": "The device of each rank.",
    "servers[].addresses": "The addresses of each device's network card, with commas; null where none is given.",
}
"""What ``ranktable check --json`` writes."""

_LARGEST = 64 << 20


def _complete_hardware(incomplete: str) -> list[str]:
    return [name for name in _npus() if name.startswith(incomplete)]


Hardware = Annotated[
    str | None,
    typer.Option(
        "--hardware",
        metavar="NAME",
        help="The product that the table is for, whose own limits are looked at too.",
        autocompletion=_complete_hardware,
    ),
]
group = typer.Typer(
    cls=ZooGroup,
    help="Write and check HCCL's rank tables (RANK_TABLE_FILE).",
    rich_markup_mode=None,
)


@group.command(cls=ZooCommand)
def write(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A file that does not exist yet.")],
    server: Annotated[
        list[str],
        typer.Option(
            "--server",
            metavar="ADDRESS=DEVICES[:IPS]",
            help="A server, in the order of ranks; repeatable. 10.0.0.1=0-7, or with an address for each device.",
        ),
    ],
    hccn: Annotated[
        list[str] | None,
        typer.Option(
            "--hccn",
            metavar="[ADDRESS=]FILE",
            help="Read the addresses of a server's devices from its /etc/hccn.conf; repeatable, with ADDRESS.",
        ),
    ] = None,
    hardware: Hardware = None,
) -> None:
    """Write a rank table. Ranks are counted through the servers in their order; a file that exists is left alone."""
    _check_hardware(hardware)
    names = [text.partition("=")[0].strip() for text in server]
    given = _hccn_files(
        hccn or [], [name for name, text in zip(names, server, strict=True) if ":" not in _devices(text)]
    )
    unknown = [name for name in given if name not in names]
    if unknown:
        raise UsageError(f"--hccn {unknown[0]}=… is of no --server; there are {', '.join(names)}")
    read = {name: read_hccn(_read(Path(file))) for name, file in given.items()}
    servers = [parse_server(text, read.get(name)) for name, text in zip(names, server, strict=True)]
    table = make_rank_table(servers, hardware)
    write_rank_table(table, out)
    print(f"{out} has {_count(table)}")


@group.command(cls=ZooCommand)
@json_output(CHECK_KEYS)
def check(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The rank table.")],
    hardware: Hardware = None,
    as_json: JsonFlag = False,
) -> None:
    """Check a rank table as HCCL would, and say everything that is wrong with it at once."""
    _check_hardware(hardware)
    table = check_rank_table(_read(file), hardware)
    if as_json:
        print_json(_data(file, table))
        return
    rows = [
        [str(device.rank), server.server_id, str(device.device), device.device_ip or ""]
        for server in table.server_list
        for device in sorted(server.device, key=lambda device: device.rank)
    ]
    print_table(["rank", "server", "device", "address"], rows)
    print(f"\n{file} is fit: {_count(table)}")


def _hccn_files(given: Sequence[str], without: Sequence[str]) -> Mapping[str, str]:
    """Files by server; one that is named for no server is of the only one that is given without addresses."""
    files: dict[str, str] = {}
    for text in given:
        name, equals, file = text.partition("=")
        if not equals:
            if len(without) != 1:
                raise UsageError(
                    f"--hccn {text} is of one server, and {len(without) or 'none'} of those that are given have no "
                    "addresses yet; write --hccn ADDRESS=FILE for each"
                )
            name, file = without[0], name
        if name in files:
            raise UsageError(f"--hccn is given twice for {name}")
        files[name] = file
    return files


def _devices(server: str) -> str:
    return server.partition("=")[2]


def _npus() -> list[str]:
    return [name for name in PRODUCTS if chip_of(name).device == "npu"]


def _check_hardware(hardware: str | None) -> None:
    if hardware is not None and hardware not in _npus():
        raise UsageError(f"--hardware {hardware}: rank tables are of HCCL, on {', '.join(_npus())}")


def _read(file: Path) -> str:
    try:
        if file.stat().st_size > _LARGEST:
            raise ConfigError(f"{file} has more than {_LARGEST >> 20} MiB, which is no table of ranks")
        return file.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot read {file}: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{file} is no text in UTF-8") from None


def _count(table: RankTable) -> str:
    servers = len(table.server_list)
    return f"{table.world_size} ranks on {servers} server{'' if servers == 1 else 's'}"


def _data(file: Path, table: RankTable) -> dict[str, object]:
    servers = []
    for server in table.server_list:
        devices = sorted(server.device, key=lambda device: device.rank)
        servers.append(
            {
                "server_id": server.server_id,
                "ranks": [device.rank for device in devices],
                "devices": [device.device for device in devices],
                "addresses": [device.device_ip for device in devices],
            }
        )
    return {"file": str(file), "world_size": table.world_size, "servers": servers}
