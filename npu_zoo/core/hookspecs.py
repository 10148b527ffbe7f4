"""The hooks of npu-zoo, for :mod:`pluggy`. A plugin implements any of them, marked with :data:`npu_zoo.hookimpl`.

All hooks but the last return a list of specs. They are called once per process, when the registry is built, in every
process that resolves a request or runs a rank; they must be cheap and must not import torch.

Each docstring says when the hook is called and what for (When), in which process the code that its specs name is
imported (Process), and shows an implementation (Example); docs/hooks.md is made of them.
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
    """Model families. A name that another plugin has taken drops the later plugin as a whole.

    When:
        The registry is built, which the first listing, check or run of a process does. A family's rows are asked when a
        request names it, its model is imported when an engine builds it.
    Process:
        The hook: every process that has a registry. The model: every rank.

    Example:
        from npu_zoo.api import FamilySpec, FeatureRow, VariantSpec, hookimpl

        ROWS = (
            FeatureRow(
                sizes=("custom",),
                hardware=("cpu",),
                dtype=("float32", "bfloat16"),
                world_size=(1,),
                attention=("paged",),
                source="README of my-package",
            ),
        )
        FAMILY = FamilySpec(
            name="my_family",
            title="My Family",
            architectures=("LlamaForCausalLM",),
            model="npu_zoo.nn.decoder:LlamaForCausalLM",
            variants=(VariantSpec(name="custom", size="custom", title="Any checkpoint of the architecture"),),
            default_variant="custom",
            rows=ROWS,
        )


        @hookimpl
        def register_families() -> list[FamilySpec]:
            return [FAMILY]
    """
    raise NotImplementedError


@hookspec
def register_kernels() -> list[KernelSpec]:
    """Implementations of operations. Of those for a chip and dtype the highest priority that is available wins.

    A kernel for a shared operation serves every family; one for an operation of :attr:`FamilySpec.operations` the
    families that name it.

    When:
        The registry is built. A kernel is chosen when a request is resolved, from specs alone, and imported when an
        engine builds the model.
    Process:
        The hook: every process that has a registry. The kernel: every rank.

    Example:
        from npu_zoo.api import KernelSpec, hookimpl


        @hookimpl
        def register_kernels() -> list[KernelSpec]:
            return [
                KernelSpec(
                    name="cpu_plain_linear",
                    operation="linear",
                    chip="cpu",
                    dtypes=("float32", "bfloat16", "float16"),
                    implementation="npu_zoo.nn.kernels.reference:Linear",
                    priority=5,
                    description="torch's own operator, on the weight as it is",
                )
            ]
    """
    raise NotImplementedError


@hookspec
def register_attention_backends() -> list[AttentionBackendSpec]:
    """Attention backends, by kind and chip.

    When:
        The registry is built. A backend is chosen when a request is resolved, from specs alone, and imported when an
        engine makes its cache.
    Process:
        The hook: every process that has a registry. The backend: every rank.

    Example:
        from npu_zoo.api import AttentionBackendSpec, hookimpl


        @hookimpl
        def register_attention_backends() -> list[AttentionBackendSpec]:
            return [
                AttentionBackendSpec(
                    name="torch_flash",
                    kind="flash",
                    chip="any",
                    dtypes=("float32", "bfloat16", "float16"),
                    implementation="npu_zoo.nn.attention.contiguous:ContiguousAttention",
                    prefix_caching=False,
                    priority=0,
                    description="one contiguous stretch of keys and values per sequence",
                )
            ]
    """
    raise NotImplementedError


@hookspec
def register_engines() -> list[EngineSpec]:
    """Engines that ``--engine`` can name.

    When:
        The registry is built. The engine is imported when one is made for a request that was resolved.
    Process:
        The hook: every process that has a registry. The engine: the process that asks for it, which is the first rank;
        what runs the others is the engine's own business.

    Example:
        from npu_zoo.api import EngineSpec, hookimpl


        @hookimpl
        def register_engines() -> list[EngineSpec]:
            return [
                EngineSpec(
                    name="native",
                    implementation="npu_zoo.engine.engine:NativeEngine",
                    chips=("cpu", "cuda", "ascend910b", "ascend310p"),
                    requires=("torch", "transformers"),
                    description="continuous batching over a paged KV cache, in torch",
                )
            ]
    """
    raise NotImplementedError


@hookspec
def register_weight_formats() -> list[WeightFormatSpec]:
    """Checkpoint formats. A directory is of the first format whose files it has.

    When:
        The registry is built. A format's loader is imported when an engine reads weights, its source and target when
        `npu-zoo convert` reads or writes it.
    Process:
        The hook: every process that has a registry. The loader: every rank. Source and target: the command line's.

    Example:
        from npu_zoo.api import WeightFormatSpec, hookimpl


        @hookimpl
        def register_weight_formats() -> list[WeightFormatSpec]:
            return [
                WeightFormatSpec(
                    name="hf-safetensors",
                    patterns=("*.safetensors",),
                    loader="npu_zoo.weights.safetensors:SafetensorsLoader",
                    source="npu_zoo.weights.formats.hf:read_safetensors",
                    target="npu_zoo.weights.formats.hf:SafetensorsTarget",
                    description="Hugging Face's safetensors files",
                )
            ]
    """
    raise NotImplementedError


@hookspec
def register_quantization_methods() -> list[QuantizationSpec]:
    """Quantization methods that ``--quantization`` and matrix rows can name.

    When:
        The registry is built. A method's reader is called when a request is resolved whose checkpoint's config.json
        names its ``quant_method``; the method is imported when an engine builds the model.
    Process:
        The hook: every process that has a registry. The reader: the process that resolves the request, without torch.
        The method: every rank.

    Example:
        from npu_zoo.api import QuantizationSpec, hookimpl


        @hookimpl
        def register_quantization_methods() -> list[QuantizationSpec]:
            return [
                QuantizationSpec(
                    name="w8a8",
                    weight_bits=8,
                    activation_bits=8,
                    chips=("any",),
                    method="npu_zoo.nn.quantization:Int8Weights",
                    description="int8 weights by channel, activations int8 with a scale per token",
                )
            ]
    """
    raise NotImplementedError


@hookspec
def register_commands(app: typer.Typer) -> None:
    """Add commands to the command line.

    The body must be cheap; import what a command needs inside the command. A name that the zoo or an earlier plugin has
    taken is left out with a warning.

    Args:
        app: an application of the plugin's own, whose commands join the root's once the hook has returned;
            ``app.command()`` adds a command, ``app.add_typer()`` a group.

    When:
        The command line starts, after the registry is built and before the arguments are parsed.
    Process:
        The command line's alone; neither ranks nor programs that import npu_zoo call it.

    Example:
        import typer

        from npu_zoo.api import hookimpl


        @hookimpl
        def register_commands(app: typer.Typer) -> None:
            @app.command("my-family", help="Say what this plugin is.")
            def show() -> None:
                typer.echo("a family of mine")
    """
