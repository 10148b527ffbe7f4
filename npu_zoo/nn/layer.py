"""What layers are made of: torch modules that cost a step little around their kernels."""

from __future__ import annotations

from typing import Any

from torch import nn


class Layer(nn.Module):
    """A module that is called as plain as its ``forward``, and has its parts as plain attributes.

    A decode step calls hundreds of modules, and torch looks for hooks in each, and for each part in three dictionaries.
    So there are no hooks on a layer; whoever wants to see what passes wraps it.
    """

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        cls.__call__ = cls.forward  # type: ignore[method-assign]

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if isinstance(value, nn.Module):
            self.__dict__[name] = value

    def __delattr__(self, name: str) -> None:
        self.__dict__.pop(name, None)
        super().__delattr__(name)
