"""HCCL's rank table: which device of which server a rank runs on, as JSON that HCCL reads (``RANK_TABLE_FILE``).

Sources: HCCL user guide, cluster information, rank tables of Atlas A2 products and of the Atlas 300I Duo; where those
pages leave something open, what HCCL's own parser takes.
"""

from __future__ import annotations

import contextlib
import ipaddress
import json
import os
import re
import secrets
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from npu_zoo.core.errors import ConfigError, validation_lines
from npu_zoo.core.hardware import PRODUCTS, Product

VERSION = "1.0"
COMPLETED = "completed"
LONGEST_SERVER_ID = 64
MOST_DEVICES = 16
"""Devices of a server, as HCCL's parser has it on 910B and 310P."""

Devices = Sequence[tuple[int, str | None]]
"""Devices of a server by number, each with the address of its network card, or None."""

_HCCN = re.compile(r"\s*address_(\d{1,4})\s*=\s*(\S+)\s*", re.ASCII)


class _Part(BaseModel):
    """Strings alone, as HCCL's parser takes nothing else; keys that other tools add are passed over, as HCCL does."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)


class RankDevice(_Part):
    """One rank's device.

    Attributes:
        device_id: its number on its server, as in ``/dev/davinci0``.
        device_ip: the address of its network card, or several with commas; a single server needs none.
        device_port: where HCCL listens at that card; 16666 unless given.
        rank_id: the rank.
    """

    device_id: str = Field(pattern=r"^[0-9]{1,4}$")
    device_ip: str | None = None
    device_port: str | None = Field(default=None, pattern=r"^[0-9]{1,5}$")
    rank_id: str = Field(pattern=r"^[0-9]{1,6}$")

    @property
    def device(self) -> int:
        """The device's number on its server."""
        return int(self.device_id)

    @property
    def rank(self) -> int:
        """The rank's number."""
        return int(self.rank_id)

    @property
    def addresses(self) -> list[str]:
        """The addresses of the network card."""
        return self.device_ip.split(",") if self.device_ip else []


class RankServer(_Part):
    """One server.

    Attributes:
        server_id: any name that no other server has, often its address.
        device: its devices.
        host_nic_ip: ``reserve``, or the host's own address; tools write it, and HCCL passes it over.
    """

    server_id: str = Field(min_length=1, max_length=LONGEST_SERVER_ID)
    device: tuple[RankDevice, ...] = Field(min_length=1, strict=False)
    host_nic_ip: str | None = None


class RankTable(_Part):
    """A rank table of version 1.0, the one of Atlas A2 products and of the Atlas 300I Duo."""

    version: str
    server_count: str = Field(pattern=r"^[0-9]{1,6}$")
    server_list: tuple[RankServer, ...] = Field(min_length=1, strict=False)
    status: str

    @property
    def world_size(self) -> int:
        """Ranks of all servers."""
        return sum(len(server.device) for server in self.server_list)

    def to_json(self) -> str:
        """The text of the file."""
        return json.dumps(self.model_dump(exclude_none=True), indent=2) + "\n"


def check_rank_table(text: str, hardware: str | None = None) -> RankTable:
    """The rank table in a file's text.

    Args:
        text: the file's text.
        hardware: the product that it is for, whose own limits are looked at too.

    Raises:
        ConfigError: it is none; every fault is listed.
    """
    data = _read_json(text)
    table, faults = _parse(data)
    if table is None:  # with the form put right, the rest can still be told
        table, _ = _parse(_mended(data))
    if table is not None:
        faults += [*_table_faults(table), *_rank_faults(table), *_address_faults(table)]
        if hardware is not None:
            faults += _product_faults(table, PRODUCTS[hardware])
    if table is None or faults:
        number = f"{len(faults)} faults" if len(faults) > 1 else "a fault"
        raise ConfigError(f"the rank table has {number}:\n  " + "\n  ".join(faults))
    return table


def make_rank_table(servers: Sequence[tuple[str, Devices]], hardware: str | None = None) -> RankTable:
    """A rank table of servers in their order, ranks counted through.

    Args:
        servers: each server's name or address, and its devices.
        hardware: the product that it is for.

    Raises:
        ConfigError: it would be unfit; every fault is listed.
    """
    rank, listed = 0, []
    for address, devices in servers:
        ranked = [_device(number, ip, rank + position) for position, (number, ip) in enumerate(devices)]
        rank += len(ranked)
        listed.append({"server_id": address, "device": ranked, "host_nic_ip": "reserve"})
    table = {"version": VERSION, "server_count": str(len(listed)), "server_list": listed, "status": COMPLETED}
    return check_rank_table(json.dumps(table), hardware)


