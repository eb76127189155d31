"""Replace the forward of a library's modules, and restore it, by swapping their class.

The module's class becomes a subclass of itself with our forward. Parameters and their names, hooks
and children stay, and `isinstance` answers as before. PyTorch's fully_shard and parametrizations do
the same. Because our forward is on the class, a forward that another library assigns to the
instance still takes effect.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar

from torch import nn


class Swapped(nn.Module):
    """The base class of our modules; `stock` is the class that a module had before."""

    stock: ClassVar[type[nn.Module]]


def swap_in(module: nn.Module, ours: type[Swapped]) -> None:
    """Give a module the forward of `ours`, which may call the original one with `super()`."""
    stock = type(module)
    module.__class__ = type(f"{ours.__name__}{stock.__name__}", (ours, stock), {"stock": stock})


@contextmanager
def swapped_out(model: nn.Module) -> Iterator[None]:
    """Restore the original classes of all modules of a model while the context lasts."""
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
