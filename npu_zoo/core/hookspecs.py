"""The hooks of npu-zoo, for :mod:`pluggy`. A plugin implements any of them, marked with :data:`npu_zoo.hookimpl`.

All hooks but the last return a list of specs. They are called once per process, when the registry is built, in every
process that resolves a request or runs a rank; they must be cheap and must not import torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pluggy

from npu_zoo.core.specs import (
    AttentionBackendSpec,
    EngineSpec,
    FamilySpec,
    KernelSpec,
    QuantizationSpec,
    WeightFormatSpec,
)

if TYPE_CHECKING:
    import typer

PROJECT = "npu_zoo"
"""The entry-point group and pluggy project name."""

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def register_families() -> list[FamilySpec]:
    """Model families. A name that another plugin has taken drops the later plugin as a whole."""
    raise NotImplementedError


@hookspec
def register_kernels() -> list[KernelSpec]:
    """Implementations of operations. Of those for a chip and dtype the highest priority that is available wins."""
    raise NotImplementedError


@hookspec
def register_attention_backends() -> list[AttentionBackendSpec]:
    """Attention backends, by kind and chip."""
    raise NotImplementedError


@hookspec
def register_engines() -> list[EngineSpec]:
    """Engines that ``--engine`` can name."""
    raise NotImplementedError


@hookspec
def register_weight_formats() -> list[WeightFormatSpec]:
    """Checkpoint formats."""
    raise NotImplementedError


@hookspec
def register_quantization_methods() -> list[QuantizationSpec]:
    """Quantization methods that ``--quantization`` and matrix rows can name."""
    raise NotImplementedError


@hookspec
def register_commands(app: typer.Typer) -> None:
    """Add commands to the command line.

    Called only in a process that runs the command line, before the arguments are parsed. The body must be cheap;
    import what a command needs inside the command.

    Args:
        app: an application of the plugin's own, whose commands join the root's once the hook has returned;
            ``app.command()`` adds a command, ``app.add_typer()`` a group.
    """