def write_rank_table(table: RankTable, path: Path) -> None:
    """Write a rank table to a file that does not exist yet; it is there whole or not at all.

    Raises:
        ConfigError: the file exists, or cannot be written.
    """
    scratch = path.parent / f".ranktable-{secrets.token_hex(6)}"
    try:
        with scratch.open("x", encoding="utf-8") as file:
            file.write(table.to_json())
            file.flush()
            os.fsync(file.fileno())
        os.link(scratch, path)  # which does not replace, as a rename would
    except FileExistsError:
        raise ConfigError(f"cannot write {path}: it exists; delete it or choose another name") from None
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror or error}; choose another directory") from None
    finally:
        with contextlib.suppress(OSError):
            scratch.unlink()


def read_hccn(text: str) -> dict[int, str]:
    """Devices' addresses from the text of ``/etc/hccn.conf``: ``address_0=192.168.1.8``.

    Raises:
        ConfigError: it names no address, or two for one device.
    """
    found: dict[int, str] = {}
    for line in text.splitlines():
        match = _HCCN.fullmatch(line)
        if match is None:
            continue
        device, address = int(match.group(1)), match.group(2)
        if found.setdefault(device, address) != address:
            raise ConfigError(f"hccn.conf gives device {device} two addresses, {found[device]} and {address}; keep one")
    if not found:
        raise ConfigError("hccn.conf has no line such as address_0=192.168.1.8; hccn_tool sets addresses")
    return found


def parse_server(text: str, hccn: Mapping[int, str] | None = None) -> tuple[str, Devices]:
    """A server from ``ADDRESS=DEVICES[:IPS]``, such as ``10.0.0.1=0-3`` or ``node_0=0,1:192.168.1.8,192.168.1.9``.

    Args:
        text: what was given.
        hccn: devices' addresses, for a server that is given without.

    Raises:
        ConfigError: it has another form, or not one address for each device.
    """
    address, equals, rest = text.partition("=")
    shown, colon, ips = rest.partition(":")
    devices = _numbers(shown)
    if not address.strip() or not equals or not devices:
        raise ConfigError(f"--server {text!r} is no ADDRESS=DEVICES[:IPS]; write 10.0.0.1=0-7, or 10.0.0.1=0,1:IP,IP")
    if not colon:
        missing = [str(number) for number in devices if hccn is not None and number not in hccn]
        if missing:
            raise ConfigError(f"hccn.conf has no address of device {', '.join(missing)} of server {address}")
        return address.strip(), [(number, hccn[number] if hccn else None) for number in devices]
    if hccn is not None:
        raise ConfigError(f"server {address} has its addresses already; leave out those in --server, or its --hccn")
    addresses = [part.strip() for part in ips.split(",")]
    if len(addresses) != len(devices):
        raise ConfigError(
            f"--server {text!r} names {len(devices)} devices and {len(addresses)} addresses; give one for each device"
        )
    return address.strip(), list(zip(devices, addresses, strict=True))


def _numbers(text: str) -> list[int]:
    """Numbers from ``0-3,6``; none where it is anything else."""
    numbers: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,4})(?:-(\d{1,4}))?\s*", part, re.ASCII)
        if match is None:
            return []
        first, last = int(match.group(1)), int(match.group(2) or match.group(1))
        if last < first:
            return []
        numbers += range(first, last + 1)
    return numbers


def _device(number: int, ip: str | None, rank: int) -> dict[str, str]:
    return {"device_id": str(number), **({"device_ip": ip} if ip is not None else {}), "rank_id": str(rank)}


def _read_json(text: str) -> Any:
    try:
        data = json.loads(text.removeprefix("\ufeff"), object_pairs_hook=_without_repeats)
    except json.JSONDecodeError as error:
        hint = "; comments, which HCCL's examples have, must go" if re.search(r"^\s*//|,\s*//", text, re.M) else ""
        raise ConfigError(f"the rank table is no JSON: {error}{hint}") from None
    except (RecursionError, ValueError) as error:
        raise ConfigError(f"the rank table is no JSON: {error}") from None
    if not isinstance(data, dict):
        raise ConfigError("the rank table is no JSON object; it begins with {")
    if "group_list" in data and "server_list" not in data:
        raise ConfigError(
            "this is a rank table of the old form, with group_list, which is for Atlas training products alone; "
            "write one with server_list: npu-zoo ranktable write"
        )
    if data.get("version") not in (None, VERSION) and isinstance(data["version"], str):
        raise ConfigError(
            f"this is a rank table of version {data['version']}; Atlas A2 products and the 300I Duo take {VERSION}"
        )
    return data


def _parse(data: Any) -> tuple[RankTable | None, list[str]]:
    try:
        return RankTable.model_validate(data), []
    except ValidationError as error:
        return None, validation_lines(error)


def _mended(value: Any, depth: int = 6) -> Any:
    """A table with numbers as strings, and with what says nothing of its own where that is missing."""
    if depth == 0:
        return value
    if isinstance(value, dict):
        mended = {name: _mended(inner, depth - 1) for name, inner in value.items()}
        servers = mended.get("server_list")
        if isinstance(servers, list):
            mended = {"version": VERSION, "server_count": str(len(servers)), "status": COMPLETED, **mended}
        return mended
    if isinstance(value, list):
        return [_mended(inner, depth - 1) for inner in value]
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    repeated = [name for name, count in Counter(name for name, _ in pairs).items() if count > 1]
    if repeated:
        raise ValueError(f"an object has {', '.join(map(repr, repeated))} more than once")
    return dict(pairs)


