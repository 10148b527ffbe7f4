"""Puts golden CPU semantics under torch_npu's operators.

For each operator: the documented rules are checked, then torch_npu's own kernel runs against the launch recorder, which
checks its arguments, allocates the outputs and names its launches, and then the golden values are written into those
outputs. Operators that only touch metadata stay as they are. Everything else fails by name in the recorder.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from typing import Any

import torch

from npu_zoo.simulator.errors import SimulatorError
from npu_zoo.simulator.golden import NO_LAUNCH, Fitted, Golden, load_golden
from npu_zoo.simulator.graph import Graphs
from npu_zoo.simulator.memory import DeviceMemory
from npu_zoo.simulator.random import GeneratorMirror
from npu_zoo.simulator.rules.table import RuleTable, load_rules
from npu_zoo.simulator.runtime import Runtime

_KEY, _AUTOGRAD_KEY = "PrivateUse1", "AutogradPrivateUse1"

NATIVE_PREFIXES = (
    "empty", "new_empty", "set_", "resize", "_resize", "view", "as_strided", "_reshape_alias", "squeeze", "unsqueeze",
    "unfold", "is_pinned", "_pin_memory", "pin_memory", "record_stream", "_has_same_storage", "_conj", "_neg_view",
    "contiguous", "_to_copy", "_local_scalar_dense", "item", "is_set_to", "_copy_from", "detach", "lift",
)  # fmt: skip
"""aten operators that touch metadata, or copy bytes through the runtime: torch_npu's own code does them right."""

DATA_DEPENDENT = frozenset({
    "nonzero", "masked_select", "_unique", "_unique2", "unique_dim", "unique_consecutive", "repeat_interleave",
    "multinomial", "equal", "bincount", "is_nonzero", "histc", "allclose", "one_hot",
})  # fmt: skip
"""aten operators whose result's shape or control flow depends on values, so that the kernel cannot run first."""

INDEXING = ("index", "_index", "_unsafe_index", "slice", "copy")
"""aten operators that take tensors of the host beside those of the device."""


_below_autograd: Any = torch._C._AutoDispatchBelowAutograd
_Library: Any = torch.library.Library  # its methods are not typed


class Overrides:
    """The overrides of this process. Keep the object: its libraries unregister what they hold when they go.

    Attributes:
        graphs: the tapes.
        memory: device memory as CPU tensors.
        rules: the documented rules for this chip.
        names: what is overridden.
        golden_only: calls of operators whose own kernel was not run, by name.
        cpu_fallbacks: calls that torch_npu would have computed on the host, by name.
    """

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime
        self.memory = DeviceMemory(runtime.base, runtime.size)
        self.graphs = Graphs(runtime)
        self.mirror = GeneratorMirror()
        self.rules = RuleTable(load_rules(), runtime.machine.chip)
        self.depth = 0
        self.nested_error: Exception | None = None
        self.names: set[str] = set()
        self.golden_only: dict[str, int] = {}
        self.cpu_fallbacks: dict[str, int] = {}
        self._libraries: dict[str, Any] = {}
        self._autograd = set(torch._C._dispatch_get_registrations_for_dispatch_key(_AUTOGRAD_KEY))

    def install(self) -> None:
        """Override every operator that golden semantics exist for."""
        fused = load_golden()
        for name in torch._C._dispatch_get_registrations_for_dispatch_key(_KEY):
            if name in fused:
                self._override(name, fused[name])
            elif name.startswith("aten::") and _is_computed(name):
                self._override(name, None)
        for name in torch._C._dispatch_get_all_op_names():
            if name.startswith("aten::") and _falls_back(name) and _is_computed(name):
                self._override(name, None, falls_back=True)

    def _override(self, name: str, golden: Golden | None, *, falls_back: bool = False) -> None:
        operator = Operator(self, name, golden, falls_back=falls_back)
        library = self._library(name.split("::")[0])
        library.impl(name, operator, _KEY, with_keyset=True, allow_override=True)
        if name in self._autograd:
            library.impl(name, operator.above_autograd, _AUTOGRAD_KEY, with_keyset=True, allow_override=True)
        self.names.add(name)

    def _library(self, namespace: str) -> Any:
        if namespace not in self._libraries:
            self._libraries[namespace] = _Library(namespace, "IMPL")
        return self._libraries[namespace]

    def to_host(self, value: Any) -> Any:
        """An argument as the CPU sees it: tensors as views, the device as the CPU, everything else as it is."""
        if isinstance(value, torch.Tensor):
            return self.memory.view(value) if value.device.type == "npu" else value
        if isinstance(value, (list, tuple)):
            return type(value)(self.to_host(item) for item in value)
        if isinstance(value, torch.device):
            return torch.device("cpu")
        return value


