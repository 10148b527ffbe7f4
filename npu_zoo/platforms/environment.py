"""Environment variables of the Ascend software: presets that overwrite nothing of the user's, and near misses."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, MutableMapping
from fnmatch import fnmatchcase

KNOWN: dict[str, str] = {
    **dict.fromkeys(
        (
            "ASCEND_RT_VISIBLE_DEVICES", "ASCEND_HOME_PATH", "ASCEND_TOOLKIT_HOME", "ASCEND_OPP_PATH",
            "ASCEND_AICPU_PATH", "ASCEND_LAUNCH_BLOCKING", "ASCEND_GLOBAL_LOG_LEVEL", "ASCEND_GLOBAL_EVENT_ENABLE",
            "ASCEND_SLOG_PRINT_TO_STDOUT", "ASCEND_PROCESS_LOG_PATH", "ASCEND_WORK_PATH", "ASCEND_CACHE_PATH",
            "HCCL_CONNECT_TIMEOUT", "HCCL_EXEC_TIMEOUT", "HCCL_WHITELIST_DISABLE", "HCCL_WHITELIST_FILE", "HCCL_IF_IP",
            "HCCL_SOCKET_IFNAME", "HCCL_SOCKET_FAMILY", "HCCL_IF_BASE_PORT", "HCCL_BUFFSIZE", "HCCL_DETERMINISTIC",
            "HCCL_OP_EXPANSION_MODE", "HCCL_INTRA_PCIE_ENABLE", "HCCL_INTRA_ROCE_ENABLE", "HCCL_ALGO",
        ),
        "CANN, environment variable reference",
    ),
    **dict.fromkeys(
        ("TASK_QUEUE_ENABLE", "INF_NAN_MODE_ENABLE", "PYTORCH_NPU_ALLOC_CONF", "COMBINED_ENABLE", "ACL_OP_INIT_MODE"),
        "torch_npu, environment variable reference",
    ),
    **dict.fromkeys(
        (
            "ATB_HOME_PATH", "ATB_LAYER_INTERNAL_TENSOR_REUSE", "ATB_OPERATION_EXECUTE_ASYNC", "ATB_CONVERT_NCHW_TO_ND",
            "ATB_WORKSPACE_MEM_ALLOC_GLOBAL", "ATB_CONTEXT_WORKSPACE_SIZE", "ATB_LAUNCH_KERNEL_WITH_TILING",
            "ATB_MATMUL_SHUFFLE_K_ENABLE", "ATB_LLM_BENCHMARK_ENABLE", "LCCL_DETERMINISTIC",
        ),
        "MindIE, model zoo scripts",
    ),
}  # fmt: skip
"""Variables of the Ascend software by name, with the document that names them. It is not complete."""

DETERMINISTIC: dict[str, str] = {
    "LCCL_DETERMINISTIC": "1",
    "HCCL_DETERMINISTIC": "true",
    "ATB_MATMUL_SHUFFLE_K_ENABLE": "0",
}
"""What MindIE's accuracy tests set, so that ranks and matrix products sum in the same order in every run."""

_PREFIXES = ("ASCEND_", "HCCL_", "ATB_", "LCCL_", "TASK_QUEUE_", "INF_NAN_", "PYTORCH_NPU_")
_CLOSE = 0.87


def presets(wanted: Mapping[str, str], read: Iterable[str]) -> dict[str, str]:
    """Those of the wanted variables that something in use reads.

    Args:
        wanted: what a family's vendor sets, by name.
        read: patterns of the names that the engine and the attention backend in use read, such as ``ATB_*``.
    """
    patterns = tuple(read)
    return {name: value for name, value in wanted.items() if any(fnmatchcase(name, p) for p in patterns)}


def apply_presets(wanted: Mapping[str, str], environ: MutableMapping[str, str]) -> dict[str, str]:
    """Set what the user has not set, be it to nothing; returns what was set."""
    added = {name: value for name, value in wanted.items() if name not in environ}
    environ.update(added)
    return added


def near_misses(environ: Mapping[str, str]) -> list[tuple[str, str]]:
    """Variables that look like one of the Ascend software and are none, each with the one that may be meant."""
    found = []
    for name in sorted(environ):
        if name in KNOWN or not name.startswith(_PREFIXES):
            continue
        close = difflib.get_close_matches(name, KNOWN, 1, _CLOSE)
        if close:
            found.append((name, close[0]))
    return found