def _table_faults(table: RankTable) -> Iterator[str]:
    if table.status != COMPLETED:
        yield f"status is {table.status!r}; HCCL takes a table that is {COMPLETED!r}"
    if int(table.server_count) != len(table.server_list):
        yield f"server_count is {table.server_count}, and server_list has {len(table.server_list)}"
    for name, count in Counter(server.server_id for server in table.server_list).items():
        if count > 1:
            yield f"server_id {name} is given to {count} servers"
    for server in table.server_list:
        for number, count in Counter(device.device for device in server.device).items():
            if count > 1:
                yield f"server {server.server_id} has device {number} {count} times"
            if number >= MOST_DEVICES:
                yield f"server {server.server_id} has device {number}; numbers go from 0 to {MOST_DEVICES - 1}"
        if server.host_nic_ip not in (None, "reserve") and _address(server.host_nic_ip or "") is None:
            yield f"server {server.server_id} has host_nic_ip {server.host_nic_ip!r}, which is no address nor 'reserve'"
        for device in server.device:
            if device.device_port is not None and not 0 < int(device.device_port) < 1 << 16:
                yield f"rank {device.rank} has device_port {device.device_port}; ports go from 1 to 65535"


def _rank_faults(table: RankTable) -> Iterator[str]:
    """Ranks count from 0 without a gap, and a server's ranks follow those of the server before it."""
    counts = Counter(device.rank for server in table.server_list for device in server.device)
    size = table.world_size
    missing = [rank for rank in range(size) if rank not in counts]
    if missing:
        yield f"of ranks 0 to {size - 1}, {_some(missing)} {'is' if len(missing) == 1 else 'are'} missing"
    for rank, count in counts.items():
        if count > 1:
            yield f"rank {rank} is given to {count} devices"
        if rank >= size:
            yield f"rank {rank} is beyond the {size} devices of the table"
    if missing:
        return
    first = 0
    for server in table.server_list:
        ranks, own = sorted(device.rank for device in server.device), range(first, first + len(server.device))
        if ranks != list(own):
            yield f"server {server.server_id} has ranks {_some(ranks)}; by the order of servers its are {_some(own)}"
        first += len(ranks)


def _address_faults(table: RankTable) -> Iterator[str]:
    """Addresses are valid, of one family and no two alike; servers reach each other by them."""
    devices = [(server, device) for server in table.server_list for device in server.device]
    named = [
        (f"device {device.device} of server {server.server_id}", text)
        for server, device in devices
        for text in device.addresses
    ]
    places: dict[str, list[str]] = defaultdict(list)
    families = set()
    for where, text in named:
        address = _address(text)
        if address is None or address.is_unspecified or address.is_multicast:
            yield f"{where} has the address {text!r}, which is none of a network card"
        else:
            places[str(address)].append(where)
            families.add(address.version)
    for shown, found in places.items():
        if len(found) > 1:
            yield f"address {shown} is given to {' and '.join(found)}"
    if len(families) > 1:
        yield "addresses are of IPv4 and of IPv6; HCCL takes one of both"
    without = [device.rank for _, device in devices if not device.addresses]
    if without and (len(table.server_list) > 1 or len(without) < len(devices)):
        why = "servers reach each other by it" if len(table.server_list) > 1 else "the other ranks have one"
        yield f"device_ip is missing of rank {_some(without)}; {why}"
    elif len({len(device.addresses) for _, device in devices}) > 1:
        yield "devices have different numbers of addresses in device_ip; HCCL takes as many for each"


def _product_faults(table: RankTable, product: Product) -> Iterator[str]:
    dies = product.dies_per_card
    for server in table.server_list:
        name, count = f"server {server.server_id}", len(server.device)
        if product.devices and max(device.device for device in server.device) >= product.devices:
            yield f"{name} goes beyond devices 0 to {product.devices - 1}, which {product.title} has"
        if dies > 1 and count % dies:
            counted = f"{count} device{'s' * (count > 1)}"
            yield f"{name} has {counted}; ranks take whole cards, and one of {product.title} has {dies}"
        if dies > 1 and any(not device.addresses for device in server.device):
            yield f"{name} has devices without device_ip, which {product.title} needs on a single server too"
    counts = {len(server.device) for server in table.server_list}
    if dies > 1 and len(counts) > 1:
        yield f"servers have {_some(sorted(counts))} devices; on {product.title} HCCL takes as many of each"


def _address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(text)
    except ValueError:
        return None


def _some(numbers: Sequence[int]) -> str:
    """Numbers of a list, the first of many."""
    shown = ", ".join(map(str, numbers[:8]))
    return shown + (f" and {len(numbers) - 8} more" if len(numbers) > 8 else "")