class Operator:
    """One overridden operator, called by the dispatcher."""

    def __init__(self, overrides: Overrides, name: str, golden: Golden | None, *, falls_back: bool = False) -> None:
        self.name = name
        self._falls_back = falls_back
        self._sim = overrides
        self._op = overload(name)
        self._schema = self._op._schema
        self._golden = golden
        base = name.split("::")[1].split(".")[0]
        self._data_dependent = golden is None and base in DATA_DEPENDENT
        self._native = not self._data_dependent and not falls_back and (golden is None or golden.native)
        self._kernel = torch.library.get_kernel(name, _KEY) if self._native else None
        self._mixes_devices = golden is not None or base.startswith(INDEXING)
        self._positional = [a.name for a in self._schema.arguments if not a.kwarg_only]
        self._keywords = [a.name for a in self._schema.arguments if a.kwarg_only]
        self._indexes = golden is None and base.startswith(INDEXING)
        self._written = [a.name for a in self._schema.arguments if a.alias_info and a.alias_info.is_write]
        self._fresh = any(r.alias_info is None or not r.alias_info.is_write for r in self._schema.returns)
        self._generator = next((a.name for a in self._schema.arguments if "Generator" in str(a.type)), None)
        self._outs = [a.name for a in self._schema.arguments if a.is_out] if golden is None else []

    def __call__(self, keyset: Any, *args: Any, **kwargs: Any) -> Any:
        """Check, launch and compute one call."""
        try:
            return self._call(keyset, args, kwargs)
        except Exception as error:
            if self._sim.depth:  # C++ stands between this call and the outer one, and may lose what was raised
                self._sim.nested_error = error
            raise

    def above_autograd(self, keyset: Any, *args: Any, **kwargs: Any) -> Any:
        """The same for operators with a kernel of their own at the autograd key.

        Fake tensors, distributed ones and other subclasses that dispatch themselves come after that key.
        """
        if any(_dispatches_itself(tensor) for tensor in _tensors([*args, *kwargs.values()])):
            with _below_autograd():
                return self._op(*args, **kwargs)
        return self(keyset, *args, **kwargs)

    def _call(self, keyset: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        sim = self._sim
        arguments = self._bind(args, kwargs)
        masked = self._indexes and _has_mask(arguments)
        if self._data_dependent or masked:
            sim.graphs.refuse(self.name, "the shape of its result depends on values")
        if not self._mixes_devices:
            self._check_devices(arguments)
        sim.rules.check(self.name, arguments)
        if self._golden is not None and self._golden.on_device:
            sim.graphs.refuse(self.name, "it allocates what a graph cannot hold")
            self._count()
            return self._golden.function(sim.memory, **arguments)
        generator = self._device_generator(arguments)
        mirror = None
        if generator is not None:
            mirror = sim.mirror.captured() if sim.graphs.capturing else sim.mirror.begin(generator)
        if masked or not self._native:
            fresh = self._without_kernel(arguments, mirror)
        else:
            fresh = self._run_kernel(keyset, arguments)
            self._run_or_capture(arguments, fresh, mirror)
        if generator is not None and mirror is not None and not sim.graphs.capturing:
            sim.mirror.end(generator, mirror)
        return fresh

    def _run_or_capture(self, arguments: dict[str, Any], fresh: Any, mirror: torch.Generator | None) -> None:
        sim = self._sim
        host = self._host_arguments(arguments, mirror)
        outputs = sim.to_host(fresh)
        step = functools.partial(self._compute, host, outputs)
        if sim.depth:
            step()
        else:
            sim.graphs.run(step)

    def _host_arguments(self, arguments: dict[str, Any], mirror: torch.Generator | None) -> dict[str, Any]:
        host = {name: self._sim.to_host(value) for name, value in arguments.items()}
        if mirror is not None and self._generator is not None:
            host[self._generator] = mirror
        return host

    def _bind(self, args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
        bound = dict(zip((a.name for a in self._schema.arguments), args, strict=False))
        bound.update(kwargs)
        for argument in self._schema.arguments[len(args) :]:
            if argument.name not in bound:
                bound[argument.name] = argument.default_value
        return bound

    def _check_devices(self, arguments: dict[str, Any]) -> None:
        tensors = [t for t in _tensors(arguments.values()) if t.dim() or t.device.type == "npu"]
        if len({t.device for t in tensors}) > 1:
            devices = ", ".join(sorted({str(t.device) for t in tensors}))
            raise RuntimeError(f"{self.name}: expected all tensors to be on the same device, found {devices}")

    def _run_kernel(self, keyset: Any, arguments: dict[str, Any]) -> Any:
        sim = self._sim
        boxed = {a.name: _boxed(a, arguments[a.name]) for a in self._schema.arguments}
        positional = [boxed[name] for name in self._positional]
        keywords = {name: boxed[name] for name in self._keywords}
        assert self._kernel is not None
        sim.runtime.enter()
        sim.depth += 1
        sim.nested_error = None
        try:
            return self._kernel.call_boxed(keyset, *positional, **keywords)
        except RuntimeError as error:
            if sim.nested_error is not None:
                raise sim.nested_error from error
            raise
        finally:
            sim.depth -= 1
            sim.runtime.leave()

    def _compute(self, host: dict[str, Any], outputs: Any) -> None:
        outs = self._fresh_outs(host)
        results = self._evaluate({**host, **outs})
        for name, result in outs.items():
            self._write(host[name], result)
        returns = self._schema.returns
        if not self._fresh:
            return
        single = len(returns) == 1
        for spec, result, output in zip(
            returns, (results,) if single else results, (outputs,) if single else outputs, strict=True
        ):
            if spec.alias_info is None or not spec.alias_info.is_write:
                self._write(output, result)

    def _fresh_outs(self, host: dict[str, Any]) -> dict[str, Any]:
        return {name: _empty_like(host[name]) for name in self._outs}

    def _evaluate(self, host: dict[str, Any]) -> Any:
        self._sim.rules.check(self.name, host, of_values=True)
        if self._golden is not None:
            return self._golden.function(**host)
        return self._op(*(host[name] for name in self._positional), **{name: host[name] for name in self._keywords})

    def _device_generator(self, arguments: dict[str, Any]) -> torch.Generator | None:
        if self._generator is None:
            return None
        given = arguments[self._generator]
        device = next((t.device for t in _tensors(arguments.values()) if t.device.type == "npu"), None)
        if given is None and device is not None:
            generators: Sequence[torch.Generator] = torch.get_device_module("npu").default_generators
            return generators[device.index or 0]
        return given if given is not None and given.device.type == "npu" else None

    def _write(self, output: Any, result: Any) -> None:
        if output is None:
            return
        if isinstance(result, (list, tuple)):
            for one, value in zip(output, result, strict=True):
                self._write(one, value)
        elif result is None:
            output.zero_()
        elif isinstance(result, Fitted):
            result.write(output)
        elif isinstance(result, torch.Tensor):
            if output.shape != result.shape or output.dtype != result.dtype:
                raise SimulatorError(
                    f"{self.name}: torch_npu allocates {tuple(output.shape)} {output.dtype}, "
                    f"the golden semantics give {tuple(result.shape)} {result.dtype}"
                )
            output.copy_(result)

    def _without_kernel(self, arguments: dict[str, Any], mirror: torch.Generator | None) -> Any:
        sim = self._sim
        self._count()
        host = self._host_arguments(arguments, mirror)
        recording = sim.graphs.recording and not sim.depth
        if recording and not self._fresh:
            sim.graphs.run(functools.partial(self._compute, host, None))
            return self._written_arguments(arguments)
        device = next(t.device for t in _tensors(arguments.values()) if t.device.type == "npu")
        outs = self._fresh_outs(host)
        results = self._evaluate({**host, **outs})
        for output, result in zip(_tensors(arguments[name] for name in outs), _tensors(outs.values()), strict=True):
            output.resize_(result.shape)
            sim.memory.view(output).copy_(result)
        if not self._fresh:
            return self._written_arguments(arguments)
        fresh = self._to_device(results, device)
        if recording:  # the values of now have given the outputs their shapes; those of a replay are written into them
            sim.graphs.run(functools.partial(self._compute, host, sim.to_host(fresh)))
        return fresh

    def _written_arguments(self, arguments: dict[str, Any]) -> Any:
        written = [arguments[name] for name in self._written[: len(self._schema.returns)]]
        return tuple(written) if len(written) > 1 else next(iter(written), None)

    def _to_device(self, result: Any, device: torch.device) -> Any:
        if isinstance(result, (list, tuple)):
            return type(result)(self._to_device(item, device) for item in result)
        if not isinstance(result, torch.Tensor):
            return result
        output = torch.empty_strided(result.shape, result.stride(), dtype=result.dtype, device=device)
        self._sim.memory.view(output).copy_(result)
        return output

    def _count(self) -> None:
        sim = self._sim
        if not self._falls_back:
            launch = (self._golden.launch if self._golden else "") or self.name
            if launch == NO_LAUNCH:
                return
            sim.runtime.record(launch)
            sim.golden_only[self.name] = sim.golden_only.get(self.name, 0) + 1
            return
        sim.graphs.refuse(self.name, "torch_npu has no kernel for it and computes it on the host")
        if self.name not in sim.cpu_fallbacks:
            warnings.warn(f"torch_npu has no kernel for {self.name} and computes it on the host", stacklevel=4)
        sim.cpu_fallbacks[self.name] = sim.cpu_fallbacks.get(self.name, 0) + 1


def overload(name: str) -> Any:
    """The OpOverload of a qualified name such as ``aten::add.Tensor``."""
    namespace, rest = name.split("::")
    base, _, which = rest.partition(".")
    return getattr(getattr(getattr(torch.ops, namespace), base), which or "default")


def _is_computed(name: str) -> bool:
    base = name.split("::")[1].split(".")[0]
    if base.startswith(NATIVE_PREFIXES) or "backward" in base:
        return False
    try:
        returns = overload(name)._schema.returns
    except AttributeError:  # registered in C++ without a schema that Python can see
        return False
    return not any(r.alias_info is not None and not r.alias_info.is_write for r in returns)


def _empty_like(out: Any) -> Any:
    """What a CPU operator resizes and fills in place of an ``out`` argument."""
    return [_empty_like(item) for item in out] if isinstance(out, (list, tuple)) else torch.empty(0, dtype=out.dtype)


def _falls_back(name: str) -> bool:
    """Whether nothing but the backend's fallback to the CPU would answer a call on the device."""
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    composite = ("CompositeImplicitAutograd", "CompositeExplicitAutograd", "CompositeExplicitAutogradNonFunctional")
    return has(name, "CPU") and not any(has(name, key) for key in (_KEY, *composite))


def _boxed(argument: Any, value: Any) -> Any:
    if isinstance(value, (bool, int, float, complex)) and str(argument.type) == "Tensor":
        return torch.tensor(value)
    return value


def _dispatches_itself(tensor: torch.Tensor) -> bool:
    return type(tensor).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__


def _has_mask(arguments: dict[str, Any]) -> bool:
    indices = arguments.get("indices")
    return indices is not None and any(t.dtype in (torch.bool, torch.uint8) for t in _tensors([indices]))


def _tensors(values: Any) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    for value in values:
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += _tensors(value)
    return found


@functools.cache
def install(runtime: Runtime) -> Overrides:
    """The overrides of a runtime, installed at the first call."""
    overrides = Overrides(runtime)
    overrides.install()
    return overrides
