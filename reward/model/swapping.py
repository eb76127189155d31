"""Modules of a library that compute in our way, and back: swapped by their class.

The class of a module becomes a subclass of its own, whose forward is ours. So it keeps its
parameters, their names, hooks and children, and `isinstance` answers as before; PyTorch's
fully_shard and parametrizations do the same. Our forward is on the class, where everyone sees it:
one that somebody else sets on an instance stays theirs.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar

from torch import nn


class Swapped(nn.Module):
    """What our classes derive from; `stock` is the class that a module had before."""

    stock: ClassVar[type[nn.Module]]


def swap_in(module: nn.Module, ours: type[Swapped]) -> None:
    """Have a module compute by the forward of `ours`, which may call its own by `super()`."""
    stock = type(module)
    module.__class__ = type(f"{ours.__name__}{stock.__name__}", (ours, stock), {"stock": stock})


@contextmanager
def swapped_out(model: nn.Module) -> Iterator[None]:
    """All modules of a model as their libraries have them, for a while."""
    ours: dict[nn.Module, type[Swapped]] = {
        module: type(module) for module in model.modules() if isinstance(module, Swapped)
    }
    for module, kind in ours.items():
        module.__class__ = kind.stock
    try:
        yield
    finally:
        for module, kind in ours.items():
            module.__class__ = kind
