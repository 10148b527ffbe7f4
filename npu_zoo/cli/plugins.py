"""``plugins``: what was found through the entry points, and why something was dropped."""

from __future__ import annotations

from typing import Any

from npu_zoo.cli.options import JsonFlag
from npu_zoo.cli.output import print_json, print_table
from npu_zoo.registry import PluginRecord, get_registry


def plugins(as_json: JsonFlag = False) -> None:
    """List plugins, what they registered, and why some were dropped."""
    records = list(get_registry().plugins.values())
    if as_json:
        print_json([_data(record) for record in records])
        return
    columns = ["plugin", "from", "state", "registered", "remark"]
    rows = [[r.name, r.distribution or "-", _state(r), _registered(r), "\n".join(r.remarks)] for r in records]
    if not any(row[-1] for row in rows):
        columns, rows = columns[:-1], [row[:-1] for row in rows]
    print_table(columns, rows)
    for record in records:
        if record.error:
            print(f"\n{record.name}: " + record.error.replace("\n", "\n  "))


def _state(record: PluginRecord) -> str:
    if record.error is None:
        return "loaded"
    return "broken" if record.registered else "dropped"


def _registered(record: PluginRecord) -> str:
    parts = []
    for hook, names in record.registered.items():
        kind = hook.removeprefix("register_").replace("_", " ")
        parts.append(f"{kind}: {', '.join(names)}")
    return "\n".join(parts) or "-"


def _data(record: PluginRecord) -> dict[str, Any]:
    return {
        "name": record.name,
        "target": record.target,
        "distribution": record.distribution,
        "builtin": record.builtin,
        "state": _state(record),
        "registered": {hook.removeprefix("register_"): names for hook, names in record.registered.items()},
        "error": record.error,
        "remarks": record.remarks,
    }
